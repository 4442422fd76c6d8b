"""The rtnetlink codec: bytes for exactly the message kinds that are programmed at scale, and back.

Owns the layout of FDB, neighbour, nexthop and route messages (include/uapi/linux/{neighbour,nexthop,rtnetlink}.h) and
of the headers that tell what a notification is about. No sockets: `kernel` sends and receives. General netlink
libraries spend hundreds of microseconds on a message, which is minutes at 15,000 hosts; here it is a few. Whatever is
not programmed at scale (devices, addresses) is not here.

Byte order is the host's own, as netlink has it; addresses inside attributes are in network order.
"""

import errno
import struct
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from overlay.model import PROTOCOL, PROTOCOL_BOOT, Entry, Fdb, Gone, Guard, Neighbour, NextHop, Route, Sight
from subnet_lease.model import Prefix

# Message types.
NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE = 1, 2, 3
NEWLINK, DELLINK = 16, 17
NEWADDR, DELADDR = 20, 21
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWNEXTHOP, DELNEXTHOP, GETNEXTHOP = 104, 105, 106

# Header flags.
REQUEST, ACK, DUMP_INTERRUPTED = 0x1, 0x4, 0x10
REPLACE, CREATE, DUMP = 0x100, 0x400, 0x300

AF_INET, AF_BRIDGE, AF_INET6 = 2, 7, 10
FAMILY = {4: AF_INET, 16: AF_INET6}
"""Address family by the length of a packed address."""

NTF_SELF = 0x02
RT_TABLE_MAIN = 254
RTPROT_UNSPEC = 0
RTN_BLACKHOLE = 6
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
RTM_F_CLONED = 0x200
RTNH_F_ONLINK = 4

NDA_DST, NDA_LLADDR, NDA_CACHEINFO, NDA_PROBES, NDA_PORT, NDA_VNI, NDA_IFINDEX = 1, 2, 3, 4, 6, 7, 8
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_TABLE, RTA_NH_ID = 1, 4, 5, 6, 15, 30
RTA_PREFSRC, RTA_METRICS, RTA_FLOW, RTA_ENCAP = 7, 8, 11, 22
RTAX_MTU = 2
IP6_RT_PRIO_USER = 1024  # What IPv6 makes of no metric (linux/ipv6_route.h).
_LAST = 0xFFFFFFFF  # The metric behind all others.
NHA_ID, NHA_OIF, NHA_GATEWAY = 1, 5, 6

HEADER = struct.Struct("=IHHII")  # nlmsg_len, nlmsg_type, nlmsg_flags, nlmsg_seq, nlmsg_pid
_NDMSG = struct.Struct("=BBHiHBB")  # family, pad, pad, ifindex, state, flags, type
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NHMSG = struct.Struct("=BBBBI")  # family, scope, protocol, reserved, flags
_IFINDEX = struct.Struct("=xxxxi")  # of both ifinfomsg and ifaddrmsg
_SCOPE_AT = 3  # ifa_scope in ifaddrmsg
_ATTR = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_ERROR = struct.Struct("=i")

# Whole messages as they are put: header, body, attributes. Packed in one call, for they are made by the ten thousand.
# By the length of an address, which is all that differs between the families.
_PUT_FDB = {size: struct.Struct(f"=IHHII BBHiHBB HH6s2x HH{size}s") for size in FAMILY}
_PUT_NEIGHBOUR = {size: struct.Struct(f"=IHHII BBHiHBB HH{size}s HH6s2x") for size in FAMILY}
_PUT_NEXTHOP = {size: struct.Struct(f"=IHHII BBBBI HHI HH{size}s HHI") for size in FAMILY}
_PUT_ROUTE = {size: struct.Struct(f"=IHHII BBBBBBBBI HH{size}s HHI") for size in FAMILY}
_PUT_PLAIN_ROUTE = {size: struct.Struct(f"=IHHII BBBBBBBBI HH{size}s HH{size}s HHI") for size in FAMILY}
_PUT_MTU = struct.Struct("=HH HHI")


# Bodies as the kernel (6.18) writes what we have put. Anything else is read attribute by attribute, to the same result.
_USUAL_FDB = struct.Struct("=BBHiHBB I6s2x I4s I16x")
_USUAL_NEIGHBOUR = struct.Struct("=BBHiHBB I4s I6s2x I4x I16x")
_USUAL_NEXTHOP = struct.Struct("=BBBBI II II I4s")
_USUAL_ROUTE = struct.Struct("=BBBBBBBBI II I4s II I4s II")


def _heads(*attributes: tuple[int, int]) -> tuple[int, ...]:
    """(length, type) of attributes as the numbers that `_USUAL_*` read."""
    return tuple(_U32.unpack(_ATTR.pack(4 + length, kind))[0] for length, kind in attributes)


_FDB_HEADS = _heads((6, NDA_LLADDR), (4, NDA_DST), (16, NDA_CACHEINFO))
_NEIGHBOUR_HEADS = _heads((4, NDA_DST), (6, NDA_LLADDR), (4, NDA_PROBES), (16, NDA_CACHEINFO))
_NEXTHOP_HEADS = _heads((4, NHA_ID), (4, NHA_OIF), (4, NHA_GATEWAY))
_ROUTE_HEADS = _heads((4, RTA_TABLE), (4, RTA_DST), (4, RTA_NH_ID), (4, RTA_GATEWAY), (4, RTA_OIF))
_PLAIN_MAIN = (AF_INET, 0, 0, RT_TABLE_MAIN)
_NO_ADDRESS = {AF_INET: bytes(4), AF_INET6: bytes(16)}


class Message(NamedTuple):
    """One message in a buffer: its header, and where its body lies."""

    kind: int
    flags: int
    sequence: int
    port: int
    body: int
    end: int


def messages(buffer: bytes) -> Iterator[Message]:
    """The messages of one datagram."""
    at, size = 0, len(buffer)
    while at + 16 <= size:
        length, kind, flags, sequence, port = HEADER.unpack_from(buffer, at)
        if length < 16 or at + length > size:
            return
        yield Message(kind, flags, sequence, port, at + 16, at + length)
        at += (length + 3) & ~3


def error_of(buffer: bytes, message: Message) -> int:
    """The errno in an NLMSG_ERROR, 0 for an acknowledgement; EBADMSG if there is none."""
    if message.end - message.body < _ERROR.size:
        return errno.EBADMSG
    code: int = _ERROR.unpack_from(buffer, message.body)[0]
    return -code


# --- building ----------------------------------------------------------------------------------------------------


def put(entry: Entry, sequence: int, *, ack: bool = True) -> bytes:
    """A message that makes the kernel's entry equal to `entry`.

    `ack`: whether success is to be answered; a refusal always is. Addresses have 4 or 16 bytes, MACs 6.
    """
    flags = REQUEST | CREATE | REPLACE | (ACK if ack else 0)
    match entry:
        case Fdb():
            (device, mac), remote = entry.at, entry.remote
            size = len(remote)
            layout = _PUT_FDB[size]
            return layout.pack(
                layout.size, NEWNEIGH, flags, sequence, 0,
                AF_BRIDGE, 0, 0, device, entry.state, NTF_SELF, 0,
                10, NDA_LLADDR, mac,
                4 + size, NDA_DST, remote,
            )  # fmt: skip
        case Neighbour():
            device, address = entry.at
            size = len(address)
            layout = _PUT_NEIGHBOUR[size]
            return layout.pack(
                layout.size, NEWNEIGH, flags, sequence, 0,
                FAMILY[size], 0, 0, device, entry.state, 0, 0,
                4 + size, NDA_DST, address,
                10, NDA_LLADDR, entry.mac,
            )  # fmt: skip
        case NextHop():
            size = len(entry.gateway)
            layout = _PUT_NEXTHOP[size]
            return layout.pack(
                layout.size, NEWNEXTHOP, flags, sequence, 0,
                FAMILY[size], 0, entry.protocol, 0, RTNH_F_ONLINK,
                8, NHA_ID, entry.id,
                4 + size, NHA_GATEWAY, entry.gateway,
                8, NHA_OIF, entry.device,
            )  # fmt: skip
        case Route():
            (base, length), mtu = entry.destination, b""
            size = len(base)
            if entry.mtu:
                mtu = _PUT_MTU.pack(_PUT_MTU.size, RTA_METRICS, 8, RTAX_MTU, entry.mtu)
            if entry.nexthop:
                layout = _PUT_ROUTE[size]
                return layout.pack(
                    layout.size + len(mtu), NEWROUTE, flags, sequence, 0,
                    FAMILY[size], length, 0, 0, RT_TABLE_MAIN, entry.protocol, RT_SCOPE_UNIVERSE, entry.kind, 0,
                    4 + size, RTA_DST, base,
                    8, RTA_NH_ID, entry.nexthop,
                ) + mtu  # fmt: skip
            layout = _PUT_PLAIN_ROUTE[size]
            return layout.pack(
                layout.size + len(mtu), NEWROUTE, flags, sequence, 0,
                FAMILY[size], length, 0, 0, RT_TABLE_MAIN, entry.protocol, RT_SCOPE_UNIVERSE, entry.kind, RTNH_F_ONLINK,
                4 + size, RTA_DST, base,
                4 + size, RTA_GATEWAY, entry.gateway,
                8, RTA_OIF, entry.device,
            ) + mtu  # fmt: skip
        case Guard():
            raise ValueError("the guard is no matter of routing")


def drop(entry: Entry, sequence: int, *, ack: bool = True) -> bytes:
    """A message that removes `entry`; the answer is ENOENT or ESRCH where it is absent already. `ack` as in `put`."""
    flags = REQUEST | (ACK if ack else 0)
    match entry:
        case Fdb():
            device, mac = entry.at
            # Without NDA_DST the whole entry goes; with a wrong one the kernel reports success and does nothing.
            body = _NDMSG.pack(AF_BRIDGE, 0, 0, device, entry.state, NTF_SELF, 0) + attribute(NDA_LLADDR, mac)
            return _message(DELNEIGH, flags, sequence, body)
        case Neighbour():
            device, address = entry.at
            body = _NDMSG.pack(FAMILY[len(address)], 0, 0, device, entry.state, 0, 0) + attribute(NDA_DST, address)
            return _message(DELNEIGH, flags, sequence, body)
        case NextHop():
            body = _NHMSG.pack(0, 0, 0, 0, 0) + _number(NHA_ID, entry.id)
            return _message(DELNEXTHOP, flags, sequence, body)
        case Route():
            # Scope "nowhere" matches any; the protocol must match, so that a stranger's route is never hit.
            base, length = entry.destination
            body = _RTMSG.pack(FAMILY[len(base)], length, 0, 0, RT_TABLE_MAIN, entry.protocol, RT_SCOPE_NOWHERE, 0, 0)
            # Where IPv4 sorts by metric, so that ours, of none, is the first that fits, IPv6 must be told it.
            metric = _number(RTA_PRIORITY, IP6_RT_PRIO_USER) if len(base) == 16 else b""
            return _message(DELROUTE, flags, sequence, body + attribute(RTA_DST, base) + metric)
        case Guard():
            raise ValueError("the guard is no matter of routing")


def clear(entry: Entry, sequence: int) -> bytes:
    """A message that removes what keeps the kernel from putting `entry`; answered as `drop` without `ack`.

    IPv4 replaces a stranger's route in place, and only ours may have to go. IPv6 refuses a gateway as long as a route
    leads to it by another device (ip6_route_check_nh_onlink); so that route goes, whoever's it is.
    """
    if isinstance(entry, Route) and len(entry.destination.base) == 16:
        entry = entry._replace(protocol=RTPROT_UNSPEC)
    return drop(entry, sequence, ack=False)


def cover(entry: Entry, sequence: int) -> tuple[bytes, bytes]:
    """Messages before and after, between which `entry` may be removed and put again; unanswered, as those of `clear`.

    A route that is away leaves its packets to a wider one: the default route, which would show them to the underlay.
    So one that drops them stands behind it meanwhile. Empty for entries without which packets go nowhere.
    """
    if not isinstance(entry, Route):
        return b"", b""
    base, length = entry.destination
    # Not of our protocol, by which `clear` tells what is ours.
    body = _RTMSG.pack(
        FAMILY[len(base)], length, 0, 0, RT_TABLE_MAIN, PROTOCOL_BOOT, RT_SCOPE_UNIVERSE, RTN_BLACKHOLE, 0
    )
    body += attribute(RTA_DST, base) + _number(RTA_PRIORITY, _LAST)
    return _message(NEWROUTE, REQUEST | CREATE, sequence, body), _message(DELROUTE, REQUEST, sequence, body)


def end_of_batch(sequence: int) -> bytes:
    """A message that does nothing but get an acknowledgement: then the kernel is through with all before it.

    Messages of one send are carried out in order, each answered at once if it fails (netlink_rcv_skb).
    """
    return _message(NLMSG_NOOP, REQUEST | ACK, sequence, b"")


def dump_requests(tunnels: Iterable[int], links: Iterable[int], nexthops: bool) -> Iterator[bytes]:
    """Requests whose answers together are all entries on the tunnels' devices, and all routes that leave by `links`.

    Both are interface indexes. Needs NETLINK_GET_STRICT_CHK on the socket: without it the kernel ignores the filters.
    """
    dump = REQUEST | DUMP
    tunnels = tuple(tunnels)
    for device in tunnels:
        yield _message(GETNEIGH, dump, 1, _NDMSG.pack(AF_BRIDGE, 0, 0, device, 0, 0, 0))
        for family in _NO_ADDRESS:
            neighbours = _NDMSG.pack(family, 0, 0, 0, 0, 0, 0) + _number(NDA_IFINDEX, device)
            yield _message(GETNEIGH, dump, 2, neighbours)
    for device in (*tunnels, *links):
        for family in _NO_ADDRESS:
            routes = _RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, 0, 0, 0, 0) + _number(RTA_OIF, device)
            yield _message(GETROUTE, dump, 3, routes)
        if nexthops:
            yield nexthop_dump_request(device)


def nexthop_dump_request(device: int = 0) -> bytes:
    """A dump of the nexthop objects on `device`, or of all; EOPNOTSUPP from a kernel that has none."""
    filtered = _number(NHA_OIF, device) if device else b""
    return _message(GETNEXTHOP, REQUEST | DUMP, 4, _NHMSG.pack(0, 0, 0, 0, 0) + filtered)


def marked_dump_requests(nexthops: bool) -> Iterator[bytes]:
    """As `dump_requests`, for the routes of our protocol and all nexthop objects, on whatever device."""
    for family in _NO_ADDRESS:
        yield _message(GETROUTE, REQUEST | DUMP, 3, _RTMSG.pack(family, 0, 0, 0, RT_TABLE_MAIN, PROTOCOL, 0, 0, 0))
    if nexthops:
        yield nexthop_dump_request()


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute of a message, padded (linux/netlink.h, struct nlattr)."""
    return _ATTR.pack(4 + len(value), kind) + value + b"\0" * (-len(value) & 3)


def _number(kind: int, value: int) -> bytes:
    return _ATTR.pack(8, kind) + _U32.pack(value)


# --- reading -----------------------------------------------------------------------------------------------------


def device_of(buffer: bytes, message: Message) -> int:
    """The interface index that a link or address message is about, 0 if it is too short to say.

    0 as well for an address of link scope: the kernel gives and takes those as it likes.
    """
    if message.end - message.body < _IFINDEX.size:
        return 0
    if message.kind in (NEWADDR, DELADDR) and buffer[message.body + _SCOPE_AT] == RT_SCOPE_LINK:
        return 0
    index: int = _IFINDEX.unpack_from(buffer, message.body)[0]
    return index


def sight(buffer: bytes, message: Message, tunnels: Collection[int]) -> Sight | None:
    """What an FDB, neighbour, nexthop or route message says of the keys we use; None if it concerns none of them.

    FDB and neighbour entries of devices other than `tunnels` (interface indexes) concern us not, nor do routes outside
    the main table or with another metric than the usual one.
    """
    entry: Entry | None
    match message.kind:
        case 28 | 29:
            entry = _neighbour(buffer, message, tunnels)
        case 24 | 25:
            entry = _route(buffer, message)
        case 104 | 105:
            entry = _nexthop(buffer, message)
        case _:
            return None
    if entry is None:
        return None
    return Gone(entry) if message.kind in (DELNEIGH, DELROUTE, DELNEXTHOP) else entry


def _neighbour(buffer: bytes, message: Message, tunnels: Collection[int]) -> Fdb | Neighbour | None:
    size = message.end - message.body
    if size == _USUAL_FDB.size:
        family, _, _, index, state, flags, _, a, mac, b, remote, c = _USUAL_FDB.unpack_from(buffer, message.body)
        if (a, b, c) == _FDB_HEADS and family == AF_BRIDGE and index in tunnels and flags & NTF_SELF:
            return Fdb((index, mac), remote, state)
    elif size == _USUAL_NEIGHBOUR.size:
        family, _, _, index, state, _, _, a, address, b, mac, c, d = _USUAL_NEIGHBOUR.unpack_from(buffer, message.body)
        if (a, b, c, d) == _NEIGHBOUR_HEADS and family == AF_INET and index in tunnels:
            return Neighbour((index, address), mac, state)
    if size < _NDMSG.size:
        return None
    family, _, _, index, state, flags, _ = _NDMSG.unpack_from(buffer, message.body)
    if index not in tunnels:
        return None
    attrs = attributes(buffer, message.body + _NDMSG.size, message.end)
    address, mac = attrs.get(NDA_DST, b""), attrs.get(NDA_LLADDR, b"")
    if family != AF_BRIDGE:
        return Neighbour((index, address), mac, state) if FAMILY.get(len(address)) == family else None
    if len(mac) != 6 or not flags & NTF_SELF:
        return None
    if not message.flags & REQUEST and not attrs.keys() & {NDA_DST, NDA_CACHEINFO}:
        # Linux 6.1 announces an FDB entry twice: the device says all there is, then rtnetlink next to nothing.
        return None
    plain = not attrs.keys() & {NDA_PORT, NDA_VNI, NDA_IFINDEX}
    return Fdb((index, mac), address if plain else b"", state)


def _route(buffer: bytes, message: Message) -> Route | None:
    size = message.end - message.body
    if size == _USUAL_ROUTE.size:
        family, length, source, tos, table, protocol, _, kind, flags, a, _, b, base, c, hop, d, _, e, _ = (
            _USUAL_ROUTE.unpack_from(buffer, message.body)
        )
        plain = (family, source, tos, table) == _PLAIN_MAIN and not flags & RTM_F_CLONED and length <= 32
        if plain and (a, b, c, d, e) == _ROUTE_HEADS:
            return Route(Prefix(base, length), hop, b"", 0, protocol, kind)
    if size < _RTMSG.size:
        return None
    family, length, source, tos, table, protocol, _, kind, flags = _RTMSG.unpack_from(buffer, message.body)
    if family not in _NO_ADDRESS or table != RT_TABLE_MAIN or source or tos or flags & RTM_F_CLONED:
        return None
    attrs = attributes(buffer, message.body + _RTMSG.size, message.end)
    if _as_number(attrs.get(RTA_PRIORITY)) != (IP6_RT_PRIO_USER if family == AF_INET6 else 0):
        return None
    destination = Prefix(attrs.get(RTA_DST, _NO_ADDRESS[family]), length)
    if FAMILY.get(len(destination.base)) != family or length > 8 * len(destination.base):
        return None
    index = _as_number(attrs.get(RTA_OIF))
    mtu = _mtu_of(attrs.get(RTA_METRICS, b""))
    if mtu is None or attrs.keys() & {RTA_PREFSRC, RTA_FLOW, RTA_ENCAP}:
        return Route(destination, device=index, protocol=protocol, kind=kind)
    if RTA_NH_ID in attrs:
        return Route(destination, nexthop=_as_number(attrs[RTA_NH_ID]), protocol=protocol, kind=kind, mtu=mtu)
    # Several gateways: nothing we set, and nothing whose parts would need telling apart.
    gateway = attrs.get(RTA_GATEWAY, b"")
    return Route(destination, gateway=gateway, device=index, protocol=protocol, kind=kind, mtu=mtu)


def _mtu_of(metrics: bytes) -> int | None:
    """The MTU if it is the only metric, 0 if there is none, None if there are others."""
    found = attributes(metrics, 0, len(metrics))
    mtu = _as_number(found.pop(RTAX_MTU, None))
    return None if found else mtu


def _nexthop(buffer: bytes, message: Message) -> NextHop | None:
    size = message.end - message.body
    if size == _USUAL_NEXTHOP.size:
        _, _, protocol, _, _, a, number, b, device, c, gateway = _USUAL_NEXTHOP.unpack_from(buffer, message.body)
        if (a, b, c) == _NEXTHOP_HEADS:
            return NextHop(number, gateway, device, protocol)
    if size < _NHMSG.size:
        return None
    _, _, protocol, _, _ = _NHMSG.unpack_from(buffer, message.body)
    attrs = attributes(buffer, message.body + _NHMSG.size, message.end)
    if NHA_ID not in attrs:
        return None
    gateway = attrs.get(NHA_GATEWAY, b"")
    return NextHop(_as_number(attrs[NHA_ID]), gateway, _as_number(attrs.get(NHA_OIF)), protocol)


def attributes(buffer: bytes, at: int = 0, end: int | None = None) -> dict[int, bytes]:
    """Those that stand from `at` to `end`, by kind; what follows one that is cut off is left out."""
    found, end = {}, len(buffer) if end is None else end
    while at + 4 <= end:
        length, kind = _ATTR.unpack_from(buffer, at)
        if length < 4 or at + length > end:
            break
        found[kind & 0x3FFF] = buffer[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def _as_number(value: bytes | None) -> int:
    if value is None or len(value) != 4:
        return 0
    number: int = _U32.unpack(value)[0]
    return number
