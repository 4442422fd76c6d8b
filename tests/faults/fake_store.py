"""etcd's twin for tests: a stateful `subnet_lease.store.Store` without a process, a clock or a thread of its own.

It is as awkward as the real one, and `test_store_contract.py` holds both to the same expectations:

- one revision for each transaction that changes something, the config key's included; none for one that does not
- an etcd lease that ends takes its keys along in one revision; one that is gone fails a put, if the put takes place
- a watch that stands gets every change, compacted or not; one that begins anew is told of a compaction, of another
  cluster, of a store that went back behind it, and of one whose witness stands otherwise; without a witness it is not
  told of a store that went back and has grown since
- etcd leases have all of their time again after a restart or a restore; none runs out while etcd is away

`FakeEtcd` is the server, with what operators and accidents do to it; `FakeStore` is one client. Of what may happen to
one call, `FakeStore.plots` decides.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from subnet_lease.store import Changes, Deleted, Record, Snapshot, StoreError, StoreUnavailable, WatchInterrupted

T = TypeVar("T")

SHORTEST_TTL = 2
"""Seconds; etcd grants no less (lessor.minLeaseTTL, from the election timeout)."""

Plot = Callable[[Callable[[], Any]], Any]
"""What becomes of one call: gets the work, does it or not, gives or withholds the answer. See `lost`, `unanswered`."""


class _LeaseGone(StoreUnavailable):
    """The etcd lease named in a request does not exist."""


@dataclass
class Data:
    """All that etcd has on its disk, and the events it has forgotten.

    `grants`: seconds granted and the time of the end, by etcd lease.
    """

    cluster_id: int
    revision: int = 1
    compacted: int = 0
    config: bytes | None = None
    records: dict[str, Record] = field(default_factory=dict)
    events: list[Record | Deleted] = field(default_factory=list)
    grants: dict[int, tuple[int, float]] = field(default_factory=dict)

    def copy(self) -> "Data":
        return replace(self, records=dict(self.records), events=list(self.events), grants=dict(self.grants))


class FakeEtcd:
    """A cluster of one. Time stands still but for `advance`.

    `idle` is called where a client would wait for a watch to say something; it returns when that may have happened.
    """

    def __init__(self, idle: Callable[[], None] | None = None) -> None:
        self.now = 0.0
        self.up = True
        self.idle = idle or _forever
        self.history = 0
        """Grows whenever the data is replaced by other data: within one history no revision stands for two things."""
        self.watches: list[FakeWatch] = []
        self._late: list[Callable[[], object]] = []
        self._clusters = itertools.count(0xC1D0)
        # Random in etcd, so never the same again, whatever is restored.
        self._ids = itertools.count(7_000_001)
        self.data = Data(next(self._clusters))

    def store(self) -> "FakeStore":
        """Another client."""
        return FakeStore(self)

    # --- what operators and accidents do ---

    def advance(self, seconds: float) -> None:
        """Time passes; etcd leases that end do so in their order."""
        end = self.now + seconds
        while ending := [(at, each) for each, (_, at) in self.data.grants.items() if at <= end and self.up]:
            self.now, etcd_lease = min(ending)
            self.revoke(etcd_lease)
        self.now = end

    def stop(self) -> None:
        """The process ends: watches break, what is on its way is lost."""
        self.up = False
        self._late.clear()
        for watch in list(self.watches):
            watch.interrupt()

    def start(self) -> None:
        """It runs again, on the data there is. A new leader gives all leases their time anew."""
        self.up = True
        self.data.grants = {each: (ttl, self.now + ttl) for each, (ttl, _) in self.data.grants.items()}

    def compact(self, revision: int) -> None:
        """Forget what was superseded before `revision`."""
        assert self.up and self.data.compacted < revision <= self.data.revision, "etcd refuses this"
        self.data.compacted = revision

    def at(self, revision: int, key: str) -> Record | None:
        """The record as of a revision that is not compacted."""
        events = (event for event in self.data.events if event.key == key and event.mod_revision <= revision)
        last = max(events, key=lambda event: event.mod_revision, default=None)
        return last if isinstance(last, Record) else None

    def save(self) -> Data:
        """A backup."""
        return self.data.copy()

    def restore(self, backup: Data | None, *, other_cluster: bool = False) -> None:
        """Put a backup in place of all there is, or nothing at all, and start on it.

        A backup that was made with `etcdctl snapshot restore` may be a cluster of another id; one of files is not. Nor
        is an empty etcd another cluster, if its members are called as before.
        """
        self.stop()
        data = Data(self.data.cluster_id) if backup is None else backup.copy()
        data.cluster_id = next(self._clusters) if other_cluster else self.data.cluster_id
        self.data = data
        self.history += 1
        self.start()

    def say_something(self) -> None:
        """A sign of life on all watches, as etcd gives every ten minutes."""
        for watch in self.watches:
            watch.alive = True

    def arrive(self) -> None:
        """Requests that nobody waits for any more reach etcd, and take place."""
        late, self._late = self._late, []
        for work in late:
            try:
                work()
            except StoreError:
                continue

    def delay(self, work: Callable[[], object]) -> None:
        """Keep a request for `arrive`."""
        self._late.append(work)

    def alive(self, etcd_lease: int) -> bool:
        """Whether there is such a lease."""
        return etcd_lease in self.data.grants

    # --- transactions ---

    def revoke(self, etcd_lease: int) -> None:
        """End a lease; all its keys go in one revision."""
        if self.data.grants.pop(etcd_lease, None):
            keys = sorted(record.key for record in self.data.records.values() if record.etcd_lease == etcd_lease)
            self.commit(*(Deleted(key, self.data.revision + 1) for key in keys))

    def grant(self, ttl: int) -> int:
        etcd_lease, seconds = next(self._ids), max(ttl, SHORTEST_TTL)
        self.data.grants[etcd_lease] = seconds, self.now + seconds
        return etcd_lease

    def put(self, key: str, value: bytes, etcd_lease: int, mod_revision: int) -> int:
        """Put `key` if it was last changed at `mod_revision`, 0: if it does not exist. The new revision, else 0."""
        data = self.data
        old = data.records.get(key)
        if (old.mod_revision if old else 0) != mod_revision:
            return 0
        if etcd_lease and etcd_lease not in data.grants:
            raise _LeaseGone("the etcd lease has ended meanwhile")
        revision = data.revision + 1
        self.commit(Record(key, value, etcd_lease, old.create_revision if old else revision, revision))
        return revision

    def move(self, old: str, old_revision: int, key: str, value: bytes, etcd_lease: int, mod_revision: int) -> int:
        """Delete `old`, then put `key`, if they were last changed at these revisions. The new revision, else 0."""
        records = self.data.records
        found = tuple(records[each].mod_revision if each in records else 0 for each in (old, key))
        if found != (old_revision, mod_revision):
            return 0
        if etcd_lease and etcd_lease not in self.data.grants:
            raise _LeaseGone("the etcd lease has ended meanwhile")
        revision = self.data.revision + 1
        created = records[key].create_revision if key in records else revision
        self.commit(
            *([Deleted(old, revision)] if old in records else []), Record(key, value, etcd_lease, created, revision)
        )
        return revision

    def delete(self, key: str, mod_revision: int) -> bool:
        old = self.data.records.get(key)
        if old is None or old.mod_revision != mod_revision:
            return False
        self.commit(Deleted(key, self.data.revision + 1))
        return True

    def write_config(self, value: bytes) -> None:
        self.data.config = value
        self.data.revision += 1

    def commit(self, *events: Record | Deleted) -> None:
        """One transaction. Nothing at all is none."""
        data = self.data
        for event in events:
            data.revision = event.mod_revision
            data.events.append(event)
            if isinstance(event, Record):
                data.records[event.key] = event
            else:
                del data.records[event.key]
        for watch in self.watches:
            watch.unread += events


class FakeStore:
    """One client of a `FakeEtcd`: `subnet_lease.store.Store`."""

    def __init__(self, etcd: FakeEtcd) -> None:
        self.etcd = etcd
        self.plots: dict[str, Plot] = {}
        """By name of the method, what becomes of its next call."""
        self.deceived = False
        """Whether the latest watch was begun on a store that had gone back, and could not tell."""
        self._reachable = True
        self._closed = False
        self._histories: dict[int, int] = {}
        """For each revision a watch may begin at: the history in which all before it was seen."""

    @property
    def reachable(self) -> bool:
        """Whether etcd answers this client."""
        return self._reachable and self.etcd.up and not self._closed

    def cut_off(self) -> None:
        """The network between this client and etcd fails."""
        self._reachable = False
        for watch in [watch for watch in self.etcd.watches if watch.store is self]:
            watch.interrupt()

    def reconnect(self) -> None:
        self._reachable = True

    # --- the Store protocol ---

    def read_config(self) -> bytes | None:
        return self.meet("read_config", lambda: self.etcd.data.config)

    def write_config(self, value: bytes) -> None:
        self.meet("write_config", lambda: self.etcd.write_config(value))

    def snapshot(self) -> Snapshot:
        def read() -> Snapshot:
            data = self.etcd.data
            self.saw_all_before(data.revision + 1)
            records = sorted(data.records.values(), key=lambda record: record.key.encode("utf-8", "surrogateescape"))
            return Snapshot(tuple(records), data.revision, data.cluster_id)

        return self.meet("snapshot", read)

    def watch(self, revision: int, cluster_id: int = 0, witness: Record | None = None) -> "FakeWatch":
        return FakeWatch(self, revision, cluster_id, witness)

    def grant(self, ttl: int) -> int:
        return self.meet("grant", lambda: self.etcd.grant(ttl))

    def keep_alive(self, etcd_lease: int) -> int:
        def renew() -> int:
            grants = self.etcd.data.grants
            if etcd_lease not in grants:
                return 0
            seconds, _ = grants[etcd_lease]
            grants[etcd_lease] = seconds, self.etcd.now + seconds
            return seconds

        return self.meet("keep_alive", renew)

    def time_left(self, etcd_lease: int) -> int:
        def left() -> int:
            _, end = self.etcd.data.grants.get(etcd_lease, (0, self.etcd.now))
            return int(end - self.etcd.now)

        return self.meet("time_left", left)

    def revoke(self, etcd_lease: int) -> None:
        self.meet("revoke", lambda: self.etcd.revoke(etcd_lease))

    def create(self, key: str, value: bytes, etcd_lease: int) -> int:
        return self.meet("create", lambda: self.etcd.put(key, value, etcd_lease, 0))

    def replace(self, key: str, value: bytes, etcd_lease: int, mod_revision: int) -> int:
        return self.meet("replace", lambda: self.etcd.put(key, value, etcd_lease, mod_revision))

    def delete(self, key: str, mod_revision: int) -> bool:
        return self.meet("delete", lambda: self.etcd.delete(key, mod_revision))

    def move(self, old: str, old_revision: int, key: str, value: bytes, etcd_lease: int, mod_revision: int) -> int:
        return self.meet("move", lambda: self.etcd.move(old, old_revision, key, value, etcd_lease, mod_revision))

    def close(self) -> None:
        self._closed = True

    # --- for watches ---

    def saw_all_before(self, revision: int) -> None:
        """This client knows all before `revision`, of the present history: a watch from there on has no gap."""
        self._histories[revision] = self.etcd.history

    def begins(self, revision: int) -> None:
        """A watch begins at `revision`: is what was known before it still the past of what comes?"""
        self.deceived = self._histories.get(revision, self.etcd.history) != self.etcd.history

    def closed(self) -> bool:
        return self._closed

    def meet(self, name: str, work: Callable[[], T]) -> T:
        """One call, and what becomes of it. That of a watch comes after its first sign of life, before any event."""
        if not self.reachable:
            raise StoreUnavailable("no connection to etcd")
        plot = self.plots.pop(name, None)
        answer: T = plot(work) if plot else work()
        return answer

    # --- plots ---

    def lost(self, work: Callable[[], object]) -> None:
        """The request never reaches etcd."""
        raise StoreUnavailable("no answer")

    def unanswered(self, work: Callable[[], object]) -> None:
        """It takes place, and nobody is told."""
        work()
        raise StoreUnavailable("no answer")

    def late(self, work: Callable[[], object]) -> None:
        """It takes place after its sender has given up: with `FakeEtcd.arrive`."""
        self.etcd.delay(work)
        raise StoreUnavailable("no answer")


class FakeWatch:
    """`subnet_lease.store.Watch`. It stands in its iteration, from the first sign of life to the end."""

    def __init__(self, store: FakeStore, revision: int, cluster_id: int, witness: Record | None) -> None:
        self.store = store
        self.unread: list[Record | Deleted] = []
        self.alive = False
        self._revision = revision
        self._cluster_id = cluster_id
        self._witness = witness
        self._cancelled = False
        self._broken = False

    def cancel(self) -> None:
        self._cancelled = True

    def interrupt(self) -> None:
        """The connection breaks, and what is on its way is lost."""
        self._broken = True
        self.unread.clear()
        if self in self.store.etcd.watches:
            self.store.etcd.watches.remove(self)

    def __iter__(self) -> Iterator[Changes]:
        etcd = self.store.etcd
        if self._ended():
            return
        if not self.store.reachable:
            raise StoreUnavailable("no connection to etcd")
        self._look_back()
        self.store.begins(self._revision)
        if self._revision:
            self.unread += [event for event in etcd.data.events if event.mod_revision >= self._revision]
        etcd.watches.append(self)
        try:
            yield Changes((), etcd.data.revision)
            try:
                self.store.meet("watch", lambda: None)
            except StoreUnavailable:
                self.interrupt()
            while not self._ended():
                if self._broken:
                    raise WatchInterrupted("the connection broke", resumable=True)
                if self.unread:
                    events, self.unread = tuple(self.unread), []
                    self.store.saw_all_before(events[-1].mod_revision + 1)
                    yield Changes(events, events[-1].mod_revision)
                elif self.alive:
                    self.alive = False
                    yield Changes((), etcd.data.revision)
                else:
                    etcd.idle()
        finally:
            if self in etcd.watches:
                etcd.watches.remove(self)

    def _look_back(self) -> None:
        """WatchInterrupted unless what was known is what has happened here."""
        data, before = self.store.etcd.data, self._revision - 1
        if self._cluster_id not in (0, data.cluster_id):
            raise WatchInterrupted("another etcd cluster answers")
        if before > 0 and not data.compacted <= before <= data.revision:
            raise WatchInterrupted(f"etcd does not have revision {before}: restored, or compacted since")
        if self._witness is not None:
            there = self.store.etcd.at(before, self._witness.key)
            if there is None or there[2:] != self._witness[2:]:
                raise WatchInterrupted(f"etcd has another revision {before}", same_history=False)

    def _ended(self) -> bool:
        return self._cancelled or self.store.closed()


def _forever() -> None:
    raise AssertionError("this watch has nothing to say, and nobody is there to change that")
