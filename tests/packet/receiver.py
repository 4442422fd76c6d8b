"""One host as the receiver of forged frames: what is put on its port of the underlay, and everything that comes of it.

The host has no other port, and its pods no other way in. So what its pods get, and what it sends itself, is all that
there is to see. Frames are forged as those of a peer, or of whoever a test says.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, Pod
from overlay.nft import Nftables
from tests.packet import forge
from tests.packet.wire import Link, Seen, Wire, mac_of, new_mark

DEVICES = {4: "flannel.1", 6: "flannel-v6.1"}
"""The VXLAN devices by the family of the underlay."""

STRANGERS = {4: "172.30.0.99", 6: "fd30::99"}
"""Underlay addresses that no host has."""

_ETCD = 2379
_HOP_BY_HOP, _IGMP = 0, 2
_OF_THE_LINK = (*range(130, 137), 143, *range(151, 154))
"""Types of ICMPv6: multicast listeners, routers and neighbours (RFC 2710, RFC 4861, RFC 3810, RFC 4286)."""

_MESSAGES: Mapping[int, Mapping[int, str]] = {
    4: {3: "unreachable", 5: "redirect", 11: "time exceeded", 12: "parameter problem"},
    6: {1: "unreachable", 2: "too big", 3: "time exceeded", 4: "parameter problem", 136: "neighbour", 137: "redirect"},
}
"""ICMP messages that hosts send of their own accord, by type."""


def packed(address: str) -> bytes:
    """An IP address as it is in a packet."""
    return ipaddress.ip_address(address).packed


def packed_mac(mac: str) -> bytes:
    """A MAC as it is in a frame."""
    return bytes.fromhex(mac.replace(":", ""))


@dataclass(frozen=True)
class Ends:
    """A host's ends, packed: its MAC on the underlay, its addresses, devices, subnets and pods, by family."""

    host: Host
    mac: bytes
    underlay: Mapping[int, bytes]
    device_macs: Mapping[int, bytes]
    subnets: Mapping[int, ipaddress.IPv4Network | ipaddress.IPv6Network]
    gateways: Mapping[int, bytes]

    @classmethod
    def of(cls, host: Host) -> "Ends":
        """As they are now."""
        return cls(
            host,
            packed_mac(mac_of(host, "eth0")),
            {family: packed(address) for family, address in host.underlay_ips.items()},
            {family: packed_mac(mac_of(host, device)) for family, device in DEVICES.items()},
            {family: gateway.network for family, gateway in host.gateways.items()},
            {family: gateway.ip.packed for family, gateway in host.gateways.items()},
        )

    def pod(self, number: int, family: int) -> bytes:
        """The address of a pod, counted from 1; of nobody beyond the last."""
        return self.base(family, number + 1)

    def base(self, family: int, number: int = 0) -> bytes:
        """The address with this number in the host's subnet. The first is that of the host's VXLAN device."""
        return self.subnets[family][number].packed


def tunnel(src: Ends, dst: Ends, family: int) -> forge.Tunnel:
    """The way of good tunnel packets between two hosts, over this family of the underlay."""
    return forge.Tunnel(
        src_mac=src.mac,
        dst_mac=dst.mac,
        src=src.underlay[family],
        dst=dst.underlay[family],
        inner_src_mac=src.device_macs[family],
        inner_dst_mac=dst.device_macs[family],
    )


class Fate(NamedTuple):
    """What came of some frames.

    `pods` got something, each named once; `sent` is what the host put on the underlay, in its order, in words;
    `counted` are the packets that counters of the agent's table counted.
    """

    pods: tuple[str, ...] = ()
    sent: tuple[str, ...] = ()
    counted: Mapping[str, int] = {}


NOTHING = Fate()


class Receiver:
    """A host that gets forged frames, as if from the host `src`; `third` is a host that has nothing to do with it."""

    def __init__(self, wire: Wire, ends: Mapping[str, Ends], tables: Mapping[str, Nftables], names: str) -> None:
        self.dst, self.src, self.third = (ends[name] for name in names.split())
        self._names = {address: each.host.name for each in ends.values() for address in each.underlay.values()}
        lab: Lab = self.dst.host.lab
        self._names |= {packed(str(address.ip)): "hub" for address in lab.topology.links[0].hub.values()}
        self._names |= {packed(address): pod.name for pod in lab.pods for address in pod.addresses.values()}
        self._table = tables[self.dst.host.name]
        self.port = wire.underlay(self.dst.host)
        self.pods: dict[Pod, Link] = {pod: wire.at(pod) for pod in self.dst.host.pods}
        self.mark = new_mark()

    def way(self, family: int) -> forge.Tunnel:
        """The way that good tunnel packets come, over this family."""
        return tunnel(self.src, self.dst, family)

    def ping(self, family: int, *, src: bytes | None = None, dst: bytes | None = None, **other: int) -> bytes:
        """A packet from the peer's first pod to the first here, which nobody answers: see `forge.echo`."""
        return forge.ping(src or self.src.pod(1, family), dst or self.dst.pod(1, family), self.mark, **other)

    def fate(self, *frames: bytes, fence: int = 4) -> Fate:
        """Put the frames on the host's port; what has come of them once a good tunnel packet that follows is through.

        `fence` is the underlay's family that this packet takes: what comes by one device keeps its order.
        """
        links = [self.port, *self.pods.values()]
        for link in links:
            for _ in link.read():
                pass
        before = {link: len(link.seen) for link in links}
        counted = self._table.counters()
        for frame in frames:
            self.port.put(frame)
        mark = new_mark()
        end = forge.ping(self.src.pod(1, fence), self.dst.pod(1, fence), mark)
        self.port.put(self.way(fence).packet(end))
        first = next(iter(self.pods.values()))
        first.expect(lambda frame: mark in frame.original)
        for link in links:
            for _ in link.read():
                pass
        news = {link: [seen for seen in link.seen[before[link] :] if mark not in seen.data] for link in links}
        came = {link: [seen for seen in news[link] if not seen.outgoing and not _usual(seen)] for link in links}
        reached = [pod.name for pod, link in self.pods.items() if came[link]]
        sent = [self._said(seen.packet) for seen in came[self.port]]
        after = self._table.counters()
        return Fate(
            tuple(reached),
            tuple(sent),
            {name: new - counted[name] for name, new in after.items() if new > counted[name]},
        )

    def _said(self, packet: Packet) -> str:
        """A frame that the host sent, in words."""
        outer = packet.payload
        if not isinstance(outer, IP | IPv6):
            return "ARP" if isinstance(outer, ARP) else str(packet.summary())
        to = self._names.get(packed(outer.dst), outer.dst)
        if isinstance(outer.payload, UDP) and outer.payload.dport == 8472:
            inside = Ether(bytes(outer.payload.payload)[8:])
            return f"tunnel to {to}: {self._said(inside)}"
        family = outer.version
        number = outer.proto if family == 4 else outer.nh
        if number == (forge.ICMP if family == 4 else forge.ICMP6):
            return _MESSAGES[family].get(bytes(outer.payload)[0], f"packet to {to}")
        return f"packet to {to}"


def _usual(seen: Seen) -> bool:
    """Whether a frame is of those that come by at all times, whatever is put on the wire.

    These are ARP, IGMP and IPv6's messages about neighbours and groups, of the link itself; and the agent's words with
    etcd.
    """
    packet = seen.packet.payload
    if isinstance(packet, IPv6):
        options = packet.nh == _HOP_BY_HOP
        kind, data = (packet.payload.nh, packet.payload.payload) if options else (packet.nh, packet.payload)
        return kind == forge.ICMP6 and bytes(data)[0] in _OF_THE_LINK
    if isinstance(packet, IP) and packet.proto == _IGMP:
        return True
    return isinstance(packet, ARP) or (TCP in packet and _ETCD in (packet[TCP].sport, packet[TCP].dport))


def all_ends(lab: Lab) -> dict[str, Ends]:
    """Of all hosts, by name."""
    return {host.name: Ends.of(host) for host in lab.hosts}


def tables(lab: Lab) -> dict[str, Nftables]:
    """The nftables of all hosts, by name; to be closed by the caller."""
    return {host.name: host.made(Nftables) for host in lab.hosts}
