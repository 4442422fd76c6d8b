"""Checks that cannot fail show nothing: each is tried on agents that do wrong, and must fail for the right reason."""

from collections.abc import Callable

import pytest
from scapy.layers.l2 import ARP, Ether

from overlay.cluster import Lab
from overlay.cluster_hosts import wait_until
from overlay.topology import Topology, network_config
from subnet_lease.model import format_address, pack_address
from tests.conftest import MakeLab
from tests.packet.broken import command, other_address
from tests.packet.checks import (
    EVERYBODY,
    Way,
    check_inner_frame,
    check_largest_packet,
    check_nothing_is_flooded,
    check_outer_checksum,
    check_outer_header,
    check_source_ports,
    check_too_large_is_cut,
    check_too_large_is_refused,
    check_vxlan_header,
    ways,
    widen,
)
from tests.packet.wire import Wire, mac_of

Check = Callable[[Wire, Way], None]

SMALLER = 1400


@pytest.fixture(scope="module")
def broken(make_module_lab: MakeLab) -> Callable[[str], Lab]:
    """Labs of two hosts whose agents have a fault, made when first asked for; `h2` has the narrower link."""
    labs: dict[str, Lab] = {}

    def with_fault(fault: str) -> Lab:
        if fault not in labs:
            lab = make_module_lab(
                hosts=2,
                pods=1,
                config=network_config("46"),
                topology=Topology("46", mtus={"h2": SMALLER}),
                agent_command=command(fault),
            )
            _bring_up(lab)
            labs[fault] = lab
        return labs[fault]

    return with_fault


def _bring_up(lab: Lab) -> None:
    """As `Lab.up`, but routes are all that is waited for: not all agents here come further."""
    lab.make_network()
    lab.start_etcd()
    lab.write_config(network_config("46"))
    for host in lab.hosts:
        # Another than its own, in case that it sends from there.
        others = [format_address(other_address(pack_address(own))) for own in host.underlay_ips.values()]
        # Deprecated, an IPv6 address is not chosen for the underlay.
        host.ip(*(f"addr add {each} dev eth0" + " preferred_lft 0" * (":" in each) for each in others))
        host.start_agent()
    for host in lab.hosts:
        host.wait_ready()
        host.attach_pods()
        widen(host)

    def routed() -> bool:
        leases = lab.leases()
        return all(len([peer for peer in host.peers(leases) if peer.gateway]) == 2 for host in lab.hosts)

    wait_until(routed, 20, "routes to each other")


def of(mtu: int, check: Callable[[Wire, Way, int], None]) -> Check:
    """A check of the largest packet that fits, told what that is."""
    return lambda wire, way: check(wire, way, mtu)


BOTH = [4, 6]

CASES: list[tuple[str, Check, str, list[int]]] = [
    ("wrong-vni", check_vxlan_header, "the VNI is 2", BOTH),
    ("wrong-vtep", check_outer_header, r"the outer source is \S+1.?11, not", BOTH),
    ("wrong-vtep", check_inner_frame, "the inner source is", BOTH),
    ("missing-neighbour", check_vxlan_header, "not seen on hub/h1", [4]),
    ("odd-device", check_outer_header, "the outer TTL is 7, not 64", BOTH),
    ("odd-device", check_outer_header, "the outer DF is True, not False", [4]),
    ("odd-device", check_source_ports, "100 flows have 1?[0-9] source ports", BOTH),
    ("odd-device", check_outer_checksum, "the outer UDP checksum is 0x0000", [4]),
    ("heedless", of(SMALLER - 70, check_too_large_is_refused), "on hub/h1, where nothing was expected", BOTH),
    ("heedless", of(SMALLER - 70, check_too_large_is_cut), "1 pieces on hub/h1", [4]),
    ("odd-device", of(SMALLER, check_too_large_is_refused), "the sender is told 1330, and 1400 fit", BOTH),
]


@pytest.mark.parametrize(
    ("fault", "check", "reason", "family"),
    [(fault, check, reason, family) for fault, check, reason, families in CASES for family in families],
)
def test_check_fails_for_the_right_reason(
    broken: Callable[[str], Lab], wire: Wire, fault: str, check: Check, reason: str, family: int
) -> None:
    h1, h2 = broken(fault).hosts
    (way,) = (way for way in ways(h1, h2) if way.family == family)
    with pytest.raises(AssertionError, match=reason):
        check(wire, way)


def test_flooding_is_seen(broken: Callable[[str], Lab], wire: Wire) -> None:
    lab = broken("flooding")
    h1, h2 = lab.hosts
    wire.underlay(h2)
    # As if a pod's question had found a way to the underlay that leads through no tunnel.
    mac, src, dst = mac_of(h1, "cni0"), h1.pods[0].addresses[4], h2.pods[0].addresses[4]
    wire.underlay(h2).put(Ether(src=mac, dst=EVERYBODY) / ARP(hwsrc=mac, psrc=src, pdst=dst))
    with pytest.raises(AssertionError) as failure:
        check_nothing_is_flooded(wire, lab)
    assert "hub/h2: broadcast or multicast in a tunnel" in str(failure.value)
    assert "hub/h2: tunnelled to a VTEP that has another MAC" in str(failure.value)
    assert "hub/h2: a pod's address in the open" in str(failure.value)


def test_tunnel_wider_than_its_underlay_is_seen(broken: Callable[[str], Lab], wire: Wire) -> None:
    h1, h2 = broken("heedless").hosts
    (way,) = (way for way in ways(h2, h1) if way.family == 4)
    # Nobody makes the tunnel follow.
    h2.kill_agent()
    h2.ip(f"link set eth0 mtu {SMALLER - 100}")
    with pytest.raises(AssertionError, match="left h2 in pieces"):
        check_largest_packet(wire, way, SMALLER - way.overhead)
