"""What a host takes out of tunnel packets, and what it refuses: each put on its port of the underlay, byte for byte.

What nobody refuses is here as well: docs/firewall.md tells operators of it.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from overlay import firewall
from overlay.cluster import Lab
from overlay.cluster_hosts import Host
from overlay.nft import Nftables
from overlay.topology import network_config
from tests.conftest import MakeLab
from tests.packet import forge
from tests.packet.receiver import DEVICES, NOTHING, STRANGERS, Ends, Fate, Receiver, all_ends, packed, tables
from tests.packet.wire import Wire

GUARDS = {"h1": "on", "h2": "log", "h3": "off"}
"""The mode of each host's guard. All tests but those of the modes are about h1."""

QUIET = ("--checksum-probe", "false")
"""Agents that send nothing to one another through the tunnels themselves."""

WORLD = {4: "198.51.100.7", 6: "2001:db8::7"}
"""Somewhere outside."""


def dual(**backend: object) -> dict[str, object]:
    """IPv4 and IPv6 pods; subnets for the tests to use are left over."""
    config = network_config("46")
    return {**config, "SubnetMax": "10.244.199.0", "Backend": {**config["Backend"], **backend}}


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    """Three hosts with IPv4 and IPv6 everywhere, each with another mode of the guard."""
    made = make_module_lab(config=dual(), underlay="46")
    made.make_network()
    made.start_etcd()
    made.write_config(dual())
    for host in made.hosts:
        host.start_agent("--source-guard", GUARDS[host.name], *QUIET)
    settled(made)
    return made


def settled(lab: Lab) -> None:
    """Until all is as it will be."""
    for host in lab.hosts:
        host.wait_ready()
        host.attach_pods()
    lab.wait_converged()
    acquainted(lab)


def acquainted(lab: Lab) -> None:
    """Until all pods reach each other, and all neighbours are known that a refusal or an answer could ask for."""
    assert all(each.ok for each in lab.ping_all())
    hub = lab.topology.links[0].hub
    for host in lab.hosts:
        for other in (*(each.underlay_ips for each in lab.hosts), {family: str(hub[family].ip) for family in hub}):
            for address in other.values():
                assert host.run("ping", "-n", "-c", "1", "-W", "5", address).returncode == 0


@pytest.fixture(scope="module")
def ends(lab: Lab) -> dict[str, Ends]:
    return all_ends(lab)


@pytest.fixture(scope="module")
def nftables(lab: Lab) -> Iterator[dict[str, Nftables]]:
    with contextlib.ExitStack() as stack:
        made = tables(lab)
        for each in made.values():
            stack.callback(each.close)
        yield made


Choose = Callable[[str], Receiver]
"""Gives a receiver by the names of three hosts: who gets the frames, as whose they are forged, and a third."""


@pytest.fixture
def choose(wire: Wire, ends: dict[str, Ends], nftables: dict[str, Nftables]) -> Choose:
    return lambda names: Receiver(wire, ends, nftables, names)


@pytest.fixture
def receiver(choose: Choose) -> Receiver:
    return choose("h1 h2 h3")


# --- frames, and what comes of them --------------------------------------------------------------------------------

families = pytest.mark.parametrize(
    ("inner", "outer"), [(4, 4), (4, 6), (6, 4), (6, 6)], ids=lambda family: f"IPv{family}"
)

Frames = Callable[[Receiver, int, int], bytes | Iterable[bytes]]
"""Forges frames for a receiver, with an inner and an outer packet of these families."""


class Case(NamedTuple):
    """Frames, and what comes of them, which may depend on the families: of the inner packets, and of the outer ones."""

    name: str
    frames: Frames
    fate: Fate | Callable[[int, int], Fate]
    inner: tuple[int, ...] = (4, 6)
    outer: tuple[int, ...] = (4, 6)


REACHES = Fate(("h1p1",))


def answered(what: str, *pods: str) -> Fate:
    """The peer gets this, through the tunnel."""
    return Fate(pods, (f"tunnel to h2: {what}",))


def counted(name: str) -> Fate:
    return Fate(counted={name: 1})


def altered(**other: object) -> Frames:
    """A good tunnel packet with other values in the tunnel's headers: see `forge.Tunnel`."""
    return lambda r, inner, outer: r.way(outer).but(**other).packet(r.ping(inner))


def outer_end(**of: Callable[[Receiver, int], bytes]) -> Frames:
    """The same, where the values are the receiver's or the family's."""
    return lambda r, inner, outer: (
        r.way(outer).but(**{key: value(r, outer) for key, value in of.items()}).packet(r.ping(inner))
    )


def inner_end(*, request: bool = False, ttl: int = 64, **of: Callable[[Receiver, int], bytes]) -> Frames:
    """A tunnel packet whose inner packet has these addresses."""
    return lambda r, inner, outer: r.way(outer).packet(
        r.ping(inner, request=request, ttl=ttl, **{key: value(r, inner) for key, value in of.items()})
    )


def constant(four: str, six: str) -> Callable[[Receiver, int], bytes]:
    return lambda r, family: packed(four if family == 4 else six)


def carried(make: Callable[[bytes], bytes]) -> Frames:
    """A good tunnel packet, its inner frame altered."""
    return lambda r, inner, outer: r.way(outer).carry(make(r.way(outer).inner(r.ping(inner))))


def with_byte(packet: bytes, at: int) -> bytes:
    """With one bit of one byte turned over."""
    return packet[:at] + bytes([packet[at] ^ 1]) + packet[at:][1:]


def tagged(frame: bytes, tag: int) -> bytes:
    return frame[:12] + b"\x81\0" + tag.to_bytes(2, "big") + frame[12:]


def nested(src: Callable[[Receiver, int], bytes], dst: Callable[[Receiver, int], bytes]) -> Frames:
    """A good tunnel packet to a pod as the payload of a packet in the tunnel."""

    def frames(r: Receiver, inner: int, outer: int) -> bytes:
        source, target = src(r, inner), dst(r, inner)
        payload = forge.vxlan(r.way(inner).inner(r.ping(inner)))
        datagram = forge.udp(source, target, 9, 8472, payload)
        return r.way(outer).packet(forge.ip(source, target, forge.UDP, datagram))

    return frames


def datagram(r: Receiver, family: int, payload: bytes) -> bytes:
    """A UDP packet from the peer's pod to ours. Nobody listens."""
    src, dst = r.src.pod(1, family), r.dst.pod(1, family)
    return forge.ip(src, dst, forge.UDP, forge.udp(src, dst, 9, 9, payload))


def whole(r: Receiver) -> bytes:
    """A large IPv4 packet with DF set."""
    src, dst = r.src.pod(1, 4), r.dst.pod(1, 4)
    return forge.ipv4(src, dst, forge.UDP, forge.udp(src, dst, 9, 9, bytes(4000)), fragment=0x4000)


def large(r: Receiver, inner: int, outer: int) -> Iterable[bytes]:
    """An inner packet of more than 4000 bytes, in outer fragments."""
    return r.way(outer).in_fragments(datagram(r, inner, bytes(4000)), 1400, 2800, ident=12)


def overlapping(packet: bytes, *, by: int) -> list[bytes]:
    """In three pieces, of which the second begins `by` bytes before the first one ends."""
    at = 20 if packet[0] >> 4 == 4 else 40
    head, data = packet[:at], packet[at:]
    ranges = (0, 24), (24 - by, 32), (32, len(data))
    return [forge.fragment(head, data[start:end], start, more=end < len(data), ident=9) for start, end in ranges]


def question(target: Callable[[Receiver], bytes]) -> Frames:
    """ARP in the tunnel: the peer's device asks who has the address."""
    return lambda r, inner, outer: r.way(outer).carry(
        forge.ethernet(
            r.dst.device_macs[outer],
            r.src.device_macs[outer],
            forge.ARP_TYPE,
            forge.arp(r.src.device_macs[outer], r.src.base(4), target(r)),
        )
    )


OUTER = [
    Case("good one reaches its pod", altered(), REACHES),
    Case("VNI 0", altered(vni=0), NOTHING),
    Case("VNI of another network", altered(vni=2), NOTHING),
    Case("largest VNI", altered(vni=0xFFFFFF), NOTHING),
    Case("no I flag", altered(flags=0), NOTHING),
    Case("another port is nobody's", altered(port=4789), Fate(sent=("unreachable",))),
    Case("stranger", outer_end(src=lambda r, f: packed(STRANGERS[f])), counted(firewall.STRANGERS)),
    Case(
        "the host's own address as source",
        outer_end(src=lambda r, f: r.dst.underlay[f]),
        # A martian to IPv4; IPv6 has none such, and leaves it to the guard.
        lambda inner, outer: NOTHING if outer == 4 else counted(firewall.STRANGERS),
    ),
    Case("to another MAC", outer_end(dst_mac=lambda r, f: r.third.mac), NOTHING),
    Case("to the MAC of all", altered(dst_mac=b"\xff" * 6), REACHES),
    Case("to all hosts", outer_end(dst=constant("224.0.0.1", "ff02::1")), REACHES),
    Case("to the link's broadcast", outer_end(dst=constant("172.30.255.255", "ff02::1")), REACHES),
    Case("to another address of the host", outer_end(dst=lambda r, f: r.dst.gateways[f]), REACHES),
    Case("TTL 0", altered(ttl=0), REACHES),
    Case("TTL 1", altered(ttl=1), REACHES),
    Case("no UDP checksum", altered(check=0), lambda inner, outer: REACHES if outer == 4 else NOTHING),
    Case("wrong UDP checksum", altered(check=0x1234), NOTHING),
    Case(
        "wrong IP checksum",
        lambda r, inner, outer: with_byte(r.way(outer).packet(r.ping(inner)), 24),
        NOTHING,
        outer=(4,),
    ),
    Case(
        "in fragments",
        lambda r, inner, outer: r.way(outer).in_fragments(r.ping(inner), 24, 48, ident=10),
        REACHES,
    ),
    Case(
        "in fragments that overlap",
        lambda r, inner, outer: map(
            r.way(outer).on_wire, overlapping(r.way(outer).outer(forge.vxlan(r.way(outer).inner(r.ping(inner)))), by=8)
        ),
        NOTHING,
    ),
    Case("in VLAN 5", lambda r, i, o: tagged(r.way(o).packet(r.ping(i)), 5), NOTHING),
    Case("in VLAN 0, which is none", lambda r, i, o: tagged(r.way(o).packet(r.ping(i)), 0), REACHES),
    Case("no VXLAN header", lambda r, i, o: r.way(o).on_wire(r.way(o).outer(b"")), NOTHING),
    Case("no frame", lambda r, i, o: r.way(o).carry(b""), NOTHING),
]

INNER = [
    Case("an Ethernet header alone", carried(lambda frame: frame[:14]), NOTHING),
    Case("to a MAC that is not the device's", altered(inner_dst_mac=bytes.fromhex("020202020202")), NOTHING),
    Case("to the MAC of all", altered(inner_dst_mac=b"\xff" * 6), NOTHING),
    Case("from the device's own MAC", outer_end(inner_src_mac=lambda r, f: r.dst.device_macs[f]), NOTHING),
    Case("in VLAN 5", carried(lambda frame: tagged(frame, 5)), NOTHING),
    Case("in VLAN 0, which is none", carried(lambda frame: tagged(frame, 0)), REACHES),
    # Sources.
    Case("from a pod of another peer", inner_end(src=lambda r, f: r.third.pod(1, f)), REACHES),
    Case("from a host of the cluster", inner_end(src=lambda r, f: r.third.underlay[f]), REACHES),
    Case("from somewhere outside", inner_end(src=constant(WORLD[4], WORLD[6])), REACHES),
    Case("from the pod itself", inner_end(src=lambda r, f: r.dst.pod(1, f)), counted(firewall.IMPOSTORS)),
    Case("from the pod beside it", inner_end(src=lambda r, f: r.dst.pod(2, f)), counted(firewall.IMPOSTORS)),
    Case("from the pods' gateway", inner_end(src=lambda r, f: r.dst.gateways[f]), counted(firewall.IMPOSTORS)),
    Case("from the device", inner_end(src=lambda r, f: r.dst.base(f)), counted(firewall.IMPOSTORS)),
    Case(
        "from the receiver's underlay address",
        inner_end(src=lambda r, f: r.dst.underlay[f]),
        lambda inner, outer: NOTHING if inner == 4 else REACHES,
    ),
    Case("from loopback", inner_end(src=constant("127.0.0.1", "::1")), NOTHING),
    Case("from nobody", inner_end(src=constant("0.0.0.0", "::")), NOTHING),
    Case("from a group", inner_end(src=constant("224.0.0.1", "ff02::1")), NOTHING),
    Case("from all, or a link-local address", inner_end(src=constant("255.255.255.255", "fe80::7")), NOTHING),
    # Destinations.
    Case("to a pod of another peer", inner_end(dst=lambda r, f: r.third.pod(1, f)), counted(firewall.STRAYS)),
    Case("back to its sender", inner_end(dst=lambda r, f: r.src.pod(2, f)), counted(firewall.STRAYS)),
    Case(
        "to a subnet nobody leases",
        inner_end(dst=constant("10.244.250.3", "fd00:244:0:fffe::3")),
        counted(firewall.STRAYS),
    ),
    Case(
        "out into the world",
        inner_end(dst=constant(WORLD[4], WORLD[6])),
        lambda inner, outer: Fate(sent=(f"packet to {WORLD[inner]}",)),
    ),
    Case(
        "to another host's underlay address",
        inner_end(dst=lambda r, f: r.third.underlay[f]),
        Fate(sent=("packet to h3",)),
    ),
    Case(
        "to the host's underlay address, asking",
        inner_end(dst=lambda r, f: r.dst.underlay[f], request=True),
        answered("packet to h2p1"),
    ),
    Case("to loopback", inner_end(dst=constant("127.0.0.1", "::1"), request=True), NOTHING),
    Case("to all", inner_end(dst=constant("255.255.255.255", "ff02::2")), NOTHING),
    Case("to all of the subnet", inner_end(dst=lambda r, f: r.dst.base(f, 255)), NOTHING, inner=(4,)),
    Case("to a group", inner_end(dst=constant("239.1.2.3", "ff0e::7"), request=True), NOTHING),
    # Hops, pieces, sizes, checksums.
    Case("TTL 0", inner_end(ttl=0), answered("time exceeded")),
    Case("TTL 1", inner_end(ttl=1), answered("time exceeded")),
    Case("TTL 2", inner_end(ttl=2), REACHES),
    Case("no payload", lambda r, i, o: r.way(o).packet(datagram(r, i, b"")[: 20 if i == 4 else 40]), NOTHING),
    Case(
        "no payload, and saying so",
        lambda r, i, o: r.way(o).packet(forge.ip(r.src.pod(1, i), r.dst.pod(1, i), forge.NONE, b"")),
        # IPv4 has no protocol 59.
        lambda inner, outer: answered("unreachable", "h1p1") if inner == 4 else REACHES,
    ),
    Case(
        "wrong IP checksum",
        lambda r, i, o: r.way(o).packet(with_byte(r.ping(i), 10)),
        NOTHING,
        inner=(4,),
    ),
    Case("wrong checksum of ICMP", lambda r, i, o: r.way(o).packet(with_byte(r.ping(i), -1 + len(r.ping(i)))), REACHES),
    Case("fragments", lambda r, i, o: map(r.way(o).packet, forge.fragments(r.ping(i), 8, 16, ident=5)), REACHES),
    Case(
        "fragments that overlap",
        lambda r, i, o: map(
            r.way(o).packet, overlapping(forge.ping(r.src.pod(1, i), r.dst.pod(1, i), bytes(40)), by=8)
        ),
        REACHES,
    ),
    Case(
        "larger than the pods' MTU",
        large,
        lambda inner, outer: answered("unreachable", "h1p1") if inner == 4 else answered("too big"),
    ),
    Case(
        "larger than the pods' MTU, and not to be fragmented",
        lambda r, i, o: r.way(o).in_fragments(whole(r), 1400, 2800, ident=13),
        answered("unreachable"),
        inner=(4,),
    ),
    # Tunnel packets in tunnel packets.
    Case(
        "nested, to a pod, where nobody listens",
        nested(lambda r, f: r.src.pod(1, f), lambda r, f: r.dst.pod(1, f)),
        answered("unreachable", "h1p1"),
    ),
    Case(
        "nested, from a pod",
        nested(lambda r, f: r.src.pod(1, f), lambda r, f: r.dst.gateways[f]),
        counted(firewall.STRANGERS),
    ),
    Case("nested, from a peer", nested(lambda r, f: r.src.underlay[f], lambda r, f: r.dst.underlay[f]), REACHES),
    # Questions.
    Case("ARP for the gateway", question(lambda r: r.dst.gateways[4]), answered("ARP"), inner=(4,)),
    Case("ARP for a pod", question(lambda r: r.dst.pod(1, 4)), NOTHING, inner=(4,)),
    Case(
        "neighbour solicitation for a pod",
        lambda r, i, o: r.way(o).packet(forge.solicitation(r.src.device_macs[o], r.src.base(6), r.dst.pod(1, 6))),
        NOTHING,
        inner=(6,),
    ),
]

PLAIN = [
    Case("to a pod", lambda r, i, o: r.way(o).on_wire(r.ping(i)), REACHES),
    Case("to a pod, from the pod beside it", lambda r, i, o: r.way(o).on_wire(r.ping(i, src=r.dst.pod(2, i))), REACHES),
    Case(
        "to a pod of another host",
        lambda r, i, o: r.way(o).on_wire(r.ping(i, dst=r.third.pod(1, i))),
        Fate(sent=("tunnel to h3: packet to h3p1",)),
    ),
]


def check(receiver: Receiver, case: Case) -> None:
    """What comes of the case's frames, in all families, is what the case says, and nothing else does."""
    for inner, outer in itertools.product(case.inner, case.outer):
        frames = case.frames(receiver, inner, outer)
        expected = case.fate if isinstance(case.fate, Fate) else case.fate(inner, outer)
        found = receiver.fate(*([frames] if isinstance(frames, bytes) else frames), fence=outer)
        assert found == expected, f"{case.name}, IPv{inner} in IPv{outer}: {found}"


def by_name(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in cases])


@by_name(OUTER)
def test_outer_packet_is_taken_or_refused(receiver: Receiver, case: Case) -> None:
    check(receiver, case)


@by_name(INNER)
def test_inner_packet_is_taken_or_refused(receiver: Receiver, case: Case) -> None:
    check(receiver, case)


@by_name(PLAIN)
def test_packet_without_a_tunnel_is_routed_like_any_other(receiver: Receiver, case: Case) -> None:
    check(receiver, case._replace(outer=(4,)))


DOCUMENTED = Path(__file__).parents[2] / "docs/firewall.md"


def test_documented_rule_keeps_peers_from_using_the_host_as_a_router(lab: Lab, receiver: Receiver) -> None:
    h1 = lab.hosts[0]
    (world,) = (case for case in INNER if case.name == "out into the world")
    world = world._replace(outer=(4,))
    commands = re.findall(r"^    (nft add .*inet mine.*)$", DOCUMENTED.read_text(), re.MULTILINE)
    check(receiver, world)
    try:
        for command in commands:
            assert h1.run("sh", "-c", command).returncode == 0
        check(receiver, world._replace(fate=NOTHING))
        check(receiver, OUTER[0])
    finally:
        h1.run("nft", "delete table inet mine")


# --- headers bit by bit and byte by byte ---------------------------------------------------------------------------

RESERVED = [altered(flags=forge.VALID_VNI ^ 1 << bit) for bit in range(32)] + [
    altered(reserved=1 << bit) for bit in range(8)
]
"""Each bit that RFC 7348 reserves, set alone; and the I flag, missing."""


@families
def test_no_reserved_bit_is_ignored_on_receipt(lab: Lab, receiver: Receiver, inner: int, outer: int) -> None:
    """The RFC has them ignored; Linux drops what it does not know, and counts it (vxlan_rcv), so that nothing new is
    taken for something old. Without the I flag it is no VXLAN packet, which is not counted."""
    host = lab.hosts[0]
    before = errors(host, DEVICES[outer])
    assert receiver.fate(*(each(receiver, inner, outer) for each in RESERVED), fence=outer) == NOTHING
    assert errors(host, DEVICES[outer]) == before + len(RESERVED) - 1


def errors(host: Host, device: str) -> int:
    """Packets that the device received and could not use."""
    return int(host.json("ip", "-s", "link", "show", device)[0]["stats64"]["rx"]["errors"])


@families
def test_cut_off_anywhere_it_reaches_nobody(receiver: Receiver, inner: int, outer: int) -> None:
    whole = altered()(receiver, inner, outer)
    # A packet socket sends no less than an Ethernet header.
    cut = [whole[:length] for length in range(14, len(whole))]
    assert receiver.fate(*cut, fence=outer) == NOTHING


@families
def test_cut_off_in_the_tunnel_and_whole_outside_it_reaches_nobody(receiver: Receiver, inner: int, outer: int) -> None:
    """From no VXLAN header at all up to an inner packet that lacks its last byte, with right outer lengths and sums."""
    way = receiver.way(outer)
    payload = forge.vxlan(way.inner(receiver.ping(inner)))
    cut = [way.on_wire(way.outer(payload[:length])) for length in range(len(payload))]
    assert receiver.fate(*cut, fence=outer) == NOTHING


@families
@pytest.mark.parametrize("protocol", [forge.UDP, forge.TCP])
def test_inner_packet_without_a_whole_header_above_ip_is_the_pods_to_refuse(
    receiver: Receiver, inner: int, outer: int, protocol: int
) -> None:
    """A router looks at IP only."""
    src, dst = receiver.src.pod(1, inner), receiver.dst.pod(1, inner)
    made = forge.udp(src, dst, 9, 9, b"") if protocol == forge.UDP else forge.tcp(src, dst, 9, 9)
    for length in range(len(made)):
        frame = receiver.way(outer).packet(forge.ip(src, dst, protocol, made[:length]))
        assert receiver.fate(frame, fence=outer) == REACHES, length


@families
def test_fragment_alone_reaches_nobody_until_the_others_come(receiver: Receiver, inner: int, outer: int) -> None:
    first, *others = receiver.way(outer).in_fragments(receiver.ping(inner), 64, ident=11)
    assert receiver.fate(first, fence=outer) == NOTHING
    assert receiver.fate(*others, fence=outer) == REACHES


# --- what becomes of the host itself -------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [4, 6])
def test_forged_answers_change_no_entry_of_the_agents(
    lab: Lab, receiver: Receiver, ends: dict[str, Ends], outer: int
) -> None:
    """Another MAC, in ARP and neighbour messages, for the address that routes to a third host's pods lead by."""
    h1 = lab.hosts[0]

    def permanent() -> list[str]:
        return sorted(map(str, h1.json("ip", "neigh", "show", "nud", "permanent") + tunnelled(h1)))

    before = permanent()
    way, mac, third = receiver.way(outer), receiver.src.device_macs[outer], receiver.third
    frames = [
        way.carry(forge.ethernet(receiver.dst.device_macs[outer], mac, forge.ARP_TYPE, forge.arp(mac, *packet)))
        for packet in (
            (third.base(4), third.base(4)),
            (third.base(4), receiver.dst.base(4)),
        )
    ]
    frames.append(way.packet(forge.solicitation(mac, third.base(6), receiver.dst.base(6))))
    assert receiver.fate(*frames, fence=outer).pods == ()
    assert permanent() == before


def tunnelled(host: Host) -> list[dict[str, object]]:
    """The FDB entries with a remote."""
    return [entry for entry in host.json("bridge", "fdb") if "dst" in entry]


# --- the modes of the guard ----------------------------------------------------------------------------------------

GUARDED = [
    Case("stranger", outer_end(src=lambda r, f: packed(STRANGERS[f])), counted(firewall.STRANGERS)),
    Case("impostor", inner_end(src=lambda r, f: r.dst.pod(2, f)), counted(firewall.IMPOSTORS)),
    Case("stray", inner_end(dst=lambda r, f: r.third.pod(1, f)), counted(firewall.STRAYS)),
]


@by_name(GUARDED)
@pytest.mark.parametrize("mode", ["log", "off"])
def test_guard_that_does_not_drop_lets_in_what_it_would_refuse(choose: Choose, case: Case, mode: str) -> None:
    names = {"log": "h2 h1 h3", "off": "h3 h1 h2"}[mode]
    receiver = choose(names)
    host, other = names.split()[0], names.split()[2]
    count = case.fate.counted if mode == "log" else {}
    let_in = Fate((f"{host}p1",), (), count)
    led_on = Fate((), (f"tunnel to {other}: packet to {other}p1",), count)
    check(receiver, case._replace(fate=led_on if case.name == "stray" else let_in))


# --- the group policy extension ------------------------------------------------------------------------------------

GBP = [0x88000000 | 7, 0x88400000 | 7, 0x88080000 | 7]
"""First words of headers that carry group policy 7: alone, with "don't learn", with "applied already"
(draft-smith-vxlan-group-policy section 2.1)."""


@pytest.mark.parametrize("flags", GBP, ids=hex)
def test_group_policy_is_refused_where_it_was_not_asked_for(receiver: Receiver, flags: int) -> None:
    check(receiver, Case("group policy", altered(flags=flags), NOTHING))


def test_group_policy_is_taken_where_it_was_and_by_it_nothing_else(make_lab: MakeLab, wire: Wire) -> None:
    lab = make_lab(hosts=3, pods=1, config=dual(GBP=True), underlay="46", agent_options=QUIET)
    lab.up()
    acquainted(lab)
    with contextlib.ExitStack() as stack:
        made = tables(lab)
        for each in made.values():
            stack.callback(each.close)
        receiver = Receiver(wire, all_ends(lab), made, "h1 h2 h3")
        for flags in GBP:
            check(receiver, Case(f"group policy {flags:x}", altered(flags=flags), REACHES))
        for bit in range(24, 32):
            if not 0x88 >> bit - 24 & 1:
                check(receiver, Case(f"bit {bit}", altered(flags=GBP[0] | 1 << bit), NOTHING))


# --- the checks themselves -----------------------------------------------------------------------------------------


@by_name(GUARDED)
def test_check_of_the_guard_fails_where_the_guard_is_off(choose: Choose, case: Case) -> None:
    with pytest.raises(AssertionError, match="IPv4 in IPv4"):
        check(choose("h3 h1 h2"), case)


@pytest.mark.parametrize("seen", ["h1p2", WORLD[4]])
def test_check_fails_on_a_host_that_sends_packets_elsewhere(lab: Lab, receiver: Receiver, seen: str) -> None:
    """To the pod beside, and back out on the underlay: by a rule that somebody else made, before all others."""
    h1 = lab.hosts[0]
    target = h1.pods[1].addresses[4] if seen == "h1p2" else seen
    # By its TTL it tells the packet from the fence.
    good = Case("good one", inner_end(ttl=99), REACHES, (4,), (4,))
    rule = f'iifname "flannel.1" ip ttl 99 ip daddr set {target}'
    text = f"table ip wrong {{ chain c {{ type filter hook prerouting priority -400; {rule}; }}; }}"
    check(receiver, good)
    done = h1.run("nft", text)
    assert done.returncode == 0, done.stderr
    try:
        with pytest.raises(AssertionError, match=seen):
            check(receiver, good)
    finally:
        h1.run("nft", "delete table ip wrong")
    check(receiver, good)
