"""A thread that serves the clients of one listening socket, without waiting on any.

Owns who may connect for how long, how many at a time, and how the thread ends. Beyond a number the oldest makes room,
and where descriptors run out as well: those who connect and say nothing can neither shut others out nor grow the
agent. What is said on a connection is up to the server that is built on this.
"""

import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

READING, WRITING, DONE = selectors.EVENT_READ, selectors.EVENT_WRITE, 0
"""What a connection waits for: that something comes, that there is room to send, nothing any more."""

CROWDED, SLOW = "crowded", "slow"
"""Why one is dropped, in the words of `drops`. Programs that only ask have no need to load that."""


class Connection(Protocol):
    """One client. Its methods are called in the server's thread, for which they must not block."""

    socket: socket.socket

    def advance(self) -> int:
        """Take in what has come, or send what there is room for; says what it waits for next, READING at first.

        BlockingIOError: nothing was done, it waits as before. OSError: the client is gone.
        """

    def ended(self, reason: str) -> None:
        """It is over: CROWDED or SLOW if it was dropped, "" if it was done or the server stops."""


class Limits(NamedTuple):
    """How many connections there are at a time at most, and how long each may last."""

    connections: int
    seconds: float


class Serving:
    """Serves from a daemon thread `name`, from now on until `stop`.

    `connect` makes the connection of a client, `limits` says what holds for it. `watched` are further sockets; when
    one is readable its function is called, and tells which connections can advance.
    """

    def __init__(
        self,
        name: str,
        listener: socket.socket,
        connect: Callable[[socket.socket], Connection],
        limits: Callable[[], Limits],
        watched: Mapping[socket.socket, Callable[[], Iterable[Connection]]],
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._connect = connect
        self._limits = limits
        self._watched = watched
        self._selector = selectors.DefaultSelector()
        # Each with its deadline, in the order of these, as all have the same time.
        self._connections: dict[Connection, float] = {}
        self._waker, self._wakened = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and drop all connections. Harmless when repeated."""
        self._waker.close()
        self._thread.join()

    def _run(self) -> None:
        with self._listener, self._wakened, self._selector:
            for each in (self._listener, self._wakened, *self._watched):
                self._selector.register(each, selectors.EVENT_READ, self._watched.get(each))
            while True:
                oldest = next(iter(self._connections.values()), None)
                timeout = None if oldest is None else max(0.0, oldest - time.monotonic())
                for key, _ in self._selector.select(timeout):
                    if key.fileobj is self._wakened:
                        for connection in list(self._connections):
                            self._drop(connection)
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._advance(key.data() if key.fileobj in self._watched else (key.data,))
                now = time.monotonic()
                for connection in [each for each, deadline in self._connections.items() if deadline <= now]:
                    self._drop(connection, SLOW)

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            # The client left before it was served.
            return
        except OSError:
            # Out of descriptors or memory: the oldest client makes room. With none to drop, the listener stays readable
            # and would keep this thread busy, so it holds its breath, ready to be stopped; poll() takes no descriptor.
            self._drop_oldest()
            breath = select.poll()
            breath.register(self._wakened, select.POLLIN)
            breath.poll(100)
            return
        client.setblocking(False)
        limits = self._limits()
        if len(self._connections) >= limits.connections:
            self._drop_oldest()
        connection = self._connect(client)
        self._connections[connection] = time.monotonic() + limits.seconds
        self._selector.register(client, READING, connection)

    def _advance(self, connections: Iterable[Connection]) -> None:
        """Those of them that have not ended in the meantime."""
        for connection in connections:
            if connection not in self._connections:
                continue
            try:
                awaited = connection.advance()
            except BlockingIOError:
                continue
            except OSError:
                awaited = DONE
            if awaited == DONE:
                self._drop(connection)
            else:
                self._selector.modify(connection.socket, awaited, connection)

    def _drop_oldest(self) -> None:
        if self._connections:
            self._drop(next(iter(self._connections)), CROWDED)

    def _drop(self, connection: Connection, reason: str = "") -> None:
        del self._connections[connection]
        connection.ended(reason)
        self._selector.unregister(connection.socket)
        connection.socket.close()
