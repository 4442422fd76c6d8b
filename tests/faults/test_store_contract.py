"""What keeper and watcher rely on of a store: the same expectations of a real etcd and of its twin.

Where one fails for etcd alone, etcd has taught us something: mend the fake, then what relied on it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import grpc
import pytest
from etcd3 import etcdrpc as rpc

from overlay.cluster import wait_until
from subnet_lease.store import Changes, Deleted, Record, Store, StoreError, StoreUnavailable, Watch, WatchInterrupted
from tests.faults.etcd_process import EtcdProcess
from tests.faults.fake_store import Data, FakeEtcd

pytestmark = pytest.mark.fault

KEY, OTHER = "10.5.1.0-24", "10.5.2.0-24"


class World(Protocol):
    """An etcd, a client of it, and what operators do to it. Unless stopped it runs, and `store` is connected."""

    store: Store

    def wait_until(self, condition: Callable[[], bool]) -> None: ...
    def compact(self, revision: int) -> None: ...
    def stop(self) -> None: ...
    def start(self) -> None: ...
    def save(self) -> None: ...
    def restore(self) -> None: ...
    def wipe(self) -> None: ...


class FakeWorld:
    def __init__(self) -> None:
        self._etcd = FakeEtcd()
        self._saved: Data | None = None
        self.store: Store = self._etcd.store()
        self.compact = self._etcd.compact
        self.stop = self._etcd.stop
        self.start = self._etcd.start

    def wait_until(self, condition: Callable[[], bool]) -> None:
        for _ in range(100):
            if condition():
                return
            self._etcd.advance(1)
        raise AssertionError("not within 100 s of its time")

    def save(self) -> None:
        self._saved = self._etcd.save()

    def restore(self) -> None:
        self._etcd.restore(self._saved)

    def wipe(self) -> None:
        self._etcd.restore(None)


class RealWorld:
    def __init__(self, etcd: EtcdProcess) -> None:
        self._etcd = etcd
        self.store: Store = etcd.store()
        self.stop = etcd.stop

    def wait_until(self, condition: Callable[[], bool]) -> None:
        wait_until(condition)

    def compact(self, revision: int) -> None:
        with contextlib.closing(grpc.insecure_channel(self._etcd.endpoint.removeprefix("http://"))) as channel:
            # With `physical` it is done when the answer comes.
            rpc.KVStub(channel).Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=5)

    def start(self) -> None:
        self._etcd.start()

        def answers() -> bool:
            with contextlib.suppress(StoreUnavailable):
                self.store.read_config()
                return True
            return False

        wait_until(answers)

    def save(self) -> None:
        self.stop()
        self._etcd.save("backup")
        self.start()

    def restore(self) -> None:
        self.stop()
        self._etcd.restore("backup")
        self.start()

    def wipe(self) -> None:
        self.stop()
        self._etcd.wipe()
        self.start()


@pytest.fixture(params=["etcd", "fake"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    if request.param == "fake":
        yield FakeWorld()
        return
    with EtcdProcess(tmp_path / "etcd") as etcd:
        real = RealWorld(etcd)
        with contextlib.closing(real.store):
            yield real


@pytest.fixture
def store(world: World) -> Store:
    return world.store


def revision(store: Store) -> int:
    return store.snapshot().revision


def put(store: Store, key: str, value: bytes = b"", etcd_lease: int = 0) -> int:
    created = store.create(key, value, etcd_lease)
    assert created
    return created


def begun(watch: Watch) -> Iterator[Changes]:
    """The changes of a watch that stands."""
    changes = iter(watch)
    assert next(changes).events == ()
    return changes


def following(changes: Iterator[Changes], count: int) -> list[Record | Deleted]:
    """The next events, which may come in several parts."""
    events: list[Record | Deleted] = []
    while len(events) < count:
        part = next(changes)
        events += part.events
        assert not part.events or part.revision == part.events[-1].mod_revision
    assert len(events) == count
    return events


# --- revisions ---


def test_every_transaction_that_changes_something_makes_one_revision(store: Store) -> None:
    start = revision(store)
    assert put(store, KEY, b"one") == start + 1
    store.write_config(b"{}")
    assert put(store, OTHER) == start + 3
    assert store.replace(KEY, b"one", 0, start + 1) == start + 4, "an equal value as well"
    assert store.delete(KEY, start + 4)
    assert revision(store) == start + 5


def test_what_changes_nothing_makes_no_revision(store: Store) -> None:
    created = put(store, KEY)
    assert store.create(KEY, b"", 0) == 0
    assert store.replace(KEY, b"", 0, created - 1) == 0
    assert store.replace(OTHER, b"", 0, created) == 0
    assert not store.delete(KEY, created - 1)
    assert not store.delete(OTHER, created)
    etcd_lease = store.grant(60)
    store.keep_alive(etcd_lease)
    store.revoke(etcd_lease)
    store.revoke(etcd_lease)
    assert revision(store) == created


def test_a_key_has_the_revision_of_its_creation_until_it_is_deleted(store: Store) -> None:
    created = put(store, KEY, b"one")
    replaced = store.replace(KEY, b"two", 0, created)
    assert store.snapshot().records == (Record(KEY, b"two", 0, created, replaced),)
    assert store.delete(KEY, replaced)
    again = put(store, KEY, b"three")
    assert store.snapshot().records == (Record(KEY, b"three", 0, again, again),)


def test_a_snapshot_is_in_the_order_of_the_bytes_of_its_keys(store: Store) -> None:
    keys = ["10.5.2.0-24", "", "\udcff", "é", "~", "10.5.10.0-24", "a"]
    for key in keys:
        put(store, key)
    found = [record.key for record in store.snapshot().records]
    assert found == sorted(keys, key=lambda key: key.encode("utf-8", "surrogateescape"))


def test_the_config_is_no_record(store: Store) -> None:
    assert store.read_config() is None
    store.write_config(b"{}")
    assert (store.read_config(), store.snapshot().records) == (b"{}", ())


def test_a_move_deletes_and_then_puts_in_one_revision(store: Store) -> None:
    etcd_lease = store.grant(60)
    first = put(store, KEY, b"one", etcd_lease)
    changes = begun(store.watch(first + 1))
    moved = store.move(KEY, first, OTHER, b"two", etcd_lease, 0)
    assert moved == first + 1
    assert following(changes, 2) == [Deleted(KEY, moved), Record(OTHER, b"two", etcd_lease, moved, moved)]
    assert store.snapshot().records == (Record(OTHER, b"two", etcd_lease, moved, moved),)
    store.revoke(etcd_lease)
    assert store.snapshot().records == ()


def test_a_move_may_go_to_a_key_that_is_there(store: Store) -> None:
    there = put(store, OTHER, b"one")
    first = put(store, KEY)
    moved = store.move(KEY, first, OTHER, b"two", 0, there)
    assert store.snapshot().records == (Record(OTHER, b"two", 0, there, moved),)


def test_a_move_takes_place_whole_or_not_at_all(store: Store) -> None:
    first = put(store, KEY, b"one")
    there = put(store, OTHER, b"two")
    before = store.snapshot()
    assert store.move(KEY, first, OTHER, b"three", 0, 0) == 0
    assert store.move(KEY, first, OTHER, b"three", 0, first) == 0
    assert store.move(KEY, there, OTHER, b"three", 0, there) == 0
    assert store.move("10.5.3.0-24", first, OTHER, b"three", 0, there) == 0
    ended = store.grant(60)
    store.revoke(ended)
    with pytest.raises(StoreUnavailable):
        store.move(KEY, first, OTHER, b"three", ended, there)
    assert store.snapshot() == before


# --- etcd leases ---


def test_a_renewed_lease_has_all_of_its_time_again(world: World, store: Store) -> None:
    etcd_lease = store.grant(60)
    world.wait_until(lambda: store.time_left(etcd_lease) <= 58)
    assert store.keep_alive(etcd_lease) == 60
    assert store.time_left(etcd_lease) >= 59


def test_a_lease_that_is_gone_has_no_time_and_cannot_be_renewed(store: Store) -> None:
    etcd_lease = store.grant(60)
    store.revoke(etcd_lease)
    assert (store.keep_alive(etcd_lease), store.time_left(etcd_lease)) == (0, 0)
    assert (store.keep_alive(12345), store.time_left(12345)) == (0, 0)
    store.revoke(12345)


def test_a_lease_has_a_least_time(store: Store) -> None:
    assert store.keep_alive(store.grant(1)) == 2


def test_a_lease_that_runs_out_takes_its_keys_along_in_one_revision(world: World, store: Store) -> None:
    etcd_lease = store.grant(2)
    put(store, OTHER, b"", etcd_lease)
    last = put(store, KEY, b"", etcd_lease)
    changes = begun(store.watch(last + 1))
    world.wait_until(lambda: not store.snapshot().records)
    assert following(changes, 2) == [Deleted(KEY, last + 1), Deleted(OTHER, last + 1)]
    assert revision(store) == last + 1
    assert store.keep_alive(etcd_lease) == 0


def test_a_key_belongs_to_the_lease_of_its_last_put_alone(store: Store) -> None:
    first, second = store.grant(60), store.grant(60)
    replaced = store.replace(KEY, b"", second, put(store, KEY, b"", first))
    store.revoke(first)
    assert [record.etcd_lease for record in store.snapshot().records] == [second]
    assert store.replace(KEY, b"", 0, replaced)
    store.revoke(second)
    assert [record.etcd_lease for record in store.snapshot().records] == [0]


def test_a_put_with_a_lease_that_is_gone_fails_if_it_would_take_place(store: Store) -> None:
    etcd_lease = store.grant(60)
    store.revoke(etcd_lease)
    with pytest.raises(StoreUnavailable):
        store.create(KEY, b"", etcd_lease)
    created = put(store, KEY)
    assert store.create(KEY, b"", etcd_lease) == 0
    with pytest.raises(StoreUnavailable):
        store.replace(KEY, b"", etcd_lease, created)
    assert revision(store) == created


def test_leases_have_all_of_their_time_again_after_a_restart(world: World, store: Store) -> None:
    etcd_lease = store.grant(60)
    world.wait_until(lambda: store.time_left(etcd_lease) <= 57)
    world.stop()
    world.start()
    assert store.time_left(etcd_lease) >= 58


# --- watches ---


def test_a_watch_that_stands_gets_every_change_and_nothing_of_the_config(store: Store) -> None:
    base = store.snapshot()
    changes = begun(store.watch(base.revision + 1, base.cluster_id))
    first = put(store, KEY, b"one")
    store.write_config(b"{}")
    assert store.delete(KEY, first)
    assert following(changes, 2) == [Record(KEY, b"one", 0, first, first), Deleted(KEY, first + 2)]


def test_a_watch_from_the_past_gets_what_happened_since(store: Store) -> None:
    first = put(store, KEY, b"one")
    second = store.replace(KEY, b"two", 0, first)
    store.delete(KEY, second)
    events = following(begun(store.watch(first)), 3)
    assert [event.mod_revision for event in events] == [first, second, second + 1]


def test_a_compaction_is_no_matter_for_a_watch_that_stands(world: World, store: Store) -> None:
    first = put(store, KEY)
    changes = begun(store.watch(first + 1))
    assert store.delete(KEY, first)
    put(store, OTHER)
    assert [event.key for event in following(changes, 2)] == [KEY, OTHER]
    world.compact(revision(store))
    last = put(store, KEY)
    assert [event.mod_revision for event in following(changes, 1)] == [last]


def test_a_watch_from_before_a_compaction_or_from_it_is_interrupted_for_good(world: World, store: Store) -> None:
    """From it: etcd forgets a deletion at the compacted revision, and says nothing of it (issue 18089)."""
    first = put(store, KEY)
    assert store.delete(KEY, first)
    last = put(store, OTHER)
    world.compact(first + 1)
    for begin in (first, first + 1):
        with pytest.raises(WatchInterrupted) as caught:
            list(store.watch(begin))
        assert (caught.value.resumable, caught.value.same_history) == (False, True)
    assert [event.mod_revision for event in following(begun(store.watch(last)), 1)] == [last]


def test_a_watch_ends_quietly_when_it_is_cancelled_or_its_store_is_closed(store: Store) -> None:
    watch = store.watch(revision(store) + 1)
    changes = begun(watch)
    watch.cancel()
    watch.cancel()
    assert list(changes) == []
    unused = store.watch(1)
    unused.cancel()
    assert list(unused) == []
    changes = begun(store.watch(revision(store) + 1))
    store.close()
    assert list(changes) == []
    with pytest.raises(StoreUnavailable):
        store.snapshot()


def test_another_cluster_interrupts_a_watch_for_good(store: Store) -> None:
    base = store.snapshot()
    with pytest.raises(WatchInterrupted) as caught:
        list(store.watch(base.revision + 1, base.cluster_id ^ 1))
    assert not caught.value.resumable


# --- outages ---


def test_without_etcd_no_call_is_answered_and_a_watch_is_interrupted_for_now(world: World, store: Store) -> None:
    created = put(store, KEY)
    changes = begun(store.watch(created + 1))
    world.stop()
    with pytest.raises(WatchInterrupted) as caught:
        list(changes)
    assert caught.value.resumable
    calls: list[Callable[[], object]] = [
        store.read_config,
        store.snapshot,
        lambda: store.grant(60),
        lambda: store.keep_alive(1),
        lambda: store.time_left(1),
        lambda: store.revoke(1),
        lambda: store.create(OTHER, b"", 0),
        lambda: store.replace(KEY, b"", 0, created),
        lambda: store.delete(KEY, created),
        lambda: store.move(KEY, created, OTHER, b"", 0, 0),
        lambda: list(store.watch(1)),
    ]
    for call in calls:
        with pytest.raises(StoreError) as error:
            call()
        assert isinstance(error.value, StoreUnavailable)
    world.start()
    assert revision(store) == created


def test_a_watch_goes_on_without_a_gap_after_a_restart(world: World, store: Store) -> None:
    base = store.snapshot()
    changes = begun(store.watch(base.revision + 1, base.cluster_id))
    first = put(store, KEY)
    assert following(changes, 1)
    world.stop()
    with pytest.raises(WatchInterrupted):
        list(changes)
    world.start()
    assert store.delete(KEY, first)
    events = following(begun(store.watch(first + 1, base.cluster_id)), 1)
    assert events == [Deleted(KEY, first + 1)]


def test_a_store_that_went_back_interrupts_a_watch_for_good(world: World, store: Store) -> None:
    first = put(store, KEY)
    world.save()
    for number in range(5):
        put(store, f"10.5.{10 + number}.0-24")
    resume = revision(store) + 1
    base = store.snapshot()
    world.restore()
    assert [record.key for record in store.snapshot().records] == [KEY]
    assert (revision(store), store.snapshot().cluster_id) == (first, base.cluster_id)
    with pytest.raises(WatchInterrupted) as caught:
        list(store.watch(resume, base.cluster_id))
    assert not caught.value.resumable


def test_a_store_that_went_back_and_has_grown_since_is_told_by_a_witness_alone(world: World, store: Store) -> None:
    world.save()
    resume = put(store, KEY) + 1
    witness = store.snapshot().records[0]
    begun(store.watch(resume, 0, witness))
    world.restore()
    put(store, KEY, b"", store.grant(60))
    last = put(store, OTHER)
    assert [event.mod_revision for event in following(begun(store.watch(resume)), 1)] == [last]
    with pytest.raises(WatchInterrupted) as caught:
        list(store.watch(resume, 0, witness))
    assert (caught.value.resumable, caught.value.same_history) == (False, False)


def test_a_witness_that_has_changed_since_is_good_as_long_as_its_past_is_kept(world: World, store: Store) -> None:
    first = put(store, KEY)
    witness = store.snapshot().records[0]
    second = store.replace(KEY, b"two", 0, first)
    assert store.delete(KEY, second)
    events = following(begun(store.watch(first + 1, 0, witness)), 2)
    assert [event.mod_revision for event in events] == [second, second + 1]
    world.compact(second)
    with pytest.raises(WatchInterrupted):
        list(store.watch(first + 1, 0, witness))
    assert following(begun(store.watch(second + 1)), 1)


def test_leases_of_a_backup_have_all_of_their_time_again_and_later_ones_are_gone(world: World, store: Store) -> None:
    kept, ended = store.grant(60), store.grant(60)
    put(store, KEY, b"", kept)
    put(store, OTHER, b"", ended)
    world.save()
    store.revoke(ended)
    later = store.grant(60)
    world.wait_until(lambda: store.time_left(kept) <= 57)
    world.restore()
    assert store.time_left(kept) >= 58
    assert store.time_left(ended) >= 58
    assert store.keep_alive(later) == 0
    assert [record.key for record in store.snapshot().records] == [KEY, OTHER]


def test_an_etcd_with_its_data_lost_begins_at_its_first_revision(world: World, store: Store) -> None:
    put(store, KEY)
    before = store.snapshot()
    world.wipe()
    after = store.snapshot()
    assert (after.records, after.revision) == ((), 1)
    # Its id follows from the names and addresses of its members.
    assert after.cluster_id == before.cluster_id
