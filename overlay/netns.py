"""Named network namespaces of this machine: what lives in them, and doing things in them.

Relies on iproute2 for the names (`ip netns`, bind mounts below /run/netns). Knows nothing of hosts, pods or agents.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

NETNS = Path("/run/netns")
"""Where iproute2 keeps named network namespaces."""

_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
T = TypeVar("T")

_C_LOCALE = {**os.environ, "LC_ALL": "C"}


class NamespaceError(Exception):
    """A namespace, or what is in it, does not do what it must; the text is one sentence for its user."""


class Process(NamedTuple):
    """A process beyond doubt: ids are reused, an id with its start time (clock ticks since boot) is not."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """None if there is no such process, or it is a zombie."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        return None if fields[0] == b"Z" else cls(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        return Process.of(self.pid) == self


def end(processes: Iterable[Process], *signals: signal.Signals, grace: float = 3.0) -> None:
    """Send each signal in turn to what is still alive, and wait up to `grace` seconds for the exits after each.

    A stopped process is continued, so that it can act on the signal.
    """
    with contextlib.ExitStack() as stack:
        handles: dict[int, Process] = {}
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                handle = os.pidfd_open(process.pid)
                stack.callback(os.close, handle)
                if process.alive:
                    handles[handle] = process
        for number in signals:
            for handle in handles:
                for each in (number, signal.SIGCONT):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(handle, each)
            deadline = time.monotonic() + grace
            while handles and (left := deadline - time.monotonic()) > 0:
                # A pidfd is readable once its process has ended (pidfd_open(2)).
                for handle in select.select(list(handles), [], [], left)[0]:
                    del handles[handle]
        if handles:
            raise NamespaceError(f"processes {sorted(each.pid for each in handles.values())} do not end.")


def inhabitants(namespaces: Iterable[Path]) -> list[Process]:
    """All processes that live in these network namespaces."""
    inodes = set()
    for path in namespaces:
        with contextlib.suppress(OSError):
            inodes.add(_identity(path))
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (process := Process.of(int(entry.name))):
            with contextlib.suppress(OSError):
                if _identity(entry / "ns/net") in inodes:
                    found.append(process)
    return found


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def run_tool(argv: Sequence[str], script: str = "") -> str:
    """Run iproute2 to its end, whatever happens on the terminal; NamespaceError with what it says if it fails.

    It inherits what the caller has made inheritable: a lock, which so is held until the work done under it has ended.
    """
    done = subprocess.run(argv, input=script, capture_output=True, text=True, start_new_session=True, close_fds=False)
    if done.returncode:
        raise NamespaceError(f"{' '.join(argv)} failed: {done.stderr.strip()}")
    return done.stdout


class Namespace:
    """The network namespace `netns`. Building the object makes nothing: see `create`."""

    def __init__(self, netns: str) -> None:
        self.netns = netns

    @property
    def exists(self) -> bool:
        return (NETNS / self.netns).exists()

    def __repr__(self) -> str:
        return f"<{self.netns}>"

    def inside(self, *argv: str) -> list[str]:
        """The command line that runs `argv` in here, with /sys as seen from here; the process id is the command's."""
        return ["ip", "netns", "exec", self.netns, *argv]

    def run(self, *argv: str, seconds: float = 30) -> subprocess.CompletedProcess[str]:
        """Run to the end in here, output captured as text, in the C locale. The exit code is the caller's to judge."""
        return subprocess.run(
            self.inside(*argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, env=_C_LOCALE
        )

    def ip(self, *lines: str) -> None:
        """Lines of `ip` in one batch; NamespaceError at the first that fails."""
        run_tool(["ip", "-n", self.netns, "-batch", "-"], "\n".join(lines))

    def json(self, *argv: str) -> list[dict[str, Any]]:
        """What `ip ARGV` or `bridge ARGV` shows in here, decoded."""
        found: list[dict[str, Any]] = json.loads(run_tool([argv[0], "-n", self.netns, "-j", *argv[1:]]) or "[]")
        return found

    def packet_socket(self, device: str, *, hears: bool = True) -> socket.socket:
        """A raw socket (AF_PACKET) that sends on `device`, and if it `hears` sees every frame on it, both ways."""

        def make() -> socket.socket:
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC)
            try:
                raw.bind((device, _ETH_P_ALL if hears else 0))
            except OSError:
                raw.close()
                raise
            return raw

        return self.made(make)

    def made(self, make: Callable[[], T]) -> T:
        """What `make` makes in here: a socket, which belongs to the namespace for good."""

        def enter_and_make() -> T:
            with (NETNS / self.netns).open() as handle:
                if ctypes.CDLL(None, use_errno=True).setns(handle.fileno(), _CLONE_NEWNET):
                    raise NamespaceError(f"cannot enter {self.netns}: {os.strerror(ctypes.get_errno())}.")
            return make()

        # A namespace is a thread's own: a passing thread enters it.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(enter_and_make).result()


def create(names: Iterable[str]) -> None:
    """Make namespaces by these names."""
    run_tool(["ip", "-batch", "-"], "".join(f"netns add {name}\n" for name in names))


def delete(names: Iterable[str]) -> None:
    """Delete them, and with them every device that lives in them. A process in one keeps it alive, without its name."""
    run_tool(["ip", "-batch", "-"], "".join(f"netns del {name}\n" for name in names))
