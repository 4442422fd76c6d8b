"""The tracker over a model kernel: whatever happens to either, the gap closes, in order, and nobody else is harmed."""

import errno

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overlay.desired import Local, entries_for, ours
from overlay.device import DeviceSpec
from overlay.model import (
    BUILD_ORDER,
    NEXTHOP_BASE,
    PROTOCOL_BOOT,
    Drop,
    Entry,
    Fdb,
    Gone,
    Neighbour,
    NextHop,
    Put,
    Refusal,
    Route,
)
from overlay.tracker import Drift, Tracker
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, pack_address
from tests.fake_dataplane import FakeKernel

NETWORK = Prefix.parse("10.0.0.0/8")
SPEC = DeviceSpec(
    "flannel.1", 1, 8472, 2, pack_address("172.30.0.5"), b"\x02\0\0\0\0\xff", 1450, Prefix.parse("10.0.0.0/32")
)
DEVICE = 7
"""The index that the model kernel gives its first device."""


def mac(host: int) -> bytes:
    return b"\x02\0\0\0\0" + bytes([host])


def lease(subnet: int, host: int) -> Lease:
    """Subnet number `subnet`, held by host number `host`."""
    attrs = LeaseAttrs(pack_address(f"172.30.1.{host}"), "vxlan", Vtep(1, mac(host)))
    return Lease(Prefix.parse(f"10.0.{subnet}.0/24"), None, attrs, 1, 1, 1)


def peer(subnet: int, host: int | None = None, *, nexthops: bool = True) -> tuple[Entry, ...]:
    """The entries of that lease, in build order."""
    return entries_for(lease(subnet, subnet if host is None else host), Local(NETWORK, DEVICE, nexthops))


def tracker() -> Tracker:
    return Tracker(lambda entry: ours(entry, Local(NETWORK, DEVICE, True)))


def converged(*subnets: int) -> Tracker:
    """A tracker all of whose entries are in place."""
    made = tracker()
    for subnet in subnets:
        made.want(str(subnet), peer(subnet))
    made.settle([])
    assert made.pending() == []
    return made


def all_refused(made: Tracker, code: int) -> list[Refusal]:
    return [Refusal(op, code) for op in made.pending()]


# --- the gap ---


def test_new_peer_is_put_in_build_order() -> None:
    made = tracker()
    made.want("1", peer(1))
    assert made.pending() == [Put(entry) for entry in peer(1)]


def test_peers_of_one_batch_are_put_rank_by_rank() -> None:
    made = tracker()
    for subnet in (1, 2, 3):
        made.want(str(subnet), peer(subnet))
    assert [type(op.entry) for op in made.pending()] == [kind for kind in BUILD_ORDER for _ in range(3)]


def test_departed_peer_is_dropped_in_reverse_order() -> None:
    made = converged(1)
    made.want("1", ())
    assert made.pending() == [Drop(entry) for entry in reversed(peer(1))]


def test_returning_peer_with_new_mac_gets_its_fdb_entry_first_and_loses_the_old_last() -> None:
    made = converged(1)
    made.want("1", peer(1, host=9))
    fdb, neighbour, *_ = peer(1, host=9)
    assert made.pending() == [Put(fdb), Put(neighbour), Drop(peer(1)[0])]


def test_wanting_the_same_again_writes_nothing() -> None:
    made = converged(1)
    made.want("1", peer(1))
    assert made.pending() == []
    made.want("unknown", ())
    assert made.owners == {"1"}


def test_peer_that_leaves_before_it_was_written_is_never_written() -> None:
    made = tracker()
    made.want("1", peer(1))
    made.want("1", ())
    assert (made.pending(), made.wanted, made.gap) == ([], 0, 0)


def test_numbers_for_people_are_right() -> None:
    made = tracker()
    made.want("1", peer(1))
    assert (made.wanted, made.gap, len(made.refused)) == (4, 4, 0)
    made.settle([])
    assert (made.wanted, made.gap) == (4, 0)


# --- shared entries ---


def test_shared_entry_stays_until_the_last_owner_lets_go() -> None:
    made = tracker()
    for subnet in (1, 2, 3):
        made.want(str(subnet), peer(subnet, host=5))
    made.settle([])
    fdb = peer(1, host=5)[0]
    made.want("1", ())
    made.want("2", ())
    assert fdb not in [op.entry for op in made.pending()]
    made.want("3", ())
    assert made.pending()[-1] == Drop(fdb)
    assert made.wanted == 0


def test_owner_may_change_all_but_what_it_shares() -> None:
    made = tracker()
    made.want("1", peer(1, host=5))
    made.want("2", peer(2, host=5))
    made.settle([])
    made.want("1", peer(1, host=6))
    assert {op.entry for op in made.pending()} == {*peer(1, host=6)[:2]}


# --- refusals ---


def test_refused_entry_stays_pending_and_stops_nothing_else() -> None:
    made = tracker()
    made.want("1", peer(1))
    made.want("2", peer(2))
    bad = peer(1)[3]
    refusal = Refusal(Put(bad), errno.EINVAL)
    made.settle([refusal])
    assert made.refused == {bad[0]: refusal}
    assert made.pending() == [Put(bad)]
    made.settle([])
    assert (dict(made.refused), made.gap) == ({}, 0)


def test_refused_drop_is_tried_again() -> None:
    made = converged(1)
    made.want("1", ())
    made.settle(all_refused(made, errno.EBUSY))
    assert made.pending() == [Drop(entry) for entry in reversed(peer(1))]


def test_refusal_is_forgotten_when_the_peer_leaves() -> None:
    made = tracker()
    made.want("1", peer(1))
    made.settle(all_refused(made, errno.EINVAL))
    made.want("1", ())
    assert (made.pending(), dict(made.refused)) == ([], {})


def test_dump_forgets_refusals_and_keeps_the_gap() -> None:
    made = tracker()
    made.want("1", peer(1))
    made.settle(all_refused(made, errno.EINVAL))
    made.saw_all([])
    assert (dict(made.refused), made.gap) == ({}, 4)


# --- drift ---


def test_entry_removed_by_somebody_is_drift_and_put_again() -> None:
    for entry in peer(1):
        made = converged(1)
        drifts = made.saw([Gone(entry)])
        assert drifts[0] == Drift(entry, None)
        assert Put(entry) in made.pending()


def test_nexthop_removed_by_somebody_takes_its_route_along_which_nobody_says() -> None:
    made = converged(1, 2)
    *_, hop, route = peer(1)
    assert made.saw([Gone(hop)]) == [Drift(hop, None), Drift(route, None)]
    assert made.pending() == [Put(hop), Put(route)]


def test_nexthop_removed_and_made_again_by_somebody_still_lacks_its_route() -> None:
    made = converged(1)
    *_, hop, route = peer(1)
    assert made.saw([Gone(hop), hop]) == [Drift(route, None)]
    assert made.pending() == [Put(route)]


def test_nexthop_and_route_removed_and_made_again_by_somebody_is_nothing() -> None:
    made = converged(1)
    *_, hop, route = peer(1)
    assert made.saw([Gone(hop), hop, route]) == []
    assert made.saw([Gone(hop), hop, route, Gone(hop)]) == [Drift(hop, None), Drift(route, None)]


def test_route_moved_to_another_nexthop_outlives_the_one_it_stood_on() -> None:
    made = converged(1, 2, 3)
    *_, first_hop, first_route = peer(1)
    *_, hop, route = peer(2)
    moved = Route(lease(2, 2).subnet, nexthop=NEXTHOP_BASE + 3 * 256)
    drifts = made.saw([Gone(first_hop), moved, Gone(hop)])
    assert drifts == [Drift(first_hop, None), Drift(first_route, None), Drift(route, moved), Drift(hop, None)]


def test_altered_entries_are_drift_and_put_again() -> None:
    fdb, neighbour, hop, route = peer(1)
    assert isinstance(neighbour, Neighbour) and isinstance(hop, NextHop)
    for entry, altered in (
        (neighbour, Neighbour(neighbour.address, mac(8))),
        (neighbour, Neighbour(neighbour.address, neighbour.mac, 4)),
        (hop, NextHop(hop.id, pack_address("10.0.8.0"), DEVICE)),
        (route, Route(Prefix.parse("10.0.1.0/24"), nexthop=hop.id + 256)),
    ):
        made = converged(1)
        assert made.saw([altered]) == [Drift(entry, altered)]
        assert made.pending() == [Put(entry)]
    made = converged(1)
    assert made.saw([Fdb(mac(1), pack_address("172.30.9.9"))]) == [Drift(fdb, Fdb(mac(1), b""))]
    assert made.pending() == [Put(fdb, afresh=True)]


def test_strangers_route_and_one_with_metrics_are_removed_before_ours_is_put() -> None:
    route = peer(1)[3]
    for altered in (
        Route(Prefix.parse("10.0.1.0/24"), gateway=b"\x0a\0\0\x01", device=3, protocol=PROTOCOL_BOOT),
        Route(Prefix.parse("10.0.1.0/24"), device=DEVICE),
    ):
        made = converged(1)
        made.saw([altered])
        assert made.pending() == [Put(route, afresh=True)]


def test_our_own_plain_route_is_replaced_in_place() -> None:
    made = tracker()
    made.saw_all([peer(1, nexthops=False)[2]])
    made.want("1", peer(1))
    assert made.pending()[-1] == Put(peer(1)[3])


def test_drift_is_reported_once() -> None:
    made = converged(1)
    neighbour = peer(1)[1]
    assert made.saw([Gone(neighbour)]) == [Drift(neighbour, None)]
    assert made.saw([Gone(neighbour)]) == []
    assert made.saw_all([entry for entry in peer(1) if entry != neighbour]) == []


def test_echo_of_what_we_wrote_is_no_drift() -> None:
    made = converged(1)
    assert made.saw(peer(1)) == []
    assert made.saw([Gone(peer(1)[0]), peer(1)[0]]) == [], "made afresh: the last sight counts"
    made.want("1", ())
    made.settle([])
    assert made.saw([Gone(entry) for entry in peer(1)]) == []
    assert made.pending() == []


def test_entry_of_a_stranger_on_our_device_is_removed_if_it_bears_our_mark() -> None:
    made = converged(1)
    assert made.saw([Fdb(mac(9), pack_address("172.30.9.9")), Neighbour(pack_address("10.0.9.0"), mac(9))]) == []
    assert [type(op) for op in made.pending()] == [Drop, Drop]


def test_entries_without_our_mark_are_not_remembered() -> None:
    made = converged(1)
    strange: list[Entry] = [
        Neighbour(pack_address("10.0.9.0"), mac(9), 2),
        NextHop(5, pack_address("10.0.9.0"), DEVICE),
        Route(Prefix.parse("192.0.2.0/24"), gateway=b"\x0a\0\0\x01", device=3, protocol=4),
    ]
    assert made.saw(strange) == []
    assert made.saw_all([*peer(1), *strange]) == []
    assert made.pending() == []


def test_entry_that_loses_our_mark_is_not_ours_any_more() -> None:
    made = tracker()
    made.saw([Neighbour(pack_address("10.0.9.0"), mac(9))])
    assert made.gap == 1
    made.saw([Neighbour(pack_address("10.0.9.0"), mac(9), 4)])
    assert (made.gap, made.pending()) == (0, [])


# --- dumps ---


def test_dump_that_shows_what_is_wanted_leaves_nothing_to_do() -> None:
    made = tracker()
    made.want("1", peer(1))
    assert made.saw_all(list(peer(1))) == []
    assert made.pending() == []


def test_dump_reports_what_is_not_as_it_was_left() -> None:
    made = converged(1, 2)
    fdb, _, _, route = peer(1)
    there = [entry for entry in (*peer(1), *peer(2)) if entry not in (fdb, route)]
    other = Route(Prefix.parse("10.0.1.0/24"), gateway=b"\x0a\0\1\0", device=DEVICE, protocol=PROTOCOL_BOOT)
    assert made.saw_all([*there, other]) == [Drift(fdb, None), Drift(route, other)]
    assert made.pending() == [Put(fdb), Put(route, afresh=True)]


def test_dump_with_two_remotes_for_a_mac_calls_for_the_entry_afresh() -> None:
    made = converged(1)
    fdb = peer(1)[0]
    made.saw_all([*peer(1), Fdb(mac(1), pack_address("172.30.9.9"))])
    assert made.pending() == [Put(fdb, afresh=True)]


def test_of_two_routes_to_one_destination_the_first_in_a_dump_is_in_force() -> None:
    route = peer(1)[3]
    other = Route(Prefix.parse("10.0.1.0/24"), gateway=b"\x0a\0\1\0", device=DEVICE, protocol=PROTOCOL_BOOT)
    made = converged(1)
    assert made.saw_all([*peer(1), other]) == []
    assert made.saw_all([*peer(1)[:3], other, route]) == [Drift(route, other)]


def test_restart_drops_what_is_ours_and_nobody_wants_any_more() -> None:
    made = tracker()
    left_by_flannel = Route(Prefix.parse("10.0.9.0/24"), gateway=b"\x0a\0\x09\0", device=DEVICE, protocol=PROTOCOL_BOOT)
    made.saw_all([*peer(1), *peer(8), left_by_flannel])
    made.want("1", peer(1))
    assert {op.entry for op in made.pending()} == {*peer(8), left_by_flannel}
    assert all(isinstance(op, Drop) for op in made.pending())


# --- any sequence of events ---

SUBNETS = st.integers(1, 4)
HOSTS = st.integers(1, 3)


def strange_entries() -> st.SearchStrategy[Entry]:
    """What other programs write: under keys of ours or beside them."""
    gateway = st.sampled_from([b"\x0a\0\x01\0", b"\x0a\0\x07\0"])
    destination = st.integers(1, 6).map(lambda number: Prefix.parse(f"10.0.{number}.0/24"))
    hop_ids = st.integers(1, 6).map(lambda number: NEXTHOP_BASE + 256 * number)
    return st.one_of(
        st.builds(Fdb, HOSTS.map(mac), st.sampled_from([b"\xac\x1e\x01\x01", b"\xac\x1e\x09\x09"])),
        st.builds(Neighbour, destination.map(lambda p: p.base), HOSTS.map(mac), st.sampled_from([0x80, 0x40, 4])),
        st.builds(NextHop, st.one_of(hop_ids, st.just(5)), gateway, st.just(DEVICE), st.sampled_from([0, 111])),
        st.builds(Route, destination, hop_ids, protocol=st.sampled_from([3, 4, 111])),
        st.builds(
            Route, destination, st.just(0), gateway, st.just(DEVICE), st.sampled_from([3, 4, 111]), st.sampled_from([1])
        ),
    )


class TrackerOverKernel(RuleBasedStateMachine):
    """The reconciler's loop, a kernel that others write to as well, and a monitor that is easily overrun."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = FakeKernel(capacity=9)
        self.kernel.ensure_device(SPEC)
        assert self.kernel.device == DEVICE
        self.local = Local(NETWORK, DEVICE, True)
        self.tracker = Tracker(lambda entry: ours(entry, self.local))
        self.wanted: dict[str, tuple[Entry, ...]] = {}

    # What we want.

    @rule(subnet=SUBNETS, host=HOSTS)
    def lease_comes_or_changes(self, subnet: int, host: int) -> None:
        self.wanted[str(subnet)] = entries = peer(subnet, host)
        self.tracker.want(str(subnet), entries)

    @rule(subnet=SUBNETS)
    def lease_goes(self, subnet: int) -> None:
        self.wanted.pop(str(subnet), None)
        self.tracker.want(str(subnet), ())

    # What happens to the kernel.

    @rule(entry=strange_entries())
    def stranger_puts(self, entry: Entry) -> None:
        self.kernel.stranger.apply([Put(entry)])

    @rule(entry=strange_entries())
    def stranger_drops(self, entry: Entry) -> None:
        self.kernel.stranger.apply([Drop(entry)])

    @precondition(lambda self: self.kernel.entries())
    @rule(data=st.data())
    def stranger_drops_what_is_there(self, data: st.DataObject) -> None:
        there = sorted(self.kernel.entries(), key=repr)
        self.kernel.stranger.apply([Drop(data.draw(st.sampled_from(there)))])

    @rule()
    def link_goes_down(self) -> None:
        self.kernel.set_down()

    @rule(data=st.data())
    def kernel_refuses(self, data: st.DataObject) -> None:
        wanted = sorted((e for entries in self.wanted.values() for e in entries), key=repr)
        for entry in data.draw(st.lists(st.sampled_from(wanted), max_size=3)) if wanted else []:
            self.kernel.refuse[entry[0]] = errno.ENOMEM

    @rule()
    def kernel_permits(self) -> None:
        self.kernel.refuse.clear()

    # The loop.

    @rule()
    def one_pass(self) -> None:
        self.look()
        self.write()

    @rule(entry=strange_entries(), there=st.booleans())
    def pass_in_a_race_with_a_stranger(self, entry: Entry, there: bool) -> None:
        self.look()
        self.kernel.stranger.apply([Put(entry) if there else Drop(entry)])
        self.write()

    @rule()
    def first_look_of_a_restarted_agent(self) -> None:
        self.kernel.observe()
        self.tracker = Tracker(lambda entry: ours(entry, self.local))
        for owner, entries in self.wanted.items():
            self.tracker.want(owner, entries)
        self.dump()

    @rule()
    def all_is_well_in_the_end(self) -> None:
        self.kernel.refuse.clear()
        for _ in range(4):
            self.one_pass()
        assert (self.tracker.gap, self.tracker.pending(), dict(self.tracker.refused)) == (0, [], {})
        seen = self.kernel.observe()
        assert self.tracker.saw(seen.sights) == []
        assert not self.tracker.pending()
        self.assert_kernel_is_right()
        # A dump tells nothing that was not known.
        assert self.dump() == []
        assert self.tracker.pending() == []

    def look(self) -> None:
        seen = self.kernel.observe()
        self.tracker.saw(seen.sights)
        if seen.lost or seen.device_changed:
            self.dump()

    def dump(self) -> list[Drift]:
        self.kernel.ensure_device(SPEC)
        return self.tracker.saw_all(self.kernel.dump(True))

    def write(self) -> None:
        ops = self.tracker.pending()
        kinds = [isinstance(op, Drop) for op in ops]
        assert kinds == sorted(kinds), "puts come before drops"
        ranks = [BUILD_ORDER.index(type(op.entry)) for op in ops]
        puts, drops = ranks[: kinds.count(False)], ranks[kinds.count(False) :]
        assert puts == sorted(puts)
        assert drops == sorted(drops, reverse=True)
        wanted = {entry[0]: entry for entries in self.wanted.values() for entry in entries}
        for op in ops:
            if isinstance(op, Put):
                assert op.entry == wanted[op.entry[0]]
            else:
                assert op.entry[0] not in wanted
                assert ours(op.entry, self.local), "what does not bear our mark is nobody's to remove"
        self.tracker.settle(self.kernel.apply(ops))

    def assert_kernel_is_right(self) -> None:
        wanted = {entry[0]: entry for entries in self.wanted.values() for entry in entries}
        there = {entry[0]: entry for entry in self.kernel.entries()}
        assert {key: there.get(key) for key in wanted} == wanted
        assert not [entry for key, entry in there.items() if key not in wanted and ours(entry, self.local)]

    @invariant()
    def numbers_agree(self) -> None:
        wanted = {entry[0] for entries in self.wanted.values() for entry in entries}
        assert self.tracker.wanted == len(wanted)
        assert set(self.tracker.owners) == set(self.wanted)
        assert len(self.tracker.pending()) == self.tracker.gap
        assert len(self.tracker.refused) <= self.tracker.gap


TrackerOverKernel.TestCase.settings = settings(max_examples=300, stateful_step_count=40)
TestTrackerOverKernel = TrackerOverKernel.TestCase
