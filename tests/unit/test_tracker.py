"""The tracker over a model kernel: whatever happens to either, the gap closes, in order, and nobody else is harmed."""

import errno
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from overlay.backends import V4, V6, Here, backend_of, ours
from overlay.device import DeviceSpec, Underlay
from overlay.model import (
    BUILD_ORDER,
    NEXTHOP_BASE,
    PROTOCOL,
    PROTOCOL_BOOT,
    Drop,
    Entry,
    Fdb,
    Gone,
    Guard,
    Neighbour,
    NextHop,
    Put,
    Refusal,
    Route,
)
from overlay.tracker import Drift, Tracker
from subnet_lease.model import Lease, LeaseAttrs, NetworkConfig, Prefix, Vtep, pack_address
from tests.fake_dataplane import FakeKernel

CONFIG = NetworkConfig.parse(
    b'{"Network":"10.0.0.0/8","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"vxlan"}}'
)
UNDERLAY = Underlay("eth0", 2, 1500, (pack_address("172.30.0.5"), pack_address("2001:db8::5")), (), (), "test")
DEVICE, DEVICE6 = 7, 8
"""The indexes that the model kernel gives its devices."""
SPECS = tuple(
    DeviceSpec(name, 1, 8472, 2, local, b"\2\0\0\0\0" + last, 1430, (Prefix.parse(address),))
    for name, local, last, address in (
        ("flannel.1", UNDERLAY.addresses[0], b"\xfe", "10.0.0.0/32"),
        ("flannel-v6.1", UNDERLAY.addresses[1], b"\xff", "fd00::/128"),
    )
)
HERE = replace(Here.of(CONFIG, UNDERLAY, 1430, nexthops=True, listed=True), tunnels={V4: DEVICE, V6: DEVICE6})
PLAIN = replace(HERE, nexthops=None)


def mac(host: int) -> bytes:
    return b"\x02\0\0\0\0" + bytes([host])


def lease(subnet: int, host: int, *, mtu: int = 0, ipv4: bool = True, ipv6: bool = False) -> Lease:
    """Subnet number `subnet`, held by host number `host`."""
    attrs = LeaseAttrs(
        pack_address(f"172.30.1.{host}"), "vxlan", Vtep(1, mac(host)),
        pack_address(f"2001:db8::1:{host:x}"), Vtep(1, mac(host + 16)), mtu,
    )  # fmt: skip
    base, base6 = (Prefix.parse(text) for text in (f"10.0.{subnet}.0/24", f"fd00:0:0:{subnet:x}::/64"))
    return Lease(base if ipv4 else None, base6 if ipv6 else None, attrs, 1, 1, 1)


def peer(
    subnet: int, host: int | None = None, *, here: Here = HERE, mtu: int = 0, ipv4: bool = True, ipv6: bool = False
) -> tuple[Entry, ...]:
    """The entries of that lease: in build order, if it is of one address family."""
    backend = backend_of(CONFIG)
    own = subnet if host is None else host
    return backend.entries(lease(subnet, own, mtu=mtu, ipv4=ipv4, ipv6=ipv6), here)


def tracker() -> Tracker:
    return Tracker(lambda entry: ours(entry, HERE))


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
    guard, fdb, neighbour, *_ = peer(1, host=9)
    assert made.pending() == [Put(guard), Put(fdb), Put(neighbour), Drop(peer(1)[1]), Drop(peer(1)[0])]


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
    assert (made.wanted, made.gap, len(made.refused)) == (5, 5, 0)
    made.settle([])
    assert (made.wanted, made.gap) == (5, 0)


# --- shared entries ---


def test_shared_entry_stays_until_the_last_owner_lets_go() -> None:
    made = tracker()
    for subnet in (1, 2, 3):
        made.want(str(subnet), peer(subnet, host=5))
    made.settle([])
    shared = peer(1, host=5)[:2]
    assert [type(entry) for entry in shared] == [Guard, Fdb]
    made.want("1", ())
    made.want("2", ())
    assert not set(shared) & {op.entry for op in made.pending()}
    made.want("3", ())
    assert made.pending()[-2:] == [Drop(entry) for entry in reversed(shared)]
    assert made.wanted == 0


def test_owner_may_change_all_but_what_it_shares() -> None:
    made = tracker()
    made.want("1", peer(1, host=5))
    made.want("2", peer(2, host=5))
    made.settle([])
    made.want("1", peer(1, host=6))
    assert {op.entry for op in made.pending()} == {*peer(1, host=6)[:3]}


# --- refusals ---


def test_refused_entry_stays_pending_and_stops_nothing_else() -> None:
    made = tracker()
    made.want("1", peer(1))
    made.want("2", peer(2))
    hop, route = peer(1)[3:]
    refusals = [Refusal(Put(bad), errno.EINVAL) for bad in (hop, route)]
    made.settle(refusals)
    assert made.refused == {hop[0]: refusals[0], route[0]: refusals[1]}
    assert made.pending() == [Put(hop), Put(route, afresh=True)], "something unseen may be in a route's way"
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
    assert (dict(made.refused), made.gap) == ({}, 5)


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
    _, fdb, neighbour, hop, route = peer(1)
    assert isinstance(neighbour, Neighbour) and isinstance(hop, NextHop)
    for entry, altered in (
        (neighbour, Neighbour(neighbour.at, mac(8))),
        (neighbour, Neighbour(neighbour.at, neighbour.mac, 4)),
        (hop, NextHop(hop.id, pack_address("10.0.8.0"), DEVICE)),
        (route, Route(Prefix.parse("10.0.1.0/24"), nexthop=hop.id + 256)),
    ):
        made = converged(1)
        assert made.saw([altered]) == [Drift(entry, altered)]
        assert made.pending() == [Put(entry)]
    made = converged(1)
    at = DEVICE, mac(1)
    assert made.saw([Fdb(at, pack_address("172.30.9.9"))]) == [Drift(fdb, Fdb(at, b""))]
    assert made.pending() == [Put(fdb, afresh=True)]


HOP = NEXTHOP_BASE + 256
SUBNET, SUBNET6 = Prefix.parse("10.0.1.0/24"), Prefix.parse("fd00:0:0:1::/64")
FOREIGN = b"\x0a\0\0\x01"


@pytest.mark.parametrize(
    ("found", "mtu", "afresh"),
    [
        (Route(SUBNET, HOP + 256), 0, False),
        (Route(SUBNET, gateway=SUBNET.base, device=DEVICE), 0, False),
        (Route(SUBNET, HOP), 1400, False),
        (Route(SUBNET, HOP, mtu=1300), 1400, False),
        (Route(SUBNET, HOP, mtu=1400), 0, True),
        (Route(SUBNET, device=DEVICE), 0, True),
        (Route(SUBNET, gateway=FOREIGN, device=3, protocol=PROTOCOL_BOOT), 0, True),
        (Route(SUBNET6, gateway=SUBNET6.base, device=DEVICE6, protocol=PROTOCOL_BOOT), 0, False),
        (Route(SUBNET6, gateway=SUBNET6.base, device=DEVICE6, mtu=1400), 0, False),
        (Route(SUBNET6, gateway=SUBNET6.base, device=DEVICE6), 1400, False),
        (Route(SUBNET6, gateway=SUBNET6.base, device=DEVICE), 0, True),
        (Route(SUBNET6, protocol=PROTOCOL_BOOT), 0, True),
    ],
    ids=[
        "another nexthop", "a plain gateway", "MTU added", "MTU changed", "MTU removed", "metrics", "a stranger's",
        "flanneld's of IPv6", "MTU removed of IPv6", "MTU added of IPv6", "IPv6 by another device",
        "IPv6 with several gateways",
    ],
)  # fmt: skip
@pytest.mark.parametrize("at_start", [True, False])
def test_route_is_replaced_in_place_where_the_kernel_does_that_and_removed_first_where_not(
    found: Route, mtu: int, afresh: bool, at_start: bool
) -> None:
    ipv6 = len(found.destination.base) == 16
    wanted = peer(1, mtu=mtu, ipv4=not ipv6, ipv6=ipv6)
    made = tracker()
    made.want("1", wanted)
    if at_start:
        made.saw_all([*wanted[:-1], found])
    else:
        made.settle([])
        assert made.saw([found]) == [Drift(wanted[-1], found)]
    assert made.pending() == [Put(wanted[-1], afresh)]


def test_our_own_plain_route_is_replaced_in_place() -> None:
    made = tracker()
    made.saw_all([peer(1, here=PLAIN)[-1]])
    made.want("1", peer(1))
    assert made.pending()[-1] == Put(peer(1)[-1])


def test_drift_is_reported_once() -> None:
    made = converged(1)
    neighbour = peer(1)[2]
    assert made.saw([Gone(neighbour)]) == [Drift(neighbour, None)]
    assert made.saw([Gone(neighbour)]) == []
    assert made.saw_all([entry for entry in peer(1) if entry != neighbour]) == []


def test_echo_of_what_we_wrote_is_no_drift() -> None:
    made = converged(1)
    assert made.saw(peer(1)) == []
    assert made.saw([Gone(peer(1)[1]), peer(1)[1]]) == [], "made afresh: the last sight counts"
    made.want("1", ())
    made.settle([])
    assert made.saw([Gone(entry) for entry in peer(1)]) == []
    assert made.pending() == []


def test_entry_of_a_stranger_on_our_device_is_removed_if_it_bears_our_mark() -> None:
    made = converged(1)
    strange = [
        Guard(pack_address("172.30.9.9")),
        Fdb((DEVICE, mac(9)), pack_address("172.30.9.9")),
        Neighbour((DEVICE, pack_address("10.0.9.0")), mac(9)),
    ]
    assert made.saw(strange) == []
    assert [(type(op), op.entry[0]) for op in made.pending()] == [(Drop, entry[0]) for entry in reversed(strange)]


def test_entries_without_our_mark_are_not_remembered() -> None:
    made = converged(1)
    strange: list[Entry] = [
        Neighbour((DEVICE, pack_address("10.0.9.0")), mac(9), 2),
        NextHop(5, pack_address("10.0.9.0"), DEVICE),
        Route(Prefix.parse("192.0.2.0/24"), gateway=b"\x0a\0\0\x01", device=3, protocol=4),
    ]
    assert made.saw(strange) == []
    assert made.saw_all([*peer(1), *strange]) == []
    assert made.pending() == []


def test_entry_that_loses_our_mark_is_not_ours_any_more() -> None:
    made = tracker()
    made.saw([Neighbour((DEVICE, pack_address("10.0.9.0")), mac(9))])
    assert made.gap == 1
    made.saw([Neighbour((DEVICE, pack_address("10.0.9.0")), mac(9), 4)])
    assert (made.gap, made.pending()) == (0, [])


# --- dumps ---


def test_dump_that_shows_what_is_wanted_leaves_nothing_to_do() -> None:
    made = tracker()
    made.want("1", peer(1))
    assert made.saw_all(list(peer(1))) == []
    assert made.pending() == []


def test_dump_reports_what_is_not_as_it_was_left() -> None:
    made = converged(1, 2)
    _, fdb, _, _, route = peer(1)
    there = [entry for entry in (*peer(1), *peer(2)) if entry not in (fdb, route)]
    other = Route(Prefix.parse("10.0.1.0/24"), gateway=b"\x0a\0\1\0", device=DEVICE, protocol=PROTOCOL_BOOT)
    assert made.saw_all([*there, other]) == [Drift(fdb, None), Drift(route, other)]
    assert made.pending() == [Put(fdb), Put(route, afresh=True)]


def test_dump_with_two_remotes_for_a_mac_calls_for_the_entry_afresh() -> None:
    made = converged(1)
    fdb = peer(1)[1]
    made.saw_all([*peer(1), Fdb((DEVICE, mac(1)), pack_address("172.30.9.9"))])
    assert made.pending() == [Put(fdb, afresh=True)]


def test_of_two_routes_to_one_destination_the_first_in_a_dump_is_in_force() -> None:
    route = peer(1)[4]
    other = Route(Prefix.parse("10.0.1.0/24"), gateway=b"\x0a\0\1\0", device=DEVICE, protocol=PROTOCOL_BOOT)
    made = converged(1)
    assert made.saw_all([*peer(1), other]) == []
    assert made.saw_all([*peer(1)[:4], other, route]) == [Drift(route, other)]


def test_restart_drops_what_is_ours_and_nobody_wants_any_more() -> None:
    made = tracker()
    left_by_flannel = Route(Prefix.parse("10.0.9.0/24"), gateway=b"\x0a\0\x09\0", device=DEVICE, protocol=PROTOCOL_BOOT)
    made.saw_all([*peer(1), *peer(8), left_by_flannel])
    made.want("1", peer(1))
    assert {op.entry for op in made.pending()} == {*peer(8), left_by_flannel}
    assert all(isinstance(op, Drop) for op in made.pending())


def test_entries_of_both_families_and_devices_are_told_apart() -> None:
    made = tracker()
    both = peer(1, ipv6=True)
    made.want("1", both)
    kinds = [Guard, Guard, Fdb, Fdb, Neighbour, Neighbour, NextHop, Route, Route]
    assert [type(op.entry) for op in made.pending()] == kinds
    assert {op.entry.at[0] for op in made.pending() if isinstance(op.entry, Fdb | Neighbour)} == {DEVICE, DEVICE6}
    made.settle([])
    made.want("1", peer(1))
    assert {op.entry for op in made.pending()} == set(both) - set(peer(1))


# --- any sequence of events ---

SUBNETS = st.integers(1, 4)
HOSTS = st.integers(1, 3)


def strange_entries() -> st.SearchStrategy[Entry]:
    """What other programs write: under keys of ours or beside them."""
    gateway = st.sampled_from([b"\x0a\0\x01\0", b"\x0a\0\x07\0"])
    numbers = st.integers(1, 6)
    destination = numbers.map(lambda number: lease(number, 1).subnets[0])
    destination6 = numbers.map(lambda number: lease(number, 1, ipv4=False, ipv6=True).subnets[0])
    hop_ids = numbers.map(lambda number: NEXTHOP_BASE + 256 * number)
    devices = st.sampled_from([DEVICE, DEVICE6])
    protocols = st.sampled_from([3, 4, PROTOCOL])
    address = st.one_of(destination, destination6).map(lambda prefix: prefix.base)
    return st.one_of(
        st.builds(Guard, st.sampled_from([b"\xac\x1e\x01\x01", b"\xac\x1e\x09\x09"])),
        st.builds(Fdb, st.tuples(devices, HOSTS.map(mac)), st.sampled_from([b"\xac\x1e\x01\x01", b"\xac\x1e\x09\x09"])),
        st.builds(Neighbour, st.tuples(devices, address), HOSTS.map(mac), st.sampled_from([0x80, 0x40, 4])),
        st.builds(NextHop, st.one_of(hop_ids, st.just(5)), gateway, st.just(DEVICE), st.sampled_from([0, PROTOCOL])),
        st.builds(Route, destination, hop_ids, protocol=protocols, mtu=st.sampled_from([0, 1300])),
        st.builds(Route, destination, st.just(0), gateway, st.just(DEVICE), protocols),
        st.builds(Route, destination6, st.just(0), st.just(bytes(15) + b"\1"), devices, protocols),
    )


class TrackerOverKernel(RuleBasedStateMachine):
    """The reconciler's loop, a kernel that others write to as well, and a monitor that is easily overrun."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = FakeKernel(capacity=9)
        self.kernel.ensure_devices(SPECS, UNDERLAY.index)
        assert self.kernel.tunnels == HERE.tunnels
        self.tracker = tracker()
        self.wanted: dict[str, tuple[Entry, ...]] = {}

    # What we want.

    @rule(subnet=SUBNETS, host=HOSTS, ipv6=st.booleans(), mtu=st.sampled_from([0, 1300, 1400]))
    def lease_comes_or_changes(self, subnet: int, host: int, ipv6: bool, mtu: int) -> None:
        self.wanted[str(subnet)] = entries = peer(subnet, host, ipv6=ipv6, mtu=mtu)
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

    @rule(spec=st.sampled_from(SPECS))
    def link_goes_down(self, spec: DeviceSpec) -> None:
        self.kernel.set_down(spec.name)

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
        self.tracker = tracker()
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
        self.kernel.ensure_devices(SPECS, UNDERLAY.index)
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
                assert ours(op.entry, HERE), "what does not bear our mark is nobody's to remove"
        self.tracker.settle(self.kernel.apply(ops))

    def assert_kernel_is_right(self) -> None:
        wanted = {entry[0]: entry for entries in self.wanted.values() for entry in entries}
        there = {entry[0]: entry for entry in self.kernel.entries()}
        assert {key: there.get(key) for key in wanted} == wanted
        assert not [entry for key, entry in there.items() if key not in wanted and ours(entry, HERE)]

    @invariant()
    def numbers_agree(self) -> None:
        wanted = {entry[0] for entries in self.wanted.values() for entry in entries}
        assert self.tracker.wanted == len(wanted)
        assert set(self.tracker.owners) == set(self.wanted)
        pending = self.tracker.pending()
        assert len(pending) == self.tracker.gap
        assert self.tracker.amiss.keys() == {op.entry[0] for op in pending}
        assert self.tracker.missing == sum(isinstance(op, Put) for op in pending)
        assert len(self.tracker.refused) <= self.tracker.gap


TrackerOverKernel.TestCase.settings = settings(max_examples=300, stateful_step_count=40)
TestTrackerOverKernel = TrackerOverKernel.TestCase
