"""The health endpoint: /healthz, /readyz and /metrics for kubelets, load balancers and Prometheus; the page for people.

One thread serves all connections without waiting on any: each has a few seconds, a few kilobytes and one request,
and beyond a fixed number the oldest makes room. So neither slow nor hostile clients can hang it or grow it. It speaks
just enough HTTP/1.1 (RFC 9112) for that; the standard library's server would take a thread for each client.

Whatever may take a moment is a document, made in a second thread that lives as long as there is something to make: a
person who looks at the page delays no liveness check.

On loopback only the programs of this host are meant to read, and no web site that somebody visits from it. Browsers
keep sites from reading one another's answers, but any name can be made to lead to 127.0.0.1 (DNS rebinding). So there
no name but localhost is answered to; an address is no name.
"""

import errno
import ipaddress
import os
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from typing import NamedTuple

from overlay.drops import CROWDED, SLOW

Page = Callable[[], tuple[bool, str]]
"""Whether all is well, and a text. Called in the server's thread: it must not block."""

PLAIN = "text/plain; charset=utf-8"

DROPPED = (CROWDED, SLOW)


class Answer(NamedTuple):
    """What a document is, of a content type `kind`. `tag`, if there is one, changes with the body: a browser that has
    it is told so and not sent it again. `headers` are whole lines without their ends."""

    body: bytes
    kind: str = PLAIN
    tag: str = ""
    headers: tuple[str, ...] = ()
    status: int = 200


Document = Callable[[str], Answer]
"""Makes the answer to a query, what stands after the question mark. Called in a thread of its own: it may take a
moment, but those who ask have a few seconds only."""

MAX_CONNECTIONS = 64
MAX_REQUEST_BYTES = 8192
SECONDS_PER_CONNECTION = 3.0

_REASONS = {
    200: "OK",
    304: "Not Modified",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    421: "Misdirected Request",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class HealthUnavailable(Exception):
    """The endpoint cannot listen; the text names address and cause."""


class HealthServer:
    """Serves `pages` and `documents`, a function for each path, on one TCP port from `start` until `stop`.

    `types` are the content types of those pages that are not PLAIN. In `dropped` the connections are counted that were
    ended before they were done, by reason.
    """

    def __init__(
        self,
        ip: str,
        port: int,
        pages: Mapping[str, Page],
        types: Mapping[str, str] | None = None,
        dropped: MutableMapping[str, int] | None = None,
        documents: Mapping[str, Document] | None = None,
    ) -> None:
        self._address = (ip, port)
        self._pages = pages
        self._types = types or {}
        self._dropped = dict.fromkeys(DROPPED, 0) if dropped is None else dropped
        self._documents = documents or {}
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
        guarded = ipaddress.ip_address(ip).is_loopback
        workshop = _Workshop(self._documents)
        loop = _Loop(listener, wakened, self._pages, self._types, self._dropped, workshop, guarded)
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

    __slots__ = ("answered", "awaits", "deadline", "received", "socket", "unsent")

    def __init__(self, client: socket.socket, deadline: float) -> None:
        self.socket = client
        self.deadline = deadline
        self.received = b""
        self.unsent = b""
        self.answered = False
        self.awaits = False
        """Whether its answer is being made."""


class _Request(NamedTuple):
    """The first line and what of the head matters; header names are in small letters."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


class _Workshop:
    """Makes documents, one after another, in a thread that starts when there is one to make and then ends.

    `ready` turns readable when some are made; `made` has them, each with the connection that it was ordered for.
    """

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self.documents = documents
        self.made: deque[tuple[_Connection, bytes]] = deque()
        self.ready, self._bell = socket.socketpair()
        self.ready.setblocking(False)
        self._bell.setblocking(False)
        self._lock = threading.Lock()
        self._orders: dict[_Connection, _Request] = {}
        self._busy = False

    def order(self, connection: _Connection, request: _Request) -> bool:
        """Have the document of the request made; False if no thread can be had for it."""
        with self._lock:
            if not self._busy:
                try:
                    threading.Thread(target=self._work, name="page", daemon=True).start()
                except RuntimeError:
                    return False
            self._busy = True
            self._orders[connection] = request
        return True

    def cancel(self, connection: _Connection) -> None:
        """Nobody waits for it any more."""
        with self._lock:
            self._orders.pop(connection, None)

    def close(self) -> None:
        """Make nothing more than what is being made."""
        with self._lock:
            self._orders.clear()
            self.ready.close()
            self._bell.close()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._orders:
                    self._busy = False
                    return
                connection = next(iter(self._orders))
                request = self._orders.pop(connection)
            try:
                answer = self.documents[request.path](request.query)
            except Exception as error:
                answer = Answer(f"the document itself failed: {type(error).__name__}\n".encode(), status=500)
            self.made.append((connection, _encoded(answer, request)))
            with self._lock:
                try:
                    self._bell.send(b"\0")
                except OSError:
                    pass  # It rings already, or nobody listens any more.


class _Loop:
    """The server's thread: all of its state, none of it shared but the workshop."""

    def __init__(
        self,
        listener: socket.socket,
        wakened: socket.socket,
        pages: Mapping[str, Page],
        types: Mapping[str, str],
        dropped: MutableMapping[str, int],
        workshop: _Workshop,
        guarded: bool,
    ) -> None:
        self._listener = listener
        self._wakened = wakened
        self._pages = pages
        self._types = types
        self._dropped = dropped
        self._workshop = workshop
        self._guarded = guarded
        self._selector = selectors.DefaultSelector()
        # In order of their deadlines, as all have the same time.
        self._connections: dict[socket.socket, _Connection] = {}

    def run(self) -> None:
        """Serve until the other end of `wakened` is closed."""
        with self._wakened, self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(self._wakened, selectors.EVENT_READ)
            self._selector.register(self._workshop.ready, selectors.EVENT_READ)
            while True:
                oldest = next(iter(self._connections.values()), None)
                timeout = None if oldest is None else max(0.0, oldest.deadline - time.monotonic())
                for key, _ in self._selector.select(timeout):
                    if key.fileobj is self._wakened:
                        for connection in list(self._connections.values()):
                            self._drop(connection)
                        self._workshop.close()
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._workshop.ready:
                        self._hand_out()
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
            if connection.answered or connection.awaits:
                return
            connection.received += data
            if b"\r\n\r\n" in connection.received or b"\n\n" in connection.received:
                self._answer(connection)
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

    def _hand_out(self) -> None:
        """Send what the workshop has made to those who still wait for it."""
        self._workshop.ready.recv(MAX_CONNECTIONS)
        while self._workshop.made:
            connection, answer = self._workshop.made.popleft()
            if connection.socket not in self._connections:
                continue
            connection.unsent = answer
            try:
                self._send(connection)
            except BlockingIOError:
                self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)
            except OSError:
                self._drop(connection)

    def _answer(self, connection: _Connection) -> None:
        """Have what the request is to get: at once if it is a page, else when it is made."""
        request = _parsed(connection.received)
        if request is None:
            connection.unsent = _response(400, "this is not an HTTP/1 request")
            return
        head = request.method == "HEAD"
        host = request.headers.get("host")
        if self._guarded and host is not None and not _is_this_host(host):
            connection.unsent = _response(421, "this is read as localhost, or by address", head=head)
        elif request.path not in self._pages and request.path not in self._workshop.documents:
            connection.unsent = _response(404, f"there is only {', '.join(self._pages)}", head=head)
        elif request.method not in ("GET", "HEAD"):
            connection.unsent = _response(405, "GET and HEAD only")
        elif request.path in self._workshop.documents:
            connection.awaits = self._workshop.order(connection, request)
            if not connection.awaits:
                connection.unsent = _response(503, "this host lets no thread be started", head=head)
        else:
            connection.unsent = self._page(request.path, head)

    def _page(self, path: str, head: bool) -> bytes:
        try:
            well, text = self._pages[path]()
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
        if connection.awaits:
            self._workshop.cancel(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()


def _parsed(request: bytes) -> _Request | None:
    """None if it is no request of HTTP/1. Of a header that comes twice the last counts."""
    first, *lines = request.decode("latin-1").split("\n")
    words = first.split()
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return None
    path, _, query = words[1].partition("?")
    headers = {name.strip().lower(): value.strip() for name, colon, value in (line.partition(":") for line in lines)}
    return _Request(words[0], path, query, headers)


def _is_this_host(host: str) -> bool:
    """Whether a Host header (RFC 9110 section 7.2) names this host by address or as localhost: no name of others'."""
    name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _response(status: int, text: str, *, head: bool = False, kind: str = PLAIN) -> bytes:
    return _message(status, text.encode() + b"\n", head=head, kind=kind, headers=("Cache-Control: no-store",))


def _encoded(answer: Answer, request: _Request) -> bytes:
    """The answer, or that the browser has it (RFC 9110 section 13.1.2)."""
    headers = answer.headers
    if not answer.tag:
        return _message(
            answer.status,
            answer.body,
            head=request.method == "HEAD",
            kind=answer.kind,
            headers=("Cache-Control: no-store", *headers),
        )
    headers = (f'ETag: "{answer.tag}"', "Cache-Control: no-cache", *headers)
    known = [each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")]
    same = f'"{answer.tag}"' in known
    return _message(
        304 if same else answer.status,
        answer.body,
        head=same or request.method == "HEAD",
        kind=answer.kind,
        headers=headers,
    )


def _message(status: int, body: bytes, *, head: bool, kind: str, headers: tuple[str, ...]) -> bytes:
    allow = ("Allow: GET, HEAD",) if status == 405 else ()
    lines = (
        f"HTTP/1.1 {status} {_REASONS[status]}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body)}",
        "X-Content-Type-Options: nosniff",
        *headers,
        *allow,
        "Connection: close",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head else body)
