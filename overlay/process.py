"""What the kernel counts of this process and of network devices, read from /proc. Units are the kernel's turned into
seconds and bytes; sources: proc(5), Documentation/filesystems/proc.rst.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

# In /proc/self/stat, counted from the state, which follows the command's name in parentheses.
_USER, _KERNEL, _THREADS, _START, _RESIDENT = 11, 12, 17, 19, 21

# In /proc/net/dev, of the eight numbers for each way.
_BYTES, _PACKETS, _ERRORS, _DROPS, _TRANSMIT = 0, 1, 2, 3, 8

_SIOCGIFFLAGS, _UP, _RUNNING = 0x8913, 0x1, 0x40  # linux/sockios.h, linux/if.h

DeviceCounts = dict[tuple[str, str], int]
"""By way (receive, transmit) and what (bytes, packets, errors, drops)."""


class Usage(NamedTuple):
    """What the process takes. `started` is in seconds since 1970."""

    cpu_seconds: float
    resident_bytes: int
    threads: int
    descriptors: int
    started: float


def usage() -> Usage:
    """As of now."""
    words = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    ticks = int(words[_USER]) + int(words[_KERNEL])
    booted = next(
        int(line.split()[1]) for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()
        if line.startswith("btime ")
    )  # fmt: skip
    return Usage(
        ticks / _TICKS,
        int(words[_RESIDENT]) * _PAGE,
        int(words[_THREADS]),
        # But for the one that the directory itself is read by.
        len(os.listdir("/proc/self/fd")) - 1,  # noqa: PTH208
        booted + int(words[_START]) / _TICKS,
    )


def device_up(name: str) -> bool | None:
    """Whether an interface of this network namespace is up and has a carrier; None if there is none (netdevice(7))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            answer = fcntl.ioctl(channel, _SIOCGIFFLAGS, struct.pack("16s24x", name.encode()))
        except OSError:
            return None
    (flags,) = struct.unpack_from("16xH", answer)
    return bool(flags & _UP and flags & _RUNNING)


def device_counts(names: Collection[str]) -> dict[str, DeviceCounts]:
    """The counters of those devices of this thread's network namespace that exist."""
    found = {}
    for line in Path("/proc/thread-self/net/dev").read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, numbers = line.partition(":")
        if (name := name.strip()) in names:
            counts = [int(number) for number in numbers.split()]
            found[name] = {
                (way, what): counts[first + place]
                for way, first in (("receive", 0), ("transmit", _TRANSMIT))
                for what, place in (("bytes", _BYTES), ("packets", _PACKETS), ("errors", _ERRORS), ("drops", _DROPS))
            }
    return found
