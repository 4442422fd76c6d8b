"""The checks that the scenarios rest on see what they are there for."""

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from overlay.cluster import Host
from tests.conftest import MakeLab
from tests.faults.etcd_process import freeze
from tests.faults.world import STALL_S, World

pytestmark = pytest.mark.fault

AWAY_S = 0.5


@contextlib.contextmanager
def forwarding_nothing(host: Host) -> Iterator[None]:
    """The host drops what passes through it while the block lasts."""
    chain = "add chain inet fault passing { type filter hook forward priority 0; policy drop; }"
    assert host.run("nft", f"add table inet fault; {chain}").returncode == 0
    yield
    assert host.run("nft", "delete table inet fault").returncode == 0


def test_a_moment_without_a_way_is_seen_in_both_directions(make_lab: MakeLab) -> None:
    with World(make_lab) as world:
        with world.traffic() as lost, forwarding_nothing(world.hosts[0]):
            world.wait_out(AWAY_S)
        pings = [gap for gap in lost if gap.pods != "a stream"]
        assert sorted(gap.pods for gap in pings) == ["h1p1 -> h2p1", "h2p1 -> h1p1"]
        assert all(AWAY_S / 2 < gap.seconds < 10 * AWAY_S for gap in pings)


def test_a_stream_that_stands_still_is_seen(make_lab: MakeLab) -> None:
    with World(make_lab) as world:
        with world.traffic() as lost, forwarding_nothing(world.hosts[0]):
            world.wait_out(1.5 * STALL_S)
        assert "a stream" in {gap.pods for gap in lost}


def test_an_entry_too_many_or_too_few_and_leases_that_overlap_are_seen(make_lab: MakeLab) -> None:
    with World(make_lab) as world:
        h1, h2 = world.hosts
        assert h1.agent_pid is not None
        freeze(h1.agent_pid)
        assert world.differences() == []
        world.join(200, "10.244.200.0/25")
        world.join(201, "10.244.200.0/24")
        h1.ip("neigh add 10.244.9.9 lladdr 02:00:00:00:09:09 dev flannel.1 nud permanent")
        h1.ip(f"route del {h2.subnet}")
        found = "\n".join(world.differences())
        assert "10.244.200.0/24 overlaps 10.244.200.0/25" in found
        assert "h1: neighbour has ['10.244.9.9 02:00:00:00:09:09']" in found
        assert f"{h2.subnet} via" in found
        os.kill(h1.agent_pid, signal.SIGCONT)
