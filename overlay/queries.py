"""Questions to this network namespace's kernel, one at a time: by which way it would send a packet, and what it knows
of a neighbour, a MAC, an interface or a rule.

An edge: owns one rtnetlink socket, and the layout of the requests that `rtnl` has no need of
(include/uapi/linux/{rtnetlink,neighbour,if_link,fib_rules}.h). Changes nothing. What the answers mean is decided in
`trace`.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from overlay import netlink, rtnl
from overlay.trace import Entrance, Hop, Link, PolicyRule, Way
from subnet_lease.model import Prefix

BUFFER = 1 << 20
SECONDS = 5.0
"""How long an answer may take."""

_GETLINK, _GETADDR, _GETRULE = 18, 22, 34
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NDMSG = struct.Struct("=BBHiHBB")  # family, pad, pad, ifindex, state, flags, type
_IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_U32 = struct.Struct("=I")

_LOOKUP_TABLE, _FIB_MATCH = 0x1000, 0x2000  # RTM_F_*
_RTA_SRC, _RTA_IIF, _RTA_VIA, _RTA_IP_PROTO, _RTA_DPORT = 2, 3, 18, 27, 29
_NDA_MASTER = 9
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 4, 10, 18
_INFO_KIND, _INFO_DATA = 1, 2
_VXLAN_ID, _VXLAN_LINK, _VXLAN_LOCAL, _VXLAN_PORT, _VXLAN_LOCAL6 = 1, 3, 4, 15, 17
_FRA_TABLE, _FRA_PRIORITY = 15, 6
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_UP, _RUNNING = 0x1, 0x40
_PROTOCOLS = {4: {"icmp": 1, "udp": 17, "tcp": 6}, 16: {"icmp": 58, "udp": 17, "tcp": 6}}
_PROC_NET = Path("/proc/sys/net")


class _Answer(NamedTuple):
    kind: int
    body: bytes


class Queries:
    """One socket for all questions. OSError where the kernel does not answer."""

    def __init__(self) -> None:
        self._socket = netlink.open_socket(socket.NETLINK_ROUTE, BUFFER)
        self._socket.settimeout(SECONDS)
        self._number = 0
        self.links = {link.number: link for link in self._links()}
        """All interfaces, as they were when this was made."""
        self.addresses = self._addresses()
        """This host's own, packed, with the index of the interface of each."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    # --- routes ---

    def way(self, dst: bytes, *, src: bytes = b"", into: int = 0, protocol: str = "", port: int = 0) -> Way:
        """The way of a packet to `dst`: of this host's own, or of one from `src` that comes in by `into`."""
        body = rtnl.attribute(rtnl.RTA_DST, dst)
        if src:
            body += rtnl.attribute(_RTA_SRC, src)
        if into:
            body += rtnl.attribute(_RTA_IIF, _U32.pack(into))
        if protocol:
            body += rtnl.attribute(_RTA_IP_PROTO, bytes((_PROTOCOLS[len(dst)][protocol],)))
            if protocol != "icmp" and port:
                body += rtnl.attribute(_RTA_DPORT, port.to_bytes(2, "big"))
        code, answers = self._ask(rtnl.GETROUTE, 0, self._route_head(dst, src, 0) + body)
        if code or not answers:
            return Way(errno=code or errno.ESRCH)
        way = _way(answers[0].body)
        # And the entry that was matched, as somebody has written it.
        code, answers = self._ask(rtnl.GETROUTE, 0, self._route_head(dst, src, _FIB_MATCH) + body)
        if code or not answers:
            return way
        entry = _way(answers[0].body)
        return way._replace(
            entry=entry.entry,
            table=entry.table,
            protocol=entry.protocol,
            mtu=min(filter(None, (way.mtu, entry.mtu)), default=0),
        )

    @staticmethod
    def _route_head(dst: bytes, src: bytes, flags: int) -> bytes:
        lengths = 8 * len(dst), 8 * len(src)
        return _RTMSG.pack(rtnl.FAMILY[len(dst)], *lengths, 0, 0, 0, 0, 0, _LOOKUP_TABLE | flags)

    def refusals(self, dst: bytes) -> list[Way]:
        """The routes to a block that holds `dst` which refuse or lose packets, the longest first."""
        found = [
            way
            for way in self.routes(len(dst))
            if way.kind in (6, 7, 8) and way.entry is not None and way.entry.holds(dst)
        ]
        return sorted(found, key=lambda way: -way.entry.length if way.entry else 0)

    def routes(self, family: int) -> Iterator[Way]:
        """All routes of a family (the length of an address), of all tables; those on nexthop objects have no device."""
        body = _RTMSG.pack(rtnl.FAMILY[family], 0, 0, 0, 0, 0, 0, 0, 0)
        return (_way(answer.body) for answer in self._ask(rtnl.GETROUTE, rtnl.DUMP, body)[1])

    def rules(self, family: int) -> list[PolicyRule]:
        """The policy rules of a family (the length of an address): priority and table of each."""
        found = []
        body = _RTMSG.pack(rtnl.FAMILY[family], 0, 0, 0, 0, 0, 0, 0, 0)
        for answer in self._ask(_GETRULE, rtnl.DUMP, body)[1]:
            attributes = rtnl.attributes(answer.body, _RTMSG.size)
            table = _number(attributes.get(_FRA_TABLE)) or answer.body[4]
            found.append(PolicyRule(_number(attributes.get(_FRA_PRIORITY)), table))
        return found

    # --- neighbours and MACs ---

    def neighbour(self, address: bytes, device: int) -> Hop | None:
        """The neighbour entry, None if there is none."""
        head = _NDMSG.pack(rtnl.FAMILY[len(address)], 0, 0, device, 0, 0, 0)
        code, answers = self._ask(rtnl.GETNEIGH, 0, head + rtnl.attribute(rtnl.NDA_DST, address))
        if code or not answers:
            return None
        _, _, _, _, state, _, _ = _NDMSG.unpack_from(answers[0].body)
        return Hop(rtnl.attributes(answers[0].body, _NDMSG.size).get(rtnl.NDA_LLADDR, b""), state)

    def remote(self, mac: bytes, device: int) -> bytes | None:
        """The packed underlay address that the VXLAN `device` sends frames for `mac` to; None without an entry."""
        head = _NDMSG.pack(rtnl.AF_BRIDGE, 0, 0, device, 0, rtnl.NTF_SELF, 0)
        code, answers = self._ask(rtnl.GETNEIGH, 0, head + rtnl.attribute(rtnl.NDA_LLADDR, mac))
        if code or not answers:
            return None
        return rtnl.attributes(answers[0].body, _NDMSG.size).get(rtnl.NDA_DST, b"")

    def bridge_port(self, mac: bytes, bridge: int) -> int | None:
        """The interface behind which the bridge knows `mac`, None if it does not."""
        head = _NDMSG.pack(rtnl.AF_BRIDGE, 0, 0, 0, 0, 0, 0)
        body = rtnl.attribute(rtnl.NDA_LLADDR, mac) + rtnl.attribute(_NDA_MASTER, _U32.pack(bridge))
        code, answers = self._ask(rtnl.GETNEIGH, 0, head + body)
        return None if code or not answers else int(_NDMSG.unpack_from(answers[0].body)[3])

    # --- settings ---

    @staticmethod
    def entrance(version: int, device: str) -> Entrance:
        """What holds for packets that come in by `device`, of IP `version` 4 or 6."""

        def value(name: str, setting: str) -> int:
            try:
                return int((_PROC_NET / f"ipv{version}/conf" / name / setting).read_text())
            except (OSError, ValueError):
                return 0

        if version == 4:
            forwards = bool(value(device, "forwarding"))
            # The higher one holds (Documentation/networking/ip-sysctl.rst).
            return Entrance(device, forwards, max(value("all", "rp_filter"), value(device, "rp_filter")))
        forwards = bool(value("all", "forwarding") or value(device, "force_forwarding"))
        return Entrance(device, forwards, 0)

    # --- what there is ---

    def _links(self) -> list[Link]:
        return [_link(answer.body) for answer in self._ask(_GETLINK, rtnl.DUMP, _IFINFO.pack(0, 0, 0, 0, 0))[1]]

    def _addresses(self) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for answer in self._ask(_GETADDR, rtnl.DUMP, _IFADDR.pack(0, 0, 0, 0, 0))[1]:
            attributes = rtnl.attributes(answer.body, _IFADDR.size)
            address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS, b"")
            found[address] = _IFADDR.unpack_from(answer.body)[4]
        return found

    def _ask(self, kind: int, flags: int, body: bytes) -> tuple[int, list[_Answer]]:
        """(errno, the answers)."""
        self._number += 1
        head = rtnl.HEADER.pack(16 + len(body), kind, rtnl.REQUEST | flags, self._number, 0)
        self._socket.send(head + body)
        answers: list[_Answer] = []
        while True:
            buffer = self._socket.recv(1 << 18)
            for message in rtnl.messages(buffer):
                if message.sequence != self._number:
                    continue
                if message.kind in (rtnl.NLMSG_ERROR, rtnl.NLMSG_DONE):
                    return rtnl.error_of(buffer, message), answers
                answers.append(_Answer(message.kind, buffer[message.body : message.end]))
                if flags != rtnl.DUMP:
                    return 0, answers


def _way(body: bytes) -> Way:
    family, length, _, _, table, protocol, _, kind, _ = _RTMSG.unpack_from(body)
    attributes = rtnl.attributes(body, _RTMSG.size)
    size = 4 if family == socket.AF_INET else 16
    metrics = rtnl.attributes(attributes.get(rtnl.RTA_METRICS, b""), 0)
    # RTA_VIA: an address of another family, after its number.
    gateway = attributes.get(rtnl.RTA_GATEWAY) or attributes.get(_RTA_VIA, b"")[2:]
    return Way(
        kind=kind,
        device=_number(attributes.get(rtnl.RTA_OIF)),
        gateway=gateway,
        mtu=_number(metrics.get(rtnl.RTAX_MTU)),
        entry=Prefix(attributes.get(rtnl.RTA_DST, bytes(size)), length),
        table=_number(attributes.get(rtnl.RTA_TABLE)) or table,
        protocol=protocol,
    )


def _link(body: bytes) -> Link:
    _, _, index, flags, _ = _IFINFO.unpack_from(body)
    attributes = rtnl.attributes(body, _IFINFO.size)
    info = rtnl.attributes(attributes.get(_IFLA_LINKINFO, b""), 0)
    kind = info.get(_INFO_KIND, b"").rstrip(b"\0").decode()
    data = rtnl.attributes(info.get(_INFO_DATA, b""), 0) if kind == "vxlan" else {}
    return Link(
        number=index,
        name=os.fsdecode(attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0")),
        up=bool(flags & _UP),
        running=bool(flags & _RUNNING),
        mtu=_number(attributes.get(_IFLA_MTU)),
        kind=kind,
        mac=attributes.get(_IFLA_ADDRESS, b""),
        master=_number(attributes.get(_IFLA_MASTER)),
        lower=_number(data.get(_VXLAN_LINK)),
        vni=_number(data.get(_VXLAN_ID)),
        port=int.from_bytes(data.get(_VXLAN_PORT, b""), "big"),
        local=data.get(_VXLAN_LOCAL) or data.get(_VXLAN_LOCAL6, b""),
    )


def _number(value: bytes | None) -> int:
    return int(_U32.unpack(value)[0]) if value is not None and len(value) == 4 else 0
