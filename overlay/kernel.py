"""The kernel edge: netlink sockets for entries, pyroute2 for devices and addresses.

Owns two raw rtnetlink sockets, one for commands and dumps, one for the monitor, and the only code that changes the
host's links, addresses and entries. Decisions are made elsewhere: this file does what it is told and reports what
happened, one result for each operation. Built for one thread, but for `interrupt`.

Relied upon: notifications are queued to the monitor while the kernel handles the message that causes them, so after a
batch is acknowledged its echoes are already there to be read; they carry our port id, but for FDB entries and the
final deletion of a neighbour, which carry 0. Those with our port id do not reach us: the monitor has a filter for that.
"""

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from overlay import iproute, netlink, rtnl
from overlay.device import OWNER, DeviceSpec, FoundDevice, adjustments, incompatibility
from overlay.model import PROTOCOL, Drop, Entry, Gone, Key, NextHop, Op, Put, Refusal, Route, Seen, Sight
from subnet_lease.model import Prefix, format_address, format_mac, pack_address, pack_mac

if TYPE_CHECKING:
    from pyroute2 import IPRoute

T = TypeVar("T")

BATCH = 400
"""Messages in one send: enough to make system calls cheap, few enough for refusals and echoes to fit the sockets."""

BUFFER = 8 << 20
"""Bytes asked for on both sockets, so that bursts of notifications and acks are not lost while Python is busy."""

ABSENT = (errno.ENOENT, errno.ESRCH, errno.ENODEV)
"""What the kernel answers when an entry to be removed, or the device it was on, is not there."""

DUMP_ATTEMPTS = 5

_NOBODY = 0xFFFFFFFF
"""The sequence number of messages whose answer concerns no one."""

_SOL_NETLINK = 270
_EXT_ACK, _STRICT_CHECK = 11, 12
_ADD_MEMBERSHIP = 1
_GROUPS = (1, 3, 5, 7, 9, 11, 32)
"""RTNLGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE, _NEXTHOP."""

_SCOPE_LINK = 253

_NODAD = 0x02  # IFA_F_NODAD: nobody else can have it, and on a device without multicast nobody would be asked.


class KernelRefused(Exception):
    """The kernel refused something that no other entry can make up for: `what` was asked, `errno` the answer."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(f"{what}: {os.strerror(code)}")
        self.what = what
        self.errno = code


class DeviceOccupied(Exception):
    """An interface has our device's name and is something else; the text says what."""


def find_device(name: str) -> FoundDevice | None:
    """The interface called `name`, None if there is none. From any thread; KernelRefused."""
    return _guarded("look up device " + name, lambda route: _find(route, name))


class Kernel:
    """This network namespace's kernel.

    `tunnels` are the interface indexes of our devices by the length of their underlay addresses, as `ensure_devices`
    has left them; `link` is the underlay's index, by which routes of ours may leave too, 0 as long as it is not known.
    """

    def __init__(self) -> None:
        self.tunnels: dict[int, int] = {}
        self.link = 0
        self._former: set[int] = set()
        """Interfaces that routes of ours may still leave by: earlier `tunnels` and `link`, until strays are removed."""
        self._commands = _netlink_socket()
        self._monitor = _netlink_socket()
        netlink.drop_from(self._monitor, self._commands)
        for group in _GROUPS:
            try:
                self._monitor.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
            except OSError:
                # Kernels before 5.3 have no nexthop objects to report on.
                continue
        self._monitor.setblocking(False)
        self._commands.settimeout(10)
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._unread: list[bytes] = []
        self._lost = False
        self.also: tuple[int, ...] = ()
        """Other descriptors that end a `wait` when they are readable."""

    def close(self) -> None:
        """Close all sockets."""
        self._commands.close()
        self._monitor.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # --- waiting ---

    def wait(self, seconds: float | None) -> None:
        """Return when the monitor has something, after `interrupt`, or after `seconds`."""
        if self._unread or self._lost:
            return
        ready, _, _ = select.select([self._monitor.fileno(), self._wake_read, *self.also], [], [], seconds)
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)

    def interrupt(self) -> None:
        """End the present or next `wait`. For other threads."""
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # The pipe is full of wake-ups already.

    # --- the monitor ---

    def observe(self) -> Seen:
        """All notifications so far, without our own echoes but those of FDB entries and of neighbours' deletion."""
        self._drain()
        buffers, self._unread = self._unread, []
        lost, self._lost = self._lost, False
        sights: list[Sight] = []
        by: dict[Key, int | str] = {}
        changed = False
        tunnels = self.tunnels.values()
        for buffer in buffers:
            for message in rtnl.messages(buffer):
                if message.kind in (rtnl.NEWLINK, rtnl.DELLINK, rtnl.NEWADDR, rtnl.DELADDR):
                    device = rtnl.device_of(buffer, message)
                    # With its last address a link loses its routes. One that is added, or renewed, harms nothing.
                    theirs = device == self.link and message.kind != rtnl.NEWADDR
                    changed = changed or theirs or device in tunnels
                    continue
                seen = rtnl.sight(buffer, message, tunnels)
                if seen is not None:
                    sights.append(seen)
                    if message.port:
                        by[(seen.entry if isinstance(seen, Gone) else seen)[0]] = message.port
        return Seen(tuple(sights), lost, changed, by=by)

    def _drain(self) -> None:
        """Move what is queued to memory: the socket's buffer is bounded, and a batch of ours may outgrow it."""
        for buffer in netlink.queued(self._monitor):
            if buffer is None:
                self._lost = True
            else:
                self._unread.append(buffer)

    # --- entries ---

    def apply(self, ops: Sequence[Op]) -> list[Refusal]:
        """Carry out `ops` in their order; returns those that were refused. One failing keeps no other from being tried.

        Raises KernelRefused if the socket itself fails, when nothing is known of what was done: dump and compare.
        """
        refusals: list[Refusal] = []
        batches = [ops[start : start + BATCH] for start in range(0, len(ops), BATCH)]
        for batch, answers in zip(batches, self._answers(batches), strict=True):
            refusals += (
                Refusal(batch[number], code)
                for number, code in answers.items()
                if number < len(batch) and not (code in ABSENT and isinstance(batch[number], Drop))
            )
            self._drain()
        return refusals

    def _answers(self, batches: Sequence[Sequence[Op]]) -> Iterator[dict[int, int]]:
        """What `_exchange` says of each. The kernel works on one batch while the next is made."""
        if len(batches) == 1:
            yield self._exchange(_messages(batches[0]), len(batches[0]))
            return
        with ThreadPoolExecutor(1) as kernel:
            before: Future[dict[int, int]] | None = None
            for batch in batches:
                under_way = kernel.submit(self._exchange, _messages(batch), len(batch))
                if before is not None:
                    yield before.result()
                before = under_way
            if before is not None:
                yield before.result()

    def _exchange(self, batch: bytes, end: int) -> dict[int, int]:
        """Send messages in one go; errno by number for each that was answered, the last of them `end`.

        The kernel answers what it refuses, asked or not. What it carries out need not be answered, which at 15,000
        hosts saves 60,000 answers: an acknowledged end tells that all before it has been tried.
        """
        answers: dict[int, int] = {}
        try:
            self._commands.send(batch)
            while end not in answers:
                buffer = self._commands.recv(65536)
                for message in rtnl.messages(buffer):
                    if message.kind == rtnl.NLMSG_ERROR:
                        answers[message.sequence] = rtnl.error_of(buffer, message)
        except OSError as error:
            self._renew_commands()
            raise KernelRefused("netlink batch", error.errno or errno.ETIMEDOUT) from error
        return answers

    def _renew_commands(self) -> None:
        """After a lost answer the socket may hold answers to questions nobody asks any more."""
        self._commands.close()
        self._commands = _netlink_socket()
        self._commands.settimeout(10)
        netlink.drop_from(self._monitor, self._commands)

    def dump(self, nexthops: bool) -> Iterator[Entry]:
        """All entries on our devices and routes by the underlay's link, whoever made them. Raises KernelRefused.

        Routes by what was our device or the underlay's before are among them, until that has been left for good. Read
        kind by kind, as they are asked for: no more than one table of the kernel's is in memory at a time.
        """
        links = sorted({self.link, *self._former} - {0})
        for request in rtnl.dump_requests(self.tunnels.values(), links, nexthops):
            yield from self._dump(request)

    def marked(self, nexthops: bool) -> list[Entry]:
        """The routes and nexthop objects that carry our protocol number, on whatever device. Raises KernelRefused."""
        return [
            entry
            for request in rtnl.marked_dump_requests(nexthops)
            for entry in self._dump(request)
            if isinstance(entry, Route | NextHop) and entry.protocol == PROTOCOL
        ]

    def has_nexthops(self) -> bool:
        """Whether this kernel (5.3 and later) has nexthop objects."""
        try:
            self._dump(rtnl.nexthop_dump_request(1))
        except KernelRefused as refused:
            if refused.errno in (errno.EOPNOTSUPP, errno.EINVAL):
                return False
            raise
        return True

    def _dump(self, request: bytes) -> list[Entry]:
        for _ in range(DUMP_ATTEMPTS):
            entries, complete = self._dump_once(request)
            if complete:
                return entries
        raise KernelRefused("dump", errno.EINTR)

    def _dump_once(self, request: bytes) -> tuple[list[Entry], bool]:
        """(entries, False if the tables changed beneath: NLM_F_DUMP_INTR)."""
        entries: list[Entry] = []
        complete = True
        try:
            self._commands.send(request)
            while True:
                buffer = self._commands.recv(1 << 18)
                for message in rtnl.messages(buffer):
                    if message.flags & rtnl.DUMP_INTERRUPTED:
                        complete = False
                    if message.kind in (rtnl.NLMSG_DONE, rtnl.NLMSG_ERROR):
                        code = rtnl.error_of(buffer, message)
                        if code and code not in ABSENT:
                            raise KernelRefused("dump", code)
                        return entries, complete
                    seen = rtnl.sight(buffer, message, self.tunnels.values())
                    if seen is not None and not isinstance(seen, Gone):
                        entries.append(seen)
        except OSError as error:
            self._renew_commands()
            raise KernelRefused("dump", error.errno or errno.ETIMEDOUT) from error

    # --- the device ---

    def find_device(self, name: str) -> FoundDevice | None:
        """As the function."""
        return find_device(name)

    def ensure_devices(self, specs: Sequence[DeviceSpec], link: int) -> dict[str, tuple[str, ...]]:
        """Make the devices as `specs` say, with the least change; the changes made by device, as words, if any.

        Sets `tunnels`, and `link` as given. Raises DeviceOccupied if a name is taken by another kind, KernelRefused on
        failure.
        """
        changes = {}
        families = {len(spec.local) for spec in specs}
        self._former |= {self.link, *(index for family, index in self.tunnels.items() if family not in families)}
        self._former.discard(link)
        self.link = link
        for spec in specs:
            index, changed = _guarded("set up device " + spec.name, partial(_ensure, spec=spec))
            self.tunnels[len(spec.local)] = index
            if changed:
                changes[spec.name] = changed
        self.tunnels = {len(spec.local): self.tunnels[len(spec.local)] for spec in specs}
        return changes

    def remove_strays(self, names: Collection[str]) -> list[str]:
        """Delete devices that bear our mark and have none of these `names`; the names of those deleted."""
        self._former.clear()
        strays = [found.name for found in self.own_devices() if found.name not in names]
        return [name for name in strays if self.remove_device(name)]

    def remove_device(self, name: str) -> bool:
        """Delete our device called `name`; False if there is none that bears our mark."""

        def remove(route: "IPRoute") -> bool:
            found = _find(route, name)
            if found is None or found.kind != "vxlan" or found.alias != OWNER:
                return False
            route.link("del", index=found.index)
            return True

        return _guarded("remove device " + name, remove)

    def own_devices(self) -> list[FoundDevice]:
        """All interfaces that bear our mark."""

        def listed(route: "IPRoute") -> list[FoundDevice]:
            names = [
                link.get_attr("IFLA_IFNAME") for link in route.get_links() if link.get_attr("IFLA_IFALIAS") == OWNER
            ]
            return [found for name in names if (found := _find(route, name)) is not None]

        return _guarded("list devices", listed)


def _messages(ops: Sequence[Op]) -> bytes:
    """One batch: each operation's message has its place as number, and the end that comes after them its length."""
    messages: list[bytes] = []
    for number, op in enumerate(ops):
        if isinstance(op, Put) and op.afresh:
            covered, uncovered = rtnl.cover(op.entry, _NOBODY)
            # Whether there was anything to remove is no matter.
            cleared = rtnl.clear(op.entry, _NOBODY)
            messages += (covered, cleared, rtnl.put(op.entry, number, ack=False), uncovered)
        elif isinstance(op, Put):
            messages.append(rtnl.put(op.entry, number, ack=False))
        else:
            messages.append(rtnl.drop(op.entry, number, ack=False))
    messages.append(rtnl.end_of_batch(len(ops)))
    return b"".join(messages)


def _ensure(route: "IPRoute", spec: DeviceSpec) -> tuple[int, tuple[str, ...]]:
    """(interface index, the changes made as words)."""
    changes: tuple[str, ...] = ()
    found = _find(route, spec.name)
    reason = incompatibility(spec, found) if found else None
    if found and found.kind != "vxlan":
        raise DeviceOccupied(f"an interface {spec.name} exists and {reason}")
    if found and reason:
        route.link("del", index=found.index)
        found, changes = None, (f"removed, {reason}",)
    if found is None:
        _create(route, spec)
        found = _find(route, spec.name)
        changes = (*changes, "created")
        if found is None:
            raise KernelRefused("create device " + spec.name, errno.ENODEV)
    todo = adjustments(spec, found)
    _adjust(route, spec, found, todo)
    return found.index, changes if "created" in changes else todo


def _find(route: "IPRoute", name: str) -> FoundDevice | None:
    _, NetlinkError = iproute.load()
    try:
        link = route.link("get", ifname=name)[0]
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise
    info = link.get_attr("IFLA_LINKINFO")
    kind = str(info.get_attr("IFLA_INFO_KIND") or "") if info else ""
    data = info.get_attr("IFLA_INFO_DATA") if info and kind == "vxlan" else None
    local = (data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6")) if data else None
    addresses = [
        (address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS"), address["prefixlen"])
        for address in route.get_addr(index=link["index"])
        # A link-local one is the kernel's own affair.
        if address["scope"] != _SCOPE_LINK
    ]
    return FoundDevice(
        index=link["index"],
        name=name,
        kind=kind,
        mac=pack_mac(link.get_attr("IFLA_ADDRESS") or "00:00:00:00:00:00"),
        mtu=link.get_attr("IFLA_MTU"),
        up=bool(link["flags"] & 1),
        alias=link.get_attr("IFLA_IFALIAS") or "",
        vni=data.get_attr("IFLA_VXLAN_ID") if data else 0,
        port=data.get_attr("IFLA_VXLAN_PORT") if data else 0,
        link=(data.get_attr("IFLA_VXLAN_LINK") or 0) if data else 0,
        local=pack_address(local) if local else b"",
        learning=bool(data and data.get_attr("IFLA_VXLAN_LEARNING")),
        gbp=bool(data and data.get_attr("IFLA_VXLAN_GBP")),
        addresses=tuple(Prefix(pack_address(address), length) for address, length in addresses),
    )


def _create(route: "IPRoute", spec: DeviceSpec) -> None:
    # The MAC is given here and not later: udev leaves a MAC alone that was set when the device was made.
    attributes: dict[str, Any] = {
        "ifname": spec.name,
        "kind": "vxlan",
        "address": format_mac(spec.mac),
        "mtu": spec.mtu,
        "ifalias": OWNER,
        "vxlan_id": spec.vni,
        "vxlan_link": spec.link,
        _local_of(spec): format_address(spec.local),
        "vxlan_port": spec.port,
        "vxlan_learning": int(spec.learning),
    }
    if spec.gbp:
        attributes["vxlan_gbp"] = True
    route.link("add", **attributes)


def _adjust(route: "IPRoute", spec: DeviceSpec, found: FoundDevice, todo: tuple[str, ...]) -> None:
    _, NetlinkError = iproute.load()
    if "link" in todo or "local" in todo:
        # First of all: the MTU may be no larger than what the link carries.
        moved = {"vxlan_link": spec.link, _local_of(spec): format_address(spec.local)}
        route.link("set", index=found.index, kind="vxlan", **moved)
    values: dict[str, Any] = {"mac": format_mac(spec.mac), "mtu": spec.mtu, "alias": OWNER}
    names = {"mac": "address", "mtu": "mtu", "alias": "ifalias"}
    changes = {names[what]: values[what] for what in todo if what in names}
    if changes:
        route.link("set", index=found.index, **changes)
    if "up" in todo:
        route.link("set", index=found.index, state="up")
    if "address" in todo:
        for base, length in spec.addresses:
            if Prefix(base, length) not in found.addresses:
                flags = 0
                if len(base) == 16:
                    flags = _NODAD
                    _allow_ipv6(spec.name)
                route.addr("add", index=found.index, address=format_address(base), prefixlen=length, flags=flags)
        for other in found.addresses:
            if other in spec.addresses:
                continue
            try:
                route.addr("del", index=found.index, address=format_address(other.base), prefixlen=other.length)
            except NetlinkError as error:
                # A secondary address goes with its primary.
                if error.code != errno.EADDRNOTAVAIL:
                    raise


def _allow_ipv6(device: str) -> None:
    """On hosts whose new interfaces may have no IPv6 addresses the kernel refuses them (EACCES)."""
    setting = Path("/proc/sys/net/ipv6/conf", device, "disable_ipv6")
    with contextlib.suppress(OSError):
        if setting.read_text() != "0\n":
            setting.write_text("0")


def _local_of(spec: DeviceSpec) -> str:
    """pyroute2's name of the local address of the device's family."""
    return "vxlan_local" if len(spec.local) == 4 else "vxlan_local6"


def _guarded(what: str, work: "Callable[[IPRoute], T]") -> T:
    """Run `work` with an open pyroute2 socket; its errors become KernelRefused."""
    # Loaded here: most of what a start costs is imports, and a pass needs none of this.
    IPRoute, NetlinkError = iproute.load()
    try:
        with IPRoute() as route:
            return work(route)
    except NetlinkError as error:
        raise KernelRefused(what, error.code) from error


def _netlink_socket() -> socket.socket:
    """A bound rtnetlink socket with strict dump filters and a large receive buffer."""
    sock = netlink.open_socket(socket.NETLINK_ROUTE, BUFFER)
    for option in (_EXT_ACK, _STRICT_CHECK):
        try:
            sock.setsockopt(_SOL_NETLINK, option, 1)
        except OSError:
            # Strict checking came with 4.20; without it dumps are filtered here alone.
            continue
    return sock
