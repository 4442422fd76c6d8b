"""What the kernel should hold, where it does not, and the writes that close the gap.

Owns `want` (from leases) and the gap: what stands, or that nothing stands, under each key where the kernel is not known
to be as it should be (from dumps, the monitor and the kernel's answers). Everywhere else it holds what is wanted, so
a dataplane in order costs one mapping. No I/O and no clock: facts go in, an ordered list of operations comes out, and
each pass starts from what is true by then. A refused operation stays in the gap, and so does an entry that somebody
removed: nothing else remembers history.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass
from itertools import chain

from overlay.model import BUILD_ORDER, PROTOCOL, Drop, Entry, Fdb, Gone, Key, NextHop, Op, Put, Refusal, Route, Sight


@dataclass(frozen=True, slots=True)
class Drift:
    """An entry was not as we had left it: `found` is what stands there now, None if nothing."""

    want: Entry
    found: Entry | None


class Tracker:
    """Wanted entries and the gap. All methods cost time in proportion to what they are given.

    `owned` tells whether an entry nobody wants is ours to remove; other people's entries are not even remembered.
    """

    def __init__(self, owned: Callable[[Entry], bool]) -> None:
        self._owned = owned
        self._want: dict[Key, Entry] = {}
        self._gap: dict[Key, Entry | None] = {}
        """In order: what came first is written first, and lies beside its like in memory."""
        self._by_owner: dict[str, tuple[Entry, ...]] = {}
        self._shared: dict[Key, int] = {}
        """How many owners beyond one want a key; absent means one."""
        self._refused: dict[Key, Refusal] = {}

    # --- what we want ---

    def want(self, owner: str, entries: tuple[Entry, ...]) -> None:
        """The whole set of entries that `owner` calls for; an empty set withdraws it.

        Owners may share an entry (two subnets of one host share its FDB entry): it stays until the last lets go. Where
        they differ the last word counts, which lasts only within one batch of changes: the table admits no conflicts.
        """
        before = self._by_owner.get(owner, ())
        if entries == before:
            return
        wanted, gap = self._want, self._gap
        for entry in entries:
            key = entry[0]
            if key in wanted:
                found = self._found(key)
                self._shared[key] = self._shared.get(key, 0) + 1
            elif key in gap:
                found = gap[key]
            else:
                # By far the most common: nobody wants it yet, and nothing is known to stand there.
                wanted[key], gap[key] = entry, None
                continue
            wanted[key] = entry
            self._book(key, found)
        for entry in before:
            self._release(entry[0])
        if entries:
            self._by_owner[owner] = entries
        else:
            del self._by_owner[owner]

    def _release(self, key: Key) -> None:
        others = self._shared.pop(key, 0)
        if others > 1:
            self._shared[key] = others - 1
        elif not others:
            found = self._found(key)
            del self._want[key]
            self._book(key, found)

    @property
    def owners(self) -> KeysView[str]:
        """All who want something."""
        return self._by_owner.keys()

    # --- what there is ---

    def _found(self, key: Key) -> Entry | None:
        """What stands under `key`, as far as we know."""
        return self._gap[key] if key in self._gap else self._want.get(key)

    def _book(self, key: Key, found: Entry | None) -> None:
        """`found` stands under `key`: as it should be, or a part of the gap."""
        want = self._want.get(key)
        if found == want or (found is not None and want is None and not self._owned(found)):
            self._gap.pop(key, None)
            self._refused.pop(key, None)
        else:
            self._gap[key] = found

    def saw_all(self, entries: Iterable[Entry]) -> list[Drift]:
        """A complete dump. Returns what differs from what we believed to be in place."""
        right: set[Key] = set()
        other: dict[Key, Entry] = {}
        for entry in entries:
            key = entry[0]
            want = self._want.get(key)
            if want is None and not self._owned(entry):
                continue
            if key in right or key in other:
                if isinstance(entry, Route):
                    continue  # The kernel lists routes to one destination in its order: the first is in force.
                # The same MAC twice is one FDB entry with several remotes, which no replace can mend: see `_resists`.
                right.discard(key)
                other[key] = Fdb(entry.at, b"") if isinstance(entry, Fdb) else entry
            elif entry == want:
                right.add(key)
            else:
                other[key] = entry
        amiss = [key for key in self._want if key not in right]
        drifted = [Drift(self._want[key], other.get(key)) for key in amiss if key not in self._gap]
        self._gap = {key: other.pop(key, None) for key in amiss}
        self._gap.update(other)
        self._refused.clear()
        return drifted

    def saw(self, sights: Iterable[Sight]) -> list[Drift]:
        """What the monitor reported, in the kernel's order. Returns what somebody else changed.

        Echoes of our own writes must come together with whatever followed them: only the last sight of a key counts.
        """
        before: dict[Key, Entry | None] = {}
        for sight in self._with_silent_losses(sights):
            gone = isinstance(sight, Gone)
            key = sight.entry[0] if isinstance(sight, Gone) else sight[0]
            if not gone and key not in self._gap and sight == self._want.get(key):
                continue  # An echo of our own: among thousands of new peers, thousands of them.
            before.setdefault(key, self._found(key))
            self._book(key, None if isinstance(sight, Gone) else sight)
        drifted = []
        for key, old in before.items():
            now, want = self._found(key), self._want.get(key)
            if now == old:
                continue
            if isinstance(now, Fdb) and now != want:
                # Replaced or appended to: the notification does not say which.
                now = Fdb(now.at, b"", now.state)
                self._book(key, now)
            if want is not None and old == want:
                drifted.append(Drift(want, now))
        return drifted

    def _with_silent_losses(self, sights: Iterable[Sight]) -> Iterator[Sight]:
        """The sights, and what the kernel does not mention: a nexthop takes its routes with it when it goes."""
        routes: dict[int, list[Route]] | None = None
        for sight in sights:
            yield sight
            if routes is not None and isinstance(sight, Route):
                routes.setdefault(sight.nexthop, []).append(sight)
            if isinstance(sight, Gone) and isinstance(sight.entry, NextHop):
                if routes is None:
                    # Built when it is needed, which is when somebody else has removed a nexthop.
                    routes = {}
                    for entry in chain(self._want.values(), self._gap.values()):
                        if isinstance(entry, Route):
                            routes.setdefault(entry.nexthop, []).append(entry)
                for route in routes.pop(sight.entry.id, ()):
                    if self._found(route.destination) == route:
                        yield Gone(route)

    def renew(self, devices: Collection[int]) -> None:
        """Have the FDB entries on these devices made afresh, although they are what they should be.

        Each remembers the way to its remote, our source address included, and outlasts a change of the device's own
        (dst_cache in struct vxlan_rdst); to rewrite it with what it holds does not help (vxlan_fdb_replace).
        """
        for key, want in self._want.items():
            if isinstance(want, Fdb) and want.at[0] in devices and key not in self._gap:
                self._gap[key] = Fdb(want.at, b"")

    # --- the gap ---

    def pending(self) -> list[Op]:
        """What closes the gap, in build order: a route never lacks the entries it stands on."""
        puts: dict[type[Entry], list[Op]] = {kind: [] for kind in BUILD_ORDER}
        drops: dict[type[Entry], list[Op]] = {kind: [] for kind in BUILD_ORDER}
        for key, found in self._gap.items():
            want = self._want.get(key)
            if want is not None:
                # Something that we have not seen may have been in the way of what was refused.
                again = isinstance(want, Route) and key in self._refused
                puts[type(want)].append(Put(want, again or (found is not None and _resists(found, want))))
            else:
                assert found is not None, "nothing there and nothing wanted is no gap"
                drops[type(found)].append(Drop(found))
        return list(chain(*puts.values(), *reversed(drops.values())))

    def settle(self, refusals: Iterable[Refusal]) -> None:
        """The kernel has tried all that was pending, and this is what it refused: the rest is in place."""
        self._refused = {refusal.op.entry[0]: refusal for refusal in refusals}
        self._gap = {key: self._gap[key] for key in self._refused}

    # --- for people ---

    @property
    def wanted(self) -> int:
        """How many entries are called for."""
        return len(self._want)

    def wants(self, key: Key) -> bool:
        """Whether anybody calls for an entry under this key. From any thread."""
        return key in self._want

    @property
    def gap(self) -> int:
        """How many entries are not as they should be."""
        return len(self._gap)

    @property
    def by_owner(self) -> dict[str, tuple[Entry, ...]]:
        """What each owner calls for: a copy."""
        return dict(self._by_owner)

    @property
    def amiss(self) -> dict[Key, Entry | None]:
        """What stands, or that nothing does, under each key of the gap: a copy."""
        return dict(self._gap)

    @property
    def missing(self) -> int:
        """How many entries of the gap are called for; the others are in the way."""
        return sum(key in self._want for key in self._gap)

    @property
    def refused(self) -> Mapping[Key, Refusal]:
        """What the kernel refused on the latest attempt, by key."""
        return self._refused


def _resists(found: Entry, want: Entry) -> bool:
    """Whether NLM_F_REPLACE alone may not make what stands there equal to what we want.

    It changes only the first remote of an FDB entry (vxlan_fdb_replace). For an IPv4 route it fails where a stranger's
    stands before one of ours (EEXIST, fib_table_insert), and where we want no metrics it keeps those there are, if the
    nexthop object stays the same (fib_find_info_nh). For an IPv6 route it fails if that leads elsewhere (`rtnl.clear`).
    Otherwise a route is replaced in place, and no packet is lost: a stranger's by itself, or flanneld's.
    """
    match found, want:
        case Fdb(), _:
            return not found.remote
        case Route(), Route() if len(want.destination.base) == 16:
            return found.device != want.device
        case Route(), Route():
            return found.protocol != PROTOCOL or not (found.nexthop or found.gateway) or found.mtu > want.mtu == 0
    return False
