"""Packets as large as the path carries, a byte larger, and much larger: what passes, who is told what, and by whom.

Pods' links are made wider here than the overlay is. A pod that keeps to its MTU never sends what its host must refuse;
one whose link was set up by somebody else, or that is itself a router, does.
"""

from collections.abc import Iterator
from socket import IPPROTO_TCP

import pytest
from scapy.layers.inet import defragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from overlay.cluster import Lab
from overlay.topology import Topology, network_config
from tests.conftest import MakeLab
from tests.netns.traffic import Flow, exchange
from tests.packet.checks import (
    DONT_FRAGMENT,
    Road,
    Way,
    check_largest_packet,
    check_too_large_is_cut,
    check_too_large_is_refused,
    fragment,
    mixed_lab,
    quoted_as_sent,
    too_big,
    ways,
    widen,
)
from tests.packet.wire import Wire, carrying, inner, new_mark, tunnelled

MTU, SMALLER = 1500, 1400


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    """Five hosts: `h1` to `h3` have both families, `h4` IPv4 alone, `h5` IPv6 alone; the link of `h3` is narrower."""
    made = mixed_lab(make_module_lab, 5, mtus={"h3": SMALLER})
    for host in made.hosts:
        widen(host)
    return made


@pytest.fixture(scope="module", params=["IPv4 over IPv4", "IPv6 over IPv6", "IPv6 over IPv4", "IPv4 over IPv6"])
def way(lab: Lab, request: pytest.FixtureRequest) -> Way:
    h1, h2, _, h4, h5 = lab.hosts
    dst = {"IPv6 over IPv4": h4, "IPv4 over IPv6": h5}.get(request.param, h2)
    (found,) = (way for way in ways(h1, dst) if f"IPv{way.family} over IPv{way.outer}" == request.param)
    return found


def test_largest_packet_fills_the_underlay_to_the_last_byte(wire: Wire, way: Way) -> None:
    check_largest_packet(wire, way, MTU - way.overhead)


def test_packet_of_a_byte_more_is_refused_and_its_sender_told_what_fits(wire: Wire, way: Way) -> None:
    check_too_large_is_refused(wire, way, MTU - way.overhead)


def test_packet_that_may_be_cut_is_cut_before_the_tunnel_and_never_on_the_underlay(wire: Wire, lab: Lab) -> None:
    h1, h2, _, _, h5 = lab.hosts
    for dst in (h2, h5):
        way = ways(h1, dst)[0]
        check_too_large_is_cut(wire, way, MTU - way.overhead)


def test_packets_far_too_large_are_refused_alike(wire: Wire, way: Way) -> None:
    road = Road(wire, way)
    for size in (MTU - 1, MTU, 4000, 8999):
        mark = new_mark()
        road.send(way.sized(mark, size, flags=DONT_FRAGMENT))
        road.expect_nothing(road.leaving, wanted=carrying(mark))
        told = road.src.expect(lambda frame, mark=mark: too_big(frame) is not None and mark in frame.original)
        assert (too_big(told) or (0,))[0] == MTU - way.overhead


@pytest.mark.parametrize("family", [4, 6])
def test_peer_of_a_smaller_mtu_is_respected_and_others_are_sent_as_much_as_ever(
    wire: Wire, lab: Lab, family: int
) -> None:
    h1, h2, h3, *_ = lab.hosts
    to_h2, to_h3 = (next(way for way in ways(h1, dst) if way.family == family) for dst in (h2, h3))
    # Its pods have both ways into them, and one MTU: that of the narrower.
    theirs = int(h3.subnet_env["FLANNEL_MTU"])
    assert theirs == SMALLER - 70
    check_largest_packet(wire, to_h3, theirs)
    check_too_large_is_refused(wire, to_h3, theirs)
    check_largest_packet(wire, to_h2, MTU - to_h2.overhead)
    if family == 4:
        check_too_large_is_cut(wire, to_h3, theirs)


@pytest.mark.parametrize("family", [4, 6])
def test_host_of_a_smaller_mtu_refuses_what_its_own_link_does_not_carry(wire: Wire, lab: Lab, family: int) -> None:
    h1, _, h3, *_ = lab.hosts
    (way,) = (way for way in ways(h3, h1) if way.family == family)
    check_largest_packet(wire, way, SMALLER - way.overhead)
    check_too_large_is_refused(wire, way, SMALLER - way.overhead)


@pytest.mark.parametrize("family", [4, 6])
def test_pods_link_that_is_narrower_than_the_tunnel_is_told_of_through_the_tunnel(
    wire: Wire, lab: Lab, family: int
) -> None:
    h1, h2, *_ = lab.hosts
    (way,) = (way for way in ways(h1, h2) if way.family == family)
    narrow = MTU - way.overhead - 100
    widen(h2, narrow)
    try:
        road, mark = Road(wire, way), new_mark()
        packet = way.sized(mark, narrow + 1, flags=DONT_FRAGMENT)
        road.send(packet)
        told = road.src.expect(lambda frame: too_big(frame) is not None and mark in frame.original)
        named, quoted = too_big(told) or (0, b"")
        assert named == narrow
        assert quoted_as_sent(quoted, packet)
        # As the tunnel's other end it has the subnet's base, which is what it speaks by.
        base = h2.gateways[family].network.network_address
        assert told.payload.src == str(base)
        assert tunnelled(road.arriving.expect(lambda frame: too_big(frame) is not None and mark in frame.original))
        road.expect_nothing(road.dst, wanted=carrying(mark))
    finally:
        widen(h2)


# --- a router in the middle that carries less than both ends ---------------------------------------------------------


@pytest.fixture
def routed(make_lab: MakeLab) -> Iterator[Lab]:
    """Two hosts on links of their own; between them a router that takes packets of 1400 bytes."""
    lab = make_lab(
        hosts=2,
        pods=1,
        config=network_config("46"),
        topology=Topology("46", beyond=("h2",), router_mtu=SMALLER),
        # It sends large packets, and hosts would know before the first packet of a pod.
        agent_options=["--checksum-probe=false"],
    )
    lab.up()
    yield lab


def test_narrow_router_cuts_the_tunnel_over_ipv4_and_is_heard_over_ipv6(routed: Lab, wire: Wire) -> None:
    h1, h2 = routed.hosts
    over4, over6 = ways(h1, h2)
    _check_router_cuts(wire, over4)
    _check_router_is_heard(wire, over6)
    # The pod's kernel has had no part in this, and TCP is yet to be told: it is, and brings everything over.
    ports = [wire.underlay(host) for host in routed.hosts]
    pod = wire.at(over6.src)
    assert exchange([Flow(way.src, way.dst, way.family, "tcp", "oversized") for way in (over4, over6)], 20) == []
    told = [found for frame in pod.all(lambda frame: True) if (found := too_big(frame))]
    assert {(mtu, quoted[6]) for mtu, quoted in told} == {(SMALLER - over6.overhead, IPPROTO_TCP)}
    for port in ports:
        frames = port.all(tunnelled)
        assert frames
        assert max(len(frame.payload) for frame in port.all(lambda frame: True)) <= MTU
        assert not any(fragment(frame) for frame in frames if frame.payload.version == 6)
    beyond = [frame for seen in ports[1].seen if seen.outgoing for frame in [seen.packet]]
    assert max(len(frame.payload) for frame in beyond) <= SMALLER


def _check_router_cuts(wire: Wire, way: Way) -> None:
    """The pod's packet may not be cut and is not: the tunnel's is, and put together again where it ends."""
    road, mark = Road(wire, way), new_mark()
    packet = way.sized(mark, MTU - 70, flags=DONT_FRAGMENT)
    road.send(packet)
    whole = road.tunnelled(mark)
    assert bytes(road.received(mark)[1:]) == bytes(packet[1:])
    assert not fragment(whole)

    def piece(frame: Packet) -> bool:
        return frame.payload.version == 4 and frame.payload.id == whole.payload.id and fragment(frame)

    pieces = road.arriving.all(piece)
    assert len(pieces) == 2
    assert max(len(frame.payload) for frame in pieces) <= SMALLER
    (again,) = defragment(Ether(frame.original) for frame in pieces)
    assert bytes(inner(again)) == bytes(inner(whole))
    # Nobody is told anything: there is nothing to tell.
    assert not road.src.all(lambda frame: too_big(frame) is not None)


def _check_router_is_heard(wire: Wire, way: Way) -> None:
    """The router tells the host, and the host tells the pod; from then on what the pod may send fits."""
    road = Road(wire, way)
    fits = SMALLER - way.overhead
    tries = 0
    while not road.src.all(lambda frame: too_big(frame) is not None):
        tries += 1
        assert tries <= 3, "the pod is told nothing"
        mark = new_mark()
        road.send(way.sized(mark, MTU - way.overhead))
        road.wire.expect_nothing(road.dst, wanted=carrying(mark), fence=road.fence, at=road.dst)
    (heard, *_) = (too_big(frame) for frame in road.leaving.all(lambda frame: too_big(frame) is not None))
    (told, *_) = (too_big(frame) for frame in road.src.all(lambda frame: too_big(frame) is not None))
    assert (heard or (0,))[0] == SMALLER
    assert (told or (0,))[0] == fits
    mark = new_mark()
    road.send(way.sized(mark, fits))
    assert len(road.tunnelled(mark).payload) == SMALLER
    road.received(mark)
    mark = new_mark()
    road.send(way.sized(mark, fits + 1))
    road.expect_nothing(road.leaving, wanted=carrying(mark))
