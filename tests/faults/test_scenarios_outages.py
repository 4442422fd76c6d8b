"""An etcd that loses members, one or most or all, falls silent, or cannot be reached, for a minute or again and again.

Each outage has a world of its own, and all last at the same time: what waits takes no CPU.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.conftest import MakeLab
from tests.faults.world import NETWORK, OUTAGE_S, Fault, World

pytestmark = pytest.mark.fault

Outage = Callable[[MakeLab], None]


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
    """A host joins as it returns."""
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
    world.last_an_outage()
    world.etcd.start()
    world.join(200)


def frozen(world: World) -> None:
    (etcd,) = world.etcd.members
    etcd.freeze()
    world.wait_said("store_unreachable")
    world.last_an_outage()
    etcd.thaw()
    world.join(200)


def cut_in_each_direction(world: World) -> None:
    h1, h2, h3 = world.hosts
    world.cut(h1, answers=False)
    world.cut(h2, requests=False)
    world.cut(h3)
    world.join(200)
    world.wait_said("store_unreachable")
    world.last_an_outage()
    world.mend()


def cut_every_other_second(world: World) -> None:
    world.join(200)
    world.join(201)
    for number in range(202, 202 + round(OUTAGE_S / 2)):
        world.cut()
        world.leave(number - 1)
        world.join(number)
        world.wait_out(1)
        world.mend()
        world.wait_out(1)


def survived(make_lab: MakeLab, fault: Fault, members: int) -> None:
    with World(make_lab, hosts=3, members=members) as world:
        world.survive(fault, 15)
        assert "10.244.200.0/24" in world.joined()


def agents_started_before_etcd(make_lab: MakeLab) -> None:
    """They are ready once it is there."""
    world = World(make_lab, hosts=3, members=3)
    world.make_network()
    world.start_agents(*world.hosts)
    world.wait_said("waiting_for_config")
    world.last_an_outage()
    world.etcd.start()
    world.lab.write_config(NETWORK)
    world.wait_ready(*world.hosts)
    with world.nothing_lost():
        world.converge(10)


OUTAGES: Mapping[str, Outage] = {
    "the member in use is killed": functools.partial(survived, fault=member_in_use_killed, members=3),
    "the leader is killed": functools.partial(survived, fault=leader_killed, members=3),
    "all members are restarted in turn": functools.partial(survived, fault=one_after_the_other_restarted, members=3),
    "the quorum is lost": functools.partial(survived, fault=quorum_lost, members=3),
    "all members are down": functools.partial(survived, fault=all_down, members=3),
    "etcd is stopped and goes on": functools.partial(survived, fault=frozen, members=1),
    "requests are lost, or answers, or both": functools.partial(survived, fault=cut_in_each_direction, members=1),
    "the way to etcd comes and goes": functools.partial(survived, fault=cut_every_other_second, members=1),
    "agents are started before etcd": agents_started_before_etcd,
}


@pytest.fixture(scope="module")
def outcomes(make_module_lab: MakeLab) -> Iterator[Mapping[str, Future[None]]]:
    """All outages, begun at once; the result of one is there when it is over."""
    with ThreadPoolExecutor(len(OUTAGES)) as threads:
        yield {name: threads.submit(outage, make_module_lab) for name, outage in OUTAGES.items()}


@pytest.mark.parametrize("name", OUTAGES)
def test_outage_is_noticed_by_no_flow(outcomes: Mapping[str, Future[None]], name: str) -> None:
    outcomes[name].result()
