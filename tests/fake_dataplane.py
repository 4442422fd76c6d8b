"""The kernel's twin for tests: a stateful `overlay.reconciler.Dataplane` without a kernel.

It is as awkward as the real one, and `netns/test_dataplane_contract.py` holds both to the same expectations:

- a route needs its nexthop object (EINVAL), a nexthop object a device that is up (ENETDOWN)
- a removed nexthop object takes its routes along without a word; so do a link that goes down and a deleted device
- a route that somebody put before ours makes the kernel refuse to rewrite ours (EEXIST)
- an equal rewrite announces nothing, but for nexthop objects, which announce themselves and the routes on them
- our own writes are not announced to us, but for those of FDB entries and the final deletion of a neighbour
- the monitor overflows, and then says no more than that it did

Whatever somebody else does to the host is a method too: `stranger` writes entries, `set_down`, `delete_device` and so
on harm the device. Refusals are injected: `refuse` by key, `fail` for whole calls.
"""

import errno
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from overlay.device import OWNER, DeviceSpec, FoundDevice, adjustments, incompatibility
from overlay.kernel import ABSENT, DeviceOccupied, KernelRefused, Seen
from overlay.model import Drop, Entry, Fdb, Gone, Key, Neighbour, NextHop, Op, Put, Refusal, Route, Sight
from subnet_lease.model import Prefix

FAILED = 0x20
"""NUD_FAILED, the state in which a neighbour entry is announced once more before it goes."""


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
    """One network namespace with at most one interface by our device's name."""

    def __init__(self, *, nexthops: bool = True, capacity: int = 100_000) -> None:
        self.device = 0
        self.lock = threading.Condition(threading.RLock())
        self.found: FoundDevice | None = None
        """The interface, whoever made it."""
        self.fdb: dict[bytes, Fdb] = {}
        self.neighbours: dict[bytes, Neighbour] = {}
        self.nexthops: dict[int, NextHop] = {}
        self.routes: dict[Prefix, list[Route]] = {}
        """By destination, the one in force first."""
        self.refuse: dict[Key, int] = {}
        """errno by key of the entry: the kernel refuses every write of it."""
        self.fail: dict[str, list[int]] = {"apply": [], "dump": [], "ensure_device": []}
        """errnos with which the next calls fail as a whole."""
        self.batches: list[list[Op]] = []
        """What `apply` was given, call by call."""
        self.dumps = 0
        self.stranger = Stranger(self)
        self._has_nexthops = nexthops
        self._capacity = capacity
        self._queue: list[Sight] = []
        self._lost = False
        self._device_changed = False
        self._interrupted = False
        self._indices = itertools.count(7)

    # --- what the reconciler calls ---

    def wait(self, seconds: float | None) -> None:
        with self.lock:
            self.lock.wait_for(self.has_news, seconds)
            self._interrupted = False

    def has_news(self) -> bool:
        """Whether `wait` would return at once."""
        return bool(self._queue) or self._lost or self._device_changed or self._interrupted

    def interrupt(self) -> None:
        with self.lock:
            self._interrupted = True
            self.lock.notify_all()

    def observe(self) -> Seen:
        with self.lock:
            seen = Seen(tuple(self._queue), self._lost, self._device_changed)
            self._queue, self._lost, self._device_changed = [], False, False
            return seen

    def apply(self, ops: Sequence[Op]) -> list[Refusal]:
        with self.lock:
            self._maybe_fail("apply")
            self.batches.append(list(ops))
            refusals = []
            for op in ops:
                if isinstance(op, Put) and op.afresh:
                    self.write(Drop(op.entry), ours=True)
                code = self.write(op, ours=True)
                if code and not (isinstance(op, Drop) and code in ABSENT):
                    refusals.append(Refusal(op, code))
            return refusals

    def dump(self, nexthops: bool) -> list[Entry]:
        with self.lock:
            self._maybe_fail("dump")
            self.dumps += 1
            if self.found is None or self.found.index != self.device:
                return []
            entries: list[Entry] = [*self.fdb.values(), *self.neighbours.values()]
            entries += [route for routes in self.routes.values() for route in routes if self._on_our_device(route)]
            if nexthops:
                entries += [hop for hop in self.nexthops.values() if hop.device == self.device]
            return entries

    def has_nexthops(self) -> bool:
        return self._has_nexthops

    def ensure_device(self, spec: DeviceSpec) -> tuple[str, ...]:
        with self.lock:
            self._maybe_fail("ensure_device")
            found = self.found
            changes: tuple[str, ...] = ()
            if found is not None and (reason := incompatibility(spec, found)):
                if found.kind != "vxlan":
                    raise DeviceOccupied(f"an interface {spec.name} exists and {reason}")
                self.delete_device()
                found, changes = None, (f"removed, {reason}",)
            if found is None:
                found = FoundDevice(
                    next(self._indices), spec.name, "vxlan", spec.mac, spec.mtu, False, OWNER,
                    spec.vni, spec.port, spec.link, spec.local, spec.learning, spec.gbp,
                )  # fmt: skip
                changes = (*changes, "created")
            todo = adjustments(spec, found)
            if "mac" in todo:
                self._flush_neighbours()
            wanted = (spec.address,)
            self.found = replace(found, mac=spec.mac, mtu=spec.mtu, alias=OWNER, up=True, addresses=wanted)
            self.device = found.index
            if changes or todo:
                self._announce_device()
            return changes if "created" in changes else todo

    # --- what others do to the device ---

    def set_down(self) -> None:
        """`ip link set down`: keeps the FDB, announces the neighbours it removes, and the rest it removes not."""
        with self.lock:
            assert self.found is not None
            self.found = replace(self.found, up=False)
            self._flush_neighbours()
            self._flush_layer_3()
            self._announce_device()

    def set_up(self) -> None:
        """`ip link set up`: brings nothing back."""
        with self.lock:
            assert self.found is not None
            self.found = replace(self.found, up=True)
            self._announce_device()

    def set_mac(self, mac: bytes) -> None:
        """`ip link set address`: the kernel forgets the neighbours."""
        with self.lock:
            assert self.found is not None
            self.found = replace(self.found, mac=mac)
            self._flush_neighbours()
            self._announce_device()

    def remove_address(self) -> None:
        """`ip addr del` of the last address: neighbours go, and routes that stand on no nexthop object."""
        with self.lock:
            assert self.found is not None
            self.found = replace(self.found, addresses=())
            self._flush_neighbours()
            self._flush_routes(lambda route: not route.nexthop and route.device == self.device)
            self._announce_device()

    def delete_device(self) -> None:
        """`ip link del`: FDB and neighbours are announced, routes and nexthop objects are not."""
        with self.lock:
            for entry in self.fdb.values():
                self._announce(Gone(entry))
            self.fdb.clear()
            self._flush_neighbours()
            self._flush_layer_3()
            self.found = None
            self._announce_device()

    def prepend_route(self, route: Route) -> None:
        """`ip route prepend`: a route before the one that stands there, and in force from now on."""
        with self.lock:
            self.routes.setdefault(route.destination, []).insert(0, route)
            self._announce(route)

    def entries(self) -> set[Entry]:
        """All there is, whoever made it."""
        with self.lock:
            routes = (route for routes in self.routes.values() for route in routes)
            return {*self.fdb.values(), *self.neighbours.values(), *self.nexthops.values(), *routes}

    # --- one write ---

    def write(self, op: Op, *, ours: bool) -> int:
        """Carry out one message and announce what it changed; its errno."""
        entry = op.entry
        if ours and entry[0] in self.refuse:
            return self.refuse[entry[0]]
        match entry:
            case Fdb():
                return self._write_fdb(op, entry)
            case Neighbour():
                return self._write_neighbour(op, entry, ours)
            case NextHop():
                return self._write_nexthop(op, entry, ours)
            case Route():
                return self._write_route(op, entry, ours)

    def _write_fdb(self, op: Op, entry: Fdb) -> int:
        if self.found is None:
            return errno.ENODEV
        old = self.fdb.get(entry.mac)
        if isinstance(op, Drop):
            if old is None:
                return errno.ENOENT
            del self.fdb[entry.mac]
            self._announce(Gone(old))
        elif old != entry:
            self.fdb[entry.mac] = entry
            self._announce(entry)
        return 0

    def _write_neighbour(self, op: Op, entry: Neighbour, ours: bool) -> int:
        if self.found is None:
            return errno.ENODEV
        old = self.neighbours.get(entry.address)
        if isinstance(op, Drop):
            if old is None:
                return errno.ENOENT
            del self.neighbours[entry.address]
            last = Neighbour(entry.address, b"", FAILED)
            if not ours:
                self._announce(last)
            self._announce(Gone(last))
        elif old != entry:
            self.neighbours[entry.address] = entry
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
        if self.found is None or entry.device != self.found.index:
            return errno.EINVAL
        if not self.found.up:
            return errno.ENETDOWN
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
            if self.found is None or self.found.index != entry.device:
                return errno.ENODEV
            if not self.found.up:
                return errno.ENETDOWN
        if entry in there:
            return 0 if there[0] == entry else errno.EEXIST
        self.routes[entry.destination] = [entry, *there[1:]]
        if not ours:
            self._announce(entry)
        return 0

    # --- consequences ---

    def _on_our_device(self, route: Route) -> bool:
        hop = self.nexthops.get(route.nexthop)
        return (hop.device if hop else route.device) == self.device

    def _remove_route(self, route: Route) -> None:
        left = [each for each in self.routes[route.destination] if each is not route]
        if left:
            self.routes[route.destination] = left
        else:
            del self.routes[route.destination]

    def _flush_routes(self, which: Callable[[Route], bool]) -> None:
        for route in [route for routes in self.routes.values() for route in routes if which(route)]:
            self._remove_route(route)

    def _flush_neighbours(self) -> None:
        for entry in self.neighbours.values():
            self._announce(Gone(entry))
        self.neighbours.clear()

    def _flush_layer_3(self) -> None:
        self._flush_routes(self._on_our_device)
        self.nexthops = {key: hop for key, hop in self.nexthops.items() if hop.device != self.device}

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
