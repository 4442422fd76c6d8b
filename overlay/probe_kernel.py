"""What this host's kernel makes of the way to a peer: by which device it would send, and what it knows of the next hop.

An edge: asks over one rtnetlink socket that lasts as long as the questions, and only after a path has failed. The
agent's own belief is not asked: a fault may be that the kernel holds something else. Changes nothing, but that the
kernel looks for a next hop sooner than it would.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple, Self

from overlay import netlink, rtnl
from overlay.model import Entry, Fdb, Neighbour, Route

SECONDS = 2.0
"""How long an answer may take."""

_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NDMSG = struct.Struct("=BBHiHBB")  # family, pad, pad, ifindex, state, flags, type
_U32 = struct.Struct("=I")
_IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
_GETLINK, _UP = 18, 0x1  # RTM_GETLINK, IFF_UP
_RTA_SRC = 2
_FIB_MATCH = 0x2000  # RTM_F_FIB_MATCH
_UNICAST = 1
_INCOMPLETE, _FAILED = 0x01, 0x20  # NUD_*
_PROBE = 0x10
_BELIEVED = 0x02 | 0x04 | 0x08  # NUD_REACHABLE, NUD_STALE, NUD_DELAY
_CONFIRMED = 0x02 | 0x04 | 0x08 | 0x10  # NUD_REACHABLE, and what becomes of it with time
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class NextHop(NamedTuple):
    """The way to an underlay address: whether there is a `route`, and whether `on_link` or by a router.

    `failed`: nobody answers for the address, or for that router. `confirmed`: how many seconds ago somebody last did,
    None if that is not known.
    """

    route: bool
    on_link: bool = True
    failed: bool = False
    confirmed: float | None = None

    def there(self, seconds: float) -> bool | None:
        """Whether somebody has answered for it in the last so many seconds; None if the kernel has yet to find out."""
        return False if self.failed else True if self.confirmed is not None and self.confirmed < seconds else None


class Link(NamedTuple):
    """A neighbour entry: MAC, NUD_* and NTF_* bits, and for how many seconds nobody has confirmed it."""

    mac: bytes = b""
    state: int = 0
    flags: int = 0
    confirmed: float = 0.0


class Way(NamedTuple):
    """The kernel's choice: interface index and gateway (empty: on link); `errno` if it refuses."""

    device: int = 0
    gateway: bytes = b""
    errno: int = 0


class Kernel:
    """One socket for all questions. OSError where the kernel does not answer."""

    def __init__(self) -> None:
        self._socket = netlink.open_socket(socket.NETLINK_ROUTE, 1 << 16)
        self._socket.settimeout(SECONDS)
        self._number = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wrong_device(self, number: int) -> str:
        """The cause if a device, by its interface index, is not as packets need it; else empty."""
        answer = self._ask(_GETLINK, _IFINFO.pack(0, 0, number, 0, 0))
        if isinstance(answer, int):
            return "device_missing"
        return "" if _IFINFO.unpack_from(answer)[3] & _UP else "device_down"

    def wrong_entry(self, entries: Iterable[Entry], source: bytes, address: bytes) -> str:
        """The cause if what a peer calls for is not what the kernel goes by, to `address` from `source`; else empty.

        In the order of the way that a packet takes: route, neighbour, FDB.
        """
        entries = tuple(entries)
        devices = {entry.at[0] for entry in entries if isinstance(entry, Neighbour)}
        route = next((each for each in entries if isinstance(each, Route) and each.destination.holds(address)), None)
        if route is not None:
            way = self.way(address, source)
            if way.errno not in (0, errno.ENETUNREACH):
                return "route_foreign"  # One that refuses: blackhole, unreachable, prohibit.
            if way.errno or (devices and way.device not in devices):
                # Ours is missing, or another as exact as it, or more so, stands in its way.
                return "route_foreign" if self.matched(address) >= route.destination.length else "route_wrong"
        for entry in entries:
            if isinstance(entry, Neighbour) and self.neighbour(entry.at[1], entry.at[0]).mac != entry.mac:
                return "neighbour_wrong"
        for entry in entries:
            if isinstance(entry, Fdb) and self.remote(entry.at[1], entry.at[0]) != entry.remote:
                return "fdb_wrong"
        return ""

    def next_hop(self, address: bytes) -> NextHop:
        """What is known of the way to an underlay address."""
        way = self.way(address)
        if way.errno:
            return NextHop(False)
        found = self.neighbour(way.gateway or address, way.device)
        failed = bool(found.state & (_INCOMPLETE | _FAILED))
        return NextHop(True, not way.gateway, failed, found.confirmed if found.state & _CONFIRMED else None)

    def verify(self, address: bytes) -> None:
        """Have the kernel ask now whether the next hop to an underlay address is there, as it does itself in time.

        It believes for half a minute what it was told last (base_reachable_time).
        """
        way = self.way(address)
        hop = way.gateway or address
        found = self.neighbour(hop, way.device)
        if not way.errno and found.state & _BELIEVED and found.mac:
            head = _NDMSG.pack(rtnl.FAMILY[len(hop)], 0, 0, way.device, _PROBE, found.flags, 0)
            body = head + rtnl.attribute(rtnl.NDA_DST, hop) + rtnl.attribute(rtnl.NDA_LLADDR, found.mac)
            self._ask(rtnl.NEWNEIGH, body, rtnl.REPLACE | rtnl.ACK)

    def way(self, target: bytes, source: bytes = b"") -> Way:
        """How the kernel would send to `target`."""
        head = _RTMSG.pack(rtnl.FAMILY[len(target)], 8 * len(target), 8 * len(source), 0, 0, 0, 0, 0, 0)
        body = head + rtnl.attribute(rtnl.RTA_DST, target) + (rtnl.attribute(_RTA_SRC, source) if source else b"")
        answer = self._ask(rtnl.GETROUTE, body)
        if isinstance(answer, int):
            return Way(errno=answer)
        found = rtnl.attributes(answer, _RTMSG.size)
        if _RTMSG.unpack_from(answer)[7] != _UNICAST:
            return Way(errno=errno.ENETUNREACH)
        gateway = found.get(rtnl.RTA_GATEWAY, b"")
        return Way(_U32.unpack(found.get(rtnl.RTA_OIF, bytes(4)))[0], b"" if gateway == target else gateway)

    def matched(self, target: bytes) -> int:
        """The length of the block of the route that the kernel goes by; -1 if it has none, or cannot tell."""
        head = _RTMSG.pack(rtnl.FAMILY[len(target)], 8 * len(target), 0, 0, 0, 0, 0, 0, _FIB_MATCH)
        answer = self._ask(rtnl.GETROUTE, head + rtnl.attribute(rtnl.RTA_DST, target))
        return -1 if isinstance(answer, int) else int(_RTMSG.unpack_from(answer)[1])

    def neighbour(self, address: bytes, device: int) -> Link:
        """A neighbour entry; empty without one."""
        head = _NDMSG.pack(rtnl.FAMILY[len(address)], 0, 0, device, 0, 0, 0)
        answer = self._ask(rtnl.GETNEIGH, head + rtnl.attribute(rtnl.NDA_DST, address))
        if isinstance(answer, int):
            return Link()
        found = rtnl.attributes(answer, _NDMSG.size)
        ticks = _U32.unpack_from(found.get(rtnl.NDA_CACHEINFO, bytes(16)))[0]
        _, _, _, _, state, flags, _ = _NDMSG.unpack_from(answer)
        return Link(found.get(rtnl.NDA_LLADDR, b""), state, flags, ticks / _TICKS_PER_SECOND)

    def remote(self, mac: bytes, device: int) -> bytes:
        """The underlay address that a VXLAN device sends frames for `mac` to; empty without one."""
        head = _NDMSG.pack(rtnl.AF_BRIDGE, 0, 0, device, 0, rtnl.NTF_SELF, 0)
        answer = self._ask(rtnl.GETNEIGH, head + rtnl.attribute(rtnl.NDA_LLADDR, mac))
        return b"" if isinstance(answer, int) else rtnl.attributes(answer, _NDMSG.size).get(rtnl.NDA_DST, b"")

    def _ask(self, kind: int, body: bytes, flags: int = 0) -> bytes | int:
        """The body of the answer, or an errno."""
        self._number += 1
        self._socket.send(rtnl.HEADER.pack(16 + len(body), kind, rtnl.REQUEST | flags, self._number, 0) + body)
        while True:
            buffer = self._socket.recv(1 << 16)
            for message in rtnl.messages(buffer):
                if message.sequence != self._number:
                    continue
                if message.kind == rtnl.NLMSG_ERROR:
                    return rtnl.error_of(buffer, message) or errno.EBADMSG
                return buffer[message.body : message.end]
