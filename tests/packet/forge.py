"""Frames made by hand, byte by byte: right ones, and wrong ones of every kind, without a library's notion of right.

Addresses and MACs are packed: 4 and 16 bytes, 6 bytes. Every length and checksum is filled in, and is what the caller
says where the caller says something. Pure; see `wire` for putting frames on links, and `oracle` for what may come of
them.
"""

import itertools
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

ICMP, TCP, UDP, FRAGMENT, ICMP6, NONE = 1, 6, 17, 44, 58, 59
"""IP protocol numbers (IANA); NONE is IPv6's "no next header", UDP and TCP are the same in both."""

ARP_TYPE, IPV4_TYPE, IPV6_TYPE = 0x0806, 0x0800, 0x86DD

VALID_VNI = 0x08000000
"""The first word of the VXLAN header: the I flag alone (RFC 7348 section 5)."""

MORE = 0x2000
"""The flag of IPv4's "more fragments", in the field it shares with the offset (RFC 791)."""

_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_UDP = struct.Struct("!HHHH")


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    # A number of 16-bit digits is, modulo 0xFFFF, the sum of its digits; only a sum of nothing but zeros is zero.
    number = int.from_bytes(data, "big")
    return 0xFFFF - (number % 0xFFFF or (0xFFFF if number else 0))


def ethernet(dst: bytes, src: bytes, kind: int, payload: bytes) -> bytes:
    """An Ethernet frame, without padding."""
    return dst + src + kind.to_bytes(2, "big") + payload


def ether_type(packet: bytes) -> int:
    """The Ethernet type of an IP packet, by its version."""
    return IPV4_TYPE if packet[0] >> 4 == 4 else IPV6_TYPE


def ipv4(
    src: bytes,
    dst: bytes,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    ident: int = 0,
    fragment: int = 0,
    tos: int = 0,
    options: bytes = b"",
    length: int | None = None,
    check: int | None = None,
) -> bytes:
    """An IPv4 packet. `fragment`: flags and offset as they are in the header."""
    words = 5 + len(options) // 4
    length = 4 * words + len(payload) if length is None else length
    fields = (0x40 | words, tos, length & 0xFFFF, ident, fragment, ttl, protocol)
    if check is None:
        check = checksum(_IPV4.pack(*fields, 0, src, dst) + options)
    return _IPV4.pack(*fields, check, src, dst) + options + payload


def ipv6(
    src: bytes,
    dst: bytes,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    tos: int = 0,
    length: int | None = None,
) -> bytes:
    """An IPv6 packet. `ttl` is its hop limit, `tos` its traffic class."""
    length = len(payload) if length is None else length
    return _IPV6.pack(0x60000000 | tos << 20, length & 0xFFFF, protocol, ttl, src, dst) + payload


def ip(
    src: bytes,
    dst: bytes,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    tos: int = 0,
    length: int | None = None,
    ident: int = 0,
) -> bytes:
    """A packet of the addresses' family; `length` and `ident` as in `ipv4`."""
    if len(src) == 4:
        return ipv4(src, dst, protocol, payload, ttl=ttl, tos=tos, length=length, ident=ident)
    return ipv6(src, dst, protocol, payload, ttl=ttl, tos=tos, length=None if length is None else length - 40)


def header_bytes(address: bytes) -> int:
    """Of an IP header of this address's family, without options."""
    return 20 if len(address) == 4 else 40


def pseudo(src: bytes, dst: bytes, protocol: int, length: int) -> bytes:
    """What checksums of the protocols above IP cover of the IP header (RFC 768, RFC 8200 section 8.1)."""
    if len(src) == 4:
        return src + dst + struct.pack("!HH", protocol, length)
    return src + dst + struct.pack("!II", length, protocol)


def udp(
    src: bytes,
    dst: bytes,
    sport: int,
    dport: int,
    payload: bytes,
    *,
    length: int | None = None,
    check: int | None = None,
) -> bytes:
    """A UDP datagram between these IP addresses, from its header on."""
    length = 8 + len(payload) if length is None else length
    if check is None:
        data = _UDP.pack(sport, dport, length, 0) + payload
        # Zero says that there is none (RFC 768).
        check = checksum(pseudo(src, dst, UDP, len(data)) + data) or 0xFFFF
    return _UDP.pack(sport, dport, length, check) + payload


def tcp(src: bytes, dst: bytes, sport: int, dport: int, payload: bytes = b"", *, flags: int = 0x02) -> bytes:
    """A TCP segment, SYN unless told otherwise."""
    data = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 0x50, flags, 8192, 0, 0) + payload
    return data[:16] + checksum(pseudo(src, dst, TCP, len(data)) + data).to_bytes(2, "big") + data[18:]


def echo(src: bytes, dst: bytes, payload: bytes, *, request: bool = False) -> bytes:
    """An ICMP echo of the addresses' family; a reply, which nobody has asked for and nobody answers, unless `request`.

    What it says of itself is right, so the receiver's kernel finds nothing to refuse.
    """
    if len(src) == 4:
        data = struct.pack("!BBHHH", 8 if request else 0, 0, 0, 1, 1) + payload
        return data[:2] + checksum(data).to_bytes(2, "big") + data[4:]
    data = struct.pack("!BBHHH", 128 if request else 129, 0, 0, 1, 1) + payload
    return data[:2] + checksum(pseudo(src, dst, ICMP6, len(data)) + data).to_bytes(2, "big") + data[4:]


def ping(src: bytes, dst: bytes, payload: bytes, *, request: bool = False, ttl: int = 64, tos: int = 0) -> bytes:
    """The same as a whole packet."""
    protocol = ICMP if len(src) == 4 else ICMP6
    return ip(src, dst, protocol, echo(src, dst, payload, request=request), ttl=ttl, tos=tos)


def fragments(packet: bytes, *cuts: int, ident: int = 1) -> list[bytes]:
    """The packet in pieces; `cuts` are where its payload is cut, in bytes, each a multiple of 8."""
    at = 20 if packet[0] >> 4 == 4 else 40
    head, payload = packet[:at], packet[at:]
    bounds = [0, *cuts, len(payload)]
    return [
        fragment(head, payload[start:end], start, more=end < len(payload), ident=ident)
        for start, end in itertools.pairwise(bounds)
    ]


def fragment(head: bytes, piece: bytes, offset: int, *, more: bool, ident: int = 1) -> bytes:
    """One piece of the payload of a packet that has this IP header, from `offset` bytes on."""
    if head[0] >> 4 == 4:
        fields = _IPV4.unpack(head[:20])
        return ipv4(fields[8], fields[9], fields[6], piece, ident=ident, fragment=offset >> 3 | MORE * more)
    _, _, protocol, ttl, src, dst = _IPV6.unpack(head[:40])
    extension = struct.pack("!BBHI", protocol, 0, offset | more, ident)
    return ipv6(src, dst, FRAGMENT, extension + piece, ttl=ttl)


def arp(src_mac: bytes, src: bytes, dst: bytes, *, reply: bool = False, dst_mac: bytes = bytes(6)) -> bytes:
    """An ARP packet: who has `dst`, unless it is a `reply` (RFC 826)."""
    return struct.pack("!HHBBH", 1, IPV4_TYPE, 6, 4, 1 + reply) + src_mac + src + dst_mac + dst


def solicitation(src_mac: bytes, src: bytes, dst: bytes) -> bytes:
    """An IPv6 neighbour solicitation for `dst`, sent to that address itself (RFC 4861)."""
    data = struct.pack("!BBHI", 135, 0, 0, 0) + dst + b"\1\1" + src_mac
    data = data[:2] + checksum(pseudo(src, dst, ICMP6, len(data)) + data).to_bytes(2, "big") + data[4:]
    return ipv6(src, dst, ICMP6, data, ttl=255)


def vxlan(frame: bytes, vni: int = 1, *, flags: int = VALID_VNI, reserved: int = 0) -> bytes:
    """A VXLAN header before a frame. `flags`: its first word; `reserved`: its last byte."""
    return struct.pack("!II", flags, vni << 8 | reserved) + frame


@dataclass(frozen=True)
class Tunnel:
    """The way from one host's tunnel end to another's, which good tunnel packets go; `but` makes another of it.

    MACs and addresses of the hosts on the underlay, the MACs of their VXLAN devices, and the rest of the headers.
    """

    src_mac: bytes
    dst_mac: bytes
    src: bytes
    dst: bytes
    inner_src_mac: bytes
    inner_dst_mac: bytes
    vni: int = 1
    port: int = 8472
    ttl: int = 64
    tos: int = 0
    flags: int = VALID_VNI
    reserved: int = 0
    check: int | None = None
    """Of UDP; the right one unless told."""
    sport: int = 49152

    def but(self, **other: object) -> "Tunnel":
        """The same with other values."""
        return replace(self, **other)  # type: ignore[arg-type]

    def inner(self, packet: bytes) -> bytes:
        """The frame that carries an IP packet from device to device."""
        return ethernet(self.inner_dst_mac, self.inner_src_mac, ether_type(packet), packet)

    def outer(self, payload: bytes) -> bytes:
        """The outer packet with this in UDP, from the IP header on."""
        datagram = udp(self.src, self.dst, self.sport, self.port, payload, check=self.check)
        return ip(self.src, self.dst, UDP, datagram, ttl=self.ttl, tos=self.tos)

    def on_wire(self, outer: bytes) -> bytes:
        """An outer packet as a frame of the underlay."""
        return ethernet(self.dst_mac, self.src_mac, ether_type(outer), outer)

    def carry(self, frame: bytes) -> bytes:
        """A frame in the tunnel, whole."""
        return self.on_wire(self.outer(vxlan(frame, self.vni, flags=self.flags, reserved=self.reserved)))

    def packet(self, packet: bytes) -> bytes:
        """An IP packet in the tunnel, whole."""
        return self.carry(self.inner(packet))

    def in_fragments(self, packet: bytes, *cuts: int, ident: int = 1) -> Iterable[bytes]:
        """The same, the outer packet in pieces cut at these bytes of its payload."""
        outer = self.outer(vxlan(self.inner(packet), self.vni, flags=self.flags, reserved=self.reserved))
        return [self.on_wire(piece) for piece in fragments(outer, *cuts, ident=ident)]
