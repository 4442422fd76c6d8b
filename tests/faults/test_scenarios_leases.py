"""A host's own lease: ended, deleted, written over, and run out while its agent was stopped or suspended."""

import os
import signal
from collections.abc import Callable

import pytest

from overlay.cluster import Host, wait_until
from tests.conftest import MakeLab
from tests.faults.etcd_process import freeze
from tests.faults.world import World, holder, lease_of, stranger

pytestmark = pytest.mark.fault

LEASE_S = 4

RETURN_S = 1.0
"""The others withdraw a host whose lease is gone, and put it back as soon as it is there again: within this time."""


def has_lease(world: World, host: Host) -> bool:
    return host.underlay_ip in map(holder, world.lab.leases())


def short_lived_world(make_lab: MakeLab) -> World:
    """Three hosts, whose leases end soon after their agents do."""
    return World(make_lab, hosts=3, agent_options=("--subnet-lease-ttl", str(LEASE_S)))


def key_of(host: Host) -> str:
    return host.subnet.replace("/", "-")


def revoked(world: World, host: Host) -> None:
    world.lab.store.revoke(lease_of(host).etcd_lease)


def deleted(world: World, host: Host) -> None:
    assert world.lab.store.delete(key_of(host), lease_of(host).mod_revision)


@pytest.mark.parametrize(
    "harm", [pytest.param(revoked, id="its etcd lease is revoked"), pytest.param(deleted, id="its key is deleted")]
)
def test_host_takes_its_subnet_again_at_once(make_lab: MakeLab, harm: Callable[[World, Host], None]) -> None:
    with World(make_lab) as world:
        h1, _ = world.hosts
        before = lease_of(h1)
        with world.lost_for_at_most(RETURN_S):
            harm(world, h1)
            wait_until(lambda: world.said(h1, "lease_lost"), 5, "the loss said")
            world.converge(5)
        assert lease_of(h1).create_revision > before.create_revision
        assert [line["subnet"] for line in world.said(h1, "lease_lost")] == [h1.subnet]


def test_host_whose_key_another_host_has_written_over_moves_and_says_so(make_lab: MakeLab) -> None:
    with World(make_lab, hosts=3) as world:
        h1, h2, h3 = world.hosts
        taken = h1.subnet
        with world.nothing_lost(h2, h3):
            store = world.lab.store
            revision = lease_of(h1).mod_revision
            assert store.replace(key_of(h1), stranger(200), store.grant(3600), revision)
            wait_until(lambda: h1.subnet != taken, 10, "another subnet")
            world.converge(5)
        assert world.joined() == {taken}
        assert [line["subnet"] for line in world.said(h1, "lease_lost")] == [taken]


def test_host_whose_subnet_was_taken_while_its_agent_was_stopped_moves_and_says_so(make_lab: MakeLab) -> None:
    with short_lived_world(make_lab) as world:
        h1, h2, h3 = world.hosts
        taken = h1.subnet
        with world.nothing_lost(h2, h3):
            h1.kill_agent(signal.SIGKILL)
            wait_until(lambda: not has_lease(world, h1), 4 * LEASE_S, "the lease's end")
            world.join(200, taken)
            world.start_agents(h1)
            world.wait_ready(h1)
            world.converge(5)
        assert h1.subnet != taken
        assert world.joined() == {taken}
        assert any(line["level"] in ("warning", "error") and taken in str(line) for line in world.log(h1))


@pytest.mark.parametrize("taken", [False, True], ids=["free on its return", "taken on its return"])
def test_host_suspended_beyond_the_end_of_its_lease_finds_its_subnet(make_lab: MakeLab, taken: bool) -> None:
    with short_lived_world(make_lab) as world:
        h1, h2, h3 = world.hosts
        subnet = h1.subnet
        assert h1.agent_pid is not None
        with world.nothing_lost(h2, h3):
            freeze(h1.agent_pid)
            wait_until(lambda: not has_lease(world, h1), 4 * LEASE_S, "the lease's end")
            if taken:
                world.join(200, subnet)
            os.kill(h1.agent_pid, signal.SIGCONT)
            wait_until(lambda: has_lease(world, h1), 10, "a lease again")
            world.converge(10)
        assert (h1.subnet != subnet) == taken
        assert [line["subnet"] for line in world.said(h1, "lease_lost")] == [subnet]
