"""An etcd whose past is compacted, moved, or another than it was: restored from a backup, or begun anew."""

from pathlib import Path

import pytest

from tests.conftest import MakeLab
from tests.faults.world import NETWORK, Fault, World

pytestmark = pytest.mark.fault


def compacted(world: World) -> None:
    world.join(200)
    world.etcd.compact()
    world.join(201)
    world.leave(200)


def compacted_while_an_agent_is_away(world: World) -> None:
    world.join(200)
    world.converge(5)
    h1, _ = world.hosts
    # Etcd can still end the connection, and the agent cannot come back.
    world.cut(h1, answers=False)
    world.etcd.restart()
    world.leave(200)
    world.join(201)
    world.etcd.compact()
    world.mend()


def compacted_where_an_agent_left_off(world: World) -> None:
    """The compaction removes what an agent would hear of next, and etcd does not tell it so (etcd issue 18089)."""
    world.join(201)
    world.join(200)
    world.converge(5)
    h1, _ = world.hosts
    world.cut(h1, answers=False)
    world.etcd.restart()
    world.leave(200)
    world.etcd.compact()
    world.mend()


def defragmented(world: World) -> None:
    world.join(200)
    world.join(201)
    world.leave(200)
    world.etcd.compact()
    world.etcd.control("defrag")


def outdated_backup(world: World) -> Path:
    """A backup that knows a host which has left since, and does not know one which has come."""
    world.join(201)
    backup = world.etcd.back_up()
    world.leave(201)
    world.join(200)
    world.converge(5)
    return backup


def restored(world: World) -> None:
    world.etcd.restore(outdated_backup(world))
    world.join(200)


def restored_as_another_cluster(world: World) -> None:
    world.etcd.restore(outdated_backup(world), "another")
    world.join(200)


def restored_and_grown_beyond_what_agents_have_seen(world: World) -> None:
    backup = outdated_backup(world)
    seen = world.etcd.revision
    world.cut(answers=False)
    world.etcd.restore(backup)
    world.etcd.grow(seen + 2)
    world.join(200)
    world.mend()


@pytest.mark.parametrize(
    ("fault", "seconds", "members"),
    [
        (compacted, 5, 1),
        (compacted_while_an_agent_is_away, 15, 1),
        (compacted_where_an_agent_left_off, 15, 1),
        (defragmented, 5, 1),
        (restored, 15, 1),
        (restored, 15, 3),
        (restored_as_another_cluster, 15, 3),
        (restored_and_grown_beyond_what_agents_have_seen, 15, 1),
    ],
)
def test_another_history_is_noticed_by_no_flow(make_lab: MakeLab, fault: Fault, seconds: float, members: int) -> None:
    with World(make_lab, members=members) as world:
        world.survive(fault, seconds)
        assert "10.244.201.0/24" in world.joined()


@pytest.mark.parametrize("grown", [False, True], ids=["at once", "grown beyond what agents have seen"])
def test_host_younger_than_a_restored_backup_keeps_its_subnet_and_its_flows(make_lab: MakeLab, grown: bool) -> None:
    with World(make_lab) as world:
        backup = world.etcd.back_up()
        world.wait_ready(world.add_host())
        world.converge(5)
        seen = world.etcd.revision
        with world.nothing_lost():
            world.cut(answers=False)
            world.etcd.restore(backup)
            if grown:
                world.etcd.grow(seen + 2)
            world.mend()
            world.converge(15)


def test_hosts_take_their_subnets_again_in_an_etcd_that_lost_all_data(make_lab: MakeLab) -> None:
    with World(make_lab, hosts=3) as world, world.nothing_lost():
        world.etcd.kill_all()
        world.etcd.members[0].wipe()
        world.etcd.start()
        world.lab.write_config(NETWORK)
        world.converge(15)
