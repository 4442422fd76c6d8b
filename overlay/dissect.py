"""One frame, decoded: from bytes to `packets.Packet`, with what is off about it (RFC 7348 section 5, and the leases).

Pure: no sockets, no files, no clock. The headers that nearly every packet has are read at their fixed places, which
takes a quarter of the time that scapy takes for them. scapy decodes and names all others, each header by itself, so
that lengths are checked before; what is in a tunnel is told by the network's port, not by the ports that scapy knows.
In the tests its frames say whether all of it is right. It is imported with the first packet: an agent never needs it.

Checksums. A kernel may leave those of TCP and UDP to hardware: what it sends, and what it has received for a pod of its
own and merged, then carries the sum of the pseudo header alone (CHECKSUM_PARTIAL, linux/skbuff.h), the outer UDP
checksum being that of the finished packet. Nothing is said of such ones, whether the kernel tells (`unfinished`) or the
sum itself. Nor of what cannot be computed: fragments, cut-off packets.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

from overlay.packets import Ethernet, Fragment, Ip, Packet, Remark
from overlay.roster import Member, Roster
from subnet_lease.model import format_address, format_mac, pack_mac

NOBODY = Roster()
"""Where no lease is known."""

ETHERNET, VXLAN_HEADER = 14, 8
_VNI_FLAG, _GROUP_FLAG = 0x08, 0x80
_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_VLANS = (0x8100, 0x88A8)
_TCP, _UDP, _ICMP, _ICMP6, _FRAGMENT = 6, 17, 1, 58, 44
_EXTENSIONS = (0, 43, 60)  # hop-by-hop, routing, destination options: next header, and a length in units of 8 bytes
_ND = range(133, 138)
_NAMES = {_TCP: "tcp", _UDP: "udp", _ICMP: "icmp", _ICMP6: "icmp"}
_PORTS_OF_VXLAN = (8472, 4789)

_IPV4_HEADER = struct.Struct("!2xHHHBB2x4s4s")  # length, number, flags and offset, TTL, protocol, source, destination
_IPV6_HEADER = struct.Struct("!4xHBB16s16s")  # length of what follows, next header, hop limit, source, destination
_TCP_HEADER = struct.Struct("!HH8xH")  # ports, data offset and flags
_UDP_HEADER = struct.Struct("!HHHH")  # ports, length, checksum
_TCP_FLAGS = "FSRPAUECN"
_MORE_FRAGMENTS, _OFFSET = 0x2000, 0x1FFF


def dissect(data: bytes, roster: Roster = NOBODY, *, unfinished: bool = False, length: int = 0) -> Packet:
    """The frame `data`, from its Ethernet header on. `length` is what it had on the wire, if the capture cut it off.

    `unfinished`: the kernel says that checksums are not computed yet.
    """
    outer = _decoded(data, "", unfinished)
    cut: list[Remark] = []
    if length > len(data):
        cut.append(Remark("truncated", f"the capture has {len(data)} of its {length} bytes"))
        outer.remarks = [remark for remark in outer.remarks if remark.kind != "truncated"]
        outer.checksums = []
    length = max(length, len(data))
    if outer.ip is None or outer.ip.protocol != "udp" or outer.ip.dst_port != roster.port:
        return _plain(outer, roster, length, cut)
    return _tunnelled(outer, roster, length, cut)


def _plain(frame: "_Decoded", roster: Roster, length: int, cut: list[Remark]) -> Packet:
    sender = receiver = None
    if frame.ip is not None:
        sender = roster.owner(frame.ip.src) or roster.host(frame.ip.src)
        receiver = roster.owner(frame.ip.dst) or roster.host(frame.ip.dst)
    return Packet(
        length=length,
        ethernet=frame.ethernet,
        outer=None,
        vni=None,
        inner_ethernet=frame.ethernet,
        inner=frame.ip,
        protocol=frame.protocol,
        what=frame.what,
        sender=sender,
        receiver=receiver,
        remarks=(*cut, *frame.remarks, *frame.checksums),
    )


def _tunnelled(outer: "_Decoded", roster: Roster, length: int, cut: list[Remark]) -> Packet:
    assert outer.ip is not None
    sender, receiver = roster.host(outer.ip.src), roster.host(outer.ip.dst)
    remarks = [*cut, *map(_of_outer, outer.remarks)]
    for what, address, member in (("source", outer.ip.src, sender), ("destination", outer.ip.dst, receiver)):
        if roster.members and member is None:
            remarks.append(Remark("unknown-vtep", f"outer {what} {format_address(address)} is in no lease"))
    packet = Packet(
        length=length,
        ethernet=outer.ethernet,
        outer=outer.ip,
        vni=None,
        inner_ethernet=None,
        inner=None,
        protocol="",
        what="VXLAN header cut off",
        sender=sender,
        receiver=receiver,
        remarks=(),
    )
    header, inside = outer.payload[:VXLAN_HEADER], outer.payload[VXLAN_HEADER:]
    if len(header) < VXLAN_HEADER:
        remarks.append(Remark("truncated", f"{len(header)} bytes are no VXLAN header, which has {VXLAN_HEADER}"))
        return packet._replace(remarks=(*remarks, *map(_of_outer, outer.checksums)))
    vni = int.from_bytes(header[4:7], "big")
    remarks += _header_remarks(header, vni, roster)
    inner = _decoded(inside, "inner ", outer.told_unfinished)
    if cut or outer.remarks:
        # What is missing is missing outside already.
        inner.remarks = [remark for remark in inner.remarks if remark.kind != "truncated"]
        inner.checksums = []
    remarks += inner.remarks
    remarks += _inner_remarks(inner, sender, receiver, len(outer.ip.src), roster)
    # The outer checksum is that of the finished packet.
    outer_checksums = [] if inner.unfinished else [_of_outer(remark) for remark in outer.checksums]
    return packet._replace(
        vni=vni,
        inner_ethernet=inner.ethernet,
        inner=inner.ip,
        protocol=inner.protocol,
        what=inner.what,
        remarks=(*remarks, *outer_checksums, *inner.checksums),
    )


def _of_outer(remark: Remark) -> Remark:
    return remark._replace(text=f"outer {remark.text}")


def _header_remarks(header: bytes, vni: int, roster: Roster) -> list[Remark]:
    """RFC 7348 section 5; with group policies their flag and the group's number are no reserved bits."""
    remarks = []
    flags = header[0]
    known = _VNI_FLAG | (_GROUP_FLAG if roster.gbp else 0)
    rest = header[7:8] if roster.gbp and flags & _GROUP_FLAG else header[1:4] + header[7:8]
    if not flags & _VNI_FLAG:
        remarks.append(Remark("no-vni-flag", f"VXLAN flags are {flags:#04x}: the I flag is missing"))
    if flags & ~known or any(rest):
        remarks.append(Remark("reserved-bits", f"reserved bits of the VXLAN header are set: {header.hex(' ')}"))
    if roster.vni is not None and vni != roster.vni:
        remarks.append(Remark("wrong-vni", f"VNI {vni}, the network's is {roster.vni}"))
    return remarks


def _inner_remarks(
    inner: "_Decoded", sender: Member | None, receiver: Member | None, family: int, roster: Roster
) -> list[Remark]:
    """What the leases of both hosts, and a network without groups and without questions, say of the inner frame."""
    remarks = []
    if inner.ethernet is not None:
        for what, mac, member in (
            ("source", inner.ethernet.src, sender),
            ("destination", inner.ethernet.dst, receiver),
        ):
            right = member.macs.get(family) if member is not None else None
            if right is not None and pack_mac(mac) != right and not (what == "destination" and _is_group(mac)):
                remarks.append(Remark("wrong-mac", f"inner {what} MAC {mac}, {member}'s is {format_mac(right)}"))
        if inner.ethernet.dst == "ff:ff:ff:ff:ff:ff":
            remarks.append(Remark("broadcast", "inner broadcast"))
        elif _is_group(inner.ethernet.dst):
            remarks.append(Remark("multicast", f"inner multicast, to {inner.ethernet.dst}"))
    if inner.protocol in ("arp", "nd"):
        remarks.append(Remark(inner.protocol, f"{'ARP' if inner.protocol == 'arp' else 'neighbour discovery'} inside"))
    ip = inner.ip
    if ip is None or inner.protocol == "nd":
        return remarks
    for kind, what, address, member in (
        ("foreign-source", "source", ip.src, sender),
        ("foreign-destination", "destination", ip.dst, receiver),
    ):
        if member is not None and not any(subnet.holds(address) for subnet in member.subnets):
            if what == "destination" and _is_multicast(address):
                continue
            has = " and ".join(map(str, member.subnets))
            remarks.append(Remark(kind, f"inner {what} {format_address(address)} is not in {member}'s {has}"))
    if ip.protocol == "udp" and ip.dst_port is not None and ip.dst_port in (roster.port, *_PORTS_OF_VXLAN):
        remarks.append(Remark("nested", f"VXLAN inside, to UDP port {ip.dst_port}"))
    return remarks


def _is_group(mac: str) -> bool:
    return bool(int(mac[:2], 16) & 1)


def _is_multicast(address: bytes) -> bool:
    return address[0] == 0xFF if len(address) == 16 else address[0] >= 224


# --- one frame, header by header ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Decoded:
    """What a frame says by itself. `where` begins its remarks; `payload` is what follows a UDP header.

    `told_unfinished`: by the kernel; `unfinished`: that, or by a checksum of its own.
    """

    where: str
    told_unfinished: bool
    ethernet: Ethernet | None = None
    ip: Ip | None = None
    protocol: str = ""
    what: str = ""
    payload: bytes = b""
    unfinished: bool = False
    remarks: list[Remark] = field(default_factory=list)
    checksums: list[Remark] = field(default_factory=list)

    def remark(self, kind: str, text: str) -> None:
        self.remarks.append(Remark(kind, self.where + text))

    def short(self, what: str, have: int, need: int) -> None:
        """The frame ends before the header does."""
        self.remark("truncated", f"{what} cut off: {have} of {need} bytes")
        self.what = self.what or f"{what}, cut off"


def _decoded(data: bytes, where: str, unfinished: bool) -> _Decoded:
    frame = _Decoded(where, unfinished, unfinished=unfinished)
    if len(data) < ETHERNET:
        frame.short("Ethernet header", len(data), ETHERNET)
        return frame
    frame.ethernet = Ethernet(data[6:12].hex(":"), data[:6].hex(":"))
    kind, at = int.from_bytes(data[12:14], "big"), ETHERNET
    while kind in _VLANS and len(data) >= at + 4:
        tag = _layers().Dot1Q(data[at : at + 4])
        if where:
            frame.remark("vlan", f"VLAN tag {tag.vlan}")
        kind, at = tag.type, at + 4
    body = data[at:]
    if kind == _IPV4:
        _ipv4(frame, body)
    elif kind == _IPV6:
        _ipv6(frame, body)
    elif kind == _ARP:
        _arp(frame, body)
    else:
        frame.protocol = f"{kind:#06x}"
        # Below 0x600 it is a length (IEEE 802.3).
        words = f"Ethernet type {kind:#06x}" if kind >= 0x600 else "IEEE 802.3"
        frame.what = f"{frame.ethernet.src} > {frame.ethernet.dst}  {words}, {len(body)} bytes"
    return frame


def _arp(frame: _Decoded, body: bytes) -> None:
    frame.protocol = "arp"
    if len(body) < 28:
        frame.short("ARP", len(body), 28)
        return
    arp = _layers().ARP(body[:28])
    if arp.op == 1:
        frame.what = f"ARP who has {arp.pdst}, tell {arp.psrc}"
    else:
        frame.what = f"ARP reply {arp.psrc} is at {arp.hwsrc}" if arp.op == 2 else f"ARP operation {arp.op}"


def _ipv4(frame: _Decoded, body: bytes) -> None:
    size = (body[0] & 0x0F) * 4 if body else 0
    if len(body) < max(20, size) or size < 20:
        frame.short("IPv4 header", len(body), max(20, size))
        return
    said, ident, offset, ttl, number, src, dst = _IPV4_HEADER.unpack_from(body)
    # 0: longer than the field can say, to be cut into segments (include/linux/skbuff.h, BIG TCP).
    total = said or len(body)
    if said and (wrong := _wrong(body[:size], 10, b"")):
        frame.checksums.append(Remark("checksum", f"{frame.where}IPv4 header checksum {wrong}"))
    more, at = bool(offset & _MORE_FRAGMENTS), (offset & _OFFSET) * 8
    fragment = Fragment(ident, at, more) if at or more else None
    header = Ip(src, dst, ttl, total, str(number), fragment=fragment)
    _transport(frame, header, number, body[size:total], total - size)


def _ipv6(frame: _Decoded, body: bytes) -> None:
    if len(body) < 40:
        frame.short("IPv6 header", len(body), 40)
        return
    said, number, ttl, src, dst = _IPV6_HEADER.unpack_from(body)
    total = 40 + said if said else len(body)
    at, fragment = 40, None
    while number in (*_EXTENSIONS, _FRAGMENT) and len(body) >= at + 8:
        if number == _FRAGMENT:
            part = _layers().IPv6ExtHdrFragment(body[at : at + 8])
            # The first and the last part may be one (RFC 6946).
            if part.offset or part.m:
                fragment = Fragment(part.id, part.offset * 8, bool(part.m))
            number, at = part.nh, at + 8
        else:
            number, at = body[at], at + 8 * (body[at + 1] + 1)
    header = Ip(src, dst, ttl, total, str(number), fragment=fragment)
    _transport(frame, header, number, body[at:total], total - at)


def _transport(frame: _Decoded, ip: Ip, number: int, body: bytes, size: int) -> None:
    """What follows the IP headers: `size` bytes, of which `body` is there."""
    name = _NAMES.get(number, str(number))
    frame.ip = ip._replace(protocol=name)
    frame.protocol = name
    if size < 0 or len(body) < size:
        have, says = ip.length - size + len(body), ip.length
        frame.remark("truncated", f"IP packet cut off: {have} of {says} bytes")
    if ip.fragment is not None:
        frame.remark("fragment", f"fragment, {_fragment(ip.fragment)}")
        if ip.fragment.offset:
            frame.what = _told(frame, f"{name.upper()} {_fragment(ip.fragment)}, {len(body)} bytes")
            return
    decode, least = _DECODERS.get(number, (None, 0))
    if decode is None:
        words = f"IP protocol {number}, {size} bytes"
    elif len(body) < least:
        if len(body) >= size:
            frame.short(f"{name.upper()} header", len(body), least)
        words = f"{name.upper()} header cut off"
    else:
        words = decode(frame, body, size)
    frame.what = _told(frame, words)


def _told(frame: _Decoded, words: str) -> str:
    assert frame.ip is not None
    frame.ip = frame.ip._replace(what=words)
    return str(frame.ip)


def _fragment(fragment: Fragment) -> str:
    return f"{fragment.ident:#x} at {fragment.offset}" + ("" if fragment.more else ", the last")


def _tcp(frame: _Decoded, body: bytes, size: int) -> str:
    sport, dport, bits = _TCP_HEADER.unpack_from(body)
    header = (bits >> 12) * 4
    if not 20 <= header <= size:
        frame.remark("truncated", f"TCP header of {header} bytes in {size}")
    flags = "".join(letter for number, letter in enumerate(_TCP_FLAGS) if bits >> number & 1)
    assert frame.ip is not None
    frame.ip = frame.ip._replace(src_port=sport, dst_port=dport, flags=flags)
    _verify(frame, "TCP", _TCP, body, size, 16)
    return f"TCP {sport} > {dport} [{flags}], {max(0, size - header)} bytes"


def _udp(frame: _Decoded, body: bytes, size: int) -> str:
    sport, dport, said, found = _UDP_HEADER.unpack_from(body)
    said = said or size
    assert frame.ip is not None
    frame.ip = frame.ip._replace(src_port=sport, dst_port=dport)
    if frame.ip.fragment is None and not 8 <= said <= size:
        frame.remark("truncated", f"UDP length is {said}, in {size} bytes")
    frame.payload = body[8 : max(8, said)]
    # 0 is none, which over IPv6 tunnels alone may do without (RFC 6935).
    if found or (len(frame.ip.src) == 16 and frame.where):
        _verify(frame, "UDP", _UDP, body[:said], min(size, said), 6)
    return f"UDP {sport} > {dport}, {said - 8} bytes"


def _icmp(frame: _Decoded, body: bytes, size: int) -> str:
    scapy = _layers()
    icmp = scapy.ICMP(body[:8])
    _verify(frame, "ICMP", None, body, size, 2)
    words = scapy.icmptypes.get(icmp.type, f"type {icmp.type}").replace("-", " ")
    if icmp.type in (0, 8):
        return f"ICMP {words} {icmp.id}/{icmp.seq}, {size - 8} bytes"
    return f"ICMP {words}" + (f", {_code(scapy, icmp)}" if icmp.type in (3, 11) else "")


def _code(scapy: Any, icmp: Any) -> str:
    name = str(scapy.icmpcodes.get(icmp.type, {}).get(icmp.code, f"code {icmp.code}")).replace("-", " ")
    return f"{name}, MTU {icmp.nexthopmtu}" if (icmp.type, icmp.code) == (3, 4) else name


def _icmp6(frame: _Decoded, body: bytes, size: int) -> str:
    scapy = _layers()
    kind, code = body[0], body[1]
    _verify(frame, "ICMPv6", _ICMP6, body, size, 2)
    words = str(scapy.icmp6types.get(kind, f"type {kind}")).lower().replace("neighbor", "neighbour")
    if kind in _ND:
        frame.protocol = "nd"
        assert frame.ip is not None
        frame.ip = frame.ip._replace(protocol="nd")
        if kind in (135, 136) and len(body) >= 24:
            words += (" for " if kind == 135 else " of ") + format_address(body[8:24])
    elif kind in (128, 129):
        echo = scapy.ICMPv6EchoRequest(body[:8])
        return f"ICMPv6 {words} {echo.id}/{echo.seq}, {size - 8} bytes"
    elif kind == 2:
        words += f", MTU {int.from_bytes(body[4:8], 'big')}"
    elif kind in (1, 3):
        words += f", code {code}"
    return f"ICMPv6 {words}"


_DECODERS: dict[int, tuple[Callable[[_Decoded, bytes, int], str], int]] = {
    _TCP: (_tcp, 20),
    _UDP: (_udp, 8),
    _ICMP: (_icmp, 8),
    _ICMP6: (_icmp6, 8),
}
"""By protocol number: what decodes it, and how many bytes that takes."""


# --- checksums ---------------------------------------------------------------------------------------------------


def _verify(frame: _Decoded, name: str, number: int | None, body: bytes, size: int, at: int) -> None:
    """Note a wrong checksum at offset `at`; `number` is the protocol's in the pseudo header, None if it has none."""
    ip = frame.ip
    assert ip is not None
    if ip.fragment is not None or len(body) < size or (frame.unfinished and number in (_TCP, _UDP)):
        return
    pseudo = b""
    if number is not None:
        # RFC 9293 section 3.1, RFC 8200 section 8.1; for IPv4 the sum is the same with a length of four bytes.
        pseudo = ip.src + ip.dst + size.to_bytes(4, "big") + bytes((0, 0, 0, number))
    if wrong := _wrong(body, at, pseudo):
        found = int.from_bytes(body[at : at + 2], "big")
        if number in (_TCP, _UDP) and found == 0xFFFF ^ _sum(pseudo):
            frame.unfinished = True
            return
        frame.checksums.append(Remark("checksum", f"{frame.where}{name} checksum {wrong}"))


def _wrong(data: bytes, at: int, pseudo: bytes) -> str:
    """Empty if the checksum at offset `at` is right, else what it is and what it should be (RFC 1071)."""
    if _sum(pseudo + data) == 0:
        return ""
    found = int.from_bytes(data[at : at + 2], "big")
    right = _sum(pseudo + data[:at] + b"\0\0" + data[at + 2 :])
    # Of the two zeros, UDP uses the one for no checksum.
    return f"is {found:#06x}, right were {right or 0xFFFF:#06x}"


def _sum(data: bytes) -> int:
    return int(_layers().checksum(data))


@cache
def _layers() -> Any:
    """What is used of scapy, in one namespace."""
    import logging

    # It tells of routes that the host lacks, which nobody here asks for.
    logging.getLogger("scapy.runtime").setLevel(logging.ERROR)
    from scapy.layers.inet import ICMP, icmpcodes, icmptypes
    from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6ExtHdrFragment, icmp6types
    from scapy.layers.l2 import ARP, Dot1Q
    from scapy.utils import checksum

    return SimpleNamespace(
        ARP=ARP, Dot1Q=Dot1Q, checksum=checksum, ICMP=ICMP, icmpcodes=icmpcodes, icmptypes=icmptypes,
        ICMPv6EchoRequest=ICMPv6EchoRequest, IPv6ExtHdrFragment=IPv6ExtHdrFragment, icmp6types=icmp6types,
    )  # fmt: skip
