"""What the reconciler relies on of a kernel: the same scenarios against the real one and against its twin.

Where a scenario fails for the kernel alone, the kernel has taught us something: mend the fake, then what relied on it.
"""

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from overlay.device import DeviceSpec, derived_mac
from overlay.kernel import Kernel
from overlay.model import (
    NEXTHOP_BASE,
    PROTOCOL_BOOT,
    Drop,
    Entry,
    Fdb,
    Gone,
    Neighbour,
    NextHop,
    Op,
    Put,
    Refusal,
    Route,
    Seen,
    Sight,
)
from overlay.reconciler import Dataplane
from subnet_lease.model import Prefix, format_address, format_mac, pack_address, pack_mac
from tests.fake_dataplane import FakeKernel
from tests.netns.namespace import ip, new_namespace, veth

pytestmark = pytest.mark.netns

LOCAL, LOCAL6 = pack_address("172.30.0.5"), pack_address("2001:db8::5")
OWN, OWN6 = Prefix.parse("10.0.0.0/32"), Prefix.parse("fd00::/128")


class Writer(Protocol):
    def apply(self, ops: list[Op]) -> list[Refusal]: ...


class World(Protocol):
    """A host with our devices on it, and what others may do to it: to the first of `specs`."""

    kernel: Dataplane
    stranger: Writer
    specs: tuple[DeviceSpec, ...]
    link: int

    def set_down(self) -> None: ...
    def set_up(self) -> None: ...
    def set_mac(self, mac: bytes) -> None: ...
    def remove_address(self, address: Prefix) -> None: ...
    def delete_device(self) -> None: ...
    def prepend_route(self, route: Route) -> None: ...


def specs(link: int) -> tuple[DeviceSpec, ...]:
    """The IPv4 device carries the pods of both families."""
    return (
        DeviceSpec("flannel.1", 1, 8472, link, LOCAL, derived_mac("contract"), 1400, (OWN, OWN6)),
        DeviceSpec("flannel-v6.1", 1, 8472, link, LOCAL6, derived_mac("contract", "6"), 1400, ()),
    )


class FakeWorld:
    def __init__(self) -> None:
        fake = FakeKernel()
        self.kernel: Dataplane = fake
        self.stranger: Writer = fake.stranger
        self.link = 2
        self.specs = specs(self.link)
        self.set_down = fake.set_down
        self.set_up = fake.set_up
        self.set_mac = fake.set_mac
        self.remove_address = fake.remove_address
        self.delete_device = fake.delete_device
        self.prepend_route = fake.prepend_route


class Foreign:
    """A second set of sockets: to the first it is somebody else."""

    def __init__(self, kernel: Kernel, ours: Kernel) -> None:
        self._kernel, self._ours = kernel, ours

    def apply(self, ops: list[Op]) -> list[Refusal]:
        self._kernel.tunnels = self._ours.tunnels
        return self._kernel.apply(ops)


class Quiet(Kernel):
    """A kernel without what IPv6 does of its own accord: neighbours for multicast, routes for addresses.

    Nor does it say who caused a change, which the fake does not know.
    """

    def observe(self) -> Seen:
        seen = super().observe()
        return seen._replace(sights=tuple(each for each in seen.sights if not _of_the_kernels_own(each)), by={})

    def dump(self, nexthops: bool) -> Iterator[Entry]:
        return (each for each in super().dump(nexthops) if not _of_the_kernels_own(each))


def _of_the_kernels_own(sight: Sight) -> bool:
    entry = sight.entry if isinstance(sight, Gone) else sight
    if isinstance(entry, Neighbour):
        return entry.at[1][:1] == b"\xff"
    return isinstance(entry, Route) and entry.protocol == 2


class RealWorld:
    def __init__(self, kernel: Kernel, other: Kernel) -> None:
        self.kernel: Dataplane = kernel
        self.stranger: Writer = Foreign(other, kernel)
        self.link = veth("under0", "under1", "172.30.0.5/24")
        ip("addr add 2001:db8::5/64 dev under0 nodad")
        self.specs = specs(self.link)

    def set_down(self) -> None:
        ip("link set flannel.1 down")

    def set_up(self) -> None:
        ip("link set flannel.1 up")

    def set_mac(self, mac: bytes) -> None:
        ip(f"link set flannel.1 address {format_mac(mac)}")

    def remove_address(self, address: Prefix) -> None:
        ip(f"addr del {address} dev flannel.1")

    def delete_device(self) -> None:
        ip("link del flannel.1")

    def prepend_route(self, route: Route) -> None:
        gateway = format_address(route.gateway)
        ip(f"route prepend {route.destination} via {gateway} dev flannel.1 onlink protocol {route.protocol}")


@pytest.fixture(params=["fake", "kernel"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A host whose devices have just been made, and nothing else has happened since."""
    if request.param == "fake":
        made: World = FakeWorld()
        ensure(made)
        made.kernel.observe()
        yield made
        return
    with new_namespace():
        # An address for each link comes some time after it, by itself.
        Path("/proc/sys/net/ipv6/conf/default/addr_gen_mode").write_text("1")
        kernel, other = Quiet(), Kernel()
        made = RealWorld(kernel, other)
        ensure(made)
        made.kernel.observe()
        yield made
        kernel.close()
        other.close()


def ensure(world: World) -> dict[str, tuple[str, ...]]:
    return dict(world.kernel.ensure_devices(world.specs, world.link))


def mac(number: int) -> bytes:
    return b"\x02\0\0\0\0" + bytes([number])


def fdb(world: World, number: int, remote: str = "") -> Fdb:
    return Fdb((world.kernel.tunnels[4], mac(number)), pack_address(remote or f"172.30.0.{100 + number}"))


def subnet(number: int, family: int = 4) -> Prefix:
    return Prefix.parse(f"10.0.{number}.0/24" if family == 4 else f"fd00:0:0:{number}::/64")


def neighbour(world: World, number: int, family: int = 4) -> Neighbour:
    return Neighbour((world.kernel.tunnels[4], subnet(number, family).base), mac(number))


def hop(world: World, number: int) -> NextHop:
    return NextHop(NEXTHOP_BASE + 256 * number, subnet(number).base, world.kernel.tunnels[4])


def route(number: int, mtu: int = 0) -> Route:
    return Route(subnet(number), nexthop=NEXTHOP_BASE + 256 * number, mtu=mtu)


def plain(world: World, number: int, family: int = 4, device: int = 4, **more: int) -> Route:
    block = subnet(number, family)
    return Route(block, gateway=block.base, device=world.kernel.tunnels[device], **more)


def peer(world: World, number: int) -> list[Entry]:
    return [fdb(world, number), neighbour(world, number), hop(world, number), route(number)]


def peer6(world: World, number: int) -> list[Entry]:
    """An IPv6 subnet of the same host, over IPv4."""
    return [fdb(world, number), neighbour(world, number, 6), plain(world, number, 6)]


def codes(refusals: list[Refusal]) -> list[int]:
    return [refusal.errno for refusal in refusals]


def put(world: World, *entries: Entry) -> None:
    """Put by us, and forget what that echoes."""
    assert codes(world.kernel.apply([Put(entry) for entry in entries])) == []
    world.kernel.observe()


def dump(world: World) -> set[Entry]:
    return set(world.kernel.dump(True))


def gone(entry: Neighbour) -> Neighbour:
    """How the kernel tells of a neighbour's end, when somebody has removed it."""
    return Neighbour(entry.at, b"", 0x20)


# --- writing ---


def test_entries_put_are_dumped_as_they_were_put(world: World) -> None:
    entries = [*peer(world, 1), *peer(world, 2)]
    put(world, *entries)
    assert dump(world) == set(entries)


def test_equal_rewrites_are_accepted_and_change_nothing(world: World) -> None:
    put(world, *peer(world, 1))
    assert codes(world.kernel.apply([Put(entry) for entry in peer(world, 1)])) == []
    assert dump(world) == set(peer(world, 1))


def test_put_replaces_what_stands_under_the_key(world: World) -> None:
    put(world, *peer(world, 1), hop(world, 2), neighbour(world, 2), fdb(world, 2))
    changed: list[Entry] = [
        fdb(world, 1, "172.30.0.77"),
        Neighbour(neighbour(world, 1).at, mac(9)),
        NextHop(hop(world, 1).id, subnet(7).base, world.kernel.tunnels[4]),
        Route(subnet(1), nexthop=hop(world, 2).id),
    ]
    put(world, *changed)
    assert dump(world) == {*changed, hop(world, 2), neighbour(world, 2), fdb(world, 2)}


def test_put_afresh_replaces_as_well(world: World) -> None:
    put(world, *peer(world, 1))
    assert codes(world.kernel.apply([Put(fdb(world, 1, "172.30.0.77"), afresh=True), Put(route(1), afresh=True)])) == []
    assert dump(world) == {fdb(world, 1, "172.30.0.77"), *peer(world, 1)[1:]}


def test_dropping_in_reverse_order_leaves_nothing(world: World) -> None:
    put(world, *peer(world, 1))
    assert codes(world.kernel.apply([Drop(entry) for entry in reversed(peer(world, 1))])) == []
    assert dump(world) == set()


def test_dropping_what_is_absent_is_success(world: World) -> None:
    assert codes(world.kernel.apply([Drop(entry) for entry in peer(world, 1)])) == []


def test_dropping_an_fdb_entry_needs_not_know_its_remote(world: World) -> None:
    put(world, fdb(world, 1))
    assert codes(world.kernel.apply([Drop(fdb(world, 1, "172.30.0.200"))])) == []
    assert dump(world) == set()


def test_dropping_a_route_never_hits_one_of_another_protocol(world: World) -> None:
    put(world, hop(world, 1))
    foreign = Route(subnet(1), nexthop=hop(world, 1).id, protocol=PROTOCOL_BOOT)
    world.stranger.apply([Put(foreign)])
    assert codes(world.kernel.apply([Drop(route(1))])) == []
    assert foreign in dump(world)


def test_route_without_its_nexthop_is_refused(world: World) -> None:
    assert codes(world.kernel.apply([Put(route(1))])) == [errno.EINVAL]


def test_one_refused_entry_stops_nothing_else(world: World) -> None:
    ops: list[Op] = [Put(fdb(world, 1)), Put(route(9)), Put(neighbour(world, 1))]
    assert world.kernel.apply(ops) == [Refusal(ops[1], errno.EINVAL)]
    assert dump(world) == {fdb(world, 1), neighbour(world, 1)}


def test_boot_route_is_replaced_in_place_by_ours(world: World) -> None:
    put(world, hop(world, 1))
    world.stranger.apply([Put(Route(subnet(1), gateway=subnet(1).base, device=world.kernel.tunnels[4], protocol=3))])
    put(world, route(1))
    assert dump(world) == {hop(world, 1), route(1)}


def test_route_behind_a_strangers_cannot_be_rewritten_but_made_afresh(world: World) -> None:
    put(world, hop(world, 1), route(1))
    in_the_way = Route(subnet(1), gateway=subnet(8).base, device=world.kernel.tunnels[4], protocol=PROTOCOL_BOOT)
    world.prepend_route(in_the_way)
    assert [e for e in world.kernel.dump(True) if e[0] == subnet(1)] == [in_the_way, route(1)]
    assert codes(world.kernel.apply([Put(route(1))])) == [errno.EEXIST]
    assert codes(world.kernel.apply([Put(route(1), afresh=True)])) == []
    assert dump(world) == {hop(world, 1), route(1)}


def test_removing_a_nexthop_removes_its_routes(world: World) -> None:
    put(world, *peer(world, 1), *peer(world, 2))
    assert codes(world.kernel.apply([Drop(hop(world, 1))])) == []
    assert dump(world) == {fdb(world, 1), neighbour(world, 1), *peer(world, 2)}


@pytest.mark.parametrize("device", [4, 16])
def test_ipv6_entries_are_put_dumped_and_dropped_as_others(world: World, device: int) -> None:
    index = world.kernel.tunnels[device]
    remote = pack_address("2001:db8::77") if device == 16 else pack_address("172.30.0.77")
    block = subnet(1, 6)
    entries: list[Entry] = [
        Fdb((index, mac(1)), remote), Neighbour((index, block.base), mac(1)), plain(world, 1, 6, device),
    ]  # fmt: skip
    put(world, *entries)
    assert dump(world) == set(entries)
    assert codes(world.kernel.apply([Drop(entry) for entry in reversed(entries)])) == []
    assert dump(world) == set()


def test_same_keys_on_two_devices_are_two_entries(world: World) -> None:
    entries: list[Entry] = [
        *(Fdb((index, mac(1)), LOCAL6[:-1] + b"\7" if family == 16 else pack_address("172.30.0.7"))
          for family, index in world.kernel.tunnels.items()),
        *(Neighbour((index, subnet(1).base), mac(1)) for index in world.kernel.tunnels.values()),
    ]  # fmt: skip
    put(world, *entries)
    assert dump(world) == set(entries)
    put_away = entries[1::2]
    assert codes(world.kernel.apply([Drop(entry) for entry in put_away])) == []
    assert dump(world) == set(entries) - set(put_away)


@pytest.mark.parametrize(("family", "by_nexthop"), [(4, True), (4, False), (6, False)])
def test_mtu_of_a_route_is_added_and_changed_in_place_and_removed_afresh(
    world: World, family: int, by_nexthop: bool
) -> None:
    put(world, hop(world, 1))

    def wanted(mtu: int) -> Route:
        return route(1, mtu) if by_nexthop else plain(world, 1, family, mtu=mtu)

    for mtu in (0, 1300, 1290):
        put(world, wanted(mtu))
        assert wanted(mtu) in dump(world)
    world.kernel.apply([Put(wanted(0))])
    assert wanted(1290 if by_nexthop else 0) in dump(world), "an equal nexthop object keeps the metrics there were"
    assert codes(world.kernel.apply([Put(wanted(0), afresh=True)])) == []
    assert wanted(0) in dump(world)


def test_ipv6_route_that_leads_to_another_device_is_in_the_way_until_it_is_removed(world: World) -> None:
    put(world, plain(world, 1, 6))
    moved = plain(world, 1, 6, 16)
    assert codes(world.kernel.apply([Put(moved)])) == [errno.EINVAL]
    assert dump(world) == {plain(world, 1, 6)}
    assert codes(world.kernel.apply([Put(moved, afresh=True)])) == []
    assert dump(world) == {moved}
    # A stranger's as well.
    world.stranger.apply([Drop(moved), Put(plain(world, 1, 6, protocol=PROTOCOL_BOOT))])
    assert codes(world.kernel.apply([Put(moved)])) == [errno.EINVAL]
    assert codes(world.kernel.apply([Put(moved, afresh=True)])) == []
    assert dump(world) == {moved}


def test_ipv6_route_that_joins_ours_makes_one_of_several_gateways_which_ours_replaces(world: World) -> None:
    put(world, plain(world, 1, 6))
    joined = Route(subnet(1, 6), gateway=subnet(8, 6).base, device=world.kernel.tunnels[4], protocol=PROTOCOL_BOOT)
    world.prepend_route(joined)
    assert world.kernel.observe() == Seen((Route(subnet(1, 6), protocol=PROTOCOL_BOOT),))
    assert dump(world) == {Route(subnet(1, 6))}
    put(world, plain(world, 1, 6))
    assert dump(world) == {plain(world, 1, 6)}


def test_routes_by_what_was_our_device_are_dumped_until_strays_are_removed(world: World) -> None:
    moved = plain(world, 1, 6, 16)
    put(world, moved, plain(world, 2, 6))
    world.kernel.ensure_devices(world.specs[:1], world.link)
    assert dump(world) == {moved, plain(world, 2, 6)}
    assert world.kernel.remove_strays(["flannel.1"]) == ["flannel-v6.1"]
    assert world.kernel.remove_strays(["flannel.1"]) == []
    assert dump(world) == {plain(world, 2, 6)}
    assert world.kernel.tunnels.keys() == {4}


# --- the monitor ---


def test_our_own_writes_are_not_echoed_but_for_fdb_entries(world: World) -> None:
    world.kernel.apply([Put(entry) for entry in peer(world, 1)])
    assert world.kernel.observe() == Seen((fdb(world, 1),))


def test_our_own_drops_are_not_echoed_but_for_fdb_entries_and_the_end_of_a_neighbour(world: World) -> None:
    put(world, *peer(world, 1))
    world.kernel.apply([Drop(entry) for entry in reversed(peer(world, 1))])
    assert world.kernel.observe() == Seen((Gone(gone(neighbour(world, 1))), Gone(fdb(world, 1))))


def test_equal_rewrite_by_a_stranger_announces_nexthops_and_the_routes_on_them_alone(world: World) -> None:
    put(world, *peer(world, 1))
    world.stranger.apply([Put(fdb(world, 1)), Put(neighbour(world, 1)), Put(route(1))])
    assert world.kernel.observe() == Seen()
    world.stranger.apply([Put(hop(world, 1))])
    assert world.kernel.observe() == Seen((hop(world, 1), route(1)))


def test_everything_a_stranger_puts_is_announced(world: World) -> None:
    world.stranger.apply([Put(entry) for entry in peer(world, 1)])
    assert world.kernel.observe() == Seen(tuple(peer(world, 1)))


def test_everything_a_stranger_removes_is_announced(world: World) -> None:
    put(world, *peer(world, 1))
    world.stranger.apply([Drop(entry) for entry in reversed(peer(world, 1))])
    failed = gone(neighbour(world, 1))
    assert world.kernel.observe() == Seen(
        (Gone(route(1)), Gone(hop(world, 1)), failed, Gone(failed), Gone(fdb(world, 1)))
    )


def test_nexthop_removed_by_a_stranger_takes_its_routes_without_a_word(world: World) -> None:
    put(world, *peer(world, 1))
    world.stranger.apply([Drop(hop(world, 1))])
    assert world.kernel.observe() == Seen((Gone(hop(world, 1)),))
    assert dump(world) == {fdb(world, 1), neighbour(world, 1)}


def test_observing_twice_tells_nothing_twice(world: World) -> None:
    world.stranger.apply([Put(fdb(world, 1))])
    assert world.kernel.observe().sights == (fdb(world, 1),)
    assert world.kernel.observe() == Seen()


def test_waiting_ends_when_there_is_something_to_observe(world: World) -> None:
    world.stranger.apply([Put(fdb(world, 1))])
    world.kernel.wait(30)
    assert world.kernel.observe().sights


def test_an_interrupt_ends_the_next_wait_and_only_that(world: World) -> None:
    world.kernel.interrupt()
    world.kernel.wait(30)
    world.kernel.wait(0.0)
    assert world.kernel.observe() == Seen()


def test_ipv6_entries_are_announced_as_others_and_an_equal_rewrite_of_a_route_too(world: World) -> None:
    world.kernel.apply([Put(entry) for entry in peer6(world, 1)])
    assert world.kernel.observe() == Seen((fdb(world, 1),))
    world.stranger.apply([Put(entry) for entry in peer6(world, 1)])
    assert world.kernel.observe() == Seen((plain(world, 1, 6),))
    world.stranger.apply([Drop(entry) for entry in reversed(peer6(world, 1))])
    failed = gone(neighbour(world, 1, 6))
    sights = Gone(plain(world, 1, 6)), failed, Gone(failed), Gone(fdb(world, 1))
    assert world.kernel.observe() == Seen(sights)


# --- the devices ---


def test_devices_as_wanted_are_left_alone(world: World) -> None:
    assert ensure(world) == {}
    assert world.kernel.observe() == Seen()


def test_link_down_keeps_the_fdb_and_removes_the_rest_telling_of_neighbours_and_ipv6_routes_alone(
    world: World,
) -> None:
    put(world, *peer(world, 1), *peer6(world, 1))
    world.set_down()
    seen = world.kernel.observe()
    assert seen.device_changed
    assert set(seen.sights) == {Gone(neighbour(world, 1)), Gone(neighbour(world, 1, 6)), Gone(plain(world, 1, 6))}
    assert dump(world) == {fdb(world, 1)}


def test_link_down_refuses_nexthops_and_takes_fdb_and_neighbours(world: World) -> None:
    world.set_down()
    results = world.kernel.apply([Put(entry) for entry in peer(world, 1)])
    assert codes(results) == [errno.ENETDOWN, errno.EINVAL]
    assert codes(world.kernel.apply([Put(plain(world, 2))])) == [errno.ENETDOWN]
    assert codes(world.kernel.apply([Put(entry) for entry in peer6(world, 1)])) == [errno.ENETDOWN]


def test_link_up_brings_nothing_back(world: World) -> None:
    put(world, *peer(world, 1), *peer6(world, 1))
    world.set_down()
    world.set_up()
    assert world.kernel.observe().device_changed
    assert dump(world) == {fdb(world, 1)}


def test_downed_link_is_set_up_in_place_and_gets_its_ipv6_address_back(world: World) -> None:
    before = dict(world.kernel.tunnels)
    world.set_down()
    assert ensure(world) == {"flannel.1": ("address", "up")}
    assert world.kernel.tunnels == before
    assert ensure(world) == {}


def test_foreign_mac_empties_the_neighbours_and_is_put_right(world: World) -> None:
    put(world, *peer(world, 1), *peer6(world, 1))
    world.set_mac(pack_mac("02:00:00:00:09:09"))
    seen = world.kernel.observe()
    assert seen.device_changed
    assert set(seen.sights) == {Gone(neighbour(world, 1)), Gone(neighbour(world, 1, 6))}
    assert dump(world) == {fdb(world, 1), hop(world, 1), route(1), plain(world, 1, 6)}
    assert ensure(world) == {"flannel.1": ("mac",)}


def test_removed_ipv4_address_takes_neighbours_and_plain_routes_of_its_family_and_is_put_back(world: World) -> None:
    put(world, *peer(world, 1), plain(world, 2), *peer6(world, 1))
    world.remove_address(OWN)
    assert world.kernel.observe() == Seen((Gone(neighbour(world, 1)),), device_changed=True)
    assert dump(world) == {hop(world, 1), route(1), *peer6(world, 1)}
    assert ensure(world) == {"flannel.1": ("address",)}


def test_removed_ipv6_address_takes_nothing_along_and_is_put_back(world: World) -> None:
    entries = {*peer(world, 1), *peer6(world, 1)}
    put(world, *peer(world, 1), *peer6(world, 1))
    world.remove_address(OWN6)
    assert world.kernel.observe() == Seen(device_changed=True)
    assert dump(world) == entries
    assert ensure(world) == {"flannel.1": ("address",)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"local": pack_address("172.30.0.6")}, ("local",)),
        ({"mac": derived_mac("other"), "mtu": 1300}, ("mac", "mtu")),
        ({"addresses": (OWN,)}, ("address",)),
    ],
)
def test_device_is_changed_in_place_with_all_that_is_on_it(
    world: World, change: dict[str, Any], words: tuple[str, ...]
) -> None:
    put(world, *peer(world, 1), *peer6(world, 1))
    before, there = dict(world.kernel.tunnels), dump(world)
    world.specs = (replace(world.specs[0], **change), world.specs[1])
    assert ensure(world) == {"flannel.1": words}
    assert world.kernel.tunnels == before
    assert dump(world) == ({each for each in there if not isinstance(each, Neighbour)} if "mac" in words else there)
    assert ensure(world) == {}


def test_deleted_device_tells_not_of_ipv4_routes_and_nexthops_and_is_made_again_empty(world: World) -> None:
    put(world, *peer(world, 1), *peer6(world, 1))
    before = dict(world.kernel.tunnels)
    told = {fdb(world, 1), neighbour(world, 1), neighbour(world, 1, 6), plain(world, 1, 6)}
    world.delete_device()
    seen = world.kernel.observe()
    assert seen.device_changed
    assert set(seen.sights) == {Gone(entry) for entry in told}
    assert list(world.kernel.dump(True)) == []
    assert ensure(world) == {"flannel.1": ("created",)}
    assert world.kernel.tunnels[4] != before[4]
    assert world.kernel.tunnels[16] == before[16]
    assert dump(world) == set()


def test_writes_to_a_deleted_device_are_refused_and_drops_succeed(world: World) -> None:
    world.delete_device()
    results = world.kernel.apply([Put(entry) for entry in [*peer(world, 1), plain(world, 1), plain(world, 1, 6)]])
    assert codes(results) == [errno.ENODEV, errno.ENODEV, errno.EINVAL, errno.EINVAL, errno.ENODEV, errno.ENODEV]
    assert codes(world.kernel.apply([Drop(entry) for entry in [*peer(world, 1), *peer6(world, 1)]])) == []


def test_dump_without_nexthops_leaves_them_out(world: World) -> None:
    put(world, *peer(world, 1))
    assert {type(e) for e in world.kernel.dump(False)} == {Fdb, Neighbour, Route}
    assert world.kernel.has_nexthops()


def test_routes_by_the_underlays_link_are_seen_dumped_and_dropped(world: World) -> None:
    by_link: list[Entry] = [
        NextHop(NEXTHOP_BASE + 256, pack_address("172.30.0.9"), world.link),
        route(1),
        Route(subnet(1, 6), gateway=pack_address("2001:db8::9"), device=world.link),
    ]
    put(world, *by_link)
    assert dump(world) == set(by_link)
    world.stranger.apply([Drop(by_link[2]), Drop(by_link[1])])
    assert world.kernel.observe() == Seen((Gone(by_link[2]), Gone(by_link[1])))
    assert codes(world.kernel.apply([Drop(entry) for entry in reversed(by_link)])) == []
    assert dump(world) == set()
