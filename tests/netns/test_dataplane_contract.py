"""What the reconciler relies on of a kernel: the same scenarios against the real one and against its twin.

Where a scenario fails for the kernel alone, the kernel has taught us something: mend the fake, then what relied on it.
"""

import errno
from collections.abc import Iterator
from typing import Protocol

import pytest

from overlay.device import DeviceSpec, derived_mac
from overlay.kernel import Kernel, Seen
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
)
from overlay.reconciler import Dataplane
from subnet_lease.model import Prefix, format_mac, pack_address, pack_mac
from tests.fake_dataplane import FakeKernel
from tests.netns.namespace import ip, new_namespace, veth

pytestmark = pytest.mark.netns

LOCAL = pack_address("172.30.0.5")


class Writer(Protocol):
    def apply(self, ops: list[Op]) -> list[Refusal]: ...


class World(Protocol):
    """A host with our device on it, and what others may do to it."""

    kernel: Dataplane
    stranger: Writer
    spec: DeviceSpec

    def set_down(self) -> None: ...
    def set_up(self) -> None: ...
    def set_mac(self, mac: bytes) -> None: ...
    def remove_address(self) -> None: ...
    def delete_device(self) -> None: ...
    def prepend_route(self, route: Route) -> None: ...


def spec(link: int) -> DeviceSpec:
    return DeviceSpec("flannel.1", 1, 8472, link, LOCAL, derived_mac("contract"), 1450, Prefix.parse("10.0.0.0/32"))


class FakeWorld:
    def __init__(self) -> None:
        fake = FakeKernel()
        self.kernel: Dataplane = fake
        self.stranger: Writer = fake.stranger
        self.spec = spec(2)
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
        self._kernel.device = self._ours.device
        return self._kernel.apply(ops)


class RealWorld:
    def __init__(self, kernel: Kernel, other: Kernel) -> None:
        self.kernel: Dataplane = kernel
        self.stranger: Writer = Foreign(other, kernel)
        self.spec = spec(veth("under0", "under1", "172.30.0.5/24"))

    def set_down(self) -> None:
        ip("link set flannel.1 down")

    def set_up(self) -> None:
        ip("link set flannel.1 up")

    def set_mac(self, mac: bytes) -> None:
        ip(f"link set flannel.1 address {format_mac(mac)}")

    def remove_address(self) -> None:
        ip("addr del 10.0.0.0/32 dev flannel.1")

    def delete_device(self) -> None:
        ip("link del flannel.1")

    def prepend_route(self, route: Route) -> None:
        gateway = ".".join(map(str, route.gateway))
        ip(f"route prepend {route.destination} via {gateway} dev flannel.1 onlink protocol {route.protocol}")


@pytest.fixture(params=["fake", "kernel"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    """A host whose device has just been made, and nothing else has happened since."""
    if request.param == "fake":
        made: World = FakeWorld()
        made.kernel.ensure_device(made.spec)
        made.kernel.observe()
        yield made
        return
    with new_namespace():
        kernel, other = Kernel(), Kernel()
        made = RealWorld(kernel, other)
        made.kernel.ensure_device(made.spec)
        made.kernel.observe()
        yield made
        kernel.close()
        other.close()


def mac(number: int) -> bytes:
    return b"\x02\0\0\0\0" + bytes([number])


def fdb(number: int, remote: str = "") -> Fdb:
    return Fdb(mac(number), pack_address(remote or f"172.30.0.{100 + number}"))


def neighbour(number: int) -> Neighbour:
    return Neighbour(pack_address(f"10.0.{number}.0"), mac(number))


def subnet(number: int) -> Prefix:
    return Prefix.parse(f"10.0.{number}.0/24")


def hop(world: World, number: int) -> NextHop:
    return NextHop(NEXTHOP_BASE + 256 * number, subnet(number).base, world.kernel.device)


def route(number: int) -> Route:
    return Route(subnet(number), nexthop=NEXTHOP_BASE + 256 * number)


def plain(world: World, number: int) -> Route:
    return Route(subnet(number), gateway=subnet(number).base, device=world.kernel.device)


def peer(world: World, number: int) -> list[Entry]:
    return [fdb(number), neighbour(number), hop(world, number), route(number)]


def codes(refusals: list[Refusal]) -> list[int]:
    return [refusal.errno for refusal in refusals]


def put(world: World, *entries: Entry) -> None:
    """Put by us, and forget what that echoes."""
    assert codes(world.kernel.apply([Put(entry) for entry in entries])) == []
    world.kernel.observe()


def dump(world: World) -> set[Entry]:
    """What is there, but for the routes that the kernel makes for addresses itself."""
    return {e for e in world.kernel.dump(True) if not (isinstance(e, Route) and e.protocol == 2)}


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
    put(world, *peer(world, 1), hop(world, 2), neighbour(2), fdb(2))
    changed: list[Entry] = [
        fdb(1, "172.30.0.77"),
        Neighbour(subnet(1).base, mac(9)),
        NextHop(hop(world, 1).id, subnet(7).base, world.kernel.device),
        Route(subnet(1), nexthop=hop(world, 2).id),
    ]
    put(world, *changed)
    assert dump(world) == {*changed, hop(world, 2), neighbour(2), fdb(2)}


def test_put_afresh_replaces_as_well(world: World) -> None:
    put(world, *peer(world, 1))
    assert codes(world.kernel.apply([Put(fdb(1, "172.30.0.77"), afresh=True), Put(route(1), afresh=True)])) == []
    assert dump(world) == {fdb(1, "172.30.0.77"), *peer(world, 1)[1:]}


def test_dropping_in_reverse_order_leaves_nothing(world: World) -> None:
    put(world, *peer(world, 1))
    assert codes(world.kernel.apply([Drop(entry) for entry in reversed(peer(world, 1))])) == []
    assert dump(world) == set()


def test_dropping_what_is_absent_is_success(world: World) -> None:
    assert codes(world.kernel.apply([Drop(entry) for entry in peer(world, 1)])) == []


def test_dropping_an_fdb_entry_needs_not_know_its_remote(world: World) -> None:
    put(world, fdb(1))
    assert codes(world.kernel.apply([Drop(fdb(1, "172.30.0.200"))])) == []
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
    ops: list[Op] = [Put(fdb(1)), Put(route(9)), Put(neighbour(1))]
    assert world.kernel.apply(ops) == [Refusal(ops[1], errno.EINVAL)]
    assert dump(world) == {fdb(1), neighbour(1)}


def test_boot_route_is_replaced_in_place_by_ours(world: World) -> None:
    put(world, hop(world, 1))
    world.stranger.apply([Put(Route(subnet(1), gateway=subnet(1).base, device=world.kernel.device, protocol=3))])
    put(world, route(1))
    assert dump(world) == {hop(world, 1), route(1)}


def test_route_behind_a_strangers_cannot_be_rewritten_but_made_afresh(world: World) -> None:
    put(world, hop(world, 1), route(1))
    in_the_way = Route(subnet(1), gateway=subnet(8).base, device=world.kernel.device, protocol=PROTOCOL_BOOT)
    world.prepend_route(in_the_way)
    assert [e for e in world.kernel.dump(True) if e[0] == subnet(1)] == [in_the_way, route(1)]
    assert codes(world.kernel.apply([Put(route(1))])) == [errno.EEXIST]
    assert codes(world.kernel.apply([Put(route(1), afresh=True)])) == []
    assert dump(world) == {hop(world, 1), route(1)}


def test_removing_a_nexthop_removes_its_routes(world: World) -> None:
    put(world, *peer(world, 1), *peer(world, 2))
    assert codes(world.kernel.apply([Drop(hop(world, 1))])) == []
    assert dump(world) == {fdb(1), neighbour(1), *peer(world, 2)}


# --- the monitor ---


def test_our_own_writes_are_not_echoed_but_for_fdb_entries(world: World) -> None:
    world.kernel.apply([Put(entry) for entry in peer(world, 1)])
    assert world.kernel.observe() == Seen((fdb(1),))


def test_our_own_drops_are_not_echoed_but_for_fdb_entries_and_the_end_of_a_neighbour(world: World) -> None:
    put(world, *peer(world, 1))
    world.kernel.apply([Drop(entry) for entry in reversed(peer(world, 1))])
    assert world.kernel.observe() == Seen((Gone(Neighbour(subnet(1).base, b"", 0x20)), Gone(fdb(1))))


def test_equal_rewrite_by_a_stranger_announces_nexthops_and_the_routes_on_them_alone(world: World) -> None:
    put(world, *peer(world, 1))
    world.stranger.apply([Put(fdb(1)), Put(neighbour(1)), Put(route(1))])
    assert world.kernel.observe() == Seen()
    world.stranger.apply([Put(hop(world, 1))])
    assert world.kernel.observe() == Seen((hop(world, 1), route(1)))


def test_everything_a_stranger_puts_is_announced(world: World) -> None:
    world.stranger.apply([Put(entry) for entry in peer(world, 1)])
    assert world.kernel.observe() == Seen(tuple(peer(world, 1)))


def test_everything_a_stranger_removes_is_announced(world: World) -> None:
    put(world, *peer(world, 1))
    world.stranger.apply([Drop(entry) for entry in reversed(peer(world, 1))])
    failed = Neighbour(subnet(1).base, b"", 0x20)
    assert world.kernel.observe() == Seen((Gone(route(1)), Gone(hop(world, 1)), failed, Gone(failed), Gone(fdb(1))))


def test_nexthop_removed_by_a_stranger_takes_its_routes_without_a_word(world: World) -> None:
    put(world, *peer(world, 1))
    world.stranger.apply([Drop(hop(world, 1))])
    assert world.kernel.observe() == Seen((Gone(hop(world, 1)),))
    assert dump(world) == {fdb(1), neighbour(1)}


def test_observing_twice_tells_nothing_twice(world: World) -> None:
    world.stranger.apply([Put(fdb(1))])
    assert world.kernel.observe().sights == (fdb(1),)
    assert world.kernel.observe() == Seen()


def test_waiting_ends_when_there_is_something_to_observe(world: World) -> None:
    world.stranger.apply([Put(fdb(1))])
    world.kernel.wait(30)
    assert world.kernel.observe().sights


def test_an_interrupt_ends_the_next_wait_and_only_that(world: World) -> None:
    world.kernel.interrupt()
    world.kernel.wait(30)
    world.kernel.wait(0.0)
    assert world.kernel.observe() == Seen()


# --- the device ---


def test_device_as_wanted_is_left_alone(world: World) -> None:
    assert world.kernel.ensure_device(world.spec) == ()
    assert world.kernel.observe() == Seen()


def test_link_down_keeps_the_fdb_and_removes_the_rest_telling_of_neighbours_alone(world: World) -> None:
    put(world, *peer(world, 1))
    world.set_down()
    assert world.kernel.observe() == Seen((Gone(neighbour(1)),), device_changed=True)
    assert dump(world) == {fdb(1)}


def test_link_down_refuses_nexthops_and_takes_fdb_and_neighbours(world: World) -> None:
    world.set_down()
    results = world.kernel.apply([Put(entry) for entry in peer(world, 1)])
    assert codes(results) == [errno.ENETDOWN, errno.EINVAL]
    assert codes(world.kernel.apply([Put(plain(world, 2))])) == [errno.ENETDOWN]


def test_link_up_brings_nothing_back(world: World) -> None:
    put(world, *peer(world, 1))
    world.set_down()
    world.set_up()
    assert world.kernel.observe().device_changed
    assert dump(world) == {fdb(1)}


def test_downed_link_is_set_up_in_place(world: World) -> None:
    index = world.kernel.device
    world.set_down()
    assert world.kernel.ensure_device(world.spec) == ("up",)
    assert world.kernel.device == index


def test_foreign_mac_empties_the_neighbours_and_is_put_right(world: World) -> None:
    put(world, *peer(world, 1))
    world.set_mac(pack_mac("02:00:00:00:09:09"))
    assert world.kernel.observe() == Seen((Gone(neighbour(1)),), device_changed=True)
    assert dump(world) == {fdb(1), hop(world, 1), route(1)}
    assert world.kernel.ensure_device(world.spec) == ("mac",)


def test_removed_address_takes_neighbours_and_plain_routes_and_is_put_back(world: World) -> None:
    put(world, *peer(world, 1), plain(world, 2))
    world.remove_address()
    assert world.kernel.observe() == Seen((Gone(neighbour(1)),), device_changed=True)
    assert dump(world) == {fdb(1), hop(world, 1), route(1)}
    assert world.kernel.ensure_device(world.spec) == ("address",)


def test_deleted_device_tells_of_fdb_and_neighbours_alone_and_is_made_again_empty(world: World) -> None:
    put(world, *peer(world, 1))
    index = world.kernel.device
    world.delete_device()
    assert world.kernel.observe() == Seen((Gone(fdb(1)), Gone(neighbour(1))), device_changed=True)
    assert list(world.kernel.dump(True)) == []
    assert world.kernel.ensure_device(world.spec) == ("created",)
    assert world.kernel.device != index
    assert dump(world) == set()


def test_writes_to_a_deleted_device_are_refused_and_drops_succeed(world: World) -> None:
    world.delete_device()
    results = world.kernel.apply([Put(entry) for entry in [*peer(world, 1), plain(world, 1)]])
    assert codes(results) == [errno.ENODEV, errno.ENODEV, errno.EINVAL, errno.EINVAL, errno.ENODEV]
    assert codes(world.kernel.apply([Drop(entry) for entry in peer(world, 1)])) == []


def test_dump_without_nexthops_leaves_them_out(world: World) -> None:
    put(world, *peer(world, 1))
    assert {type(e) for e in world.kernel.dump(False)} == {Fdb, Neighbour, Route}
    assert world.kernel.has_nexthops()
