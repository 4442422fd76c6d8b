"""A peer joins, changes and leaves, under a steady flow of numbered packets: where each packet went."""

import ipaddress
import signal
import sys
from collections.abc import Iterator

import pytest

from overlay.cluster_hosts import Host
from subnet_lease.model import Prefix
from tests.conftest import MakeLab
from tests.packet import life
from tests.packet.life import (
    CLEAR,
    CONFIG,
    DEVICES,
    Monitor,
    Peers,
    Story,
    check_none_after,
    check_ways,
)
from tests.packet.wire import Wire

BLACKHOLES = [f"route add blackhole {CONFIG[key]} metric 4294967295" for key in ("Network", "IPv6Network")]
"""What an operator may add: docs/network.md."""


@pytest.fixture(scope="module")
def cluster(make_module_lab: MakeLab) -> Peers:
    lab = make_module_lab(hosts=2, pods=1, config=CONFIG, underlay="46")
    lab.up()
    return Peers(lab)


@pytest.fixture
def peers(cluster: Peers) -> Iterator[Peers]:
    yield cluster
    cluster.drop_all()


def test_join_takes_effect_between_two_packets(wire: Wire, peers: Peers) -> None:
    life.check_join(wire, peers)


def test_leave_takes_effect_between_two_packets(wire: Wire, peers: Peers) -> None:
    life.check_leave(wire, peers)


def test_new_mac_takes_effect_between_two_packets(wire: Wire, peers: Peers) -> None:
    life.check_new_mac(wire, peers)


def test_takeover_takes_effect_between_two_packets(wire: Wire, peers: Peers) -> None:
    life.check_takeover(wire, peers)


def test_nothing_leaves_in_the_clear_while_a_route_is_replaced(wire: Wire, peers: Peers) -> None:
    life.check_other_mtu(wire, peers)


def test_nothing_is_flooded_while_an_entry_is_missing(wire: Wire, peers: Peers) -> None:
    life.check_removed_by_hand(wire, peers)


def test_what_is_begun_by_an_agent_that_is_killed_is_ended_by_the_next(wire: Wire, peers: Peers) -> None:
    life.check_passes_broken_off(wire, peers)


# --- hosts with agents -----------------------------------------------------------------------------------------------


def restart(host: Host, number: signal.Signals = signal.SIGTERM) -> None:
    host.kill_agent(number)
    host.start_agent()
    host.wait_ready()


def test_host_that_joins_is_reached_by_the_first_packet_and_none_after_it_has_left(wire: Wire, peers: Peers) -> None:
    host = peers.ends[0]
    taken = {subnet for each in peers.lab.hosts[:2] for subnet in each.subnets.values()}
    subnets = next(
        each for n in range(1, 99) if taken.isdisjoint(each := (f"10.240.{n}.0/24", f"fd00:244:0:{n:x}::/64"))
    )
    # It takes the subnet that it had before.
    lines = [
        f"FLANNEL_NETWORK={CONFIG['Network']}",
        f"FLANNEL_SUBNET={subnets[0].replace('.0/', '.1/')}",
        f"FLANNEL_IPV6_NETWORK={CONFIG['IPv6Network']}",
        f"FLANNEL_IPV6_SUBNET={subnets[1].replace('::/', '::1/')}",
    ]
    host.subnet_file.write_text("\n".join([*lines, "FLANNEL_MTU=1400", "FLANNEL_IPMASQ=false", ""]))
    # Its pods are there before it can be reached: what comes for a subnet without pods goes out by the default route.
    host.attach_pods()
    pods = [str(ipaddress.ip_network(subnet)[2]) for subnet in subnets]
    with Story(wire, peers.pod, pods) as joining:
        host.start_agent()
        host.wait_ready()
        there = peers.ways_to(host)
        joining.until(there)
        joining.go_on()
    with Story(wire, peers.pod, pods) as leaving, Monitor(peers.sender) as monitor:
        host.kill_agent()
        cleanup = [sys.executable, "-P", "-m", "agent", "cleanup", "--release", "--subnet-file", str(host.subnet_file)]
        done = host.run(*cleanup, "--state-dir", str(host.state_dir), "--etcd-endpoints", peers.lab.etcd_endpoint())
        assert done.returncode == 0, done.stderr
        leaving.until(life.CLEARLY)
        done_ns = monitor.until_unrouted(*map(Prefix.parse, subnets))
        leaving.go_on()
    for record in joining.records:
        check_ways(record, CLEAR, there[record.family])
    for record in leaving.records:
        check_ways(record, there[record.family], CLEAR)
        check_none_after(record, there[record.family], done_ns)


def test_restart_of_the_agent_is_not_seen_on_the_wire(wire: Wire, peers: Peers) -> None:
    receiver = peers.lab.hosts[1]
    with Story(wire, peers.pod, receiver.pods[0].addresses.values()) as story:
        for number in signal.SIGTERM, signal.SIGKILL:
            restart(peers.sender, number)
    for record in story.records:
        check_ways(record, peers.ways_to(receiver)[record.family])


def test_host_with_another_mac_gets_no_packet_for_the_old_one_after_the_first_for_the_new(
    wire: Wire, peers: Peers
) -> None:
    receiver = peers.lab.hosts[1]
    old = peers.ways_to(receiver)
    with Story(wire, peers.pod, receiver.pods[0].addresses.values()) as story:
        receiver.kill_agent()
        receiver.ip(*(f"link set {device} address 02:00:00:0{family}:00:01" for family, device in DEVICES.items()))
        receiver.start_agent()
        receiver.wait_ready()
        new = peers.ways_to(receiver)
        story.until(new)
        story.go_on()
    for record in story.records:
        check_ways(record, old[record.family], new[record.family])


def test_other_vni_is_taken_between_two_packets_with_none_in_the_clear(wire: Wire, peers: Peers) -> None:
    hosts = peers.lab.hosts[:2]
    receiver = hosts[1]
    for vni in 7, 1:
        before = peers.ways_to(receiver, 8 - vni)
        with Story(wire, peers.pod, receiver.pods[0].addresses.values()) as story:
            peers.lab.write_config({**CONFIG, "Backend": {"Type": "vxlan", "VNI": vni}})
            for host in hosts:
                host.kill_agent()
            for host in hosts:
                host.start_agent()
            for host in hosts:
                host.wait_ready()
            after = peers.ways_to(receiver, vni)
            story.until(after)
            story.go_on()
        for record in story.records:
            check_ways(record, before[record.family], after[record.family], lossless=False)


def test_nothing_leaves_in_the_clear_while_a_host_moves(wire: Wire, peers: Peers) -> None:
    receiver = peers.lab.hosts[1]
    for host, addresses in (
        (receiver, {"ipv4": "172.30.0.91", "ipv6": "fd30::91"}),
        (peers.sender, {"ipv4": "172.30.0.92", "ipv6": "fd30::92"}),
    ):
        before = peers.ways_to(receiver)
        with Story(wire, peers.pod, receiver.pods[0].addresses.values()) as story:
            host.renumber(**addresses)
            after = peers.ways_to(receiver)
            story.until(after)
            story.go_on()
        for record in story.records:
            check_ways(record, before[record.family], after[record.family], lossless=False, settled=False)


# --- subnets nobody leases -------------------------------------------------------------------------------------------


def test_packets_for_a_subnet_nobody_leases_leave_in_the_clear_by_the_default_route(wire: Wire, peers: Peers) -> None:
    (number,) = peers.numbers(1)
    with Story(wire, peers.pod, life.pods_of(number)) as story:
        story.go_on()
    for record in story.records:
        check_ways(record, CLEAR)


def test_with_a_blackhole_for_the_network_nothing_ever_leaves_in_the_clear(wire: Wire, peers: Peers) -> None:
    (number,) = peers.numbers(1)
    end, receiver = peers.end(), peers.lab.hosts[1]
    peers.sender.ip(*BLACKHOLES)
    to_real = peers.ways_to(receiver)
    addresses = [*life.pods_of(number), *receiver.pods[0].addresses.values()]
    with Story(wire, peers.pod, addresses) as story, Monitor(peers.sender) as monitor:
        joining, standing = story.records[:2], story.records[2:]
        peers.put(number, end)
        story.until_one(joining[0], peers.ways(end))
        peers.drop(number)
        monitor.until_unrouted(*life.subnets(number))
        # The devices are made anew, and so are all routes.
        peers.sender.ip(*(f"link del {device}" for device in DEVICES.values()))
        story.go_on()
        for record in standing:
            story.until_one(record, to_real)
        story.go_on()
        restart(peers.sender)
    for record in joining:
        check_ways(record, peers.ways(end)[record.family], lossless=False)
        assert record.lost
    for record in standing:
        check_ways(record, to_real[record.family], lossless=False)
    # It is nobody's of ours, and stays.
    peers.sender.ip(*(line.replace("add", "del") for line in BLACKHOLES))
