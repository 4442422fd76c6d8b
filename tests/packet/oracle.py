"""What may come of a frame that goes to a host of the overlay, as a second opinion on what the host does.

Written from RFC 791, 768, 8200 and 7348 and from docs/firewall.md, for one host and by reading bytes; it shares nothing
with the agent. It is told every frame that goes to the host, and asked about every frame that its pods get and that it
sends: whether one that went to the host explains it. It allows more than the kernel does where the difference is of no
interest, and never less. What a packet does not tell, as which of several peers sent it, the oracle does not know.
"""

import ipaddress
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from scapy.utils import checksum

_IPV4, _IPV6, _ARP, _VLAN = 0x0800, 0x86DD, 0x0806, 0x8100
_IGMP, _TCP, _UDP, _FRAGMENT = 2, 6, 17, 44
_ICMP = {4: 1, 6: 58}
_EXTENSIONS = (0, 43, 60)  # hop-by-hop, routing and destination options (RFC 8200 section 4)
_ON_LINK_HOPS = 255
"""Nothing that was forwarded has as many: it comes from the same link (RFC 4861 section 3.1)."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Packet(NamedTuple):
    """An IP packet, cut to the length it says it has; `fields` are what no router changes of the rest of its header."""

    version: int
    src: bytes
    dst: bytes
    protocol: int
    ttl: int
    fields: bytes
    payload: bytes

    @property
    def key(self) -> bytes:
        """By which it is known again on the other side of a router, which lowers the TTL and may mark congestion."""
        return b"%b%b%b%b%b" % (self.fields, bytes([self.protocol]), self.src, self.dst, self.payload)


class Truth(NamedTuple):
    """What there is to know of the host, all of it packed.

    `mac` on the underlay; `devices` are the MACs of its VXLAN devices by the underlay's family. `local` are all its own
    addresses. `subnets` and `blocks`: its own subnets, and the overlay's networks. `pods`: who has which addresses.
    `bridge`: the MACs of its bridge, its ports and the pods on it. `peers` are the underlay addresses of the others.
    """

    mac: bytes
    devices: dict[int, bytes]
    local: frozenset[bytes]
    subnets: tuple[Network, ...]
    blocks: tuple[Network, ...]
    pods: dict[bytes, str]
    bridge: frozenset[bytes]
    peers: frozenset[bytes]
    port: int = 8472
    vni: int = 1


class Oracle:
    """Explains what a host does by what went to it.

    `streams` are pairs of addresses, source and destination, between which TCP is not looked into: the kernel joins and
    cuts the segments of a real connection as it likes.
    """

    def __init__(self, truth: Truth, streams: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self._truth = truth
        self._streams = frozenset(streams)
        self._for_pods: dict[str, Counter[bytes]] = defaultdict(Counter)
        self._for_others: Counter[bytes] = Counter()
        self._pieces: dict[tuple[bytes, ...], _Pieces] = defaultdict(lambda: defaultdict(set))

    # --- what goes to the host ---

    def take(self, frame: bytes, *, finished: bool = True) -> None:
        """A frame has gone to the host. Not `finished`: its sender leaves checksums to hardware that is not there."""
        truth = self._truth
        if frame[:6] != truth.mac and not frame[0] & 1:
            return
        packet = _packet(frame)
        if packet is None:
            return
        if packet.dst in truth.local or _is_group(packet.dst):
            for whole in self._assembled(packet):
                self._deliver(whole, finished)
        elif frame[:6] == truth.mac:
            # The host is a router, whatever the overlay does: into the overlay as well, for whoever sends to its MAC.
            self._forward(packet)

    def _forward(self, packet: Packet) -> None:
        """A packet that is not for the host itself goes on, to a pod of the host or elsewhere."""
        if packet.ttl < 2:
            return
        if pod := self._truth.pods.get(packet.dst):
            self._for_pods[pod][packet.key] += 1
        else:
            self._for_others[packet.key] += 1

    def _deliver(self, packet: Packet, finished: bool) -> None:
        """A packet for the host itself, whole: what it is to the tunnel."""
        truth = self._truth
        protocol, data = _upper(packet)
        if protocol != _UDP or len(data) < 8:
            return
        length = int.from_bytes(data[4:6], "big")
        if not 8 <= length <= len(data) or int.from_bytes(data[2:4], "big") != truth.port:
            return
        data = data[:length]
        if packet.src not in truth.peers:
            return
        if data[6:8] == b"\0\0":
            if packet.version == 6:
                return
        elif finished and checksum(_pseudo(packet, length) + data):
            return
        self._leave_tunnel(data[8:], truth.devices[packet.version], finished)

    def _leave_tunnel(self, data: bytes, device: bytes, finished: bool) -> None:
        """The payload of a datagram that has passed the guard."""
        truth = self._truth
        header = b"\x08\0\0\0" + truth.vni.to_bytes(3, "big") + b"\0"
        frame = data[8:]
        if data[:8] != header or len(frame) < 14 or frame[6:12] == device:
            return
        if frame[:6] != device and not frame[0] & 1:
            return
        packet = _packet(frame)
        if packet is None or _cannot_send(packet.src):
            return
        source, target = ipaddress.ip_address(packet.src), ipaddress.ip_address(packet.dst)
        if any(source in subnet for subnet in truth.subnets):
            return
        if packet.dst in truth.local or _is_group(packet.dst):
            for whole in self._assembled(packet):
                self._deliver(whole, finished)
        elif frame[:6] != device or (packet.version == 4 and packet.src in truth.local):
            return
        elif any(target in each for each in truth.subnets) or not any(target in each for each in truth.blocks):
            self._forward(packet)

    def _assembled(self, packet: Packet) -> Iterator[Packet]:
        """The packet if it is whole; if it is a fragment, all packets that it may complete."""
        piece = _fragment(packet)
        if piece is None:
            yield packet
            return
        ident, protocol, offset, more, data = piece
        if packet.version == 6:
            # The first piece says which protocol it is, whatever the others say; none but this one matters here.
            protocol = _UDP
        pieces = self._pieces[packet.src, packet.dst, ident, bytes([protocol])]
        pieces[offset].add((more, data))
        for payload in _chains(pieces, 0, b""):
            yield packet._replace(protocol=protocol, payload=payload)

    # --- what comes of it ---

    def explains_at_pod(self, pod: str, frame: bytes) -> bool:
        """Whether something that went to the host explains that the pod gets this frame, once."""
        truth = self._truth
        if frame[6:12] not in truth.bridge:
            return False
        if frame[12:14] == _ARP.to_bytes(2, "big"):
            return frame[28:32] in truth.local or frame[28:32] in truth.pods
        packet = _packet(frame)
        if packet is None:
            return False
        if packet.version == 6 and (packet.ttl == _ON_LINK_HOPS or _stays_on_link(packet.src)):
            return True
        if packet.src in truth.local and _is_error(packet):
            return True
        if packet.protocol == _TCP and (packet.src, packet.dst) in self._streams:
            return True
        return _consumed(self._for_pods[pod], packet.key)

    def explains_on_underlay(self, frame: bytes) -> bool:
        """Whether the host may send this: for itself or its pods, or because it routes what went to it, once."""
        truth = self._truth
        if frame[12:14] == _ARP.to_bytes(2, "big"):
            return frame[28:32] in truth.local
        packet = _packet(frame)
        if packet is None:
            return False
        if _consumed(self._for_others, packet.key):
            return True
        port = int.from_bytes(packet.payload[2:4], "big")
        if packet.src in truth.local and packet.protocol == _UDP and port == truth.port:
            return packet.dst in truth.peers and self._may_be_tunnelled(packet.payload[8:])
        return self._is_ours(packet.src)

    def _may_be_tunnelled(self, data: bytes) -> bool:
        """Whether the host may put this into a tunnel: it or its pods sent it, or it came there by another way."""
        frame = data[8:]
        if data[:8] != b"\x08\0\0\0" + self._truth.vni.to_bytes(3, "big") + b"\0" or len(frame) < 14:
            return False
        if frame[12:14] == _ARP.to_bytes(2, "big"):
            return frame[28:32] in self._truth.local
        packet = _packet(frame)
        return packet is not None and (self._is_ours(packet.src) or _consumed(self._for_others, packet.key))

    def _is_ours(self, address: bytes) -> bool:
        own = address in self._truth.local or address in self._truth.pods
        return own or (len(address) == 16 and _stays_on_link(address))


def _consumed(expected: "Counter[bytes]", key: bytes) -> bool:
    if expected[key] < 1:
        return False
    expected[key] -= 1
    return True


# --- reading bytes -----------------------------------------------------------------------------------------------


def _packet(frame: bytes) -> Packet | None:
    """The IP packet in a frame, None if there is none that a host would take; VLAN 0 stands for no VLAN (802.1Q)."""
    at = 14
    while frame[at - 2 : at] == b"\x81\0" and not int.from_bytes(frame[at : at + 2], "big") & 0xFFF:
        at += 4
    kind, data = int.from_bytes(frame[at - 2 : at], "big"), frame[at:]
    if kind == _IPV4:
        return _ipv4(data)
    return _ipv6(data) if kind == _IPV6 else None


def _ipv4(data: bytes) -> Packet | None:
    if len(data) < 20:
        return None
    head, length = (data[0] & 0xF) * 4, int.from_bytes(data[2:4], "big")
    if data[0] >> 4 != 4 or head < 20 or not head <= length <= len(data) or checksum(data[:head]):
        return None
    # A router may rewrite options, and the two bits of the traffic class that tell of congestion.
    fields = bytes([4, data[1] & 0xFC]) + data[4:8]
    return Packet(4, data[12:16], data[16:20], data[9], data[8], fields, data[head:length])


def _ipv6(data: bytes) -> Packet | None:
    if len(data) < 40 or data[0] >> 4 != 6:
        return None
    end = 40 + int.from_bytes(data[4:6], "big")
    if end > len(data):
        return None
    fields = bytes([data[0], data[1] & 0xCF]) + data[2:4]
    return Packet(6, data[8:24], data[24:40], data[6], data[7], fields, data[40:end])


def _upper(packet: Packet) -> tuple[int, bytes]:
    """The protocol above IP and its data, past IPv6's extension headers."""
    protocol, data = packet.protocol, packet.payload
    while packet.version == 6 and protocol in _EXTENSIONS and len(data) >= 8:
        protocol, data = data[0], data[8 * (data[1] + 1) :]
    return protocol, data


def _fragment(packet: Packet) -> tuple[bytes, int, int, bool, bytes] | None:
    """Of a fragment its identification, protocol, offset in bytes, whether more follow, and data."""
    if packet.version == 4:
        field = int.from_bytes(packet.fields[4:6], "big")
        if not field & 0x3FFF:
            return None
        return packet.fields[2:4], packet.protocol, (field & 0x1FFF) * 8, bool(field & 0x2000), packet.payload
    protocol, data = _upper(packet)
    if protocol != _FRAGMENT or len(data) < 8:
        return None
    field = int.from_bytes(data[2:4], "big")
    return data[4:8], data[0], field & 0xFFF8, bool(field & 1), data[8:]


_Pieces = dict[int, set[tuple[bool, bytes]]]
"""Fragments of one packet by their offsets: whether more follow, and data."""


def _chains(pieces: _Pieces, start: int, so_far: bytes) -> Iterator[bytes]:
    """All payloads that can be put together from the pieces."""
    for more, data in pieces.get(start, ()):
        if not more:
            yield so_far + data
        elif data:
            yield from _chains(pieces, start + len(data), so_far + data)


def _pseudo(packet: Packet, length: int) -> bytes:
    numbers = length.to_bytes(4, "big") + _UDP.to_bytes(4, "big")
    return packet.src + packet.dst + numbers


def _is_group(address: bytes) -> bool:
    """Multicast, or a broadcast; of which IPv4 networks is not looked into."""
    return address[0] == 0xFF if len(address) == 16 else address[0] >= 224 or address[3] == 255


def _cannot_send(address: bytes) -> bool:
    """No packet with such a source is forwarded or, in a tunnel, believed (RFC 1122 section 3.2.1.3, RFC 4291)."""
    if len(address) == 4:
        return address[0] in (0, 127) or address[0] >= 224
    return not any(address[:15]) or address[0] == 0xFF or address[:2] == b"\xfe\x80"


def _stays_on_link(address: bytes) -> bool:
    """IPv6 addresses no packet of which is forwarded: link-local ones, and that of who has none yet (RFC 4291)."""
    return address[:2] == b"\xfe\x80" or not any(address)


def _is_error(packet: Packet) -> bool:
    """ICMP errors and replies, and IGMP: what hosts say of themselves."""
    return packet.protocol in (_ICMP[packet.version], _IGMP)
