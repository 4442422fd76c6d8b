"""Kernel settings below /proc/sys: read, and set only where they differ.

A setting is named as `sysctl` names it, `net.ipv4.ip_forward`. A slash in a name stands for a dot inside a part, as
in sysctl(8): the device `flannel.1` is `net.ipv6.conf.flannel/1.accept_ra`.
"""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

PROC_SYS = Path("/proc/sys")


@dataclass(frozen=True, slots=True)
class Change:
    """A setting was changed, from one value to another."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Refused:
    """A setting has the wrong value and cannot be changed from here; `remedy` is the command that does it."""

    name: str
    value: str
    wanted: str
    reason: str

    @property
    def remedy(self) -> str:
        """To be run as root on the host itself, outside of containers."""
        return f"sysctl -w {self.name}={self.wanted}"


@dataclass(frozen=True, slots=True)
class Absent:
    """This kernel or namespace has no such setting."""

    name: str


_REASONS = {
    errno.EROFS: "/proc/sys is read-only here",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
}


def read(name: str, root: Path = PROC_SYS) -> str | None:
    """The value without the line end, None if there is no such setting."""
    try:
        return _path(name, root).read_text().strip()
    except OSError:
        return None


def ensure(name: str, wanted: str, root: Path = PROC_SYS) -> Change | Refused | Absent | None:
    """Set it unless it has the value already: None. Whatever else comes back deserves to be told, once."""
    before = read(name, root)
    if before is None:
        return Absent(name)
    if before == wanted:
        return None
    try:
        # No O_CREAT: the setting exists, or went with its device since it was read.
        descriptor = os.open(_path(name, root), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, wanted.encode())
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return Absent(name)
    except OSError as error:
        return Refused(name, before, wanted, _REASONS.get(error.errno or 0, os.strerror(error.errno or 0)))
    after = read(name, root)
    if after != wanted:
        return Refused(name, after or "", wanted, "the kernel kept its value")
    return Change(name, before, wanted)


def enable_forwarding(root: Path = PROC_SYS) -> Change | Refused | Absent | None:
    """Let the host route between its pods and the overlay."""
    return ensure("net.ipv4.ip_forward", "1", root)


def ignore_router_advertisements(device: str, root: Path = PROC_SYS) -> Change | Refused | None:
    """A pod must not become the host's IPv6 router by way of the overlay's device. A host without IPv6 is fine."""
    outcome = ensure(f"net.ipv6.conf.{device.replace('.', '/')}.accept_ra", "0", root)
    return None if isinstance(outcome, Absent) else outcome


def _path(name: str, root: Path) -> Path:
    parts = [part.replace("/", ".") for part in name.split(".")]
    if not all(parts) or any(part in (".", "..") for part in parts):
        raise ValueError(f"{name!r} names no kernel setting")
    return root.joinpath(*parts)
