"""The kernel's twin for tests: a stateful `overlay.reconciler.Dataplane` without a kernel.

It is as awkward as the real one, and `netns/test_dataplane_contract.py` holds both to the same expectations:

- a route needs its nexthop object (EINVAL), a nexthop object a device that is up (ENETDOWN)
- a removed nexthop object takes its routes along without a word; so do, for IPv4, a link that goes down and a deleted
  device, while IPv6 tells of each route
- an IPv4 route that somebody put before ours makes the kernel refuse to rewrite ours (EEXIST), an IPv6 one becomes one
  route of several gateways with ours
- an IPv6 route is refused while one to the same destination leads to another device (EINVAL)
- a route through the same nexthop object keeps its MTU if it is rewritten without one
- an equal rewrite announces nothing, but for nexthop objects, which announce themselves and the routes on them, and for
  IPv6 routes
- our own writes are not announced to us, but for those of FDB entries and the final deletion of a neighbour
- the monitor overflows, and then says no more than that it did

Entries of the firewall's stand beside the kernel's, as `overlay.dataplane` has it. Whatever somebody else does to the
host is a method too: `stranger` writes entries, `set_down`, `delete_device` and so on harm a device. Refusals are
injected: `refuse` by key, `fail` for whole calls.
"""

import errno
import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from overlay.device import OWNER, DeviceSpec, FoundDevice, adjustments, incompatibility
from overlay.kernel import ABSENT, DeviceOccupied, KernelRefused
from overlay.model import (
    UNICAST,
    Drop,
    Entry,
    Fdb,
    Gone,
    Guard,
    Key,
    Neighbour,
    NextHop,
    Op,
    Place,
    Put,
    Refusal,
    Route,
    Seen,
    Sight,
)
from subnet_lease.model import Prefix

FAILED = 0x20
"""NUD_FAILED, the state in which a neighbour entry is announced once more before it goes."""

V4_DEVICE, V6_DEVICE = "flannel.1", "flannel-v6.1"


class Stranger:
    """Somebody else's socket: writes entries, and everybody is told."""

    def __init__(self, kernel: "FakeKernel") -> None:
        self._kernel = kernel

    def apply(self, ops: Sequence[Op]) -> list[Refusal]:
        """As `kernel.Kernel.apply`."""
        with self._kernel.lock:
            answers = [Refusal(op, self._kernel.write(op, ours=False)) for op in ops]
            return [answer for answer in answers if answer.errno]


class FakeKernel:
    """One network namespace with interfaces by our devices' names, and `links` (indexes) of others that are up."""

    def __init__(self, *, nexthops: bool = True, capacity: int = 100_000, links: Collection[int] = (2, 3)) -> None:
        self.tunnels: Mapping[int, int] = {}
        self.link = 0
        self._former: set[int] = set()
        self.also: tuple[int, ...] = ()
        self.lock = threading.Condition(threading.RLock())
        self.devices: dict[str, FoundDevice] = {}
        """The interfaces by name, whoever made them."""
        self.guards: set[Guard] = set()
        self.fdb: dict[Place, Fdb] = {}
        self.neighbours: dict[Place, Neighbour] = {}
        self.nexthops: dict[int, NextHop] = {}
        self.routes: dict[Prefix, list[Route]] = {}
        """By destination, the one in force first."""
        self.refuse: dict[Key, int] = {}
        """errno by key of the entry: the kernel refuses every write of it."""
        self.fail: dict[str, list[int]] = {"apply": [], "dump": [], "ensure_devices": []}
        """errnos with which the next calls fail as a whole."""
        self.batches: list[list[Op]] = []
        """What `apply` was given, call by call."""
        self.dumps = 0
        self.stranger = Stranger(self)
        self._links = set(links)
        self._has_nexthops = nexthops
        self._capacity = capacity
        self._queue: list[Sight] = []
        self._lost = False
        self._device_changed = False
        self._firewall_changed = False
        self._interrupted = False
        self._indices = itertools.count(7)

    # --- what the reconciler calls ---

    def wait(self, seconds: float | None) -> None:
        with self.lock:
            self.lock.wait_for(self.has_news, seconds)
            self._interrupted = False

    def has_news(self) -> bool:
        """Whether `wait` would return at once."""
        changed = self._device_changed or self._firewall_changed
        return bool(self._queue) or self._lost or changed or self._interrupted

    def interrupt(self) -> None:
        with self.lock:
            self._interrupted = True
            self.lock.notify_all()

    def observe(self) -> Seen:
        with self.lock:
            seen = Seen(tuple(self._queue), self._lost, self._device_changed, self._firewall_changed)
            self._queue, self._lost, self._device_changed, self._firewall_changed = [], False, False, False
            return seen

    def apply(self, ops: Sequence[Op]) -> list[Refusal]:
        with self.lock:
            self._maybe_fail("apply")
            self.batches.append(list(ops))
            refusals = []
            for op in ops:
                if isinstance(op, Put) and op.afresh:
                    self._clear(op.entry)
                code = self.write(op, ours=True)
                if code and not (isinstance(op, Drop) and code in ABSENT):
                    refusals.append(Refusal(op, code))
            return refusals

    def dump(self, nexthops: bool) -> Iterator[Entry]:
        with self.lock:
            self._maybe_fail("dump")
            self.dumps += 1
            tunnels = set(self.tunnels.values()) & {found.index for found in self.devices.values()}
            entries: list[Entry] = [*self.guards]
            entries += [each for each in self.fdb.values() if each.at[0] in tunnels]
            entries += [each for each in self.neighbours.values() if each.at[0] in tunnels]
            ways = tunnels | {self.link} | self._former
            entries += [each for routes in self.routes.values() for each in routes if self._devices_of(each) & ways]
            if nexthops:
                entries += [hop for hop in self.nexthops.values() if hop.device in ways]
            return iter(entries)

    def has_nexthops(self) -> bool:
        return self._has_nexthops

    def ensure_devices(self, specs: Sequence[DeviceSpec], link: int) -> dict[str, tuple[str, ...]]:
        with self.lock:
            self._maybe_fail("ensure_devices")
            families = {len(spec.local) for spec in specs}
            self._former |= {self.link, *(index for family, index in self.tunnels.items() if family not in families)}
            self._former.discard(link)
            self.link = link
            done = {spec: self._ensure(spec) for spec in specs}
            self.tunnels = {len(spec.local): self.devices[spec.name].index for spec in specs}
            return {spec.name: changes for spec, changes in done.items() if changes}

    def _ensure(self, spec: DeviceSpec) -> tuple[str, ...]:
        found = self.devices.get(spec.name)
        changes: tuple[str, ...] = ()
        if found is not None and (reason := incompatibility(spec, found)):
            if found.kind != "vxlan":
                raise DeviceOccupied(f"an interface {spec.name} exists and {reason}")
            self.delete_device(spec.name)
            found, changes = None, (f"removed, {reason}",)
        if found is None:
            found = FoundDevice(
                next(self._indices), spec.name, "vxlan", spec.mac, spec.mtu, False, OWNER,
                spec.vni, spec.port, spec.link, spec.local, spec.learning, spec.gbp,
            )  # fmt: skip
            changes = (*changes, "created")
        todo = adjustments(spec, found)
        if "mac" in todo:
            self._flush_neighbours(found.index)
        self.devices[spec.name] = replace(
            found, mac=spec.mac, mtu=spec.mtu, alias=OWNER, up=True, addresses=spec.addresses,
            link=spec.link, local=spec.local,
        )  # fmt: skip
        if changes or todo:
            self._announce_device()
        return changes if "created" in changes else todo

    def remove_strays(self, names: Collection[str]) -> list[str]:
        with self.lock:
            self._former.clear()
            strays = [found.name for found in self.devices.values() if found.alias == OWNER and found.name not in names]
            for name in strays:
                self.delete_device(name)
            return strays

    # --- what others do to a device ---

    def set_down(self, name: str = V4_DEVICE) -> None:
        """`ip link set down`: keeps the FDB and the IPv4 address, and tells of neighbours and IPv6 routes alone."""
        with self.lock:
            found = self.devices[name]
            kept = tuple(address for address in found.addresses if len(address.base) == 4)
            self.devices[name] = replace(found, up=False, addresses=kept)
            self._flush_layer_3(found.index)
            self._flush_neighbours(found.index)
            self._announce_device()

    def set_up(self, name: str = V4_DEVICE) -> None:
        """`ip link set up`: brings nothing back."""
        with self.lock:
            self.devices[name] = replace(self.devices[name], up=True)
            self._announce_device()

    def set_mac(self, mac: bytes, name: str = V4_DEVICE) -> None:
        """`ip link set address`: the kernel forgets the neighbours."""
        with self.lock:
            self.devices[name] = replace(self.devices[name], mac=mac)
            self._flush_neighbours(self.devices[name].index)
            self._announce_device()

    def remove_address(self, address: Prefix, name: str = V4_DEVICE) -> None:
        """`ip addr del`: with the last of IPv4 go its neighbours, and routes that stand on no nexthop object."""
        with self.lock:
            found = self.devices[name]
            left = tuple(each for each in found.addresses if each != address)
            self.devices[name] = replace(found, addresses=left)
            if len(address.base) == 4 and not any(len(each.base) == 4 for each in left):
                self._flush_neighbours(found.index, 4)
                self._flush_routes(
                    lambda each: not each.nexthop and each.device == found.index and len(each.destination.base) == 4
                )
            self._announce_device()

    def delete_device(self, name: str = V4_DEVICE) -> None:
        """`ip link del`: FDB, IPv6 routes and neighbours are announced, IPv4 routes and nexthop objects are not."""
        with self.lock:
            index = self.devices.pop(name).index
            for entry in [each for each in self.fdb.values() if each.at[0] == index]:
                del self.fdb[entry.at]
                self._announce(Gone(entry))
            self._flush_layer_3(index)
            self._flush_neighbours(index)
            self._announce_device()

    def prepend_route(self, route: Route) -> None:
        """`ip route prepend`. IPv4: a route before the one that stands there, and in force from now on. IPv6: the two
        become one with several gateways, of the protocol of the first; the notification names the newcomer's."""
        with self.lock:
            there = self.routes.setdefault(route.destination, [])
            if len(route.destination.base) == 16:
                both = Route(route.destination, protocol=route.protocol)
                self._announce(both)
                self.routes[route.destination] = [both._replace(protocol=there[0].protocol)]
            else:
                there.insert(0, route)
                self._announce(route)

    def alter_firewall(self) -> None:
        """`nft flush ruleset`: our table goes with all in it."""
        with self.lock:
            self.guards.clear()
            self._firewall_changed = True
            self.lock.notify_all()

    def entries(self) -> set[Entry]:
        """All there is, whoever made it."""
        with self.lock:
            routes = (route for routes in self.routes.values() for route in routes)
            tables = self.guards, self.fdb.values(), self.neighbours.values(), self.nexthops.values(), routes
            return {*itertools.chain.from_iterable(tables)}

    # --- one write ---

    def write(self, op: Op, *, ours: bool) -> int:
        """Carry out one message and announce what it changed; its errno."""
        entry = op.entry
        if ours and entry[0] in self.refuse:
            return self.refuse[entry[0]]
        match entry:
            case Guard():
                (self.guards.add if isinstance(op, Put) else self.guards.discard)(entry)
                if not ours:
                    self._announce(entry if isinstance(op, Put) else Gone(entry))
                return 0
            case Fdb():
                return self._write_fdb(op, entry)
            case Neighbour():
                return self._write_neighbour(op, entry, ours)
            case NextHop():
                return self._write_nexthop(op, entry, ours)
            case Route():
                return self._write_route(op, entry, ours)

    def _write_fdb(self, op: Op, entry: Fdb) -> int:
        if self._state(entry.at[0]) is None:
            return errno.ENODEV
        old = self.fdb.get(entry.at)
        if isinstance(op, Drop):
            if old is None:
                return errno.ENOENT
            del self.fdb[entry.at]
            self._announce(Gone(old))
        elif old != entry:
            self.fdb[entry.at] = entry
            self._announce(entry)
        return 0

    def _write_neighbour(self, op: Op, entry: Neighbour, ours: bool) -> int:
        if self._state(entry.at[0]) is None:
            return errno.ENODEV
        old = self.neighbours.get(entry.at)
        if isinstance(op, Drop):
            if old is None:
                return errno.ENOENT
            del self.neighbours[entry.at]
            last = Neighbour(entry.at, b"", FAILED)
            if not ours:
                self._announce(last)
            self._announce(Gone(last))
        elif old != entry:
            self.neighbours[entry.at] = entry
            if not ours:
                self._announce(entry)
        return 0

    def _write_nexthop(self, op: Op, entry: NextHop, ours: bool) -> int:
        if isinstance(op, Drop):
            old = self.nexthops.pop(entry.id, None)
            if old is None:
                return errno.ENOENT
            self._flush_routes(lambda route: route.nexthop == entry.id)
            if not ours:
                self._announce(Gone(old))
            return 0
        state = self._state(entry.device)
        if not state:
            return errno.EINVAL if state is None else errno.ENETDOWN
        self.nexthops[entry.id] = entry
        if not ours:
            self._announce(entry)
            for routes in self.routes.values():
                for route in routes:
                    if route.nexthop == entry.id:
                        self._announce(route)
        return 0

    def _write_route(self, op: Op, entry: Route, ours: bool) -> int:
        there = self.routes.get(entry.destination, [])
        ipv6 = len(entry.destination.base) == 16
        if isinstance(op, Drop):
            for route in there:
                if route.protocol == entry.protocol:
                    self._remove_route(route)
                    if not ours:
                        self._announce(Gone(route))
                    return 0
            return errno.ESRCH
        if entry.nexthop and entry.nexthop not in self.nexthops:
            return errno.EINVAL
        if not entry.nexthop and entry.device:
            state = self._state(entry.device)
            if not state:
                return errno.ENODEV if state is None else errno.ENETDOWN
            if ipv6 and there and there[0].kind == UNICAST and there[0].device not in (entry.device, 0):
                return errno.EINVAL
        if there and there[0].mtu and there[0]._replace(mtu=0) == entry and entry.nexthop:
            return 0
        if entry in there:
            if there[0] != entry:
                return errno.EEXIST
        else:
            self.routes[entry.destination] = [entry, *there[1:]]
        if not ours and (ipv6 or entry not in there):
            self._announce(entry)
        return 0

    def _clear(self, entry: Entry) -> None:
        """As `rtnl.clear`."""
        if isinstance(entry, Route) and len(entry.destination.base) == 16:
            for route in self.routes.get(entry.destination, ())[:1]:
                entry = entry._replace(protocol=route.protocol)
        self.write(Drop(entry), ours=True)

    # --- consequences ---

    def _state(self, index: int) -> bool | None:
        """Whether the interface is up, None if there is none."""
        if index in self._links:
            return True
        return next((found.up for found in self.devices.values() if found.index == index), None)

    def _devices_of(self, route: Route) -> set[int]:
        hop = self.nexthops.get(route.nexthop)
        device = hop.device if hop else route.device
        # Several gateways: as far as tests make such, by a device of ours.
        return {device} if device or route.kind != UNICAST else {*self.tunnels.values()}

    def _remove_route(self, route: Route) -> None:
        left = [each for each in self.routes[route.destination] if each is not route]
        if left:
            self.routes[route.destination] = left
        else:
            del self.routes[route.destination]

    def _flush_routes(self, which: Callable[[Route], bool]) -> None:
        for route in [route for routes in self.routes.values() for route in routes if which(route)]:
            self._remove_route(route)
            if len(route.destination.base) == 16:
                self._announce(Gone(route))

    def _flush_neighbours(self, device: int, family: int = 0) -> None:
        for entry in [*self.neighbours.values()]:
            if entry.at[0] == device and family in (0, len(entry.at[1])):
                del self.neighbours[entry.at]
                self._announce(Gone(entry))

    def _flush_layer_3(self, device: int) -> None:
        self._flush_routes(lambda route: device in self._devices_of(route))
        self.nexthops = {key: hop for key, hop in self.nexthops.items() if hop.device != device}

    def _announce(self, sight: Sight) -> None:
        if len(self._queue) < self._capacity:
            self._queue.append(sight)
        else:
            self._lost = True
        self.lock.notify_all()

    def _announce_device(self) -> None:
        self._device_changed = True
        self.lock.notify_all()

    def _maybe_fail(self, call: str) -> None:
        if self.fail[call]:
            raise KernelRefused(call, self.fail[call].pop(0))
