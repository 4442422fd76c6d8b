"""Kernel settings below /proc/sys: read, set only where they differ, and put back by `cleanup`.

A setting is named as `sysctl` names it, `net.ipv4.ip_forward`. A slash in a name stands for a dot inside a part, as
in sysctl(8): the device `flannel.1` is `net.ipv6.conf.flannel/1.accept_ra`.

What is not needed is not set. The bridge's netfilter hooks (`net.bridge.bridge-nf-call-iptables`) are in that class:
pods on one bridge reach each other with them and without, and keep their addresses (tests/netns/test_sysctl.py).
"""

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC_SYS = Path("/proc/sys")

LEDGER = "settings.json"
"""File in the state directory: see `Ledger`."""
PROC_ROUTES = Path("/proc/net/ipv6_route")

_ADVERTISED = 0x00010000 | 0x00040000
"""RTF_DEFAULT and RTF_ADDRCONF (linux/ipv6_route.h): a default route from a router advertisement."""


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


def ensure(
    name: str, wanted: str, root: Path = PROC_SYS, ledger: "Ledger | None" = None
) -> Change | Refused | Absent | None:
    """Set it unless it has the value already: None. Whatever else comes back deserves to be told, once.

    With a ledger, what was there before is on disk before anything is changed.
    """
    before = read(name, root)
    if before is None:
        return Absent(name)
    if before == wanted:
        return None
    if ledger:
        ledger.note(Change(name, before, wanted))
    outcome = _set(name, before, wanted, root)
    if ledger and not isinstance(outcome, Change):
        ledger.strike(name)
    return outcome


def _set(name: str, before: str, wanted: str, root: Path) -> Change | Refused | Absent:
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


def enable_forwarding(root: Path = PROC_SYS, ledger: "Ledger | None" = None) -> Change | Refused | Absent | None:
    """Let the host route IPv4 between its pods and the overlay."""
    return ensure("net.ipv4.ip_forward", "1", root, ledger)


def enable_ipv6_forwarding(
    underlay: str, root: Path = PROC_SYS, ledger: "Ledger | None" = None, routes: Path = PROC_ROUTES
) -> list[Change | Refused | Absent]:
    """Let the host route IPv6, without the loss of a default route that it has, or will have, from an advertisement.

    A kernel that begins to forward drops such routes and takes no new ones, but for interfaces with accept_ra=2
    (Documentation/networking/ip-sysctl.rst; rt6_purge_dflt_routers in net/ipv6/route.c). So 1 becomes 2 first, on
    `underlay` and on every interface that has such a route; if that is refused, forwarding stays off. A host that
    forwards already has been set up by somebody for it.
    """
    forwarding = "net.ipv6.conf.all.forwarding"
    if read(forwarding, root) == "1":
        return []
    outcomes = [
        ensure(name, "2", root, ledger)
        for interface in sorted({underlay, *_advertised(routes)})
        if read(name := _of_interface(6, interface, "accept_ra"), root) == "1"
    ]
    if not any(isinstance(outcome, Refused) for outcome in outcomes):
        outcomes.append(ensure(forwarding, "1", root, ledger))
    return [outcome for outcome in outcomes if outcome is not None]


def _advertised(routes: Path) -> Iterable[str]:
    """Names of the interfaces with a default route from a router advertisement."""
    try:
        lines = routes.read_text().splitlines()
    except OSError:
        return ()
    fields = (line.split() for line in lines)
    return {field[9] for field in fields if len(field) == 10 and int(field[8], 16) & _ADVERTISED == _ADVERTISED}


def honour_path_mtu(root: Path = PROC_SYS, ledger: "Ledger | None" = None) -> Change | Refused | Absent | None:
    """Let what was learnt of a path's MTU count for forwarded IPv4 packets (ip_dst_mtu_maybe_forward).

    Otherwise pods are never told that a tunnel over IPv6, whose routers cut nothing, takes less than its device.
    """
    return ensure("net.ipv4.ip_forward_use_pmtu", "1", root, ledger)


# --- our own device: these settings go with it, so no ledger need have them -----------------------------------------


def ignore_router_advertisements(device: str, root: Path = PROC_SYS) -> Change | Refused | None:
    """A pod must not become the host's IPv6 router by way of the overlay's device. A host without IPv6 is fine."""
    outcome = ensure(_of_interface(6, device, "accept_ra"), "0", root)
    return None if isinstance(outcome, Absent) else outcome


def loosen_reverse_path(device: str, root: Path = PROC_SYS) -> Change | Refused | Absent | None:
    """Take what a peer sends by the tunnel although this host would answer by another way: None unless that is dropped.

    The strict reverse path filter (RFC 3704 section 2.2) drops it; what holds for an interface is the higher one of its
    own value and that for all (ip-sysctl.rst). Two cases meet it: processes of a peer that use its underlay address,
    and peers that this host reaches without the tunnel while they do not reach it so. Packets from pods to pods
    never do. The underlay's own filter is the operator's.
    """
    strict = strict_reverse_path(device, root) is not None
    return ensure(_of_interface(4, device, "rp_filter"), "2", root) if strict else None


def strict_reverse_path(device: str, root: Path = PROC_SYS) -> str | None:
    """The setting by which the reverse path filter of `device` is strict, None if it is not."""
    name, of_all = _of_interface(4, device, "rp_filter"), "net.ipv4.conf.all.rp_filter"
    values = {name: read(name, root), of_all: read(of_all, root)}
    if "2" in values.values():
        return None
    return next((setting for setting, value in values.items() if value == "1"), None)


def _of_interface(version: int, interface: str, setting: str) -> str:
    return f"net.ipv{version}.conf.{interface.replace('.', '/')}.{setting}"


# --- the ledger ----------------------------------------------------------------------------------------------------


class Ledger:
    """What was changed on this host, and from what, in a file that outlives the agent.

    Settings last until the host boots, or its network namespace ends, and so does what the file says: a record of
    another boot or namespace is void. Of several changes of one setting the first tells what was there before us.
    """

    def __init__(self, path: Path, root: Path = PROC_SYS) -> None:
        self._path = path
        self._root = root
        self.problem = ""
        """Why the file does not have the last change, empty if it has. The settings themselves do not depend on it."""
        namespace = Path("/proc/thread-self/ns/net").stat().st_ino
        self._life = f"{read('kernel.random.boot_id', root)} {namespace}"
        self._changes = {change.name: change for change in self._read()}

    @property
    def changes(self) -> tuple[Change, ...]:
        """In the order in which they were first made."""
        return tuple(self._changes.values())

    def note(self, change: Change) -> None:
        """Keep `change`, with the value that stood there before the first one."""
        first = self._changes.get(change.name, change)
        self._changes[change.name] = Change(change.name, first.before, change.after)
        self._write()

    def strike(self, name: str) -> None:
        """Forget a change that did not come about. An earlier one of the same setting is undone by whoever undid it."""
        del self._changes[name]
        self._write()

    def restore(self) -> list[Change | Refused]:
        """Put back what still is as we set it, last change first, and remove the file unless something was refused.

        What somebody has changed since is theirs.
        """
        outcomes: list[Change | Refused] = []
        for change in reversed(self.changes):
            outcome = None
            if read(change.name, self._root) == change.after:
                outcome = ensure(change.name, change.before, self._root)
            if isinstance(outcome, Change | Refused):
                outcomes.append(outcome)
            if not isinstance(outcome, Refused):
                del self._changes[change.name]
        self._write()
        return outcomes

    def _read(self) -> list[Change]:
        try:
            content = json.loads(self._path.read_bytes())
            if content["life"] != self._life:
                return []
            return [Change(str(name), str(before), str(after)) for name, before, after in content["changes"]]
        except (OSError, ValueError, KeyError, TypeError):
            # Not there, or not ours; a file of ours is whole, as it is put in place in one step.
            return []

    def _write(self) -> None:
        rows = [(change.name, change.before, change.after) for change in self.changes]
        new = self._path.with_name(self._path.name + ".new")
        try:
            if not rows:
                self._path.unlink(missing_ok=True)
            else:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with new.open("w") as file:
                    json.dump({"life": self._life, "changes": rows}, file)
                    file.flush()
                    os.fsync(file.fileno())
                new.rename(self._path)
            self.problem = ""
        except OSError as error:
            self.problem = f"{self._path} cannot be written: {os.strerror(error.errno or 0)}"


def _path(name: str, root: Path) -> Path:
    parts = [part.replace("/", ".") for part in name.split(".")]
    if not all(parts) or any(part in (".", "..") for part in parts):
        raise ValueError(f"{name!r} names no kernel setting")
    return root.joinpath(*parts)
