"""The agent's unix socket: programs on this host ask, the agent answers.

A client sends one line, a JSON object with `version` and `question`, and gets one line, a JSON object with `version`
and either `answer` or `error`; then the connection ends. Who may ask is told by the mode of the socket's file.

One thread serves all connections without waiting on any (`serving`), and no answer is in memory as a whole. Each
connection has a few seconds and a few kilobytes to ask with; beyond a fixed number the oldest makes room.
"""

import contextlib
import errno
import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from overlay.serving import DONE, READING, WRITING, Limits, Serving

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
        self._running = contextlib.ExitStack()

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
        self._running.callback(self._remove, found)
        serving = Serving(
            "control",
            listener,
            lambda client: _Connection(client, self._handlers),
            lambda: Limits(MAX_CONNECTIONS, SECONDS_PER_CONNECTION),
            {},
        )
        self._running.callback(serving.stop)

    def stop(self) -> None:
        """Stop listening, drop all connections, remove the socket's file. Harmless when repeated or without `start`."""
        self._running.close()

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

    def _remove(self, ours: os.stat_result) -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(Path(self._path).stat(), ours):
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
    """One client: what it asked, and what it is still to get."""

    __slots__ = ("_answer", "_handlers", "_received", "_unsent", "socket")

    def __init__(self, client: socket.socket, handlers: Mapping[str, Handler]) -> None:
        self.socket = client
        self._handlers = handlers
        self._received = b""
        self._answer: Iterator[str] | None = None
        self._unsent = b""

    def advance(self) -> int:
        return self._read() if self._answer is None else self._send(self._answer)

    def ended(self, reason: str) -> None:
        """Nobody else knows of it."""

    def _read(self) -> int:
        data = self.socket.recv(MAX_QUESTION_BYTES)
        self._received += data
        if b"\n" in self._received:
            self._answer = self._reply(self._received.partition(b"\n")[0])
        elif len(self._received) >= MAX_QUESTION_BYTES:
            self._answer = iter((_error("the question is too long"),))
        elif not data:
            return DONE
        return READING if self._answer is None else WRITING

    def _send(self, answer: Iterator[str]) -> int:
        """The next piece, or the rest of the last one: others have their turn in between."""
        if not self._unsent:
            try:
                self._unsent = next(answer, "").encode()
            except Exception:
                # A defect in a handler ends one answer, which the client finds broken off, and no thread.
                return DONE
            if not self._unsent:
                return DONE
        sent = self.socket.send(self._unsent)
        self._unsent = self._unsent[sent:]
        return WRITING

    def _reply(self, line: bytes) -> Iterator[str]:
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
