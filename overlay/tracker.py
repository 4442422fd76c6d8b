"""What the kernel should hold, what it holds, and the writes that close the gap.

Owns `want` (from leases), `have` (from dumps, the monitor and acks) and the set of keys where they may differ. No I/O
and no clock: facts go in, an ordered list of operations comes out, and each pass starts from what is true by then. A
refused operation stays in the gap, and so does an entry that somebody removed: nothing else remembers history.
"""

from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping
from dataclasses import dataclass
from itertools import chain

from overlay.model import PROTOCOL, Drop, Entry, Fdb, Gone, Key, NextHop, Op, Put, Rank, Route, Sight


@dataclass(frozen=True, slots=True)
class Drift:
    """An entry was not as we had left it: `found` is what stands there now, None if nothing."""

    want: Entry
    found: Entry | None


@dataclass(frozen=True, slots=True)
class Refusal:
    """The kernel refused the operation with `errno` on its latest attempt."""

    op: Op
    errno: int


class Tracker:
    """Wanted and present entries. All methods cost time in proportion to what they are given.

    `owned` tells whether an entry nobody wants is ours to remove; other people's entries are not even remembered.
    """

    def __init__(self, owned: Callable[[Entry], bool]) -> None:
        self._owned = owned
        self._want: dict[Key, Entry] = {}
        self._have: dict[Key, Entry] = {}
        self._by_owner: dict[str, tuple[Entry, ...]] = {}
        self._shared: dict[Key, int] = {}
        """How many owners beyond one want a key; absent means one."""
        self._dirty: dict[Key, None] = {}
        """An ordered set: what came first is written first, and lies beside its like in memory."""
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
        for entry in entries:
            key = entry.key
            if key in self._want:
                self._shared[key] = self._shared.get(key, 0) + 1
            self._want[key] = entry
            if key in self._have:
                self._have[key] = self._intern(key, self._have[key])
            self._touch(key)
        for entry in before:
            self._release(entry.key)
        if entries:
            self._by_owner[owner] = entries
        else:
            del self._by_owner[owner]

    def _release(self, key: Key) -> None:
        others = self._shared.pop(key, 0)
        if others > 1:
            self._shared[key] = others - 1
        elif not others:
            del self._want[key]
        self._touch(key)

    @property
    def owners(self) -> KeysView[str]:
        """All who want something."""
        return self._by_owner.keys()

    # --- what there is ---

    def saw_all(self, entries: Iterable[Entry]) -> list[Drift]:
        """A complete dump. Returns what differs from what we believed to be in place."""
        seen: dict[Key, Entry] = {}
        for entry in entries:
            key = entry.key
            if key not in self._want and not self._owned(entry):
                continue
            if key in seen and isinstance(entry, Route):
                continue  # The kernel lists routes to one destination in its order: the first is in force.
            # The same MAC twice is one FDB entry with several remotes, which no replace can mend: see `_resists`.
            seen[key] = Fdb(entry.mac, b"") if isinstance(entry, Fdb) and key in seen else entry
        drifted = [
            Drift(want, seen.get(key))
            for key, want in self._want.items()
            if self._have.get(key) == want and seen.get(key) != want
        ]
        self._have = {key: self._intern(key, entry) for key, entry in seen.items()}
        self._refused.clear()
        strange = (key for key in seen if key not in self._want)
        self._dirty = dict.fromkeys(key for key in chain(self._want, strange) if self._differs(key))
        return drifted

    def saw(self, sights: Iterable[Sight]) -> list[Drift]:
        """What the monitor reported, in the kernel's order. Returns what somebody else changed.

        Echoes of our own writes must come together with whatever followed them: only the last sight of a key counts.
        """
        before: dict[Key, Entry | None] = {}
        for sight in self._with_silent_losses(sights):
            entry = sight.entry if isinstance(sight, Gone) else sight
            key = entry.key
            before.setdefault(key, self._have.get(key))
            if isinstance(sight, Gone) or (key not in self._want and not self._owned(sight)):
                self._have.pop(key, None)
            else:
                self._have[key] = self._intern(key, sight)
        drifted = []
        for key, old in before.items():
            now, want = self._have.get(key), self._want.get(key)
            if now == old:
                continue
            if isinstance(now, Fdb) and now != want:
                # Replaced or appended to: the notification does not say which.
                now = self._have[key] = Fdb(now.mac, b"", now.state)
            self._touch(key)
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
                    for entry in self._have.values():
                        if isinstance(entry, Route):
                            routes.setdefault(entry.nexthop, []).append(entry)
                for route in routes.pop(sight.entry.id, ()):
                    if self._have.get(route.key) == route:
                        yield Gone(route)

    def _intern(self, key: Key, entry: Entry) -> Entry:
        """The wanted object itself where it is equal: one object in memory for what is as it should be."""
        want = self._want.get(key)
        return want if want is not None and want == entry else entry

    # --- the gap ---

    def pending(self) -> list[Op]:
        """What closes the gap, in build order: a route never lacks the entries it stands on."""
        puts: list[list[Op]] = [[] for _ in Rank]
        drops: list[list[Op]] = [[] for _ in Rank]
        for key in self._dirty:
            want, have = self._want.get(key), self._have.get(key)
            if want is not None:
                puts[want.rank].append(Put(want, afresh=have is not None and _resists(have)))
            elif have is not None:
                drops[have.rank].append(Drop(have))
        return list(chain(*puts, *reversed(drops)))

    def settle(self, results: Iterable[tuple[Op, int]]) -> list[Refusal]:
        """The kernel's answers, as (operation, errno or 0). Returns what it refused; that stays pending."""
        refusals = []
        for op, errno in results:
            key = op.entry.key
            if errno:
                refusal = Refusal(op, errno)
                self._refused[key] = refusal
                self._dirty[key] = None
                refusals.append(refusal)
                continue
            if isinstance(op, Put):
                self._have[key] = op.entry
            else:
                self._have.pop(key, None)
            self._touch(key)
        if not self._dirty:
            # An emptied dict keeps the room for what was in it: megabytes after a start among thousands of peers.
            self._dirty = {}
        return refusals

    def _touch(self, key: Key) -> None:
        if self._differs(key):
            self._dirty[key] = None
        else:
            self._dirty.pop(key, None)
            self._refused.pop(key, None)

    def _differs(self, key: Key) -> bool:
        want, have = self._want.get(key), self._have.get(key)
        if want is have:  # The usual case, and far cheaper than to compare: see `_intern`.
            return False
        if want is None:
            return have is not None and self._owned(have)
        return want != have

    # --- for people ---

    @property
    def wanted(self) -> int:
        """How many entries are called for."""
        return len(self._want)

    @property
    def gap(self) -> int:
        """How many entries are not as they should be."""
        return len(self._dirty)

    @property
    def refused(self) -> Mapping[Key, Refusal]:
        """What the kernel refused on the latest attempt, by key."""
        return self._refused


def _resists(have: Entry) -> bool:
    """Whether NLM_F_REPLACE alone may not make what stands there equal to what we want.

    It changes only the first remote of an FDB entry (vxlan_fdb_replace). It fails where a stranger's route stands
    before one of ours (EEXIST, fib_table_insert), and keeps the metrics of a route of our protocol (fib_find_info_nh).
    Only a route of our protocol is removed first: a stranger's by itself is still replaced in place.
    """
    match have:
        case Fdb():
            return not have.remote
        case Route():
            return have.protocol != PROTOCOL or not (have.nexthop or have.gateway)
    return False
