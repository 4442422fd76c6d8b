"""The loop over the kernel's twin: facts in, entries in the kernel, and a state that tells the truth.

The loop runs in the test's own thread, up to the point where it would wait: no test depends on time passing.
"""

import dataclasses
import errno
import itertools
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import pytest
from structlog.testing import capture_logs

from overlay.backends import V4, Here, backend_of
from overlay.device import FoundDevice, Underlay, derived_mac, overlay_mtu
from overlay.kernel import KernelRefused
from overlay.model import PROTOCOL_BOOT, Drop, Entry, Fdb, Guard, NextHop, Put, Route
from overlay.reconciler import (
    HEARTBEAT,
    LINGER,
    RETRY,
    RETRY_MOST,
    TOLD,
    Fact,
    Plan,
    Reconciler,
    State,
    Stop,
)
from overlay.records import Event, News, Table, Turns
from subnet_lease.model import (
    Lease,
    LeaseAttrs,
    NetworkConfig,
    Prefix,
    Vtep,
    encode_attrs,
    format_subnets,
    pack_address,
)
from subnet_lease.store import Changes, Deleted, Record, Snapshot
from subnet_lease.table import REJECTIONS, LeaseTable
from tests.fake_dataplane import FakeKernel

T = TypeVar("T")

CONFIG = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}')
DUAL = NetworkConfig.parse(
    b'{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}'
)
LOCAL, LOCAL6 = pack_address("172.30.0.200"), pack_address("2001:db8::c8")
ON_LINK = (Prefix.parse("172.30.0.0/16"), Prefix.parse("2001:db8::/64"))
UNDERLAY = Underlay("eth0", 2, 1500, (LOCAL,), ON_LINK[:1], ON_LINK[:1], "test")
BOTH = Underlay("eth0", 2, 1500, (LOCAL, LOCAL6), ON_LINK, ON_LINK, "test")


def mac(host: int) -> bytes:
    return b"\x02\0\0\0\0" + bytes([host])


def mac6(host: int) -> bytes:
    return b"\x02\0\0\0\6" + bytes([host])


def lease(
    number: int,
    *,
    host: int | None = None,
    revision: int = 1,
    families: str = "4",
    mtu: int = 0,
    backend: str = "vxlan",
) -> Lease:
    """Subnet number `number`, of the host of that number unless another is named; pods and underlay of `families`."""
    host = number if host is None else host
    has4, has6, tunnel = "4" in families, "6" in families, backend == "vxlan"
    attrs = LeaseAttrs(
        pack_address(f"172.30.0.{host}") if has4 else None, backend, Vtep(1, mac(host)) if has4 and tunnel else None,
        pack_address(f"2001:db8::{host:x}") if has6 else None, Vtep(1, mac6(host)) if has6 and tunnel else None, mtu,
    )  # fmt: skip
    subnet = Prefix.parse(f"10.0.{number}.0/24") if has4 else None
    subnet6 = Prefix.parse(f"fd00:0:0:{number:x}::/64") if has6 else None
    return Lease(subnet, subnet6, attrs, 1, number, revision)


def record(each: Lease) -> Record:
    return Record(each.key, encode_attrs(each.attrs), each.etcd_lease, each.create_revision, each.mod_revision)


OWN, MOVED = lease(200), lease(201, host=200)


def snapshot(numbers: Iterable[int], revision: int = 300, own: Lease = OWN) -> Snapshot:
    return told(own, *map(lease, numbers), revision=revision)


def told(*leases: Lease, revision: int = 300) -> Snapshot:
    return Snapshot(tuple(map(record, leases)), revision, 1)


def joined(each: Lease, revision: int) -> Changes:
    return Changes((record(each),), revision)


def left(number: int, revision: int) -> Changes:
    return Changes((Deleted(lease(number).key, revision),), revision)


class WouldWait(Exception):
    """The loop has nothing to do; it would wait for as many seconds as it says."""


class SteppedKernel(FakeKernel):
    """A kernel whose `wait` comes back where it has something to tell, and otherwise hands over to the test."""

    def __init__(self, *, nexthops: bool = True, capacity: int = 100_000) -> None:
        super().__init__(nexthops=nexthops, capacity=capacity)
        self.elapsing = 0
        """How many waits may come to their end."""

    def wait(self, seconds: float | None) -> None:
        if self.has_news() or seconds == 0.0:
            super().wait(0.0)
        elif self.elapsing:
            self.elapsing -= 1
        else:
            raise WouldWait(seconds)


class Agent:
    """A reconciler, its kernel, and what it called."""

    def __init__(
        self,
        kernel: SteppedKernel | None = None,
        underlay: Underlay = UNDERLAY,
        *,
        config: NetworkConfig = CONFIG,
        own: Lease = OWN,
        listed: bool = False,
    ) -> None:
        self.kernel = kernel or SteppedKernel()
        self.config, self.underlay, self.listed = config, underlay, listed
        self.calls: list[str] = []
        self.news: list[News] = []
        ticks = itertools.count(1)
        self.reconciler = Reconciler(
            self.kernel, config, underlay, own,
            prepare=partial(self._called, "prepare"), protect=partial(self._called, "protect"),
            on_ready=partial(self._called, "ready"), clock=lambda: float(next(ticks)), listed=listed,
            tell=self.news.append,
        )  # fmt: skip

    def _called(self, what: str, plan: Plan) -> None:
        self.calls.append(f"{what} {format_subnets(plan.subnets)} {plan.mtu} {len(self.kernel.entries())}")

    def called(self, since: int = 0) -> str:
        """The names of the calls from number `since` on."""
        return " ".join(call.split()[0] for call in self.calls[since:])

    @property
    def state(self) -> State:
        return self.reconciler.state

    def settle(self) -> float | None:
        """Run until the loop would wait; for how many seconds it would."""
        try:
            self.reconciler.run()
        except WouldWait as wait:
            return wait.args[0]  # type: ignore[no-any-return]
        raise AssertionError("the loop has ended")

    def later(self) -> float | None:
        """As `settle`, once the present wait has come to its end."""
        self.kernel.elapsing = 1
        return self.settle()

    def post(self, *facts: Fact) -> list[str]:
        """Post facts, settle; what was written meanwhile."""
        before = len(self.kernel.batches)
        for fact in facts:
            self.reconciler.post(fact)
        self.settle()
        return self.written(before)

    def asked(self, question: Callable[[float], T | None]) -> T:
        """The answer to a question that another thread asks."""
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(question, 10.0)
            while not answer.done():
                self.settle()
            found = answer.result()
        assert found is not None
        return found

    def written(self, since: int = 0) -> list[str]:
        """All operations from batch number `since` on, as words."""
        ops = [op for batch in self.kernel.batches[since:] for op in batch]
        return [f"{'put' if isinstance(op, Put) else 'drop'} {op.entry}" for op in ops]

    def entries(self, *leases: Lease) -> set[Entry]:
        backend = backend_of(self.config)
        mtu = overlay_mtu(self.config, self.underlay, tunnels=backend.tunnels)
        nexthops = self.kernel.has_nexthops()
        here = Here.of(self.config, self.underlay, mtu, nexthops=nexthops, listed=self.listed)
        here = dataclasses.replace(here, tunnels=self.kernel.tunnels)
        return {entry for each in leases for entry in backend.entries(each, here)}

    def assert_in_step(self, *numbers: int) -> None:
        assert self.kernel.entries() == self.entries(*map(lease, numbers))
        assert (self.state.gap, self.state.refused, self.state.peers) == (0, 0, len(numbers))


@pytest.fixture
def agent() -> Agent:
    """Three peers, in place, and nothing left to do."""
    made = Agent()
    made.post(snapshot([1, 2, 3]))
    made.assert_in_step(1, 2, 3)
    return made


# --- the start ---


def test_nothing_is_written_before_the_first_complete_snapshot() -> None:
    made = Agent()
    made.settle()
    stale = Fdb((made.kernel.tunnels[V4], mac(77)), pack_address("172.30.0.77"))
    made.kernel.stranger.apply([Put(stale)])
    assert made.settle() == HEARTBEAT
    made.post(joined(lease(1), 5))
    assert (made.written(), made.state.ready, made.state.peers) == ([], False, 0)
    assert made.kernel.entries() == {stale}
    assert made.calls == ["prepare 10.0.200.0/24 1450 0"]
    made.post(snapshot([1]))
    made.assert_in_step(1)
    assert made.calls[1:] == ["protect 10.0.200.0/24 1450 4", "ready 10.0.200.0/24 1450 4"]


def test_restart_on_unchanged_entries_writes_nothing(agent: Agent) -> None:
    again = Agent(agent.kernel)
    before = len(agent.kernel.batches)
    with capture_logs() as logs:
        again.post(snapshot([1, 2, 3]))
    assert again.written(before) == []
    assert logs == []
    again.assert_in_step(1, 2, 3)
    assert (again.state.ready, again.state.drift) == (True, 0)


def test_restart_removes_who_left_and_puts_who_came_meanwhile(agent: Agent) -> None:
    again = Agent(agent.kernel)
    before = len(agent.kernel.batches)
    again.post(snapshot([2, 3, 4]))
    assert len(again.written(before)) == 8
    again.assert_in_step(2, 3, 4)
    assert again.state.drift == 0


def test_flannels_routes_are_replaced_and_those_of_its_departed_peers_removed() -> None:
    made = Agent(SteppedKernel(nexthops=False))
    made.settle()
    device = made.kernel.tunnels[V4]
    for number in (1, 9):
        (base,) = lease(number).subnets
        theirs = Route(base, gateway=base.base, device=device, protocol=PROTOCOL_BOOT)
        made.kernel.stranger.apply([Put(theirs)])
    made.post(snapshot([1]))
    made.assert_in_step(1)


def test_kernel_without_nexthop_objects_gets_plain_routes() -> None:
    made = Agent(SteppedKernel(nexthops=False))
    made.post(snapshot([1, 2]))
    made.assert_in_step(1, 2)
    assert made.state.entries == 6


def test_state_tells_the_numbers(agent: Agent) -> None:
    assert agent.state == State(
        ready=True, beat=agent.state.beat, peers=3, entries=12, gap=0, refused=0, rejected=0, drift=0, revision=300,
        rejected_by=dict.fromkeys(REJECTIONS, 0),
    )  # fmt: skip


def test_passes_are_counted_with_what_they_wrote_and_found(agent: Agent) -> None:
    passes = agent.reconciler.passes
    assert (passes.outcomes["changed"], passes.written, passes.batches.sum) == (1, [12, 0], 12)
    assert sum(passes.events.counts) == 0, "a snapshot is no event"
    agent.post(joined(lease(4), 301), left(1, 302))
    assert (passes.outcomes["changed"], passes.written, sum(passes.events.counts)) == (2, [16, 4], 1)
    assert passes.events.sum > passes.seconds.sum - passes.seconds.counts[-1], "it includes the wait for the pass"
    agent.kernel.stranger.apply([Drop(min(agent.entries(lease(2)), key=lambda entry: not isinstance(entry, Fdb)))])
    agent.settle()
    drifts = {which: number for which, number in passes.drifts.items() if number}
    assert drifts == {("fdb", "removed"): 1}
    agent.later()
    assert sum(passes.outcomes.values()) > passes.outcomes["changed"] == 3


def test_changes_that_call_for_nothing_are_no_event_that_reached_the_kernel(agent: Agent) -> None:
    passes = agent.reconciler.passes
    agent.post(Changes((Record("nonsense", b"", 1, 301, 301),), 301))
    agent.post(joined(lease(5), 302))
    assert sum(passes.events.counts) == 1
    assert agent.state.rejected_by["malformed"] == 1


def test_lost_notifications_and_failed_passes_are_counted() -> None:
    made = Agent(SteppedKernel(capacity=2))
    made.post(snapshot([1, 2, 3]))
    lost = made.reconciler.passes.lost
    made.kernel.stranger.apply([Drop(entry) for entry in sorted(made.entries(lease(2)), key=repr)])
    made.settle()
    assert made.reconciler.passes.lost == lost + 1


def test_the_loop_sleeps_where_it_waits(agent: Agent) -> None:
    assert agent.settle() == HEARTBEAT
    assert agent.reconciler.pulse.trouble() == ""


def test_one_line_is_logged_for_a_pass_that_changed_something() -> None:
    made = Agent()
    with capture_logs() as logs:
        made.post(snapshot([1]))
        made.later()
    assert [(line["event"], line["log_level"]) for line in logs] == [("device_set", "info"), ("reconciled", "info")]
    assert {key: logs[1][key] for key in ("put", "dropped", "refused", "revision")} == {
        "put": 4, "dropped": 0, "refused": 0, "revision": 300,
    }  # fmt: skip


# --- joins, leaves, changes ---


def test_join_is_written_in_build_order_and_reads_nothing_back(agent: Agent) -> None:
    dumps = agent.kernel.dumps
    assert agent.post(joined(lease(4), 301)) == [
        "put fdb 02:00:00:00:00:04 dst 172.30.0.4",
        "put neighbour 10.0.4.0 lladdr 02:00:00:00:00:04",
        "put nexthop 1862272000 via 10.0.4.0",
        "put route 10.0.4.0/24 nhid 1862272000",
    ]
    agent.assert_in_step(1, 2, 3, 4)
    assert (agent.kernel.dumps, agent.state.revision) == (dumps, 301)


def test_leave_is_written_in_reverse_order(agent: Agent) -> None:
    assert [line.split()[1] for line in agent.post(left(2, 301))] == ["route", "nexthop", "neighbour", "fdb"]
    agent.assert_in_step(1, 3)


def test_peer_with_a_new_mac_gets_the_new_fdb_entry_first_and_loses_the_old_last(agent: Agent) -> None:
    assert agent.post(joined(lease(2, host=22, revision=301), 301)) == [
        "put fdb 02:00:00:00:00:16 dst 172.30.0.22",
        "put neighbour 10.0.2.0 lladdr 02:00:00:00:00:16",
        "drop fdb 02:00:00:00:00:02 dst 172.30.0.2",
    ]
    assert agent.kernel.entries() == agent.entries(lease(1), lease(2, host=22), lease(3))


def test_many_facts_make_one_batch(agent: Agent) -> None:
    before = len(agent.kernel.batches)
    agent.post(*(joined(lease(number), 300 + number) for number in range(10, 60)))
    assert len(agent.kernel.batches) == before + 1
    agent.assert_in_step(1, 2, 3, *range(10, 60))


def test_peer_that_joins_and_leaves_between_two_passes_is_never_written(agent: Agent) -> None:
    assert agent.post(joined(lease(4), 301), left(4, 302)) == []


def test_peers_missing_in_a_later_snapshot_are_withdrawn(agent: Agent) -> None:
    agent.post(snapshot([1, 3, 4], revision=310))
    agent.assert_in_step(1, 3, 4)


def test_lease_that_cannot_be_believed_is_counted_and_harms_nobody(agent: Agent) -> None:
    agent.post(Changes((Record("10.0.9.0-24", b"garbage", 1, 301, 301),), 301))
    agent.assert_in_step(1, 2, 3)
    assert agent.state.rejected == 1


def agent_linked_to(*blocks: str) -> Agent:
    links = (*UNDERLAY.links, *map(Prefix.parse, blocks))
    return Agent(underlay=dataclasses.replace(UNDERLAY, links=links))


def test_link_inside_the_overlay_is_kept_from_leases() -> None:
    made = agent_linked_to("10.0.1.0/24")
    made.post(snapshot([1, 2]))
    assert (made.state.peers, made.state.rejected) == (1, 1)


# --- drift ---


def test_entry_removed_by_hand_is_back_after_one_pass_and_counted(agent: Agent) -> None:
    for number, entry in enumerate(sorted(agent.entries(lease(2)), key=repr), start=1):
        agent.kernel.stranger.apply([Drop(entry)])
        with capture_logs() as logs:
            agent.settle()
        agent.assert_in_step(1, 2, 3)
        assert agent.state.drift >= number
        assert (logs[0]["event"], logs[0]["log_level"]) == ("reconciled", "warning")
        assert f"{entry} was removed" in logs[0]["drifted"]


def test_nexthop_removed_by_hand_brings_back_its_route_too(agent: Agent) -> None:
    hop = next(entry for entry in agent.entries(lease(2)) if str(entry).startswith("nexthop"))
    agent.kernel.stranger.apply([Drop(hop)])
    agent.settle()
    agent.assert_in_step(1, 2, 3)
    assert agent.state.drift == 2


def test_route_put_before_ours_is_replaced(agent: Agent) -> None:
    agent.kernel.prepend_route(Route(lease(2).subnets[0], gateway=b"\x0a\0\0\1", device=3, protocol=PROTOCOL_BOOT))
    agent.settle()
    agent.assert_in_step(1, 2, 3)


def test_foreign_fdb_entry_on_our_device_is_removed(agent: Agent) -> None:
    agent.kernel.stranger.apply([Put(Fdb((agent.kernel.tunnels[V4], mac(99)), pack_address("172.30.0.99")))])
    agent.settle()
    agent.assert_in_step(1, 2, 3)


def test_strangers_route_elsewhere_is_left_alone(agent: Agent) -> None:
    theirs = Route(Prefix.parse("192.0.2.0/24"), gateway=b"\xac\x1e\0\1", protocol=PROTOCOL_BOOT)
    agent.kernel.stranger.apply([Put(theirs)])
    agent.settle()
    assert theirs in agent.kernel.entries()
    assert agent.state.drift == 0


def test_our_own_echoes_are_no_drift_and_end_in_a_long_wait(agent: Agent) -> None:
    agent.post(joined(lease(4), 301), left(1, 302))
    assert agent.settle() == HEARTBEAT
    assert agent.state.drift == 0


def test_lost_notifications_end_in_a_dump_that_heals() -> None:
    made = Agent(SteppedKernel(capacity=2))
    made.post(snapshot([1, 2, 3]))
    dumps = made.kernel.dumps
    made.kernel.stranger.apply([Drop(entry) for entry in sorted(made.entries(lease(2)), key=repr)])
    with capture_logs() as logs:
        made.settle()
    made.assert_in_step(1, 2, 3)
    assert made.kernel.dumps == dumps + 1
    assert "notifications_lost" in [line["event"] for line in logs]


def test_wait_is_a_heartbeat_when_all_is_well(agent: Agent) -> None:
    beat = agent.state.beat
    assert agent.later() == HEARTBEAT
    assert agent.state.beat > beat


# --- the device ---


def test_deleted_device_comes_back_with_everything_on_it(agent: Agent) -> None:
    index = agent.kernel.tunnels[V4]
    agent.kernel.delete_device()
    agent.settle()
    assert agent.kernel.tunnels[V4] != index
    agent.assert_in_step(1, 2, 3)
    assert agent.called() == "prepare protect ready prepare protect"
    assert [call.split()[-1] for call in agent.calls] == ["0", "12", "12", "0", "12"], "before the entries, and after"


def test_link_set_down_is_set_up_and_filled_again(agent: Agent) -> None:
    agent.kernel.set_down()
    agent.settle()
    assert agent.kernel.devices["flannel.1"].up
    agent.assert_in_step(1, 2, 3)
    assert agent.state.drift == 9, "neighbours, nexthops and routes; the FDB outlasts the link"


def test_device_deleted_while_entries_are_written_comes_back_with_them() -> None:
    class Vanishing(SteppedKernel):
        """Its device goes right before the first write."""

        def apply(self, ops):  # type: ignore[no-untyped-def]
            if not self.batches:
                self.delete_device()
            return super().apply(ops)

    made = Agent(Vanishing())
    made.post(snapshot([1, 2]))
    made.later()
    made.assert_in_step(1, 2)


def test_device_that_somebody_made_otherwise_is_made_anew(agent: Agent) -> None:
    agent.kernel.delete_device()
    agent.kernel.devices["flannel.1"] = FoundDevice(99, "flannel.1", "vxlan", derived_mac("other"), 1450, True, vni=9)
    agent.settle()
    agent.assert_in_step(1, 2, 3)
    assert agent.kernel.devices["flannel.1"].vni == 1


def test_interface_of_another_kind_by_our_name_is_told_and_waited_for() -> None:
    made = Agent()
    made.kernel.devices["flannel.1"] = FoundDevice(99, "flannel.1", "bridge", mac(9), 1500, True)
    with capture_logs() as logs:
        assert made.post(snapshot([1])) == []
        made.later()
    assert made.state.trouble == "an interface flannel.1 exists and its kind is bridge, not vxlan"
    assert not made.state.ready
    assert [line["event"] for line in logs] == ["dataplane_refused"], "told once"
    del made.kernel.devices["flannel.1"]
    made.later()
    made.assert_in_step(1)
    assert (made.state.trouble, made.state.ready) == ("", True)


# --- refusals ---


def test_refused_entry_is_retried_with_growing_pauses_and_stops_nobody_else(agent: Agent) -> None:
    route = next(entry for entry in agent.entries(lease(4)) if isinstance(entry, Route))
    agent.kernel.refuse[route.destination] = errno.ENOMEM
    with capture_logs() as logs:
        agent.post(joined(lease(4), 301), joined(lease(5), 302))
        pauses = [agent.settle(), *(agent.later() for _ in range(9))]
    # The echo of the first attempt's FDB entries is a second one.
    assert pauses == [min(RETRY * 2**n, RETRY_MOST) for n in range(1, 11)]
    assert agent.kernel.entries() == agent.entries(*map(lease, range(1, 6))) - {route}
    assert (agent.state.refused, agent.state.gap, agent.state.ready) == (1, 1, True)
    refused = [line for line in logs if line["event"] == "reconciled"]
    assert [line["refusals"] for line in refused] == [[f"{route}: ENOMEM"]], "the same refusal is told once"
    agent.kernel.refuse.clear()
    assert agent.later() == HEARTBEAT
    agent.assert_in_step(1, 2, 3, 4, 5)


def test_peers_with_refused_entries_do_not_keep_the_agent_from_being_ready() -> None:
    made = Agent()
    route = Route(lease(1).subnets[0])
    made.kernel.refuse[route.destination] = errno.ENOMEM
    made.post(snapshot([1, 2]))
    assert (made.state.ready, made.state.refused) == (True, 1)
    assert made.called() == "prepare protect ready"


@pytest.mark.parametrize("call", ["apply", "dump", "ensure_devices"])
def test_call_that_fails_as_a_whole_is_followed_by_a_dump_that_heals(call: str) -> None:
    made = Agent()
    made.kernel.fail[call] = [errno.ENOBUFS, errno.ENOBUFS]
    with capture_logs() as logs:
        made.post(snapshot([1, 2]))
    assert made.state.trouble == str(KernelRefused(call, errno.ENOBUFS))
    assert (made.state.ready, made.kernel.entries()) == (False, set())
    assert [line["event"] for line in logs if line["log_level"] == "error"] == ["dataplane_refused"]
    made.later()
    made.later()
    made.assert_in_step(1, 2)
    assert (made.state.trouble, made.state.ready) == ("", True)


def test_batch_that_failed_half_way_is_finished_and_not_begun_again(agent: Agent) -> None:
    class Half(SteppedKernel):
        """Its socket fails in the middle of the first batch."""

        def apply(self, ops):  # type: ignore[no-untyped-def]
            if self.batches:
                return super().apply(ops)
            super().apply(ops[: len(ops) // 2])
            raise KernelRefused("netlink batch", errno.ENOBUFS)

    made = Agent(Half())
    made.post(snapshot([1, 2]))
    made.later()
    made.assert_in_step(1, 2)
    assert len(made.written()) == 8, "nothing is written twice"
    assert made.state.drift == 0


# --- the own lease ---


def test_own_lease_moved_withdraws_the_old_after_the_next_snapshot_and_not_before(agent: Agent) -> None:
    agent.post(MOVED)
    assert agent.kernel.entries() == agent.entries(*map(lease, (1, 2, 3)))
    assert not agent.state.ready
    assert agent.kernel.devices["flannel.1"].addresses == (Prefix.parse("10.0.201.0/32"),)
    assert agent.post(left(1, 301)) == [], "changes before the snapshot tell nothing of the whole"
    agent.post(snapshot([2, 3], revision=302, own=MOVED))
    agent.assert_in_step(2, 3)
    assert agent.state.ready
    assert [call.rsplit(" ", 1)[0] for call in agent.calls[3:]] == [
        f"{what} 10.0.201.0/24 1450" for what in ("prepare", "protect", "ready")
    ]


def test_peer_that_took_our_former_subnet_is_served_after_the_move(agent: Agent) -> None:
    agent.post(MOVED)
    heir = lease(200, host=7)
    agent.post(told(MOVED, heir, revision=302))
    assert agent.kernel.entries() == agent.entries(heir)


def test_own_lease_renewed_changes_nothing(agent: Agent) -> None:
    renewed = lease(200, revision=299)
    assert agent.post(renewed) == []
    assert agent.state.ready
    assert agent.called() == "prepare protect ready"


def test_own_lease_with_other_attributes_keeps_the_table_until_the_next_snapshot(agent: Agent) -> None:
    own = lease(200, host=199)
    assert {line.split()[1] for line in agent.post(own)} == {"neighbour"}, "which go with the MAC"
    agent.assert_in_step(1, 2, 3)
    assert agent.state.ready, "the new MAC is the device's by now, and the plan announced"
    assert agent.kernel.devices["flannel.1"].mac == mac(199)
    thief = lease(4, host=199, revision=301)._replace(create_revision=301)
    agent.post(joined(lease(5), 301), left(1, 302), joined(thief, 303))
    assert agent.kernel.entries() == agent.entries(lease(2), lease(3), lease(5), thief), "by what it was before"
    agent.post(told(own, *map(lease, (2, 3, 5)), thief, revision=304))
    agent.assert_in_step(2, 3, 5)
    assert agent.state.rejected == 1


# --- the underlay ---


def test_other_address_of_the_underlay_changes_the_device_in_place_and_renews_its_fdb(agent: Agent) -> None:
    index = agent.kernel.tunnels[V4]
    moved = dataclasses.replace(UNDERLAY, name="eth1", index=3, addresses=(pack_address("172.30.0.199"),))
    with capture_logs() as logs:
        written = agent.post(moved)
    # They remember the address that packets came from; nothing else does.
    assert [each.split()[:2] for each in written] == [["put", "fdb"]] * 3
    agent.assert_in_step(1, 2, 3)
    found = agent.kernel.devices["flannel.1"]
    assert (found.index, found.link, found.local) == (index, 3, pack_address("172.30.0.199"))
    assert [(line["event"], line.get("changes")) for line in logs] == [
        ("device_set", ["link", "local"]),
        ("reconciled", None),
    ]
    assert agent.called(3) == "prepare protect ready"


def test_other_mtu_of_the_underlay_changes_the_device_and_the_routes_to_peers_of_another(agent: Agent) -> None:
    assert agent.post(joined(lease(4, mtu=1450), 301))[-1].endswith("nhid 1862272000")
    wide = dataclasses.replace(UNDERLAY, mtu=9000)
    assert agent.post(wide) == ["put route 10.0.4.0/24 nhid 1862272000 mtu 1450"]
    assert agent.kernel.devices["flannel.1"].mtu == 8950
    assert agent.calls[-1].startswith("ready 10.0.200.0/24 8950")
    assert agent.post(UNDERLAY) == ["put route 10.0.4.0/24 nhid 1862272000"]
    agent.assert_in_step(1, 2, 3, 4)
    assert agent.kernel.devices["flannel.1"].mtu == 1450


def dual(underlay: Underlay = BOTH, listed: bool = False) -> Agent:
    """An agent of a dual-stack network, with two such peers, and one that has IPv4 alone below."""
    made = Agent(
        underlay=underlay, config=DUAL, own=lease(200, families="46" if underlay is BOTH else "4"), listed=listed
    )
    made.post(told(*DUAL_PEERS))
    return made


IPV4_BELOW = lease(3, families="46")._replace(attrs=lease(3).attrs)
DUAL_PEERS = (lease(1, families="46"), lease(2, families="46"), IPV4_BELOW)


def test_dual_stack_peers_are_reached_over_two_devices() -> None:
    made = dual(listed=True)
    assert made.kernel.entries() == made.entries(*DUAL_PEERS)
    assert set(made.kernel.devices) == {"flannel.1", "flannel-v6.1"}
    assert {len(entry.address) for entry in made.kernel.guards} == {4, 16}
    assert (made.state.ready, made.state.peers, made.state.unreachable) == (True, 3, 0)


@pytest.mark.parametrize("name", ["flannel.1", "flannel-v6.1"])
@pytest.mark.parametrize("harm", ["delete_device", "set_down"])
def test_either_device_is_mended_with_all_that_was_on_it(name: str, harm: str) -> None:
    made = dual()
    getattr(made.kernel, harm)(name)
    made.settle()
    assert made.kernel.entries() == made.entries(*DUAL_PEERS)
    assert (made.state.gap, made.settle()) == (0, HEARTBEAT)


def test_underlay_that_gains_and_loses_a_family_gets_its_device_and_leaves_none_behind() -> None:
    made = dual(dataclasses.replace(BOTH, addresses=(LOCAL,)))
    assert set(made.kernel.devices) == {"flannel.1"}
    assert made.kernel.entries() == made.entries(*DUAL_PEERS)
    both = lease(200, families="46")
    # The address comes before the lease that states it; what its device carries is worked out with that.
    made.post(BOTH)
    assert set(made.kernel.devices) == {"flannel.1"}
    made.underlay = BOTH
    made.post(both, told(both, *DUAL_PEERS, revision=301))
    assert set(made.kernel.devices) == {"flannel.1", "flannel-v6.1"}
    assert made.kernel.entries() == made.entries(*DUAL_PEERS)
    with capture_logs() as logs:
        made.post(dataclasses.replace(BOTH, addresses=(LOCAL,)))
    made.underlay = dataclasses.replace(BOTH, addresses=(LOCAL,))
    assert set(made.kernel.devices) == {"flannel.1"}
    assert made.kernel.entries() == made.entries(*DUAL_PEERS)
    assert [line["event"] for line in logs] == ["device_set", "reconciled", "device_removed"]
    assert logs[1]["refused"] == 0
    assert logs[-1] == {
        "event": "device_removed", "log_level": "info", "device": "flannel-v6.1",
        "reason": "the network configuration does not call for it",
    }  # fmt: skip


def test_device_that_is_not_called_for_goes_once_nothing_is_refused_or_it_takes_too_long() -> None:
    made = dual()
    made.underlay = dataclasses.replace(BOTH, addresses=(LOCAL,))
    # What the old device reaches may be reached by nothing else yet.
    made.kernel.refuse[DUAL_PEERS[0].subnets[1]] = errno.EINVAL
    made.post(made.underlay)
    while made.later() < RETRY_MOST:
        assert set(made.kernel.devices) == {"flannel.1", "flannel-v6.1"}
    made.later()
    assert set(made.kernel.devices) == {"flannel.1"}


# --- other backends ---


def backend(text: str) -> NetworkConfig:
    return NetworkConfig.parse(f'{{"Network":"10.0.0.0/8","Backend":{{{text}}}}}'.encode())


def test_hosts_on_the_link_are_routed_to_and_those_behind_a_router_are_said_to_be_unreachable_once() -> None:
    config, own = backend('"Type":"host-gw"'), lease(200, backend="host-gw")
    made = Agent(config=config, own=own)
    beyond = [lease(number, backend="host-gw") for number in (8, 9)]
    beyond = [
        each._replace(attrs=each.attrs._replace(public_ip=bytes((172, 31, 0, each.subnets[0].base[2]))))
        for each in beyond
    ]
    near = lease(1, backend="host-gw")
    with capture_logs() as logs:
        made.post(told(own, near, *beyond))
        made.later()
        made.post(joined(lease(2, backend="host-gw"), 301))
    assert made.kernel.devices == {} and made.kernel.link == 2
    assert made.kernel.entries() == made.entries(near, lease(2, backend="host-gw"))
    assert {type(entry) for entry in made.kernel.entries()} == {NextHop, Route}
    assert (made.state.peers, made.state.unreachable, made.state.ready) == (2, 2, True)
    (said,) = (line for line in logs if line["event"] == "peers_unreachable")
    assert (said["peers"], said["reason"]) == (["10.0.8.0-24", "10.0.9.0-24"], "on no link of this host")
    made.post(left(8, 302))
    assert made.state.unreachable == 1
    made.post(told(own, revision=303))
    assert (made.state.unreachable, made.kernel.entries()) == (0, set())


def test_route_of_ours_on_the_link_is_mended(agent: Agent) -> None:
    own = lease(200, backend="host-gw")
    made = Agent(config=backend('"Type":"host-gw"'), own=own)
    made.post(told(own, lease(1, backend="host-gw")))
    wanted = made.kernel.entries()
    for entry in sorted(wanted, key=repr):
        made.kernel.stranger.apply([Drop(entry)])
        made.settle()
        assert made.kernel.entries() == wanted
    again = Agent(made.kernel, config=backend('"Type":"host-gw"'), own=own)
    assert again.post(told(own)) == ["drop route 10.0.1.0/24 nhid 1862271232", "drop nexthop 1862271232 via 172.30.0.1"]


def test_allocation_alone_leaves_the_dataplane_to_others() -> None:
    own = lease(200, backend="alloc")
    made = Agent(config=backend('"Type":"alloc"'), own=own)
    theirs = Route(lease(1).subnets[0], gateway=pack_address("172.30.0.1"), device=2, protocol=PROTOCOL_BOOT)
    made.kernel.stranger.apply([Put(theirs)])
    assert made.post(told(own, lease(1, backend="alloc"))) == []
    assert made.kernel.entries() == {theirs}
    assert (made.state.ready, made.state.unreachable, made.kernel.devices) == (True, 0, {})
    assert made.called() == "prepare protect ready"


def test_direct_routing_is_switched_on_and_off_while_running(agent: Agent) -> None:
    direct = backend('"Type":"vxlan","DirectRouting":true')
    agent.post(direct)
    agent.config = direct
    agent.assert_in_step(1, 2, 3)
    assert {hop.device for hop in agent.kernel.nexthops.values()} == {2}
    agent.post(CONFIG)
    agent.config = CONFIG
    agent.assert_in_step(1, 2, 3)
    assert {hop.device for hop in agent.kernel.nexthops.values()} == {agent.kernel.tunnels[V4]}


# --- the firewall ---


def test_hosts_are_let_in_before_they_are_reached_and_kept_out_after() -> None:
    made = Agent(listed=True)
    made.post(snapshot([1]))
    assert [line.split()[1] for line in made.written()] == ["guard", "fdb", "neighbour", "nexthop", "route"]
    assert [line.split()[1] for line in made.post(left(1, 301))] == ["route", "nexthop", "neighbour", "fdb", "guard"]


def test_firewall_that_somebody_altered_is_made_anew_before_its_elements() -> None:
    made = Agent(listed=True)
    made.post(snapshot([1, 2]))
    before = len(made.kernel.batches), len(made.calls)
    made.kernel.alter_firewall()
    made.settle()
    made.assert_in_step(1, 2)
    assert made.written(before[0]) == ["put guard 172.30.0.1", "put guard 172.30.0.2"]
    assert made.called(before[1]) == "prepare protect"
    assert [call.split()[-1] for call in made.calls[before[1] :]] == ["8", "10"], "around the elements"
    assert made.state.drift == 2


def test_guard_that_somebody_added_or_removed_is_put_right() -> None:
    made = Agent(listed=True)
    made.post(snapshot([1]))
    ours, strange = Guard(pack_address("172.30.0.1")), Guard(pack_address("172.30.0.99"))
    made.kernel.stranger.apply([Put(strange), Drop(ours)])
    made.settle()
    made.assert_in_step(1)
    assert made.state.drift == 1


# --- threads ---


def test_loop_in_its_own_thread_takes_facts_and_stops_leaving_all_in_place() -> None:
    kernel = FakeKernel()
    ready = threading.Event()
    ticks = itertools.count(1)
    reconciler = Reconciler(
        kernel, CONFIG, UNDERLAY, OWN,
        prepare=lambda plan: None, protect=lambda plan: None, on_ready=lambda plan: ready.set(),
        clock=lambda: float(next(ticks)),
    )  # fmt: skip
    thread = threading.Thread(target=reconciler.run)
    thread.start()
    try:
        reconciler.post(snapshot([1, 2, 3]))
        assert ready.wait(30)
    finally:
        reconciler.post(Stop())
        thread.join(30)
    assert not thread.is_alive()
    assert len(kernel.entries()) == 12


# --- stores that went back, and configurations that change ---


def test_peers_that_a_replaced_store_does_not_have_are_kept_for_a_while(agent: Agent) -> None:
    with capture_logs() as logs:
        assert agent.post(told(OWN, lease(2), revision=5)._replace(cluster_id=2)) == []
    assert [line["event"] for line in logs] == ["store_went_back"]
    agent.assert_in_step(1, 2, 3)
    agent.post(joined(lease(1), 6))
    for _ in range(int(LINGER)):
        agent.later()
    agent.assert_in_step(1, 2)


def test_peers_that_all_return_end_the_wait(agent: Agent) -> None:
    agent.post(told(OWN, lease(2), lease(3), revision=5)._replace(cluster_id=2))
    agent.post(joined(lease(1), 6))
    for _ in range(int(LINGER)):
        agent.later()
    agent.assert_in_step(1, 2, 3)


def test_mtu_of_the_configuration_is_taken_over(agent: Agent) -> None:
    before = len(agent.calls)
    smaller = dataclasses.replace(CONFIG, backend=dataclasses.replace(CONFIG.backend, mtu=1400))
    assert agent.post(smaller) == [], "no entry is touched"
    assert agent.kernel.devices["flannel.1"].mtu == 1400
    assert agent.called(before) == "prepare protect ready"


def test_survey_is_answered_with_the_accepted_leases(agent: Agent) -> None:
    census = agent.asked(agent.reconciler.survey)
    assert {each.subnet for each in census.leases} == {lease(number).subnet for number in (1, 2, 3)}
    assert (census.revision, census.cluster) == (agent.state.revision, 1)
    assert {entry for each in census.leases for entry in census.entries(each)} == set(agent.kernel.entries())
    assert census.tunnels == agent.kernel.tunnels


def test_question_that_is_not_answered_in_time_has_no_answer(agent: Agent) -> None:
    assert agent.reconciler.survey(0.01) is None


def test_inspection_tells_what_each_peer_calls_for_and_what_is_amiss(agent: Agent) -> None:
    found = agent.asked(agent.reconciler.inspect)
    assert [key for key, _ in found.peers] == [lease(number).key for number in (1, 2, 3)]
    assert set().union(*found.wanted.values()) == set(agent.kernel.entries())
    assert (found.gap, found.missing, found.refused, found.rejected, found.unreachable) == ({}, 0, {}, [], set())
    assert found.last_change is not None and found.last_change.put == len(agent.kernel.entries())
    assert found.plan == agent.reconciler.plan and found.state.entries == agent.state.entries
    assert found.routes and found.nexthops


def test_inspection_tells_when_a_lease_changed_since_the_start(agent: Agent) -> None:
    before = agent.state.beat
    agent.post(joined(lease(4), 400))
    timeline = agent.asked(agent.reconciler.inspect).timeline
    when = timeline.when(400)
    assert when is not None and before < when < agent.state.beat
    assert timeline.when(lease(1).mod_revision) is None


def test_some_peers_are_told_with_what_they_call_for_and_no_others(agent: Agent) -> None:
    keys = (lease(1).key, lease(3).key, "10.0.99.0-24")

    def choose(table: LeaseTable) -> tuple[str, ...]:
        assert table.places == 3
        return keys

    some = agent.asked(partial(agent.reconciler.some, choose))
    assert {key: each.subnet for key, (each, _) in some.leases.items()} == {
        key: lease(number).subnet for key, number in zip(keys, (1, 3), strict=False)
    }
    entries = {entry for _, each in some.leases.values() for entry in each}
    assert entries < set(agent.kernel.entries())
    assert all(agent.reconciler.wants(entry[0]) for entry in entries)
    assert not agent.reconciler.wants((1, b"nobody"))
    assert (some.here.tunnels, some.port) == (agent.kernel.tunnels, CONFIG.backend.port)


def test_rejected_leases_are_told_with_their_reasons_and_not_twice(agent: Agent) -> None:
    garbage = Record("x" * 1000, b"{}", 1, 400, 400)
    rival = record(lease(4, host=3, revision=401)._replace(attrs=lease(9).attrs._replace(vtep=Vtep(1, mac(3)))))
    with capture_logs() as logs:
        agent.post(Changes((garbage,), 400), Changes((rival,), 401))
        agent.later()
    (line,) = (line for line in logs if line["event"] == "leases_rejected")
    assert line["rejected"] == 2
    assert [len(reason.partition(":")[0]) for reason in line["reasons"]] == [64, len("10.0.4.0-24")]
    assert "has longer been" in line["reasons"][1]


# --- the journal ---


def test_the_journal_hears_of_every_key_first_and_then_of_those_that_turn() -> None:
    made = Agent()
    made.post(Snapshot((*map(record, (OWN, lease(1))), Record("10.0.2.0-24", b"", 1, 5, 5)), 300, 1))
    assert made.news == [Table({OWN.key: OWN, lease(1).key: lease(1), "10.0.2.0-24": "the value is not JSON"})]
    made.news.clear()
    made.post(joined(lease(3), 301), left(1, 302), joined(OWN, 303))
    # Of one pass once, as the keys stand at its end.
    assert made.news == [Turns({lease(3).key: lease(3), lease(1).key: None, OWN.key: OWN})]
    made.news.clear()
    made.post(MOVED)
    assert made.news == []
    made.post(snapshot([3], 304))
    (told,) = made.news
    assert isinstance(told, Table) and told.standings[MOVED.key] == MOVED


def test_the_journal_hears_what_drifted_and_what_became_of_it(agent: Agent) -> None:
    route = next(entry for entry in agent.entries(lease(1)) if isinstance(entry, Route))
    agent.news.clear()
    agent.kernel.stranger.apply([Drop(route)])
    agent.settle()
    drift, repaired = agent.news
    assert isinstance(drift, Event) and (drift.kind, drift.facts["entry"], drift.facts["found"]) == (
        "drift", str(route), "nothing",
    )  # fmt: skip
    assert repaired == Event("repaired", {"entries": 1, "refused": 0})


def test_the_journal_hears_of_a_refusal_once_while_it_lasts(agent: Agent) -> None:
    route = next(entry for entry in agent.entries(lease(4)) if isinstance(entry, Route))
    agent.kernel.refuse[route.destination] = errno.ENOMEM
    agent.post(joined(lease(4), 301))
    agent.later()
    told = [news for news in agent.news if isinstance(news, Event)]
    assert told == [Event("refused", {"entry": str(route), "errno": "ENOMEM"})]


def test_of_many_drifted_entries_the_journal_hears_some_and_how_many_more() -> None:
    made = Agent()
    numbers = range(1, TOLD + 10)
    made.post(snapshot(numbers))
    made.news.clear()
    made.kernel.stranger.apply([Drop(e) for n in numbers for e in made.entries(lease(n)) if isinstance(e, Fdb)])
    made.settle()
    drifts = [news for news in made.news if isinstance(news, Event) and news.kind == "drift"]
    assert len(drifts) == TOLD + 1
    assert drifts[-1].facts["more"] == 9
