"""A host's network changes under its agent: what flows notice, and that every host follows, with nothing left over."""

import contextlib
import json
from collections.abc import Iterator

import pytest

from overlay.cluster import Lab
from overlay.cluster_hosts import Host, wait_until
from overlay.topology import FAMILIES, network_config
from tests.conftest import MakeLab
from tests.netns.moves import (
    down_and_up,
    failures,
    moves_of,
    own_devices,
    renew_addresses,
    replace_addresses,
    set_mtu,
    topology_of,
    wait_settled,
)
from tests.netns.traffic import Meter


def up(make_lab: MakeLab, families: str, backend: str) -> Lab:
    """A lab whose agents choose the interface of the default route."""
    config = network_config(families, backend)
    topology = topology_of(families, backend)
    lab = make_lab(hosts=3, pods=1, config=config, topology=topology, underlay_options=())
    lab.up()
    return lab


@pytest.fixture(scope="module")
def lab(make_module_lab: MakeLab) -> Lab:
    """For tests that leave every host followed, at whatever address."""
    return up(make_module_lab, "4", "vxlan")


@contextlib.contextmanager
def metered(lab: Lab) -> Iterator[list[Meter]]:
    """Packets between the first two hosts' pods, both ways, in each family."""
    here, there = lab.hosts[0].pods[0], lab.hosts[1].pods[0]
    meters = [Meter(*way, family=family) for family in here.addresses for way in ((here, there), (there, here))]
    with contextlib.ExitStack() as stack:
        for meter in meters:
            stack.enter_context(meter)
        yield meters


def said(host: Host, since: int = 0) -> list[str]:
    """The events in the log of the host's agents after so many characters."""
    return [json.loads(line)["event"] for line in host.log()[since:].splitlines()]


def indexes(host: Host) -> dict[str, int]:
    """The interface indexes of the agent's devices."""
    return {name: link["ifindex"] for name, link in own_devices(host).items()}


@pytest.mark.parametrize(
    ("families", "backend"),
    [
        ("4", "vxlan"),
        ("4", "host-gw"),
        ("6", "vxlan"),
        ("46", "direct"),
    ],
)
def test_every_host_follows_what_happens_to_the_network_of_one(make_lab: MakeLab, families: str, backend: str) -> None:
    lab = up(make_lab, families, backend)
    host = lab.hosts[0]
    for move in moves_of(FAMILIES[families], backend):
        before = indexes(host)
        with metered(lab) as meters:
            move.act(host)
            wait_settled(lab, backend)
        assert failures(lab.pods) == [], move.name
        if move.harmless:
            assert [str(gap) for meter in meters for gap in meter.gaps()] == [], move.name
        if not move.rebuilds:
            assert indexes(host) == before, move.name
    assert all(each.agent_pid for each in lab.hosts)


def test_renewal_of_the_same_addresses_writes_nothing_and_says_nothing(lab: Lab) -> None:
    host = lab.hosts[0]
    wait_settled(lab, "vxlan")
    before, revision = len(host.log()), lab.store.snapshot().revision
    renew_addresses(host)
    # What the agent hears of afterwards, it takes up afterwards.
    set_mtu(host, 1400)
    wait_until(lambda: lab.store.snapshot().revision > revision and said(host, before)[-1] == "ready")
    assert sorted(said(host, before)) == ["device_set", "lease_published", "ready", "underlay_changed"]
    assert lab.store.snapshot().revision == revision + 1


def test_address_that_goes_and_comes_back_is_published_as_the_one_that_stays(lab: Lab) -> None:
    host = lab.hosts[0]
    own = next(lease for lease in lab.leases() if host.holds(lease))
    for _ in range(5):
        replace_addresses(host, 81)
        replace_addresses(host, 1)
    wait_settled(lab, "vxlan")
    assert failures(lab.pods) == []
    after = next(lease for lease in lab.leases() if host.holds(lease))
    assert (after.key, after.attrs, after.etcd_lease) == (own.key, own.attrs, own.etcd_lease)


def test_link_that_stays_down_changes_nothing_until_it_is_up_again(make_lab: MakeLab) -> None:
    lab = up(make_lab, "4", "direct")
    host = lab.hosts[0]
    leases = lab.leases()
    host.ip(f"link set {host.seat.device} down")
    wait_until(lambda: "underlay_gone" in said(host))
    wait_until(lambda: any(not peer.programmed for peer in host.peers(leases)))
    down_and_up(host)
    wait_settled(lab, "direct")
    assert failures(lab.pods) == []
    assert lab.leases() == leases


def test_family_that_is_gone_for_good_is_given_up_and_taken_up_again(make_lab: MakeLab) -> None:
    lab = up(make_lab, "46", "vxlan")
    host = lab.hosts[0]
    address = host.seat.addresses[6]
    host.ip(f"addr del {address} dev {host.seat.device}")
    del host.underlay_ips[6]
    wait_settled(lab, "vxlan")
    assert failures(lab.pods) == []
    host.ip(f"addr add {address} dev {host.seat.device} nodad")
    host.underlay_ips[6] = str(address.ip)
    wait_settled(lab, "vxlan")
    assert failures(lab.pods) == []


def test_address_that_changes_while_etcd_is_away_is_published_once_it_is_back(lab: Lab) -> None:
    host = lab.hosts[0]
    lab.stop_etcd()
    replace_addresses(host, 83)
    wait_until(lambda: own_devices(host)["flannel.1"]["linkinfo"]["info_data"]["local"] == host.underlay_ip)
    lab.start_etcd()
    wait_settled(lab, "vxlan")
    assert failures(lab.pods) == []


def test_agent_leaves_the_connection_to_etcd_that_was_from_an_address_it_has_lost(lab: Lab) -> None:
    first, second = lab.hosts[:2]
    lost = first.underlay_ip
    replace_addresses(first, 81)
    # Of the other's new address the first hears by its watch, which must be on a connection that lives.
    replace_addresses(second, 82)
    wait_settled(lab, "vxlan")

    def ends() -> str:
        return first.run("ss", "-Htn", "state", "established", "dport", "=", ":2379").stdout

    wait_until(lambda: first.underlay_ip in ends() and lost not in ends(), 5, "connections from the new address alone")
    assert "store_denied" not in said(first)
