"""What the health pages say of loops and tables that are as the test wants them."""

import math

import pytest

from overlay import metrics
from overlay.causes import Finding
from overlay.probe import Paths
from overlay.process import Usage
from overlay.reconciler import Plan, State
from overlay.verdict import starting
from overlay.vitals import Vitals
from subnet_lease.model import Prefix
from subnet_lease.table import REJECTIONS

MAX_AGE = 300.0
STATE = State(ready=True, peers=2, entries=8, revision=7, rejected_by=dict.fromkeys(REJECTIONS, 0))


class World:
    """All that vitals are asked about; times are on `now`."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.loops = {"reconciler": "", "watcher": ""}
        self.state = STATE
        self.lease: object | None = object()
        self.left: float | None = 86400.0
        self.connected = True
        self.table_age: float | None = 0.0
        self.counters = {"strangers": 4}
        self.findings: list[Finding] = []
        self.vitals = Vitals(
            "1.2.3",
            MAX_AGE,
            lambda: self.loops,
            lambda: self.now,
            usage=lambda: Usage(1.5, 50 << 20, 9, 20, 1e9),
            devices=lambda names: {name: dict.fromkeys(metrics.DEVICE_COUNTERS, 5) for name in names},
            firewall=lambda: self.counters,
        )
        self.vitals.findings = lambda: self.findings

    def seconds_left(self) -> float | None:
        return self.left

    def age(self) -> float | None:
        return self.table_age

    def complete(self) -> Vitals:
        """As after a start."""
        vitals = self.vitals
        vitals.lease = vitals.table = self
        vitals.state = lambda: self.state
        return vitals

    def samples(self) -> dict[str, float]:
        well, text = self.vitals.metrics()
        assert well
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


@pytest.fixture
def world() -> World:
    return World()


def test_healthz_names_the_loops_that_are_alive(world: World) -> None:
    assert world.vitals.healthz() == (True, "alive: reconciler, watcher")
    world.loops.clear()
    assert world.vitals.healthz() == (True, "alive: starting")


def test_healthz_names_each_loop_that_is_dead_and_no_other(world: World) -> None:
    world.loops = {"reconciler": "busy for 99 s", "watcher": "", "cache": "its thread has ended"}
    assert world.vitals.healthz() == (False, "reconciler: busy for 99 s\ncache: its thread has ended")


def test_an_agent_that_starts_is_alive_not_ready_and_says_what_it_waits_for(world: World) -> None:
    assert world.vitals.healthz()[0]
    world.findings = [starting("a subnet")]
    assert world.vitals.readyz() == (
        False,
        "not ready: agent_starting: the agent is not ready: it waits for a subnet",
    )
    found = world.samples()
    assert found["overlay_agent_ready"] == 0
    assert "overlay_agent_peers" not in found


def test_ready_tells_the_numbers(world: World) -> None:
    assert world.complete().readyz() == (
        True,
        "ready: 2 peers, 8 entries, 0 not in place, 0 leases rejected, 0 unreachable",
    )


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        ({"findings": [Finding("lease_lost")]}, "lease_lost: this host holds no lease"),
        (
            {"table_age": MAX_AGE + 1, "connected": False},
            "etcd_unreachable: the table of peers is 301 s old, at most 300 s are allowed: etcd is away",
        ),
        (
            {"table_age": MAX_AGE + 1, "findings": [Finding("journal_failing"), Finding("etcd_denied")]},
            "etcd_denied: the table of peers is 301 s old, at most 300 s are allowed: etcd is away",
        ),
        ({"table_age": MAX_AGE + 1, "findings": [Finding("lease_lost")]}, "lease_lost: this host holds no lease"),
    ],
)
def test_not_ready_has_one_reason_and_goes_with_it(world: World, trouble: dict[str, object], reason: str) -> None:
    vitals = world.complete()
    good = {name: getattr(world, name) for name in trouble}
    vars(world).update(trouble)
    ready, text = vitals.readyz()
    assert (ready, text.split(";")[0]) == (False, f"not ready: {reason}")
    assert world.samples()["overlay_agent_ready"] == 0
    vars(world).update(good)
    assert vitals.readyz()[0]
    assert world.samples()["overlay_agent_ready"] == 1


def test_every_grave_cause_is_named_and_none_of_the_others(world: World) -> None:
    world.findings = [Finding("lease_lost"), Finding("rp_filter"), Finding("forward_drop")]
    ready, text = world.complete().readyz()
    assert not ready and "lease_lost: " in text and "forward_drop: " in text and "rp_filter" not in text
    world.findings = [Finding("rp_filter")]
    assert world.vitals.readyz()[0]


def test_table_from_disk_is_as_old_as_the_file_until_the_store_says_something(world: World) -> None:
    vitals = world.complete()
    world.table_age, world.connected, world.left = None, False, None
    vitals.table_from -= MAX_AGE - 10
    assert vitals.readyz()[0]
    world.now += 11
    assert "the table of peers is 301 s old" in vitals.readyz()[1]
    found = world.samples()
    assert found["overlay_agent_table_age_seconds"] == 301
    assert found["overlay_agent_lease_held"] == 1
    assert "overlay_agent_lease_remaining_seconds" not in found
    world.table_age, world.connected = 0.0, True
    assert vitals.readyz()[0]


def test_every_metric_has_a_value_but_those_of_what_never_happened(world: World) -> None:
    vitals = world.complete()
    vitals.paths = Paths()
    vitals.planned(Plan((Prefix.parse("10.0.1.0/24"),), (), "eth0", 1450))
    found = world.samples()
    names = {name.partition("{")[0] for name in found}
    lacking = [family.name for family in metrics.FAMILIES if not any(name.startswith(family.name) for name in names)]
    # Nothing was refused, and a plan without devices has no counters of devices.
    assert [name for name in lacking if "_device_" not in name] == ["overlay_agent_refusals_total"]


def test_values_are_those_of_the_loops(world: World) -> None:
    vitals = world.complete()
    vitals.requested("read", 0.2, "")
    vitals.requested("write", 5.0, "denied")
    vitals.underlay_changes = 3
    world.left = math.inf
    world.loops["watcher"] = "busy"
    found = world.samples()
    assert found["overlay_agent_peers"] == 2
    assert found['overlay_agent_loop_alive{loop="reconciler"}'] == 1
    assert found['overlay_agent_loop_alive{loop="watcher"}'] == 0
    assert found["overlay_agent_lease_remaining_seconds"] == math.inf
    assert found["overlay_agent_underlay_changes_total"] == 3
    assert found['overlay_agent_firewall_packets_total{counter="strangers"}'] == 4
    assert found['overlay_agent_store_request_failures_total{reason="denied"}'] == 1
    assert found['overlay_agent_store_request_duration_seconds_count{request="read"}'] == 1
    assert found["process_resident_memory_bytes"] == 50 << 20
