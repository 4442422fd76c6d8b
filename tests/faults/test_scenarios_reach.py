"""An etcd that falls silent, and a way to it that is cut, in one direction or both, once or again and again."""

from collections.abc import Callable

import pytest

from tests.conftest import MakeLab
from tests.faults.world import NETWORK, OUTAGE_S, World

pytestmark = pytest.mark.fault


def frozen(world: World) -> None:
    (etcd,) = world.etcd.members
    etcd.freeze()
    world.wait_said("store_unreachable")
    etcd.thaw()
    world.join(200)


def cut_in_each_direction(world: World) -> None:
    h1, h2, h3 = world.hosts
    world.cut(h1, answers=False)
    world.cut(h2, requests=False)
    world.cut(h3)
    world.join(200)
    world.wait_said("store_unreachable")
    world.mend()


def flapping(world: World) -> None:
    world.join(200)
    world.join(201)
    for number in range(202, 202 + round(OUTAGE_S / 2)):
        world.cut()
        world.leave(number - 1)
        world.join(number)
        world.wait_out(1)
        world.mend()
        world.wait_out(1)


@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        pytest.param(frozen, 15, id="etcd is stopped and goes on"),
        pytest.param(cut_in_each_direction, 15, id="requests are lost, or answers, or both"),
        pytest.param(flapping, 15, id="the way to etcd comes and goes every second"),
    ],
)
def test_silence_is_noticed_by_no_flow(make_lab: MakeLab, fault: Callable[[World], None], seconds: float) -> None:
    with World(make_lab, hosts=3) as world, world.nothing_lost():
        fault(world)
        world.converge(seconds)
        assert "10.244.200.0/24" in world.joined()


def test_agents_started_before_etcd_wait_idly_and_are_ready_once_it_is_there(make_lab: MakeLab) -> None:
    world = World(make_lab, hosts=3, members=3)
    world.make_network()
    world.start_agents(*world.hosts)
    world.wait_said("waiting_for_config")
    world.stay_idle()
    world.etcd.start()
    world.lab.write_config(NETWORK)
    world.wait_ready(*world.hosts)
    with world.nothing_lost():
        world.converge(10)
