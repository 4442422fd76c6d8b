"""Tunnel packets of every kind, and what becomes of them when bytes are altered at random, from one seed.

A mutant is made in a few microseconds: templates are bytes, and what is altered are bytes. Most mutants get right
lengths and checksums again, so that they come past the first look; the others show that look.

Addresses are not altered bit by bit but taken from a pool, and a few bits of them flipped. All namespaces of a machine
share the kernel's tables of neighbours, and a flood of addresses nobody has would fill them.
"""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tests.packet import forge
from tests.packet.receiver import STRANGERS, Ends, packed, tunnel

ABSENT = {4: ("198.51.100.7", "10.244.250.3"), 6: ("2001:db8::7", "fd00:244:0:fffe::3")}
"""Addresses outside the overlay, and in a subnet of it that nobody leases."""

_SPECIAL = {
    4: ("0.0.0.0", "127.0.0.1", "255.255.255.255", "224.0.0.1", "172.30.0.1", *ABSENT[4]),
    6: ("::", "::1", "ff02::1", "ff0e::7", "fe80::7", "fd30::1", *ABSENT[6]),
}
_INTERESTING = (0, 1, 2, 4, 6, 8, 17, 44, 58, 64, 0x45, 0x60, 0x7F, 0x80, 0xFF)
_LENGTHS = (0, 1, 7, 8, 19, 20, 28, 39, 40, 48, 100, 1400, 0x7FFF, 0x8000, 0xFFFF)
NOBODY = 9
"""The number of a pod that no host has. Third pods, which hosts may have, are never written to."""

MOST = 14 + 1430
"""Bytes of a frame that fits the pods' MTU, so that hosts that route it as it is need not cut it up."""

LEAST = 14
"""A packet socket sends no frame without a whole Ethernet header."""


@dataclass(frozen=True)
class Template:
    """A good frame: the outer and the inner family, and where in it addresses lie, as (offset, length)."""

    frame: bytes
    outer: int
    addresses: tuple[tuple[int, int], ...]
    others: tuple[int, ...]
    """All other bytes' places."""

    @property
    def udp(self) -> int:
        """Where the outer UDP header begins."""
        return 34 if self.outer == 4 else 54

    @property
    def inner(self) -> int:
        """Where the inner IP header begins."""
        return self.udp + 30


class Mutants:
    """Frames for the host `dst`, as if from `src`; `third` is a host that has nothing to do with it."""

    def __init__(self, seed: int, dst: Ends, src: Ends, third: Ends) -> None:
        self._random = random.Random(seed)
        ends = (dst, src, third)
        self._pool = {
            family: [
                *(each.pod(number, family) for each in ends for number in (1, 2, NOBODY)),
                *(each.base(family, number) for each in ends for number in (0, 1)),
                *(each.underlay[family] for each in ends),
                packed(STRANGERS[family]),
                *map(packed, _SPECIAL[family]),
            ]
            for family in (4, 6)
        }
        for family, bits in ((4, (0, 10, 20, 26, 31)), (6, (0, 40, 60, 70, 100, 127))):
            self._pool[family] += [flipped(dst.pod(1, family), bit) for bit in bits]
        self._macs = [each.mac for each in ends] + [mac for each in ends for mac in each.device_macs.values()]
        self._macs += [b"\xff" * 6, bytes(6), bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")]
        known = {*self._macs[:9], *(address for pool in self._pool.values() for address in pool if any(address[:12]))}
        self.templates = [
            [_template(frame, outer, known) for frame in frames]
            for inner in (4, 6)
            for outer in (4, 6)
            for frames in _kinds(tunnel(src, dst, outer), dst, src, third, inner)
        ]
        """Groups of good frames, most of a single one; of the pieces of a packet, one is altered."""

    def frames(self, count: int) -> Iterator[bytes]:
        """So many mutants, in the order that the seed determines."""
        rnd, templates = self._random, self.templates
        ways = (self._flip, self._set, self._cut, self._swap, self._length, self._refill, lambda frame, template: None)
        made = 0
        while made < count:
            group = rnd.choice(templates)
            altered = rnd.choice(group)
            ident = rnd.randrange(1 << 16)
            for template in group[: count - made]:
                frame = bytearray(template.frame)
                if len(group) > 1:
                    at = 18 if template.outer == 4 else 60
                    frame[at : at + 2] = _U16.pack(ident)
                if template is altered:
                    for _ in range(rnd.choice((1, 1, 1, 2, 3))):
                        rnd.choice(ways)(frame, template)
                if len(group) > 1 or rnd.random() < 0.75:
                    _mend(frame, template, inner=rnd.random() < 0.7)
                made += 1
                yield bytes(frame)

    # --- ways to alter a frame in place ---

    def _flip(self, frame: bytearray, template: Template) -> None:
        for _ in range(self._random.choice((1, 1, 2, 4))):
            at = self._random.choice(template.others)
            if at < len(frame):
                frame[at] ^= 1 << self._random.randrange(8)

    def _set(self, frame: bytearray, template: Template) -> None:
        at = self._random.choice(template.others)
        if at < len(frame):
            frame[at] = self._random.choice((*_INTERESTING, self._random.randrange(256)))

    def _cut(self, frame: bytearray, template: Template) -> None:
        del frame[self._random.randrange(LEAST, len(frame) + 1) :]

    def _swap(self, frame: bytearray, template: Template) -> None:
        at, length = self._random.choice(template.addresses)
        if at + length <= len(frame):
            frame[at : at + length] = self._random.choice(
                self._macs if length == 6 else self._pool[6 if length > 4 else 4]
            )

    def _length(self, frame: bytearray, template: Template) -> None:
        """A length of the outer IP or UDP header, or of the inner IP header."""
        at = self._random.choice((16 if template.outer == 4 else 18, template.udp + 4, template.inner + 2))
        value = self._random.choice((*_LENGTHS, self._random.randrange(1 << 16)))
        if at + 2 <= len(frame):
            frame[at : at + 2] = value.to_bytes(2, "big")

    def _refill(self, frame: bytearray, template: Template) -> None:
        """Something else, of any length, behind the inner IP header."""
        start = template.inner + 40
        if start < len(frame):
            frame[start:] = self._random.randbytes(self._random.randrange(MOST - start))


def flipped(address: bytes, bit: int) -> bytes:
    """An address with one bit, counted from the left, turned over."""
    return (int.from_bytes(address, "big") ^ 1 << (8 * len(address) - 1 - bit)).to_bytes(len(address), "big")


def _template(frame: bytes, outer: int, known: set[bytes]) -> Template:
    found = set()
    for address in known:
        at = frame.find(address)
        while at >= 0:
            found.add((at, len(address)))
            at = frame.find(address, at + 1)
    inside = {at + each for at, length in found for each in range(length)}
    return Template(frame, outer, tuple(sorted(found)), tuple(at for at in range(len(frame)) if at not in inside))


def _kinds(way: forge.Tunnel, dst: Ends, src: Ends, third: Ends, family: int) -> Iterator[list[bytes]]:
    """Good frames in the tunnel, and bad ones that are whole, with inner packets of this family."""
    here, there, payload = dst.pod(1, family), src.pod(1, family), b"mutant" * 6
    second, gateway, elsewhere = dst.pod(2, family), dst.gateways[family], third.pod(1, family)
    world, icmp = packed(ABSENT[family][0]), forge.ICMP if family == 4 else forge.ICMP6

    def datagram(source: bytes, target: bytes, port: int = 9) -> bytes:
        return forge.ip(source, target, forge.UDP, forge.udp(source, target, 9, port, payload))

    yield [way.packet(datagram(there, here))]
    yield [way.packet(datagram(there, second))]
    yield [way.packet(forge.ip(there, here, forge.TCP, forge.tcp(there, here, 1024, 80)))]
    yield [way.packet(forge.ip(there, second, forge.TCP, forge.tcp(there, second, 1024, 80, payload, flags=0x18)))]
    for request in (True, False):
        yield [way.packet(forge.ping(there, here, payload, request=request))]
    yield [way.packet(forge.ping(there, gateway, payload, request=True))]
    yield [way.packet(forge.ip(there, here, forge.NONE, b""))]
    yield [way.packet(forge.ping(there, here, bytes(1300)))]
    # What the agent's table refuses, and what the host routes.
    yield [way.but(src=packed(STRANGERS[6 if len(way.src) > 4 else 4])).packet(datagram(there, here))]
    yield [way.packet(datagram(second, here))]
    yield [way.packet(datagram(there, elsewhere))]
    yield [way.packet(datagram(there, world))]
    # Pieces, of the inner packet and of the outer one.
    whole = forge.ip(there, here, icmp, forge.echo(there, here, payload * 4))
    for piece in forge.fragments(whole, 64, 128, ident=77):
        yield [way.packet(piece)]
    yield list(way.in_fragments(forge.ping(there, here, payload * 4), 64, 128))
    # A tunnel packet in a tunnel packet, for a pod and for the host itself.
    for target in (here, gateway):
        nested = forge.vxlan(way.inner(forge.ping(there, here, payload)))
        yield [way.packet(forge.ip(there, target, forge.UDP, forge.udp(there, target, 9, way.port, nested)))]
    # No IP packet at all, or for everybody.
    everybody = packed("255.255.255.255" if family == 4 else "ff02::1")
    yield [way.but(inner_dst_mac=b"\xff" * 6).packet(forge.ping(there, everybody, payload, request=True))]
    if family == 4:
        question = forge.arp(way.inner_src_mac, src.base(4), gateway)
        yield [way.carry(forge.ethernet(way.inner_dst_mac, way.inner_src_mac, forge.ARP_TYPE, question))]
    else:
        yield [way.packet(forge.solicitation(way.inner_src_mac, src.base(6), gateway))]
    yield [way.carry(b"")]
    yield [way.on_wire(way.outer(b""))]


_U16 = struct.Struct("!H")


def _mend(frame: bytearray, template: Template, *, inner: bool) -> None:
    """Give the outer headers right lengths and checksums, and, with `inner`, an inner IPv4 header a right checksum.

    A frame that is cut in its outer headers stays as it is.
    """
    udp, start = template.udp, template.inner
    if len(frame) < udp + 8:
        return
    if inner and len(frame) >= start + 20 and frame[start] >> 4 == 4:
        head = start + max(20, 4 * (frame[start] & 0xF))
        frame[start + 10 : start + 12] = b"\0\0"
        frame[start + 10 : start + 12] = _U16.pack(forge.checksum(bytes(frame[start:head])))
    length = len(frame) - udp
    if template.outer == 4:
        whole = not (int.from_bytes(frame[20:22], "big") & 0x3FFF)
        frame[16:18] = _U16.pack(len(frame) - 14)
        frame[24:26] = b"\0\0"
        frame[24:26] = _U16.pack(forge.checksum(bytes(frame[14:34])))
        addresses = bytes(frame[26:34])
    else:
        whole = frame[20] == forge.UDP
        frame[18:20] = _U16.pack(length)
        addresses = bytes(frame[22:54])
    if whole:
        frame[udp + 4 : udp + 8] = _U16.pack(length) + b"\0\0"
        check = forge.checksum(addresses + struct.pack("!HHI", 0, forge.UDP, length) + bytes(frame[udp:]))
        frame[udp + 6 : udp + 8] = _U16.pack(check or 0xFFFF)
