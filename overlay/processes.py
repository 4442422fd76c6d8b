"""The processes of this network namespace, as /proc shows them (proc(5)): for who looks for the agent, or a second one.

An edge; it only reads. In a container those of its own PID namespace are seen, and without privileges those of the same
user.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")


class Process(NamedTuple):
    """A process: its number, its short name, and its command line."""

    pid: int
    name: str
    command: tuple[str, ...]


def here() -> Iterator[Process]:
    """All in the network namespace of this process, but for itself and the kernel's own."""
    own = (PROC / "self/ns/net").stat().st_ino
    for entry in PROC.iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if (entry / "ns/net").stat().st_ino == own and (command := _words(entry / "cmdline")):
                yield Process(int(entry.name), (entry / "comm").read_text().rstrip("\n"), command)


def with_socket(processes: Iterator[Process], name: str) -> Process | None:
    """Which of them has the abstract Unix socket called `name`; None if none that can be looked into."""
    lines = (PROC / "self/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    # Num, RefCount, Protocol, Flags, Type, St, Inode, Path (proc_net(5)); connections to it have its name as well.
    wanted = {f"socket:[{words[6]}]" for words in map(str.split, lines) if words[-1] == f"@{name}"}
    for process in processes:
        with contextlib.suppress(OSError):
            for descriptor in (PROC / str(process.pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) in wanted:
                        return process
    return None


def status(pid: int) -> str:
    """The text of /proc/PID/status; empty if there is no such process."""
    with contextlib.suppress(OSError):
        return (PROC / str(pid) / "status").read_text()
    return ""


def is_stopped(pid: int) -> bool:
    """Whether it stands still by a signal or a debugger."""
    state = next((line.split()[1] for line in status(pid).splitlines() if line.startswith("State:")), "")
    return state.upper() == "T"


def environment(pid: int) -> Mapping[str, str]:
    """The variables that it was started with; empty if they may not be read."""
    with contextlib.suppress(OSError):
        pairs = (word.partition("=") for word in _words(PROC / str(pid) / "environ"))
        return {name: value for name, _, value in pairs}
    return {}


def started(pid: int) -> float:
    """Seconds since the process was started; 0 if there is none."""
    with contextlib.suppress(OSError):
        ticks = int((PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[19])
        return float((PROC / "uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def _words(path: Path) -> tuple[str, ...]:
    return tuple(os.fsdecode(word) for word in path.read_bytes().split(b"\0") if word)
