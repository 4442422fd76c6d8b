"""sd_notify: what arrives at a manager's socket, and that nothing ever goes wrong without one."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from overlay.notify import Notifier

PID = 4711


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A manager's socket and the value of NOTIFY_SOCKET that names it."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@overlay-agent-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(name.replace("@", "\0", 1) if name.startswith("@") else name)
        channel.settimeout(5)
        yield channel, name


def test_every_state_arrives_as_one_datagram(manager: tuple[socket.socket, str]) -> None:
    channel, name = manager
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000"}, PID)
    assert notifier.ready("3 peers")
    assert channel.recv(1024) == b"READY=1\nSTATUS=3 peers"
    assert notifier.status("etcd away")
    assert channel.recv(1024) == b"STATUS=etcd away"
    assert notifier.beat()
    assert channel.recv(1024) == b"WATCHDOG=1"
    assert notifier.stopping()
    assert channel.recv(1024) == b"STOPPING=1"


def test_a_status_cannot_smuggle_another_variable_in(manager: tuple[socket.socket, str]) -> None:
    channel, name = manager
    Notifier.from_environ({"NOTIFY_SOCKET": name}, PID).status("a\nMAINPID=1\r\nb \udc80")
    assert channel.recv(1024) == b"STATUS=a MAINPID=1 b ?"


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(PID)}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_beats_at_half_of_its_time_and_only_for_its_process(
    environ: dict[str, str], interval: float | None
) -> None:
    notifier = Notifier.from_environ({"NOTIFY_SOCKET": "/none", **environ}, PID)
    assert notifier.watchdog_interval == interval


@pytest.mark.parametrize("name", [None, "", "@", "relative", "vsock:2:1234"])
def test_without_a_usable_socket_nothing_is_sent(name: str | None) -> None:
    environ = {"WATCHDOG_USEC": "30000000"} | ({} if name is None else {"NOTIFY_SOCKET": name})
    notifier = Notifier.from_environ(environ, PID)
    assert notifier.watchdog_interval is None
    assert not any([notifier.ready("x"), notifier.status("x"), notifier.beat(), notifier.stopping()])


def test_a_manager_that_is_gone_is_no_error(tmp_path: Path) -> None:
    assert not Notifier.from_environ({"NOTIFY_SOCKET": str(tmp_path / "gone")}, PID).ready("x")


def test_a_path_too_long_for_a_socket_is_no_error() -> None:
    assert not Notifier.from_environ({"NOTIFY_SOCKET": "/" + "x" * 200}, PID).ready("x")


def test_a_manager_that_does_not_read_does_not_block(tmp_path: Path) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(path)
        notifier = Notifier.from_environ({"NOTIFY_SOCKET": path}, PID)
        # The kernel queues net.unix.max_dgram_qlen datagrams and refuses the next.
        assert not all(notifier.status(str(number)) for number in range(10_000))


def test_a_path_or_an_address_with_a_zero_byte_is_no_error() -> None:
    assert not Notifier.from_environ({"NOTIFY_SOCKET": "/a\0b"}, PID).ready("x")
