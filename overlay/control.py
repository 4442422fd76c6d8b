"""The agent's unix socket: programs on this host ask, the agent answers.

A client sends one line, a JSON object with `version` and `question`, and gets one line, a JSON object with `version`
and either `answer` or `error`; then the connection ends. Who may ask is told by the mode of the socket's file.

One thread serves all connections without waiting on any, and no answer is in memory as a whole. Each connection has a
few seconds and a few kilobytes to ask with; beyond a fixed number the oldest makes room.
"""

import contextlib
import errno
import json
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

VERSION = 1
"""Of the protocol. A question of another version is refused."""

MAX_CONNECTIONS = 16
MAX_QUESTION_BYTES = 4096
SECONDS_PER_CONNECTION = 15.0

MAX_ANSWER_BYTES = 1 << 28

Handler = Callable[[Mapping[str, Any]], Iterable[str]]
"""Gives the answer to a question, as the pieces of one JSON text. Called in the server's thread; what it waits for,
all clients wait for."""


class ControlUnavailable(Exception):
    """The socket cannot be had; the text names its path and the cause."""


class NoAnswer(Exception):
    """Nobody answers; the text says why, as one clause.

    `denied`: this process may not ask. `listening`: somebody listens and stays silent. `refused`: somebody does not
    know the question.
    """

    def __init__(self, reason: str, *, denied: bool = False, listening: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.denied = denied
        self.listening = listening
        self.refused = refused


# --- the agent's side --------------------------------------------------------------------------------------------


class ControlServer:
    """Answers questions by `handlers`, a mapping that may change, on a socket at `path` from `start` until `stop`."""

    def __init__(self, path: str, mode: int, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._mode = mode
        self._handlers = handlers
        self._identity: tuple[int, int] | None = None
        self._waker: socket.socket | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen, and serve from a daemon thread. ControlUnavailable if the path cannot be had, or is another's."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            Path(self._path).parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._bind(listener)
            # Nobody can connect before `listen`, whatever the umask was.
            Path(self._path).chmod(self._mode)
            listener.listen(MAX_CONNECTIONS)
            found = Path(self._path).stat()
        except (OSError, ValueError) as error:
            listener.close()
            raise ControlUnavailable(f"cannot listen on {self._path}: {_cause(error)}") from None
        self._identity = found.st_dev, found.st_ino
        listener.setblocking(False)
        self._waker, wakened = socket.socketpair()
        loop = _Loop(listener, wakened, self._handlers)
        self._thread = threading.Thread(target=loop.run, name="control", daemon=True)
        self._thread.start()

    def _bind(self, listener: socket.socket) -> None:
        """Take the path, also from a dead process; never from a living one."""
        try:
            listener.bind(self._path)
            return
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not Path(self._path).is_socket():
                raise
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            if probe.connect_ex(self._path) != errno.ECONNREFUSED:
                raise OSError(errno.EADDRINUSE, "")
        Path(self._path).unlink(missing_ok=True)
        listener.bind(self._path)

    def stop(self) -> None:
        """Stop listening, drop all connections, remove the socket's file. Harmless when repeated or without `start`."""
        if self._thread is None or self._waker is None:
            return
        self._waker.close()
        self._thread.join()
        self._thread = None
        with contextlib.suppress(OSError):
            found = Path(self._path).stat()
            if (found.st_dev, found.st_ino) == self._identity:
                Path(self._path).unlink()


def _cause(error: OSError | ValueError) -> str:
    number = error.errno if isinstance(error, OSError) else None
    causes = {
        errno.EADDRINUSE: "another process listens there, or it is no socket; choose another --control-socket",
        errno.EACCES: "this process may not write there; choose another --control-socket",
        errno.EROFS: "the file system is read-only; choose another --control-socket",
    }
    if number is None:
        # Python's own check of sun_path's 108 bytes.
        return f"{error}; choose another --control-socket".lower()
    return causes.get(number) or f"{os.strerror(number).lower()}; choose another --control-socket"


class _Connection:
    """One client: what it asked, what it is still to get, and when it has had its time."""

    __slots__ = ("answer", "deadline", "received", "socket", "unsent")

    def __init__(self, client: socket.socket, deadline: float) -> None:
        self.socket = client
        self.deadline = deadline
        self.received = b""
        self.answer: Iterator[str] | None = None
        self.unsent = b""


class _Loop:
    """The server's thread: all of its state, none of it shared."""

    def __init__(self, listener: socket.socket, wakened: socket.socket, handlers: Mapping[str, Handler]) -> None:
        self._listener = listener
        self._wakened = wakened
        self._handlers = handlers
        self._selector = selectors.DefaultSelector()
        # In order of their deadlines, as all have the same time.
        self._connections: dict[socket.socket, _Connection] = {}

    def run(self) -> None:
        """Serve until the other end of `wakened` is closed."""
        with self._listener, self._wakened, self._selector:
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
                    self._drop(connection)

    def _accept(self) -> None:
        if len(self._connections) >= MAX_CONNECTIONS:
            self._drop(next(iter(self._connections.values())))
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return  # The client left before it was served.
        except OSError:
            # Out of descriptors or memory. The listener stays readable: do not spin while that lasts.
            _hold_breath(self._wakened)
            return
        client.setblocking(False)
        connection = _Connection(client, time.monotonic() + SECONDS_PER_CONNECTION)
        self._connections[client] = connection
        self._selector.register(client, selectors.EVENT_READ, connection)

    def _advance(self, connection: _Connection) -> None:
        """Take in what has come, or send what there is room for."""
        try:
            if connection.answer is None:
                self._read(connection)
            else:
                self._send(connection)
        except BlockingIOError:
            return
        except OSError:
            self._drop(connection)

    def _read(self, connection: _Connection) -> None:
        data = connection.socket.recv(MAX_QUESTION_BYTES)
        connection.received += data
        if b"\n" in connection.received:
            connection.answer = self._answer(connection.received.partition(b"\n")[0])
        elif len(connection.received) >= MAX_QUESTION_BYTES:
            connection.answer = iter((_error("the question is too long"),))
        elif not data:
            self._drop(connection)
            return
        if connection.answer is not None:
            self._selector.modify(connection.socket, selectors.EVENT_WRITE, connection)

    def _send(self, connection: _Connection) -> None:
        """The next piece, or the rest of the last one: others have their turn in between."""
        assert connection.answer is not None, "it was asked"
        if not connection.unsent:
            try:
                piece = next(connection.answer, "")
            except Exception:
                # A defect in a handler ends one answer, which the client finds broken off, and no thread.
                piece = ""
            if not piece:
                self._drop(connection)
                return
            connection.unsent = piece.encode()
        sent = connection.socket.send(connection.unsent)
        connection.unsent = connection.unsent[sent:]

    def _answer(self, line: bytes) -> Iterator[str]:
        try:
            question = json.loads(line)
        except (ValueError, RecursionError):
            question = None
        if not isinstance(question, dict):
            return iter((_error("a question is a JSON object on one line"),))
        if question.get("version") != VERSION:
            return iter((_error(f"this agent speaks version {VERSION} of the protocol"),))
        name = question.get("question")
        handler = self._handlers.get(name) if isinstance(name, str) else None
        if handler is None:
            return iter((_error(f"there is only {', '.join(self._handlers)}"),))
        return _answered(handler, question)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.socket]
        self._selector.unregister(connection.socket)
        connection.socket.close()


def _hold_breath(wakened: socket.socket) -> None:
    """Hold breath for a tenth of a second, ready to be stopped."""
    with selectors.DefaultSelector() as breath:
        breath.register(wakened, selectors.EVENT_READ)
        breath.select(0.1)


_HEAD, _TAIL = f'{{"version": {VERSION}, "answer": ', "}\n"


def _answered(handler: Handler, question: Mapping[str, Any]) -> Iterator[str]:
    """What is sent. A handler that fails before it has said anything is an error; later, the answer breaks off."""
    try:
        pieces = iter(handler(question))
        first = next(pieces)
    except Exception as error:
        yield _error(f"the agent failed to answer: {type(error).__name__}")
        return
    yield _HEAD + first
    yield from pieces
    yield _TAIL


def _error(text: str) -> str:
    return json.dumps({"version": VERSION, "error": text}) + "\n"


# --- the asking side ---------------------------------------------------------------------------------------------


def ask(path: str, question: str, seconds: float, **arguments: object) -> Any:
    """The answer of the agent that listens at `path`, decoded; NoAnswer if there is none within `seconds`."""
    return json.loads(ask_text(path, question, seconds, **arguments))


def ask_text(path: str, question: str, seconds: float, **arguments: object) -> bytes:
    """The answer as it came, one line of JSON; as `ask`."""
    line = json.dumps({"version": VERSION, "question": question, **arguments}).encode() + b"\n"
    try:
        received = _exchange(path, line, seconds)
    except (OSError, ValueError) as error:
        raise _silence(path, error, seconds) from None
    begin, end = _HEAD.encode(), _TAIL.encode()
    if received.startswith(begin) and received.endswith(end):
        return bytes(received[len(begin) : -len(end)])
    try:
        document = json.loads(received)
    except ValueError:
        raise NoAnswer(f"the answer at {path} broke off") from None
    reason = document.get("error") if isinstance(document, dict) else None
    raise NoAnswer(f"what listens at {path} does not answer that: {reason}", refused=True)


def _exchange(path: str, line: bytes, seconds: float) -> bytearray:
    """Send `line`; all that comes back. TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    received = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as channel:
        # Where too many wait already, connect() of a socket that does not block fails at once (unix_stream_connect).
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(seconds), _micros(seconds)))
        try:
            channel.connect(path)
            channel.sendall(line)
        except BlockingIOError:
            raise TimeoutError from None
        while len(received) < MAX_ANSWER_BYTES:
            channel.settimeout(max(0.001, deadline - time.monotonic()))
            data = channel.recv(1 << 18)
            if not data:
                break
            received += data
    return received


def _micros(seconds: float) -> int:
    return int(seconds % 1 * 1_000_000)


def _silence(path: str, error: OSError | ValueError, seconds: float) -> NoAnswer:
    if isinstance(error, TimeoutError):
        return NoAnswer(f"no answer at {path} within {seconds:g} s", listening=True)
    if isinstance(error, FileNotFoundError):
        return NoAnswer(f"nobody listens at {path}")
    if isinstance(error, ConnectionRefusedError):
        return NoAnswer(f"nobody listens at {path} any more")
    if isinstance(error, PermissionError):
        return NoAnswer(f"this user may not ask at {path}; use sudo", denied=True)
    number = error.errno if isinstance(error, OSError) else None
    return NoAnswer(f"{path}: {os.strerror(number).lower() if number else error}")
