"""The thread that serves clients, over real sockets: who may stay, who makes room, how it ends."""

import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from overlay.cluster import wait_until
from overlay.serving import DONE, READING, WRITING, Limits, Serving


class Host:
    """A server whose connections send back what comes, and `news` to all when `bell` rings."""

    def __init__(self) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("")
        self.listener.listen(16)
        self.address = self.listener.getsockname()
        self.limits = Limits(3, 60.0)
        self.guests: list[Echo] = []
        self.ended: list[str] = []
        self.bell, self.ready = socket.socketpair()
        self.serving = Serving("host", self.listener, self.connect, lambda: self.limits, {self.ready: self.news})

    def connect(self, client: socket.socket) -> "Echo":
        self.guests.append(Echo(client, self.ended))
        return self.guests[-1]

    def news(self) -> "Iterator[Echo]":
        data = self.ready.recv(64)
        for guest in self.guests:
            guest.unsent = data
            yield guest

    def visit(self, stack: ExitStack) -> socket.socket:
        """A client that is being served."""
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.settimeout(10)
        client.connect(self.address)
        assert said(client) == b"hello"
        return client


class Echo:
    def __init__(self, client: socket.socket, ends: list[str]) -> None:
        self.socket = client
        self.unsent = b""
        self._ends = ends

    def advance(self) -> int:
        if not self.unsent:
            self.unsent = self.socket.recv(64)
            if self.unsent == b"refuse":
                raise ConnectionResetError
            return WRITING if self.unsent else DONE
        self.unsent = self.unsent[self.socket.send(self.unsent) :]
        return WRITING if self.unsent else READING

    def ended(self, reason: str) -> None:
        self._ends.append(reason)


def said(client: socket.socket) -> bytes:
    client.sendall(b"hello")
    return client.recv(64)


@pytest.fixture
def host() -> Iterator[Host]:
    running = Host()
    with running.bell, running.ready:
        yield running
        running.serving.stop()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as found:
        yield found


def test_connection_that_is_done_is_dropped_for_no_reason(host: Host, stack: ExitStack) -> None:
    first, second = host.visit(stack), host.visit(stack)
    first.shutdown(socket.SHUT_WR)
    assert first.recv(1) == b""
    second.sendall(b"refuse")
    assert second.recv(1) == b""
    assert host.ended == ["", ""]


def test_beyond_the_number_the_oldest_makes_room(host: Host, stack: ExitStack) -> None:
    first, *others = [host.visit(stack) for _ in range(4)]
    assert first.recv(1) == b""
    assert host.ended == ["crowded"]
    assert [said(client) for client in others] == [b"hello"] * 3


def test_time_ends_also_for_those_who_keep_talking(host: Host, stack: ExitStack) -> None:
    host.limits = Limits(3, 0.2)
    client = host.visit(stack)
    with pytest.raises(ConnectionError):
        while said(client):
            pass
        client.send(b"more")
    assert host.ended == ["slow"]


def test_out_of_descriptors_the_oldest_makes_room_and_with_none_it_waits(host: Host, stack: ExitStack) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    early, late, last = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3))
    for client in (early, late, last):
        client.settimeout(10)
    fillers = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 20, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                fillers.append(os.dup(last.fileno()))
        early.connect(host.address)
        os.close(fillers.pop())
        assert said(early) == b"hello"
        late.connect(host.address)
        assert said(late) == b"hello"
        assert early.recv(1) == b""
        assert host.ended == ["crowded"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in fillers:
            os.close(descriptor)
    last.connect(host.address)
    assert said(last) == b"hello"


def test_further_sockets_say_which_connections_can_advance(host: Host, stack: ExitStack) -> None:
    gone, *others = [host.visit(stack) for _ in range(3)]
    gone.close()
    wait_until(lambda: host.ended == [""], 5, "the end of the first")
    host.bell.send(b"news")
    assert [client.recv(64) for client in others] == [b"news"] * 2
    assert [said(client) for client in others] == [b"hello"] * 2


def test_after_stop_nobody_is_served_and_the_thread_is_gone(host: Host, stack: ExitStack) -> None:
    client = host.visit(stack)
    host.serving.stop()
    host.serving.stop()
    assert client.recv(1) == b""
    assert host.ended == [""]
    assert "host" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ConnectionRefusedError):
        host.visit(stack)
