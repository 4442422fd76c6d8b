"""What must be true of the overlay's packets: a function for each, which takes the wire and a way from pod to pod.

They stand apart from the tests, for they are tried on agents that do right and on agents that do wrong: see `broken`.
What is expected comes from the leases and from the packet that was sent, never from what the agent has programmed.
"""

import contextlib
import ipaddress
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from scapy.layers.inet import ICMP, IP, UDP, defragment
from scapy.layers.inet6 import ICMPv6MLReport2, ICMPv6ND_NS, ICMPv6ND_RS, ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, Pod, wait_until
from overlay.device import OVERHEAD
from overlay.offload import set_feature
from overlay.topology import Topology, network_config
from subnet_lease.model import format_address, format_mac
from tests.conftest import MakeLab
from tests.packet.wire import Link, Wanted, Wire, carrying, inner, mac_of, new_mark, tunnelled

PORT = 8472

DONT_FRAGMENT = 2  # IPv4's flag DF, as scapy numbers them.

EVERYBODY = "ff:ff:ff:ff:ff:ff"

NETWORKS = {4: ipaddress.ip_network("10.244.0.0/16"), 6: ipaddress.ip_network("fd00:244::/48")}
"""Where pods have their addresses (`network_config`)."""

_LENGTH = {4: 4, 6: 16}
"""Address family -> bytes of an address, which is how `device` tells them apart."""


# --- labs and ways ---------------------------------------------------------------------------------------------------


def mixed_lab(make_lab: MakeLab, hosts: int, *, mtus: Mapping[str, int] | None = None) -> Lab:
    """Up and converged, pods of both families: the last host has IPv6 alone, the one before it IPv4 alone, all others
    have both. These two do not reach one another.
    """
    *_, only4, only6 = (f"h{number + 1}" for number in range(hosts))
    topology = Topology("46", underlays={only4: "4", only6: "6"}, mtus=mtus or {})
    lab = make_lab(hosts=hosts - 1, pods=1, config=network_config("46"), topology=topology)
    lab.up()
    last = lab.add_host()
    last.start_agent()
    last.wait_ready()
    last.attach_pods()
    both = lab.hosts[:-2]

    def converged() -> bool:
        leases = lab.leases()
        others = [lease for lease in leases if not lab.hosts[-2].holds(lease)]
        peers = [peer for host in both for peer in host.peers(leases)] + last.peers(others)
        return all(peer.programmed for peer in peers)

    wait_until(converged, 30, "the last host in the kernels of all that reach it")
    return lab


@dataclass(frozen=True)
class Vtep:
    """A tunnel's end as its lease has it."""

    address: str
    mac: str


def vtep_of(host: Host, family: int) -> Vtep:
    """The host's on the underlay of this family."""
    (attrs,) = (lease.attrs for lease in host.lab.leases() if host.holds(lease))
    address, vtep = (attrs.public_ip, attrs.vtep) if family == 4 else (attrs.public_ip6, attrs.vtep6)
    assert address is not None
    assert vtep is not None
    return Vtep(format_address(address), format_mac(vtep.mac))


@dataclass(frozen=True)
class Way:
    """From pod to pod, by one address family of theirs."""

    src: Pod
    dst: Pod
    family: int

    @cached_property
    def outer(self) -> int:
        """The underlay's family that carries it: their own if both hosts have it."""
        common = self.src.host.underlay_ips.keys() & self.dst.host.underlay_ips.keys()
        return self.family if self.family in common else min(common)

    @property
    def device(self) -> str:
        """Of the tunnel, on both hosts."""
        return "flannel.1" if self.outer == 4 else "flannel-v6.1"

    @property
    def overhead(self) -> int:
        """Bytes that the tunnel adds to the pod's packet, the outer Ethernet header not counted."""
        return OVERHEAD[_LENGTH[self.outer]]

    @cached_property
    def vteps(self) -> tuple[Vtep, Vtep]:
        """Where it enters the tunnel, and where it leaves it."""
        return vtep_of(self.src.host, self.outer), vtep_of(self.dst.host, self.outer)

    @cached_property
    def macs(self) -> tuple[str, str]:
        """Of the underlay's interfaces, of the source and of the destination."""
        return mac_of(self.src.host, "eth0"), mac_of(self.dst.host, "eth0")

    def packet(self, payload: bytes, *, sport: int = 4000, **header: int) -> Packet:
        """A packet over UDP. `header`: ttl, tos, id and flags, for IPv6 the first two under its names for them."""
        return (
            ip(self.src.addresses[self.family], self.dst.addresses[self.family], **header)
            / UDP(sport=sport, dport=9)
            / Raw(payload)
        )

    def sized(self, mark: bytes, size: int, **header: int) -> Packet:
        """One of `size` bytes from the IP header on."""
        packet = self.packet(mark, **header)
        return packet / Raw(bytes(size - len(packet)))

    def forged(self, frame: Packet, *, tos: int = 0, **udp: int) -> Packet:
        """A frame in a tunnel, as the source's host would send it but for what is told."""
        (near, far), (own, other) = self.vteps, self.macs
        header = ip(near.address, far.address, tos=tos) / UDP(sport=40000, dport=PORT, **udp)
        return Ether(src=own, dst=other) / header / VXLAN(flags=8, vni=1) / frame

    def inner_ether(self) -> Packet:
        """The Ethernet header that belongs inside of the tunnel."""
        near, far = self.vteps
        return Ether(src=near.mac, dst=far.mac)


def ip(src: str, dst: str, **header: int) -> Packet:
    """An IP header of the addresses' family, its fields under IPv4's names."""
    if ":" not in dst:
        return IP(src=src, dst=dst, **header)
    names = {"ttl": "hlim", "tos": "tc"}
    return IPv6(src=src, dst=dst, **{names[key]: value for key, value in header.items() if key in names})


def ttl_of(packet: Packet) -> int:
    """TTL, or hop limit."""
    return int(packet.ttl if packet.version == 4 else packet.hlim)


def tos_of(packet: Packet) -> int:
    """DSCP and ECN in one byte."""
    return int(packet.tos if packet.version == 4 else packet.tc)


class Road:
    """The links along a way, all watched, and a word for each thing that may happen on it."""

    def __init__(self, wire: Wire, way: Way) -> None:
        self.wire, self.way = wire, way
        self.src, self.dst = wire.watched(way.src), wire.watched(way.dst)
        hub = way.src.lab.hub
        self.leaving, self.arriving = (wire.watched(hub, pod.host.name) for pod in (way.src, way.dst))

    def send(self, packet: Packet) -> None:
        """From the pod."""
        self.wire.send(self.way.src, packet)

    def tunnelled(self, mark: bytes) -> Packet:
        """The frame with the mark, as it leaves the source's host. AssertionError if it is not in a tunnel."""
        frame = self.leaving.expect(carrying(mark))
        assert tunnelled(frame), f"left {self.way.src.host.name} untunnelled: {frame.summary()}"
        return frame

    def received(self, mark: bytes) -> Packet:
        """The packet with the mark, as it reaches the pod, from its IP header on."""
        return self.dst.expect(carrying(mark)).payload

    def fence(self, mark: bytes) -> None:
        """Send a packet all the way."""
        self.send(self.way.packet(mark))

    def expect_nothing(self, *links: Link, wanted: Wanted) -> None:
        """Nothing of the kind has passed the links by the time that a packet has come all the way."""
        self.wire.expect_nothing(*links, wanted=wanted, fence=self.fence, at=self.dst)

    def expect_no_arrival(self, mark: bytes) -> None:
        """What was put on the port of the destination's host has not reached the pod, and a good tunnel packet does."""

        def fence(mark: bytes) -> None:
            self.arriving.put(self.way.forged(self.way.inner_ether() / self.way.packet(mark)))

        self.wire.expect_nothing(self.dst, wanted=carrying(mark), fence=fence, at=self.dst)


# --- encapsulation ---------------------------------------------------------------------------------------------------


def check_vxlan_header(wire: Wire, way: Way) -> None:
    """The I flag, the VNI, and nothing else (RFC 7348 section 5), to the overlay's port."""
    road, mark = Road(wire, way), new_mark()
    road.send(way.packet(mark))
    frame = road.tunnelled(mark)
    header = bytes(frame[VXLAN])[:8]
    assert header[:4] == bytes.fromhex("08 00 00 00"), f"flags and reserved bits are {header[:4].hex(' ')}"
    assert header[4:7] == bytes.fromhex("00 00 01"), f"the VNI is {int.from_bytes(header[4:7], 'big')}"
    assert header[7] == 0, f"the last reserved byte is {header[7]:#x}"
    assert frame[UDP].dport == PORT


def check_outer_header(wire: Wire, way: Way) -> None:
    """From VTEP to VTEP as the leases have them: TTL 64, DSCP 0, one piece; the MACs are the hosts' own.

    DF is off, whatever the pod says (`df unset`, as flannel's device): routers on the underlay may cut.
    """
    road = Road(wire, way)
    for flags in (0, DONT_FRAGMENT):
        mark = new_mark()
        road.send(way.packet(mark, flags=flags))
        _check_outer(road.tunnelled(mark), way)
        # The other end's port has the same frame.
        assert road.arriving.expect(carrying(mark)).original == road.tunnelled(mark).original


def _check_outer(frame: Packet, way: Way) -> None:
    near, far = way.vteps
    outer = frame.payload
    assert outer.version == way.outer, f"carried by IPv{outer.version}, not IPv{way.outer}"
    expected = {
        "MAC of the source": (frame.src, way.macs[0]),
        "MAC of the destination": (frame.dst, way.macs[1]),
        "source": (outer.src, near.address),
        "destination": (outer.dst, far.address),
        "TTL": (ttl_of(outer), 64),
        "DSCP and ECN": (tos_of(outer), 0),
    }
    if way.outer == 4:
        expected |= {
            "DF": (bool(outer.flags.DF), False),
            "MF": (bool(outer.flags.MF), False),
            "offset": (outer.frag, 0),
        }
    else:
        expected |= {"flow label": (outer.fl, 0), "next header": (outer.nh, 17)}
    wrong = [f"the outer {what} is {seen}, not {right}" for what, (seen, right) in expected.items() if seen != right]
    assert not wrong, "; ".join(wrong)


def check_inner_frame(wire: Wire, way: Way) -> None:
    """From VTEP MAC to VTEP MAC; the packet is the pod's, less a hop at each host, to the last bit."""
    road, mark = Road(wire, way), new_mark()
    packet = way.packet(mark, ttl=17, tos=0x28)
    road.send(packet)
    frame = inner(road.tunnelled(mark))
    near, far = way.vteps
    assert frame.src == near.mac, f"the inner source is {frame.src}, not {near.mac}"
    assert frame.dst == far.mac, f"the inner destination is {frame.dst}, not {far.mac}"
    for hops, seen in ((1, frame.payload), (2, road.received(mark))):
        assert ttl_of(seen) == 17 - hops
        assert bytes(seen) == bytes(way.packet(mark, ttl=17 - hops, tos=0x28))


FLOWS, PACKETS = 100, 20


def check_source_ports(wire: Wire, way: Way) -> None:
    """Flows spread over the ephemeral ports; the packets of one flow, of any size, have one (RFC 7348 section 5)."""
    road = Road(wire, way)

    def source_port(flow: int, number: int) -> int:
        mark = new_mark()
        road.send(way.packet(mark + bytes(50 * number), sport=4000 + flow, ttl=64 - number))
        return int(road.tunnelled(mark)[UDP].sport)

    one = {source_port(0, number) for number in range(PACKETS)}
    assert len(one) == 1, f"{PACKETS} packets of one flow have {len(one)} source ports"
    distinct = {source_port(flow, 0) for flow in range(FLOWS)}
    low, high = map(int, way.src.host.run("cat", "/proc/sys/net/ipv4/ip_local_port_range").stdout.split())
    assert all(low <= port <= high for port in distinct), f"source ports outside of {low} to {high}: {distinct}"
    # A hundred of 28,000 ports chosen at random: ten coincidences are not to be seen in the age of the world.
    assert len(distinct) > FLOWS - 10, f"{FLOWS} flows have {len(distinct)} source ports"


def check_outer_checksum(wire: Wire, way: Way) -> None:
    """There is one, over IPv4 too, and it is right."""
    road = Road(wire, way)
    with _checksums_finished(way.src.host):
        for size in (1, 8, 1000, 1001):
            mark = new_mark()
            road.send(way.packet(mark + bytes(size)))
            frame = road.tunnelled(mark)
            assert _checksum_is_right(frame.payload), f"the outer UDP checksum is {frame[UDP].chksum:#06x}"
            assert _checksum_is_right(inner(frame).payload)
            road.received(mark)


@contextlib.contextmanager
def _checksums_finished(host: Host) -> Iterator[None]:
    """The kernel finishes them itself, so that they can be seen: what it leaves to hardware is not there yet."""
    host.made(lambda: set_feature("eth0", "tx-checksum-ip-generic", False))
    try:
        yield
    finally:
        host.made(lambda: set_feature("eth0", "tx-checksum-ip-generic", True))


def _checksum_is_right(packet: Packet) -> bool:
    """Whether the UDP checksum of a packet is what RFC 768 calls for, and not zero, which stands for none."""
    again = packet.copy()
    del again[UDP].chksum
    return bool(packet[UDP].chksum) and bytes(again) == bytes(packet)


# --- nothing is flooded ----------------------------------------------------------------------------------------------


def check_nothing_is_flooded(wire: Wire, lab: Lab) -> None:
    """Whatever a pod or a host says to nobody in particular, no port of the underlay carries it, in a tunnel or not."""
    first, *others = lab.hosts
    ports = [wire.watched(lab.hub, host.name) for host in lab.hosts]
    pod = wire.watched(first.pods[0])
    tunnels = [wire.at(first, way.device) for way in ways(first, others[0])]
    for frame in _pleas(first.pods[0], others[0].pods[0], pod.mac, mac_of(first, "cni0")):
        pod.put(frame)
    for tunnel in tunnels:
        for frame in _calls(tunnel.mac, first.pods[0], others[0].pods[0]):
            tunnel.put(frame)
    # What is flooded goes by every port, so each has a fence of its own.
    for port, host in zip(ports[1:], others, strict=True):
        mark = new_mark()
        (way, *_) = ways(first, host)
        wire.send(way.src, way.packet(mark))
        port.expect(carrying(mark))
    rules = _Rules(lab)
    offences = [
        f"{port.name}: {why}: {frame.summary()}"
        for port in ports
        for frame in port.all(lambda frame: True)
        if (why := rules.broken_by(frame))
    ]
    assert not offences, "\n".join(offences)


def ways(src: Host, dst: Host) -> list[Way]:
    """Between the first pods of two hosts, by each family."""
    return [Way(src.pods[0], dst.pods[0], family) for family in sorted(src.pods[0].addresses)]


def _pleas(pod: Pod, far: Pod, mac: str, gateway: str) -> Iterator[Packet]:
    """What pods send to nobody in particular, or to somebody who is not there."""
    payload = UDP(sport=4000, dport=9) / Raw(b"anybody?")
    own, other = pod.host.gateways, far.host.gateways
    absent = {family: str(network.ip + 76) for family, network in own.items()}
    lost = {family: str(network.ip + 76) for family, network in other.items()}
    for dst in ("255.255.255.255", str(own[4].network.broadcast_address)):
        yield Ether(src=mac, dst=EVERYBODY) / IP(src=pod.addresses[4], dst=dst) / payload
    yield Ether(src=mac, dst="01:00:5e:00:00:fb") / IP(src=pod.addresses[4], dst="224.0.0.251", ttl=9) / payload
    yield Ether(src=mac, dst="01:00:5e:01:02:03") / IP(src=pod.addresses[4], dst="239.1.2.3", ttl=9) / payload
    for target in (absent[4], far.addresses[4], str(other[4].ip)):
        yield Ether(src=mac, dst=EVERYBODY) / ARP(hwsrc=mac, psrc=pod.addresses[4], pdst=target)
    for dst, group in (("ff02::1", "33:33:00:00:00:01"), ("ff0e::fb", "33:33:00:00:00:fb")):
        yield Ether(src=mac, dst=group) / IPv6(src=pod.addresses[6], dst=dst, hlim=9) / payload
    for target in (absent[6], far.addresses[6]):
        yield _solicitation(mac, pod.addresses[6], target)
    # By its gateway: to pods that are not there, and to all of another host's subnet.
    for family in (4, 6):
        for dst in (absent[family], lost[family]):
            yield Ether(src=mac, dst=gateway) / ip(pod.addresses[family], dst) / payload
    directed = str(other[4].network.broadcast_address)
    yield Ether(src=mac, dst=gateway) / IP(src=pod.addresses[4], dst=directed) / payload
    # To no MAC that anybody has.
    yield Ether(src=mac, dst="02:00:00:00:00:99") / ip(pod.addresses[4], far.addresses[4]) / payload


def _calls(mac: str, near: Pod, far: Pod) -> Iterator[Packet]:
    """What a host's kernel may say into its tunnel to all, or to a MAC that no peer has."""
    own = near.host.gateways
    payload = UDP(sport=4000, dport=9) / Raw(b"anybody?")
    base = {family: str(gateway.network.network_address) for family, gateway in own.items()}
    yield Ether(src=mac, dst=EVERYBODY) / ARP(hwsrc=mac, psrc=base[4], pdst=far.addresses[4])
    yield Ether(src=mac, dst=EVERYBODY) / IP(src=base[4], dst="255.255.255.255") / payload
    yield Ether(src=mac, dst="01:00:5e:00:00:fb") / IP(src=base[4], dst="224.0.0.251") / payload
    yield Ether(src=mac, dst="02:00:00:00:00:99") / IP(src=base[4], dst=far.addresses[4]) / payload
    yield _solicitation(mac, base[6], far.addresses[6])
    yield Ether(src=mac, dst="33:33:00:00:00:02") / IPv6(src="fe80::1", dst="ff02::2", hlim=255) / ICMPv6ND_RS()
    yield Ether(src=mac, dst="33:33:00:00:00:16") / IPv6(src="fe80::1", dst="ff02::16", hlim=1) / ICMPv6MLReport2()
    yield Ether(src=mac, dst="02:00:00:00:00:99") / IPv6(src=base[6], dst=far.addresses[6]) / payload


def _solicitation(mac: str, src: str, target: str) -> Packet:
    """Who has `target`? (RFC 4861 section 4.3, to the solicited-node group)"""
    tail = ipaddress.IPv6Address(target).packed[-3:]
    group = str(ipaddress.IPv6Address(ipaddress.IPv6Address("ff02::1:ff00:0").packed[:-3] + tail))
    return (
        Ether(src=mac, dst="33:33:ff:" + tail.hex(":")) / IPv6(src=src, dst=group, hlim=255) / ICMPv6ND_NS(tgt=target)
    )


class _Rules:
    """What a frame on the underlay must not be, by the leases."""

    def __init__(self, lab: Lab) -> None:
        self._vteps = {
            vtep.address: (vtep.mac, [ipaddress.ip_network(subnet) for subnet in host.subnets.values()])
            for host in lab.hosts
            for vtep in (vtep_of(host, family) for family in host.underlay_ips)
        }

    def broken_by(self, frame: Packet) -> str:
        """Which rule; empty if none."""
        if not tunnelled(frame):
            return self._in_the_open(frame)
        if (found := self._vteps.get(frame.payload.dst)) is None:
            return "tunnelled to no VTEP"
        mac, subnets = found
        within = inner(frame)
        if int(within.dst[:2], 16) & 1:
            return "broadcast or multicast in a tunnel"
        if within.dst != mac:
            return "tunnelled to a VTEP that has another MAC"
        if ARP in within or ICMPv6ND_NS in within:
            return "asks for a neighbour in a tunnel"
        if not any(ipaddress.ip_address(within.payload.dst) in subnet for subnet in subnets):
            return "tunnelled to a host that does not lease the subnet"
        return ""

    def _in_the_open(self, frame: Packet) -> str:
        # Hosts ask for one another, and speak to etcd.
        addresses = [getattr(frame.payload, name, None) for name in ("src", "dst", "psrc", "pdst")]
        if ICMPv6ND_NS in frame:
            addresses.append(frame[ICMPv6ND_NS].tgt)
        known = [ipaddress.ip_address(each) for each in addresses if each]
        return "a pod's address in the open" if any(each in NETWORKS[each.version] for each in known) else ""


# --- MTU -------------------------------------------------------------------------------------------------------------


def widen(host: Host, mtu: int = 9000) -> None:
    """Give the links of the host's pods this MTU, whatever the overlay's is."""
    host.ip(f"link set cni0 mtu {mtu}", *(f"link set p{pod.number} mtu {mtu}" for pod in host.pods))
    for pod in host.pods:
        pod.ip(f"link set eth0 mtu {mtu}")


def check_largest_packet(wire: Wire, way: Way, mtu: int) -> None:
    """A packet of `mtu` bytes crosses whole, in one frame on the underlay."""
    road, mark = Road(wire, way), new_mark()
    packet = way.sized(mark, mtu, flags=DONT_FRAGMENT)
    road.send(packet)
    frame = road.tunnelled(mark)
    assert not fragment(frame), f"left {way.src.host.name} in pieces: {frame.summary()}"
    assert len(frame.payload) == mtu + way.overhead, f"{mtu} bytes make {len(frame.payload)} on the underlay"
    assert bytes(road.received(mark)[UDP]) == bytes(packet[UDP])


def check_too_large_is_refused(wire: Wire, way: Way, mtu: int) -> None:
    """A packet of a byte more is not sent on, and its sender is told what fits (RFC 1191, RFC 8201).

    Who tells is the pod's gateway; it quotes the packet that it refused as it came.
    """
    road, mark = Road(wire, way), new_mark()
    packet = way.sized(mark, mtu + 1, flags=DONT_FRAGMENT)
    road.send(packet)
    road.expect_nothing(road.leaving, road.arriving, wanted=carrying(mark))
    told = road.src.expect(lambda frame: too_big(frame) is not None and mark in frame.original)
    gateway = str(way.src.host.gateways[way.family].ip)
    assert (told.payload.src, told.payload.dst) == (gateway, way.src.addresses[way.family])
    named, quoted = too_big(told) or (0, b"")
    assert named == mtu, f"the sender is told {named}, and {mtu} fit"
    # RFC 792 wants 8 bytes behind the header, RFC 4443 all that the least MTU holds.
    assert len(quoted) >= (28 if way.family == 4 else 1280 - 40 - 8)
    assert quoted_as_sent(quoted, packet)


def check_too_large_is_cut(wire: Wire, way: Way, mtu: int) -> None:
    """Of a byte more that may be fragmented, the host makes fragments before the tunnel; none is of the underlay's."""
    road, mark = Road(wire, way), new_mark()
    packet = way.sized(mark, mtu + 1, id=next(_identities))
    road.send(packet)

    def piece(frame: Packet) -> bool:
        seen = inner(frame) if tunnelled(frame) else frame
        return IP in seen and seen[IP].id == packet.id and seen[IP].src == packet.src and ICMP not in seen

    road.dst.expect(lambda frame: piece(frame) and not frame[IP].flags.MF)
    for link, longest in ((road.leaving, mtu + way.overhead), (road.arriving, mtu + way.overhead), (road.dst, mtu)):
        pieces = link.all(piece)
        assert len(pieces) == 2, f"{len(pieces)} pieces on {link.name}"
        assert all(len(frame.payload) <= longest for frame in pieces)
        assert not any(map(fragment, pieces)) or link is road.dst, "a piece of the underlay's"
    (whole,) = defragment(Ether(frame.original) for frame in road.dst.all(piece))
    assert bytes(whole[UDP]) == bytes(packet[UDP])


_identities = itertools.count(0x4000)


def fragment(frame: Packet) -> bool:
    """Whether the frame's own packet, not the one in the tunnel, is a fragment."""
    packet = frame.payload
    return bool(packet.flags.MF or packet.frag) if packet.version == 4 else packet.nh == 44


def quoted_as_sent(quoted: bytes, packet: Packet) -> bool:
    """Whether an ICMP error quotes this packet, after any number of hops."""
    hops = {4: (8, 10, 11), 6: (7,)}[packet.version]  # TTL and header checksum, or hop limit.
    pairs = zip(quoted, bytes(packet), strict=False)
    return all(one == other or at in hops for at, (one, other) in enumerate(pairs))


def too_big(frame: Packet) -> tuple[int, bytes] | None:
    """What an ICMP error says that fits, and the packet it quotes; None if the frame is no such."""
    if ICMPv6PacketTooBig in frame:
        return int(frame[ICMPv6PacketTooBig].mtu), bytes(frame[ICMPv6PacketTooBig])[8:]
    if ICMP in frame and (frame[ICMP].type, frame[ICMP].code) == (3, 4):
        return int(frame[ICMP].nexthopmtu), bytes(frame[ICMP])[8:]
    return None
