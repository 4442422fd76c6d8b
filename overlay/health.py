"""The health endpoint: /healthz, /readyz and /metrics for kubelets, load balancers and Prometheus; the page for people.

One thread serves all connections without waiting on any (`serving`): each has a few seconds, a few kilobytes and one
request, and beyond a fixed number the oldest makes room. So neither slow nor hostile clients can hang it or grow it. It
speaks just enough HTTP/1.1 (RFC 9112) for that; the standard library's server would take a thread for each client.

Whatever may take a moment is a document, made in a second thread that lives as long as there is something to make: a
person who looks at the page delays no liveness check.

On loopback only the programs of this host are meant to read, and no web site that somebody visits from it. Browsers
keep sites from reading one another's answers, but any name can be made to lead to 127.0.0.1 (DNS rebinding). So there
no name but localhost is answered to; an address is no name.
"""

import errno
import ipaddress
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, suppress
from typing import NamedTuple

from overlay.drops import CROWDED, SLOW
from overlay.serving import DONE, READING, WRITING, Limits, Serving

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
        self._running = ExitStack()
        self.port = port
        """The port listened on: from `start` on the kernel's choice if 0 was asked for."""

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
        self.port = listener.getsockname()[1]
        workshop = _Workshop(self._documents)
        self._running.callback(workshop.close)
        site = _Site(self._pages, self._types, self._dropped, workshop, ipaddress.ip_address(ip).is_loopback)
        serving = Serving(
            "health",
            listener,
            lambda client: _Connection(client, site),
            lambda: Limits(MAX_CONNECTIONS, SECONDS_PER_CONNECTION),
            {workshop.ready: workshop.hand_out},
        )
        self._running.callback(serving.stop)

    def stop(self) -> None:
        """Stop listening and drop all connections. May be called more than once, and without `start`."""
        self._running.close()


def _cause(error: OSError) -> str:
    causes = {
        errno.EADDRINUSE: "another program listens there; choose another --healthz-port",
        errno.EADDRNOTAVAIL: "this host has no such address; correct --healthz-ip",
        errno.EACCES: "ports below 1024 need a privilege; choose another --healthz-port",
    }
    return causes.get(error.errno or 0) or os.strerror(error.errno or 0).lower()


class _Request(NamedTuple):
    """The first line and what of the head matters; header names are in small letters."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


class _Connection:
    """One client: what it sent, and what it is still to get."""

    __slots__ = ("_answered", "_awaits", "_received", "_site", "socket", "unsent")

    def __init__(self, client: socket.socket, site: "_Site") -> None:
        self.socket = client
        self._site = site
        self._received = b""
        self.unsent = b""
        self._answered = False
        # Whether its answer is being made.
        self._awaits = False

    def advance(self) -> int:
        """Read what has come, answer once the request is complete, and wait for the client to hang up.

        Closing at once could reset the connection and take the answer with it (RFC 9112 section 9.6).
        """
        if self.unsent:
            return self._send()
        data = self.socket.recv(MAX_REQUEST_BYTES)
        if not data:
            return DONE
        if self._answered or self._awaits:
            return READING
        self._received += data
        if b"\r\n\r\n" in self._received or b"\n\n" in self._received:
            self.unsent = self._answer()
        elif len(self._received) >= MAX_REQUEST_BYTES:
            self.unsent = _response(400, "the request is too long")
        else:
            return READING
        self._received = b""
        return self._send() if self.unsent else READING

    def ended(self, reason: str) -> None:
        if reason and not self._answered:
            self._site.dropped[reason] += 1
        if self._awaits:
            self._site.workshop.cancel(self)

    def _send(self) -> int:
        with suppress(BlockingIOError):
            sent = self.socket.send(self.unsent)
            self.unsent = self.unsent[sent:]
        if self.unsent:
            return WRITING
        self._answered = True
        self.socket.shutdown(socket.SHUT_WR)
        return READING

    def _answer(self) -> bytes:
        """What the request is to get at once; nothing if it is a document, which is then being made."""
        request = _parsed(self._received)
        if request is None:
            return _response(400, "this is not an HTTP/1 request")
        head = request.method == "HEAD"
        pages, documents = self._site.pages, self._site.workshop.documents
        host = request.headers.get("host")
        if self._site.guarded and host is not None and not _is_this_host(host):
            return _response(421, "this is read as localhost, or by address", head=head)
        if request.path not in pages and request.path not in documents:
            return _response(404, f"there is only {', '.join(pages)}", head=head)
        if request.method not in ("GET", "HEAD"):
            return _response(405, "GET and HEAD only")
        if request.path not in documents:
            return self._site.page(request.path, head)
        self._awaits = self._site.workshop.order(self, request)
        return b"" if self._awaits else _response(503, "this host lets no thread be started", head=head)


class _Workshop:
    """Makes documents, one after another, in a thread that starts when there is one to make and then ends.

    `ready` turns readable when some are made.
    """

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self.documents = documents
        self._made: deque[tuple[_Connection, bytes]] = deque()
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

    def hand_out(self) -> Iterator[_Connection]:
        """The connections that have what they ordered now."""
        self.ready.recv(MAX_CONNECTIONS)
        while self._made:
            connection, answer = self._made.popleft()
            connection.unsent = answer
            yield connection

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
            self._made.append((connection, _encoded(answer, request)))
            with self._lock:
                try:
                    self._bell.send(b"\0")
                except OSError:
                    pass  # It rings already, or nobody listens any more.


class _Site(NamedTuple):
    """What all connections share, in the server's thread."""

    pages: Mapping[str, Page]
    types: Mapping[str, str]
    dropped: MutableMapping[str, int]
    workshop: _Workshop
    guarded: bool

    def page(self, path: str, head: bool) -> bytes:
        try:
            well, text = self.pages[path]()
        except Exception as error:
            # A defect in a check is a failed check; it must not end the thread that all checks hang on.
            well, text = False, f"the check itself failed: {type(error).__name__}"
        return _response(200 if well else 503, text, head=head, kind=self.types.get(path, PLAIN) if well else PLAIN)


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
