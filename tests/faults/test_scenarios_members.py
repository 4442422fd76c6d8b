"""Members of etcd that die one by one, by majority and all at once, under running flows."""

from collections.abc import Callable

import pytest

from tests.conftest import MakeLab
from tests.faults.world import OUTAGE_S, World

pytestmark = pytest.mark.fault


def member_in_use_killed(world: World) -> None:
    host = world.hosts[0]
    world.etcd.kill(world.etcd.used_by(host))
    world.wait_said("store_unreachable", host)
    world.join(200)


def leader_killed(world: World) -> None:
    world.etcd.kill(world.etcd.leader)
    world.join(200)


def one_after_the_other_restarted(world: World) -> None:
    for number, member in enumerate(world.etcd.members):
        world.etcd.kill(member)
        world.join(200 + number)
        world.etcd.start(member)


def quorum_lost(world: World) -> None:
    _, *lost = world.etcd.members
    world.etcd.kill(*lost)
    world.wait_said("store_unreachable")
    newcomer = world.add_host()
    world.wait_out(OUTAGE_S)
    world.etcd.start(*lost)
    world.join(200)
    world.wait_ready(newcomer)


def all_down(world: World) -> None:
    world.etcd.kill_all()
    world.wait_said("store_unreachable")
    world.stay_idle()
    world.etcd.start()
    world.join(200)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        pytest.param(member_in_use_killed, 10, id="the member in use is killed"),
        pytest.param(leader_killed, 10, id="the leader is killed"),
        pytest.param(one_after_the_other_restarted, 10, id="all members are restarted in turn"),
        pytest.param(quorum_lost, 15, id="the quorum is lost and a host joins as it returns"),
        pytest.param(all_down, 15, id="all members are down and agents are idle meanwhile"),
    ],
)
def test_loss_of_members_is_noticed_by_no_flow(
    make_lab: MakeLab, fault: Callable[[World], None], seconds: float
) -> None:
    with World(make_lab, members=3) as world, world.nothing_lost():
        fault(world)
        world.converge(seconds)
        assert "10.244.200.0/24" in world.joined()
