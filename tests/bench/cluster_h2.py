"""As many gRPC connections as etcd can bear, from one thread: HTTP/2 (RFC 9113) with no more than a client needs.

grpc's own channels take threads and megabytes each, and would be measured instead of etcd. Here a connection is a
socket, a buffer and one call at a time. What etcd sees is what an agent sends: the same headers, the same messages, one
connection and one stream each. Windows are opened as wide as the protocol allows, once, so that reading never waits.
"""

import select
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
INITIAL_WINDOW_SIZE = 4
WIDEST = (1 << 31) - 1
DEFAULT_WINDOW = 65535


class Broken(Exception):
    """The server ended a connection or a call; the text says how."""


class Connection:
    """One connection. `messages` counts the gRPC messages of its present call, `last` is the latest of them."""

    def __init__(self, sock: socket.socket, authority: bytes) -> None:
        self.socket = sock
        self.messages = 0
        self.last = b""
        self.received = 0
        """Bytes, frame headers included."""
        self.open = False
        """Whether a call is under way."""
        self.at = 0.0
        """When the latest message came, on the steady clock."""
        self._authority = authority
        self._stream = -1
        self._frames = bytearray()
        self._message = bytearray()
        windows = INITIAL_WINDOW_SIZE.to_bytes(2, "big") + WIDEST.to_bytes(4, "big")
        update = (WIDEST - DEFAULT_WINDOW).to_bytes(4, "big")
        sock.sendall(PREFACE + _frame(SETTINGS, 0, 0, windows) + _frame(WINDOW_UPDATE, 0, 0, update))

    def call(self, path: str, request: bytes, *, last: bool = True, **metadata: str) -> None:
        """Begin a call with one message. `last`: there will be no more of them, as in a call with a plain answer."""
        self._stream += 2
        self._message.clear()
        self.messages, self.last, self.open = 0, b"", True
        secure = isinstance(self.socket, ssl.SSLSocket)
        # RFC 7541, nothing compressed: 0x83 POST, 0x86 and 0x87 the scheme; :path, :authority and content-type by their
        # places in the static table.
        head = b"\x83" + (b"\x87" if secure else b"\x86") + b"\x04" + _text(path.encode())
        head += b"\x01" + _text(self._authority) + b"\x0f\x10" + _text(b"application/grpc")
        for name, value in {"te": "trailers", **metadata}.items():
            head += b"\x00" + _text(name.encode()) + _text(value.encode())
        body = b"\0" + len(request).to_bytes(4, "big") + request
        flags = END_STREAM if last else 0
        self.socket.sendall(_frame(HEADERS, END_HEADERS, self._stream, head) + _frame(DATA, flags, self._stream, body))

    def ping(self) -> None:
        """As a keepalive does."""
        self.socket.sendall(_frame(PING, 0, 0, bytes(8)))

    def read(self) -> None:
        """Take in what has come."""
        try:
            while chunk := self.socket.recv(1 << 18):
                self.received += len(chunk)
                self._frames += chunk
                if len(chunk) < 1 << 14 and not isinstance(self.socket, ssl.SSLSocket):
                    break
            else:
                raise Broken("the server closed a connection")
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        frames, start = self._frames, 0
        while len(frames) - start >= 9:
            end = start + 9 + int.from_bytes(frames[start : start + 3], "big")
            if len(frames) < end:
                break
            stream = int.from_bytes(frames[start + 5 : start + 9], "big")
            self._take(frames[start + 3], frames[start + 4], stream, frames[start + 9 : end])
            start = end
        del frames[:start]

    def _take(self, kind: int, flags: int, stream: int, payload: bytearray) -> None:
        if kind == DATA and stream == self._stream:
            self._message += payload
            while len(self._message) >= 5 and len(self._message) >= (end := 5 + _length(self._message)):
                self.last, self.at = bytes(self._message[5:end]), time.monotonic()
                self.messages += 1
                del self._message[:end]
        elif kind in (SETTINGS, PING) and not flags & ACK:
            self.socket.sendall(_frame(kind, ACK, 0, b"" if kind == SETTINGS else payload))
        elif kind in (RST_STREAM, GOAWAY):
            raise Broken(f"the server ended {'a connection' if kind == GOAWAY else 'a call'}: {bytes(payload)!r}")
        if kind in (DATA, HEADERS) and flags & END_STREAM and stream == self._stream:
            self.open = False
            if not self.messages:
                raise Broken("the server refused a call")


class Swarm:
    """Connections to one endpoint (`http://host:port` or `https://host:port`). A context manager, which closes them."""

    def __init__(self, endpoint: str, certificate: tuple[Path, Path] | None = None) -> None:
        """`certificate` and its key are the client's, and what the server's is verified with."""
        url = urlsplit(endpoint)
        assert url.hostname and url.port
        self.connections: list[Connection] = []
        self._address = (url.hostname, url.port)
        self._authority = url.netloc.encode()
        self._poll = select.epoll()
        self._by_handle: dict[int, Connection] = {}
        self._context: ssl.SSLContext | None = None
        if certificate:
            self._context = ssl.create_default_context(cafile=str(certificate[0]))
            self._context.load_cert_chain(*certificate)
            self._context.set_alpn_protocols(["h2"])

    def __enter__(self) -> "Swarm":
        return self

    def __exit__(self, *_: object) -> None:
        self._poll.close()
        for connection in self.connections:
            connection.socket.close()

    def add(self) -> Connection:
        """One more connection."""
        sock = socket.create_connection(self._address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._context:
            sock = self._context.wrap_socket(sock, server_hostname=self._address[0])
        connection = Connection(sock, self._authority)
        sock.setblocking(False)
        self.connections.append(connection)
        self._by_handle[sock.fileno()] = connection
        self._poll.register(sock, select.EPOLLIN)
        return connection

    def turn(self, seconds: float, then: Callable[[Connection], None] = lambda _: None) -> None:
        """Wait up to `seconds` for something to come, take it in, and call `then` with each connection it came on."""
        for handle, _ in self._poll.poll(seconds, max(len(self.connections), 1)):
            connection = self._by_handle[handle]
            connection.read()
            then(connection)

    def run_until(
        self,
        done: Callable[[], bool],
        what: str,
        then: Callable[[Connection], None] = lambda _: None,
        seconds: float = 120,
    ) -> None:
        """Take turns until `done`; Broken naming `what` if that is not so within `seconds`."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise Broken(f"{what}: not within {seconds:g} s")
            self.turn(0.2, then)


def _frame(kind: int, flags: int, stream: int, payload: bytes | bytearray) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _text(value: bytes) -> bytes:
    assert len(value) < 127, "longer ones take more than one byte for their length"
    return bytes((len(value),)) + value


def _length(message: bytearray) -> int:
    return int.from_bytes(message[1:5], "big")
