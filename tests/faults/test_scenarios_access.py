"""An etcd that begins to ask for logins, forgets them, refuses them, and takes permissions away and gives them back."""

import pytest

from tests.conftest import MakeLab
from tests.faults.world import ROOT, Fault, World

pytestmark = pytest.mark.fault

TOKEN_S = 2
LEASE_S = 8
"""Leases are renewed when half of their time is over, which is longer than a login lasts without use."""

QUICK = (f"--auth-token-ttl={TOKEN_S}", "--bcrypt-cost=4")


def guarded_world(make_lab: MakeLab, *agent_options: str) -> World:
    """Agents with user and password, and an etcd that will ask for them."""
    return World(make_lab, login=True, agent_options=agent_options, etcd_options=QUICK)


def logins_forgotten_in_a_restart(world: World) -> None:
    world.etcd.restart()


def role_taken_and_given_back(world: World) -> None:
    world.etcd.forbid()
    world.etcd.restart()
    world.wait_said("store_denied")
    world.join(201)
    world.etcd.allow(ROOT)


def role_taken_under_a_watch_that_stands(world: World) -> None:
    """Etcd asks for the permission as a watch begins and not again, but at every read and write."""
    world.etcd.forbid()
    world.join(201)
    world.converge(5)
    store = world.lab.store
    for record in store.snapshot().records:
        # Who sees its own key touched looks at it, and hears the refusal.
        assert store.replace(record.key, record.value, record.etcd_lease, record.mod_revision)
    world.wait_said("store_denied")
    newcomer = world.add_host()
    world.wait_said("waiting_for_config", newcomer)
    world.join(202)
    world.etcd.allow(ROOT)
    world.wait_ready(newcomer)


def password_changed(world: World) -> None:
    world.etcd.change_password("another")
    world.etcd.restart()
    world.wait_said("store_denied")
    world.set_password("another")
    for host in world.hosts:
        host.kill_agent()
    world.start_agents(*world.hosts)
    for host in world.hosts:
        host.wait_ready()


@pytest.mark.parametrize(
    "fault",
    [
        logins_forgotten_in_a_restart,
        role_taken_and_given_back,
        role_taken_under_a_watch_that_stands,
        password_changed,
    ],
)
def test_refusal_is_said_and_noticed_by_no_flow(make_lab: MakeLab, fault: Fault) -> None:
    with guarded_world(make_lab) as world:
        world.etcd.demand_logins()
        with world.nothing_lost():
            fault(world)
            world.join(200)
            world.converge(15)
        assert "10.244.200.0/24" in world.joined()
        assert not any(secret in host.log() for host in world.hosts for secret in ("secret", "another"))


def test_logins_are_demanded_and_run_out_while_leases_are_renewed(make_lab: MakeLab) -> None:
    with guarded_world(make_lab, "--subnet-lease-ttl", str(LEASE_S)) as world, world.nothing_lost():
        world.etcd.demand_logins()
        world.join(200)
        world.converge(5)
        world.wait_out(1.5 * LEASE_S)
        world.join(201)
        world.converge(5)
        # Nobody's lease has run out and been taken again.
        assert [world.said(host, "lease_lost", "lease_acquired", "store_denied") for host in world.hosts] == [[], []]
