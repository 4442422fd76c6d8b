"""The health endpoint: GET /healthz, /readyz and /metrics for kubelets, load balancers, Prometheus and people.

One thread serves all connections without waiting on any: each has a few seconds, a few kilobytes and one request,
and beyond a fixed number the oldest makes room. So neither slow nor hostile clients can hang it or grow it. It speaks
just enough HTTP/1.1 (RFC 9112) for that; the standard library's server would take a thread for each client.
"""

import errno
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping

from overlay.drops import CROWDED, SLOW

Page = Callable[[], tuple[bool, str]]
"""Whether all is well, and a text. Called in the server's thread: it must not block."""

PLAIN = "text/plain; charset=utf-8"

DROPPED = (CROWDED, SLOW)

MAX_CONNECTIONS = 64
MAX_REQUEST_BYTES = 8192
SECONDS_PER_CONNECTION = 3.0

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}


class HealthUnavailable(Exception):
    """The endpoint cannot listen; the text names address and cause."""


class HealthServer:
    """Serves `pages`, a function for each path, on one TCP port from `start` until `stop`.

    `types` are the content types of those that are not PLAIN. In `dropped` the connections are counted that were ended
    before they were done, by reason.
    """

    def __init__(
        self,
        ip: str,
        port: int,
        pages: Mapping[str, Page],
        types: Mapping[str, str] | None = None,
        dropped: MutableMapping[str, int] | None = None,
    ) -> None:
        self._address = (ip, port)
        self._pages = pages
        self._types = types or {}
        self._dropped = dict.fromkeys(DROPPED, 0) if dropped is None else dropped
        self._listener: socket.socket | None = None
        self._waker: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The port listened on; the kernel's choice if 0 was asked for."""
        assert self._listener is not None, "start() comes first"
        return int(self._listener.getsockname()[1])

    def start(self) -> None:
        """Listen, and serve from a daemon thread. HealthUnavailable if the address cannot be had."""
        ip, port = self._address
        listener = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(self._address)
            listener.listen(MAX_CONNECTIONS)
        except OSError as error:
            listener.close()
            shown = f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
            raise HealthUnavailable(f"cannot listen on {shown}: {_cause(error)}") from None
        listener.setblocking(False)
        self._listener = listener
        self._waker, wakened = socket.socketpair()
        loop = _Loop(listener, wakened, self._pages, self._types, self._dropped)
        self._thread = threading.Thread(target=loop.run, name="health", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and drop all connections. May be called more than once, and without `start`."""
        if self._thread is None or self._waker is None or self._listener is None:
            return
        self._waker.close()
        self._thread.join()
        self._listener.close()
        self._thread = None


def _cause(error: OSError) -> str:
    causes = {
        errno.EADDRINUSE: "another program listens there; choose another --healthz-port",
        errno.EADDRNOTAVAIL: "this host has no such address; correct --healthz-ip",
        errno.EACCES: "ports below 1024 need a privilege; choose another --healthz-port",
    }
    return causes.get(error.errno or 0) or os.strerror(error.errno or 0).lower()


class _Connection:
    """One client: what it sent, what it is still to get, and when it has had its time."""

    __slots__ = ("answered", "deadline", "received", "socket", "unsent")

    def __init__(self, client: socket.socket, deadline: float) -> None:
        self.socket = client
        self.deadline = deadline
        self.received = b""
        self.unsent = b""
        self.answered = False


class _Loop:
    """The server's thread: all of its state, none of it shared."""

    def __init__(
        self,
        listener: socket.socket,
        wakened: socket.socket,
        pages: Mapping[str, Page],
        types: Mapping[str, str],
        dropped: MutableMapping[str, int],
    ) -> None:
        self._listener = listener
        self._wakened = wakened
        self._pages = pages
        self._types = types
        self._dropped = dropped
        self._selector = selectors.DefaultSelector()
        # In order of their deadlines, as all have the same time.
        self._connections: dict[socket.socket, _Connection] = {}

    def run(self) -> None:
        """Serve until the other end of `wakened` is closed."""
        with self._wakened, self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(self._wakened, selectors.EVENT_READ)
            while True:
                oldest = next(iter(self._connections.values()), None)
                timeout = None if oldest is None else max(0.0, oldest.deadline - time.monotonic())
                for key, _ in self._selector.select(timeout):
                    if key.fileobj is self._wakened:
                        for connection in list(self._connections.values()):
                            self._drop(connection)
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.data.socket in self._connections:
                        self._advance(key.data)
                now = time.monotonic()
                for connection in [c for c in self._connections.values() if c.deadline <= now]:
                    self._drop(connection, SLOW)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            # The client left before it was served.
            return
        except OSError:
            # Out of descriptors or memory: the oldest client makes room. With none to drop, the listener stays readable
            # and would keep this thread busy, so it holds its breath, ready to be stopped.
            self._drop_oldest()
            breath = select.poll()
            breath.register(self._wakened, select.POLLIN)
            breath.poll(100)
            return
        client.setblocking(False)
        if len(self._connections) >= MAX_CONNECTIONS:
            self._drop_oldest()
        connection = _Connection(client, time.monotonic() + SECONDS_PER_CONNECTION)
        self._connections[client] = connection
        self._selector.register(client, selectors.EVENT_READ, connection)

    def _advance(self, connection: _Connection) -> None:
        """Read what has come, answer once the request is complete, and wait for the client to hang up.

        Closing at once could reset the connection and take the answer with it (RFC 9112 section 9.6).
        """
        try:
            if connection.unsent:
                self._send(connection)
                return
            data = connection.socket.recv(MAX_REQUEST_BYTES)
            if not data:
                self._drop(connection)
                return
            if connection.answered:
                return
            connection.received += data
            if b"\r\n\r\n" in connection.received or b"\n\n" in connection.received:
                connection.unsent = self._answer(connection.received)
            elif len(connection.received) >= MAX_REQUEST_BYTES:
                connection.unsent = _response(400, "the request is too long")
            if connection.unsent:
                connection.received = b""
                self._send(connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)

    def _send(self, connection: _Connection) -> None:
        sent = connection.socket.send(connection.unsent)
        connection.unsent = connection.unsent[sent:]
        if connection.unsent:
            self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
            return
        connection.answered = True
        connection.socket.shutdown(socket.SHUT_WR)
        self._selector.modify(connection.socket, selectors.EVENT_READ, connection)

    def _answer(self, request: bytes) -> bytes:
        words = request.split(b"\n", 1)[0].decode("latin-1").split()
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return _response(400, "this is not an HTTP/1 request")
        method, target, _ = words
        head = method == "HEAD"
        path = target.partition("?")[0]
        page = self._pages.get(path)
        if page is None:
            return _response(404, f"there is only {', '.join(self._pages)}", head=head)
        if method not in ("GET", "HEAD"):
            return _response(405, "GET and HEAD only")
        try:
            well, text = page()
        except Exception as error:
            # A defect in a check is a failed check; it must not end the thread that all checks hang on.
            well, text = False, f"the check itself failed: {type(error).__name__}"
        return _response(200 if well else 503, text, head=head, kind=self._types.get(path, PLAIN) if well else PLAIN)

    def _drop_oldest(self) -> None:
        oldest = next(iter(self._connections.values()), None)
        if oldest is not None:
            self._drop(oldest, CROWDED)

    def _drop(self, connection: _Connection, reason: str = "") -> None:
        """Be done with it; `reason` if it is not, nor its client."""
        if reason and not connection.answered:
            self._dropped[reason] += 1
        del self._connections[connection.socket]
        self._selector.unregister(connection.socket)
        connection.socket.close()


def _response(status: int, text: str, *, head: bool = False, kind: str = PLAIN) -> bytes:
    body = text.encode() + b"\n"
    allow = "Allow: GET, HEAD\r\n" if status == 405 else ""
    lines = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
        f"Content-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\n"
        f"Cache-Control: no-store\r\n{allow}Connection: close\r\n\r\n"
    )
    return lines.encode() + (b"" if head else body)
