"""What the overlay puts on the underlay, bit by bit (RFC 7348 section 5), and what it never puts there."""

from functools import partial

import pytest
from scapy.layers.inet import ICMP, UDP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, ICMPv6TimeExceeded
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from overlay.cluster import Lab
from tests.conftest import MakeLab
from tests.packet.checks import (
    NETWORKS,
    Road,
    Way,
    check_inner_frame,
    check_nothing_is_flooded,
    check_outer_checksum,
    check_outer_header,
    check_source_ports,
    check_vxlan_header,
    ip,
    mixed_lab,
    tos_of,
    ttl_of,
    ways,
)
from tests.packet.wire import Wire, carrying, inner, mac_of, new_mark, tunnelled, tunnelling

NOT_ECT, ECT_1, ECT_0, CE = range(4)
"""The two bits of ECN (RFC 3168 section 5)."""


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    """Four hosts: `h1` and `h2` have both families, `h3` IPv4 alone, `h4` IPv6 alone; their pods have both."""
    return mixed_lab(make_module_lab, 4)


@pytest.fixture(scope="module", params=["IPv4 over IPv4", "IPv6 over IPv6", "IPv6 over IPv4", "IPv4 over IPv6"])
def way(lab: Lab, request: pytest.FixtureRequest) -> Way:
    h1, h2, h3, h4 = lab.hosts
    dst = {"IPv6 over IPv4": h3, "IPv4 over IPv6": h4}.get(request.param, h2)
    (found,) = (way for way in ways(h1, dst) if f"IPv{way.family} over IPv{way.outer}" == request.param)
    return found


def test_vxlan_header_has_the_i_flag_and_the_vni_and_no_other_bit(wire: Wire, way: Way) -> None:
    check_vxlan_header(wire, way)


def test_outer_header_leads_from_vtep_to_vtep_as_the_leases_have_them(wire: Wire, way: Way) -> None:
    check_outer_header(wire, way)


def test_inner_frame_is_from_mac_to_mac_and_holds_the_pods_packet_less_a_hop_at_each_host(wire: Wire, way: Way) -> None:
    check_inner_frame(wire, way)


def test_source_port_is_of_the_flow(wire: Wire, way: Way) -> None:
    check_source_ports(wire, way)


def test_inner_macs_are_those_of_the_neighbour_and_fdb_entries(wire: Wire, way: Way) -> None:
    road, mark = Road(wire, way), new_mark()
    road.send(way.packet(mark))
    frame = road.tunnelled(mark)
    host = way.src.host
    base = str(way.dst.host.gateways[way.family].network.network_address)
    neighbours = {each["dst"]: each.get("lladdr") for each in host.json("ip", "neigh", "show", "dev", way.device)}
    fdb = {each["mac"]: each["dst"] for each in host.json("bridge", "fdb", "show", "dev", way.device)}
    assert (neighbours[base], fdb[inner(frame).dst]) == (inner(frame).dst, frame.payload.dst)
    assert inner(frame).src == mac_of(host, way.device)


def test_ping_of_a_pods_own_kernel_is_carried_there_and_back_to_the_bit(wire: Wire, way: Way) -> None:
    road, mark = Road(wire, way), bytes.fromhex("6f7665726c6179")
    done = way.src.run("ping", "-n", "-c", "1", "-W", "5", "-p", mark.hex(), way.dst.addresses[way.family])
    assert done.returncode == 0, done.stdout
    for kind, seen in (("request", (road.src, road.leaving, road.dst)), ("reply", (road.dst, road.arriving, road.src))):
        frames = [link.expect(partial(_echo, kind, mark)) for link in seen]
        assert [tunnelled(frame) for frame in frames] == [False, True, False]
        sent, *after = (inner(frame).payload if tunnelled(frame) else frame.payload for frame in frames)
        assert [ttl_of(packet) for packet in (sent, *after)] == [64, 63, 62]
        assert all(bytes(packet.payload) == bytes(sent.payload) for packet in after)


def _echo(kind: str, mark: bytes, frame: Packet) -> bool:
    layers = {"request": ICMPv6EchoRequest, "reply": ICMPv6EchoReply}
    right = frame[ICMP].type == {"request": 8, "reply": 0}[kind] if ICMP in frame else layers[kind] in frame
    return right and mark in frame.original


# --- hops, marks of congestion, classes of service -------------------------------------------------------------------


def test_outer_ttl_is_the_hosts_whatever_the_inner_one_is(wire: Wire, way: Way) -> None:
    road = Road(wire, way)
    for ttl in (3, 64, 255):
        mark = new_mark()
        road.send(way.packet(mark, ttl=ttl))
        frame = road.tunnelled(mark)
        assert (ttl_of(frame.payload), ttl_of(inner(frame).payload)) == (64, ttl - 1)
        assert ttl_of(road.received(mark)) == ttl - 2


@pytest.mark.parametrize("ttl", [1, 2])
def test_packet_that_has_no_hop_left_is_answered_by_the_host_where_it_ends(wire: Wire, way: Way, ttl: int) -> None:
    road, mark = Road(wire, way), new_mark()
    road.send(way.packet(mark, ttl=ttl))

    def exceeded(frame: Packet) -> bool:
        time = ICMPv6TimeExceeded in frame or (ICMP in frame and frame[ICMP].type == 11)
        return time and mark in frame.original

    answer = road.src.expect(exceeded).payload
    if ttl == 1:
        assert answer.src == str(way.src.host.gateways[way.family].ip)
        road.expect_nothing(road.leaving, road.arriving, wanted=carrying(mark))
    else:
        assert ttl_of(inner(road.tunnelled(mark)).payload) == 1
        road.expect_nothing(road.dst, wanted=carrying(mark))


ENCAPSULATED = {NOT_ECT: NOT_ECT, ECT_1: ECT_1, ECT_0: ECT_0, CE: ECT_0}
"""Inner ECN -> outer ECN."""


def test_outer_ecn_is_the_inner_one_but_for_congestion_met_before_and_dscp_is_zero(wire: Wire, way: Way) -> None:
    """RFC 6040 section 4.1 would copy CE too; Linux does as RFC 3168 section 9.1.1 says (INET_ECN_encapsulate)."""
    road = Road(wire, way)
    expedited = 0xB8
    for sent, outer in ENCAPSULATED.items():
        mark = new_mark()
        road.send(way.packet(mark, tos=expedited | sent))
        frame = road.tunnelled(mark)
        assert tos_of(frame.payload) == outer
        assert tos_of(inner(frame).payload) == tos_of(road.received(mark)) == expedited | sent


DECAPSULATED = {
    NOT_ECT: (NOT_ECT, NOT_ECT, NOT_ECT, None),
    ECT_1: (ECT_1, ECT_1, ECT_1, CE),
    ECT_0: (ECT_0, ECT_1, ECT_0, CE),
    CE: (CE, CE, CE, CE),
}
"""Inner ECN -> what becomes of it under an outer one of 0 to 3; None: the packet is dropped (RFC 6040 section 4.2)."""


def test_congestion_met_in_the_tunnel_is_told_to_who_can_act_on_it_and_drops_the_rest(wire: Wire, way: Way) -> None:
    road = Road(wire, way)
    for within, becomes in DECAPSULATED.items():
        for outer, wanted in enumerate(becomes):
            mark = new_mark()
            frame = way.inner_ether() / way.packet(mark, tos=0xB8 | within)
            road.arriving.put(way.forged(frame, tos=0x28 | outer))
            if wanted is None:
                road.expect_no_arrival(mark)
            else:
                # The outer DSCP stays outside.
                assert tos_of(road.received(mark)) == 0xB8 | wanted, f"inner {within}, outer {outer}"


# --- checksums -------------------------------------------------------------------------------------------------------


def test_outer_checksum_is_there_and_right(wire: Wire, way: Way) -> None:
    check_outer_checksum(wire, way)


def test_tunnel_without_checksum_is_let_in_over_ipv4_and_not_over_ipv6(wire: Wire, way: Way) -> None:
    """RFC 7348 section 4.1 wants it let in; over IPv6, RFC 6935 leaves that to whoever sets up the tunnel."""
    road, mark = Road(wire, way), new_mark()
    road.arriving.put(way.forged(way.inner_ether() / way.packet(mark), chksum=0))
    if way.outer == 4:
        road.received(mark)
    else:
        road.expect_no_arrival(mark)


# --- tags ------------------------------------------------------------------------------------------------------------

TAGS = (Dot1Q(vlan=100), Dot1AD(vlan=100), Dot1AD(vlan=100) / Dot1Q(vlan=5))


def test_tagged_frame_of_a_pod_is_not_tunnelled(wire: Wire, way: Way) -> None:
    road = Road(wire, way)
    gateway = mac_of(way.src.host, "cni0")
    for tag in TAGS:
        mark = new_mark()
        road.src.put(Ether(src=road.src.mac, dst=gateway) / tag / way.packet(mark))
        road.expect_nothing(road.leaving, road.arriving, wanted=carrying(mark))


def test_tagged_frame_in_a_tunnel_reaches_no_pod(wire: Wire, way: Way) -> None:
    """RFC 7348 section 6.1: a frame with an inner tag is to be discarded."""
    road = Road(wire, way)
    for tag in TAGS:
        mark = new_mark()
        road.arriving.put(way.forged(way.inner_ether() / tag / way.packet(mark)))
        road.expect_no_arrival(mark)


def test_priority_tag_in_a_tunnel_is_passed_over(wire: Wire, way: Way) -> None:
    """VLAN 0 is none, but a priority (IEEE 802.1Q): the kernel takes the frame as untagged, and the tag ends there."""
    road, mark = Road(wire, way), new_mark()
    road.arriving.put(way.forged(way.inner_ether() / Dot1Q(vlan=0, prio=5) / way.packet(mark)))
    assert Dot1Q not in road.dst.expect(carrying(mark))


# --- nothing is flooded ----------------------------------------------------------------------------------------------


def test_nothing_is_ever_flooded(wire: Wire, lab: Lab) -> None:
    check_nothing_is_flooded(wire, lab)


@pytest.mark.parametrize("family", [4, 6])
def test_packet_for_a_subnet_nobody_leases_is_not_tunnelled(wire: Wire, lab: Lab, family: int) -> None:
    h1, h2, *_ = lab.hosts
    road, mark = Road(wire, ways(h1, h2)[family == 6]), new_mark()
    ports = [wire.underlay(host) for host in lab.hosts]
    leased = {host.subnets[family] for host in lab.hosts}
    free = next(each for each in NETWORKS[family].subnets(new_prefix={4: 24, 6: 64}[family]) if str(each) not in leased)
    road.send(ip(road.way.src.addresses[family], str(free[9])) / UDP(sport=4000, dport=9) / Raw(mark))
    road.expect_nothing(*ports, wanted=tunnelling(mark))
