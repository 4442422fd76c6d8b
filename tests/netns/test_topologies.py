"""Underlays that are not one link of one MTU: a router in between, mixed MTUs, mixed families, bridges."""

import select
import socket
import time
from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6PacketTooBig
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from overlay.cluster_hosts import Host, Pod, wait_until
from overlay.topology import Topology, network_config
from tests.conftest import MakeLab
from tests.netns.traffic import Meter, Stream, all_to_all, exchange, fragments_made, mtu_of, send_whole

FRAGMENTATION_NEEDED = (3, 4)  # ICMP type and code (RFC 792).


def ways(host: Host) -> dict[str, set[bool]]:
    """To each peer, by its name, whether the routes to its subnets are direct. Those not yet in place do not count."""
    found: dict[str, set[bool]] = {}
    for peer in host.peers(host.lab.leases()):
        (name,) = (each.name for each in host.lab.hosts if each.holds(peer.lease))
        if peer.programmed:
            found.setdefault(name, set()).add(peer.direct)
    return found


@pytest.mark.parametrize(
    ("overlay", "underlay", "backend"),
    [
        ("4", "4", "vxlan"),
        ("4", "4", "direct"),
        ("46", "46", "direct"),
        ("46", "6", "direct"),
    ],
)
def test_peer_beyond_a_router_is_reached_by_the_tunnel_and_its_neighbours_as_configured(
    make_lab: MakeLab, overlay: str, underlay: str, backend: str
) -> None:
    config = network_config(overlay, backend)
    lab = make_lab(hosts=4, pods=1, config=config, topology=Topology(underlay, beyond=("h3", "h4")))
    lab.up()
    near = {backend == "direct"}
    h1, h2, h3, h4 = lab.hosts
    assert ways(h1) == {"h2": near, "h3": {False}, "h4": {False}}
    assert ways(h2) == {"h1": near, "h3": {False}, "h4": {False}}
    assert ways(h3) == {"h1": {False}, "h2": {False}, "h4": near}
    assert ways(h4) == {"h1": {False}, "h2": {False}, "h3": near}
    assert exchange(all_to_all(lab.pods)) == []


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("backend", ["vxlan", "direct", "host-gw"])
def test_hosts_of_mixed_mtu_reach_one_another_and_pods_are_told_what_fits(
    make_lab: MakeLab, backend: str, family: int
) -> None:
    name = str(family)
    topology = Topology(name, mtus={"h1": 9000})
    lab = make_lab(hosts=3, pods=1, config=network_config(name, backend), topology=topology)
    lab.up()
    h1, h2, h3 = lab.hosts
    assert mtu_of(h1.pods[0]) > mtu_of(h2.pods[0]) == mtu_of(h3.pods[0])
    for small in (h2, h3):
        assert told_mtu(h1.pods[0], small.pods[0]) == mtu_of(small.pods[0])
    # IPv6 packets are cut by their senders alone, which had to be told first: that is done for all sizes now.
    assert exchange(all_to_all(lab.pods)) == []


def told_mtu(src: Pod, dst: Pod) -> int:
    """What the pod is told that fits, once it has sent as large a packet as it can, not to be fragmented."""
    family = min(src.addresses)

    def told(frame: Packet) -> int | None:
        if ICMPv6PacketTooBig in frame:
            return int(frame[ICMPv6PacketTooBig].mtu)
        if ICMP in frame and (frame[ICMP].type, frame[ICMP].code) == FRAGMENTATION_NEEDED:
            return int(frame[ICMP].nexthopmtu)
        return None

    with src.host.packet_socket(f"p{src.number}") as capture:
        send_whole(src, dst, family, mtu_of(src))
        return first(capture, told)


def first(capture: socket.socket, found: Callable[[Packet], int | None], seconds: float = 5) -> int:
    """What is found in the first frame in which it is; AssertionError with all frames if there is none."""
    frames = []
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([capture], [], [], left)[0]:
            frames.append(Ether(capture.recv(1 << 16)))
            if (value := found(frames[-1])) is not None:
                return value
    raise AssertionError("not seen; what was: " + "; ".join(frame.summary() for frame in frames))


def test_router_of_smaller_mtu_than_both_ends_cuts_the_tunnels_packets_over_ipv4(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=2, pods=1, topology=Topology(beyond=("h2",), router_mtu=1400))
    lab.up()
    before = fragments_made(lab.hub)
    assert exchange(all_to_all(lab.pods)) == []
    assert fragments_made(lab.hub) > before


@pytest.mark.parametrize("overlay", ["4", "6"])
def test_router_of_smaller_mtu_than_both_ends_makes_itself_heard_over_ipv6(make_lab: MakeLab, overlay: str) -> None:
    topology = Topology("6", beyond=("h2",), router_mtu=1400)
    lab = make_lab(hosts=2, pods=1, config=network_config(overlay), topology=topology)
    lab.up()
    # What is too large is lost until the hosts have been told, and the pods in their turn, each on its way.
    told = all_to_all(lab.pods, ["tcp"]) + all_to_all(lab.pods, ["icmp", "udp"], ["small", "oversized"])
    wait_until(lambda: exchange(told, seconds=2) == [], 20, "all sizes on all ways")
    assert fragments_made(lab.hub) == 0


def test_host_with_ipv4_alone_is_reached_by_those_that_have_both(make_lab: MakeLab) -> None:
    topology = Topology("46", underlays={"h2": "4"})
    lab = make_lab(hosts=3, pods=1, config=network_config("46"), topology=topology)
    lab.up()
    # Tunnels of both kinds leave different MTUs, and IPv6 packets are cut by senders alone, once they have been told.
    exchange(all_to_all(lab.pods, sizes=["oversized"]), seconds=1)
    assert exchange(all_to_all(lab.pods)) == []


@pytest.mark.parametrize("family", [4, 6])
def test_change_between_tunnel_and_routes_loses_no_packet(make_lab: MakeLab, family: int) -> None:
    name = str(family)
    lab = make_lab(hosts=2, pods=1, config=network_config(name, "vxlan"), underlay=name)
    lab.up()
    h1, h2 = lab.hosts
    src, dst = h1.pods[0], h2.pods[0]
    with Meter(src, dst) as there, Meter(dst, src) as back, Stream(src, dst) as stream:
        for backend in ("direct", "vxlan"):
            lab.reconfigure(network_config(name, backend))
            wanted = {backend == "direct"}
            wait_until(
                lambda wanted=wanted: ways(h1).get("h2") == ways(h2).get("h1") == wanted, 10, f"the way of {backend}"
            )
    assert (there.gaps(), back.gaps(), stream.troubles) == ([], [], [])


def test_bridge_can_be_the_underlay_interface(make_lab: MakeLab) -> None:
    lab = make_lab(hosts=3, pods=1, topology=Topology(bridged=("h1", "h3")))
    lab.up()
    h1 = lab.hosts[0]
    assert h1.json("ip", "-d", "link", "show", "flannel.1")[0]["linkinfo"]["info_data"]["link"] == "br0"
    assert exchange(all_to_all(lab.pods)) == []
