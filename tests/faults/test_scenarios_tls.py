"""Certificates of etcd and of its agents: replaced while all run, expired, and for another address."""

import pytest

from tests.conftest import MakeLab
from tests.faults.world import Fault, World

pytestmark = pytest.mark.fault


def expired_at_etcd(world: World) -> None:
    world.pki.expire("etcd")


def for_another_address(world: World) -> None:
    world.pki.make("etcd", address="172.30.0.2")


def expired_at_the_agents(world: World) -> None:
    world.pki.expire("agent")


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (expired_at_etcd, "has expired"),
        (for_another_address, "is not for 172.30.0.1"),
        (expired_at_the_agents, "expired"),
    ],
)
def test_certificate_that_cannot_be_used_is_said_and_its_renewal_is_found(
    make_lab: MakeLab, harm: Fault, reason: str
) -> None:
    with World(make_lab, tls=True) as world, world.nothing_lost():
        harm(world)
        world.etcd.restart()
        world.wait_said("store_unreachable", reason=reason)
        world.pki.make("etcd")
        world.pki.make("agent")
        world.join(200)
        world.converge(15)


def test_agents_follow_to_a_new_certificate_authority(make_lab: MakeLab) -> None:
    with World(make_lab, tls=True) as world, world.nothing_lost():
        world.pki.make_all()
        world.etcd.restart()
        world.join(200)
        world.converge(15)
