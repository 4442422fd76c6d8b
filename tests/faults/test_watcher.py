"""The watcher against real etcd processes: nothing is lost, nothing is repeated without need, no CPU is burnt."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from etcd3 import etcdrpc as rpc
from structlog.testing import capture_logs

from overlay.cluster import wait_until
from subnet_lease.etcd import EtcdStore, EtcdWatch
from subnet_lease.store import Changes, Deleted, Record, Snapshot
from subnet_lease.watcher import Watcher
from tests.faults.etcd_process import EtcdProcess

pytestmark = pytest.mark.fault


class Consumer:
    """Keeps what a watcher delivers: the records as they are now, and how they came."""

    def __init__(self) -> None:
        self.snapshots: list[Snapshot] = []
        self.revisions: list[int] = []
        self.values: dict[str, bytes] = {}

    def __call__(self, delivered: Snapshot | Changes) -> None:
        if isinstance(delivered, Snapshot):
            self.values = {record.key: record.value for record in delivered.records}
            self.snapshots.append(delivered)
            return
        assert delivered.events
        for event in delivered.events:
            self.revisions.append(event.mod_revision)
            if isinstance(event, Deleted):
                self.values.pop(event.key, None)
            else:
                self.values[event.key] = event.value


@contextlib.contextmanager
def watching(store: EtcdStore, consumer: Consumer, **options: float) -> Iterator[Watcher]:
    """A watcher that runs in a thread of its own, and has ended afterwards."""
    watcher = Watcher(store, consumer, **options)
    thread = threading.Thread(target=watcher.run)
    thread.start()
    try:
        yield watcher
    finally:
        watcher.stop()
        thread.join(10)
        assert not thread.is_alive()
        assert not watcher.connected


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdProcess]:
    with EtcdProcess(tmp_path / "etcd") as etcd:
        yield etcd


@pytest.fixture
def store(etcd: EtcdProcess) -> Iterator[EtcdStore]:
    with contextlib.closing(etcd.store()) as store:
        yield store


@pytest.fixture
def writer(etcd: EtcdProcess) -> Iterator[EtcdStore]:
    with contextlib.closing(etcd.store()) as writer:
        yield writer


def put(store: EtcdStore, key: str, value: bytes = b"") -> int:
    """Create a key; the revision. To be used only while etcd answers."""
    revision = store.create(key, value, 0)
    assert revision
    return revision


def compact(etcd: EtcdProcess, revision: int) -> None:
    with contextlib.closing(grpc.insecure_channel(etcd.endpoint.removeprefix("http://"))) as channel:
        rpc.KVStub(channel).Compact(rpc.CompactionRequest(revision=revision), timeout=5)


def wait_until_answering(store: EtcdStore) -> None:
    def answers() -> bool:
        try:
            store.read_config()
        except Exception:
            return False
        return True

    wait_until(answers)


def test_a_snapshot_comes_first_and_then_each_change(store: EtcdStore, writer: EtcdStore) -> None:
    first = put(writer, "10.5.1.0-24", b"one")
    consumer = Consumer()
    with watching(store, consumer) as watcher:
        wait_until(lambda: watcher.connected)
        assert consumer.values == {"10.5.1.0-24": b"one"}
        second = put(writer, "10.5.2.0-24", b"two")
        assert writer.delete("10.5.1.0-24", first)
        wait_until(lambda: consumer.values == {"10.5.2.0-24": b"two"})
    assert consumer.revisions == [second, second + 1]
    assert len(consumer.snapshots) == 1
    assert watcher.age() is not None


def test_the_table_ages_while_no_watch_stands_and_only_then(etcd: EtcdProcess, store: EtcdStore) -> None:
    with watching(store, Consumer()) as watcher:
        wait_until(lambda: watcher.connected)
        assert watcher.age() == 0
        etcd.kill()
        wait_until(lambda: not watcher.connected)
        first = watcher.age()
        assert first is not None
        wait_until(lambda: (watcher.age() or 0) > first + 0.2)
        assert watcher.pulse.trouble() == ""
        etcd.start()
        wait_until(lambda: watcher.connected)
        assert watcher.age() == 0


def test_a_watcher_that_never_reached_its_store_knows_no_age(store: EtcdStore) -> None:
    assert Watcher(store, Consumer()).age() is None


def test_an_etcd_killed_and_restarted_loses_no_event_and_costs_no_snapshot(
    etcd: EtcdProcess, store: EtcdStore, writer: EtcdStore
) -> None:
    consumer = Consumer()
    expected: list[int] = []

    def caught_up() -> bool:
        return consumer.revisions == expected

    with capture_logs() as logs, watching(store, consumer) as watcher:
        wait_until(lambda: watcher.connected)
        for round_ in range(3):
            expected += [put(writer, f"10.{round_}.{n}.0-24") for n in range(20)]
            wait_until(caught_up)
            etcd.kill()
            wait_until(lambda: not watcher.connected)
            etcd.start()
            wait_until_answering(writer)
            expected += [put(writer, f"10.{round_}.{n}.0-24") for n in range(100, 120)]
            wait_until(caught_up)
            wait_until(lambda: watcher.connected)
    assert len(consumer.snapshots) == 1
    events = [entry["event"] for entry in logs if entry["event"].startswith("store_")]
    assert events == ["store_unreachable", "store_reachable"] * 3
    assert all(entry["away_s"] >= 0 for entry in logs if entry["event"] == "store_reachable")


class GatedStore(EtcdStore):
    """A store whose watches begin only while the gate is open, so that what happens meanwhile is no matter of luck."""

    def __init__(self, endpoint: str) -> None:
        super().__init__([endpoint], "/coreos.com/network")
        self.gate = threading.Event()
        self.gate.set()

    def watch(self, revision: int, cluster_id: int = 0, witness: Record | None = None) -> EtcdWatch:
        assert self.gate.wait(30)
        return super().watch(revision, cluster_id, witness)


def test_a_compaction_while_away_ends_in_a_snapshot(etcd: EtcdProcess, writer: EtcdStore) -> None:
    first = put(writer, "10.5.1.0-24")
    consumer = Consumer()
    with (
        contextlib.closing(GatedStore(etcd.endpoint)) as store,
        capture_logs() as logs,
        watching(store, consumer) as watcher,
    ):
        wait_until(lambda: watcher.connected)
        store.gate.clear()
        etcd.restart()
        wait_until_answering(writer)
        assert writer.delete("10.5.1.0-24", first)
        last = put(writer, "10.5.2.0-24")
        compact(etcd, last)
        store.gate.set()
        wait_until(lambda: len(consumer.snapshots) == 2)
        assert consumer.values.keys() == {"10.5.2.0-24"}
    assert [entry["log_level"] for entry in logs if entry["event"] == "watch_interrupted"] == ["warning"]


def test_another_cluster_at_the_address_ends_in_a_snapshot(
    etcd: EtcdProcess, store: EtcdStore, writer: EtcdStore
) -> None:
    put(writer, "10.5.1.0-24")
    consumer = Consumer()
    with watching(store, consumer) as watcher:
        wait_until(lambda: watcher.connected)
        etcd.kill()
        etcd.wipe()
        etcd.start()
        wait_until(lambda: len(consumer.snapshots) == 2)
        assert consumer.values == {}


def test_a_restored_backup_ends_in_a_snapshot(etcd: EtcdProcess, store: EtcdStore, writer: EtcdStore) -> None:
    put(writer, "10.5.1.0-24")
    etcd.stop()
    etcd.save("backup")
    etcd.start()
    wait_until_answering(writer)
    put(writer, "10.5.2.0-24")
    consumer = Consumer()
    with watching(store, consumer) as watcher:
        wait_until(lambda: watcher.connected)
        assert len(consumer.values) == 2
        etcd.kill()
        etcd.restore("backup")
        etcd.start()
        wait_until(lambda: len(consumer.snapshots) == 2)
        assert consumer.values.keys() == {"10.5.1.0-24"}
        wait_until(lambda: watcher.connected)


def test_a_snapshot_is_taken_anew_when_its_time_has_come(store: EtcdStore, writer: EtcdStore) -> None:
    consumer = Consumer()
    with watching(store, consumer, relist_s=0.0) as watcher:
        # A sign of life or a change shows that the time has come.
        wait_until(lambda: len(consumer.snapshots) >= 3)
        put(writer, "10.5.1.0-24")
        wait_until(lambda: consumer.values == {"10.5.1.0-24": b""})
    assert watcher.age() is not None


def test_an_etcd_that_is_away_costs_no_cpu_and_one_line(etcd: EtcdProcess, store: EtcdStore) -> None:
    consumer = Consumer()
    etcd.kill()
    with capture_logs() as logs, watching(store, consumer):
        wait_until(lambda: any(entry["event"] == "store_unreachable" for entry in logs))
        spent = time.process_time()
        time.sleep(3)
        spent = time.process_time() - spent
    assert spent < 0.1
    assert [entry["event"] for entry in logs if entry["log_level"] != "debug"] == ["store_unreachable"]


def test_a_stop_ends_a_wait_at_once(etcd: EtcdProcess, store: EtcdStore) -> None:
    etcd.kill()
    watcher = Watcher(store, Consumer(), jitter=lambda: 1000.0)  # Its first wait would take minutes.
    thread = threading.Thread(target=watcher.run)
    with capture_logs() as logs:
        thread.start()
        wait_until(lambda: logs)
        watcher.stop()
        thread.join(10)
    assert not thread.is_alive()


def test_a_watch_that_is_denied_is_retried_without_hurry(etcd: EtcdProcess, store: EtcdStore) -> None:
    with contextlib.closing(grpc.insecure_channel(etcd.endpoint.removeprefix("http://"))) as channel:
        auth = rpc.AuthStub(channel)
        auth.UserAdd(rpc.AuthUserAddRequest(name="root", password="top"), timeout=5)
        auth.RoleAdd(rpc.AuthRoleAddRequest(name="root"), timeout=5)
        auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"), timeout=5)
        auth.AuthEnable(rpc.AuthEnableRequest(), timeout=5)
    consumer = Consumer()
    with capture_logs() as logs, watching(store, consumer):
        time.sleep(2)
    assert [entry["event"] for entry in logs if entry["log_level"] != "debug"] == ["store_denied"]
    assert consumer.snapshots == []
