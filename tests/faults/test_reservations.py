"""Reservations against a real etcd: what the commands write, what keepers make of it, and who is faster."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from overlay import reservations
from overlay.cluster import wait_until
from overlay.reservations import ReservationRefused, reserve, reserved_value, unreserve
from subnet_lease.etcd import EtcdStore
from subnet_lease.keeper import Identity, Keeper, release_lease
from subnet_lease.model import (
    Lease,
    LeaseAttrs,
    NetworkConfig,
    Prefix,
    Vtep,
    decode_attrs,
    encode_attrs,
    format_mac,
    pack_address,
)
from subnet_lease.store import Deleted, Record, Snapshot, Store, StoreUnavailable
from subnet_lease.watcher import Watcher
from tests.faults.etcd_process import EtcdProcess

pytestmark = pytest.mark.fault

ROOT = Path(__file__).parents[2]

VALUE = b'{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}'
CONFIG = NetworkConfig.parse(VALUE)
SUBNET = (Prefix.parse("10.5.34.0/24"),)
KEY = "10.5.34.0-24"
HOST = pack_address("192.168.0.5")
OTHER = pack_address("192.168.0.6")
OWN_MAC = b"\x02\0\0\0\0\x05"


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    with EtcdProcess(tmp_path_factory.mktemp("etcd")) as process:
        yield process


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    return f"/test/{request.node.name}"


@pytest.fixture
def store(etcd: EtcdProcess, prefix: str) -> Iterator[EtcdStore]:
    with contextlib.closing(etcd.store(prefix)) as store:
        store.write_config(VALUE)
        yield store


def records(store: Store) -> dict[str, Record]:
    return {record.key: record for record in store.snapshot().records}


def own_attrs(previous: Lease | None, public_ip: bytes = HOST) -> LeaseAttrs:
    """As the agent has it: the MAC of the lease there was, and facts of the host."""
    known = previous.attrs.vtep if previous else None
    return LeaseAttrs(public_ip, "vxlan", known or Vtep(1, OWN_MAC), node_name="node-5")


def keeper(store: Store, on_lease: Callable[[Lease], None] = lambda _: None, preferred: str | None = None) -> Keeper:
    """The keeper of an agent on HOST, which renews halfway through each lease."""
    before = (Prefix.parse(preferred),) if preferred else ()
    return Keeper(
        store, CONFIG, Identity(HOST), own_attrs, ttl=60, renew_margin=86400, preferred=before, on_lease=on_lease
    )  # fmt: skip


@contextlib.contextmanager
def running(store: Store, preferred: str | None = None) -> Iterator[list[Lease]]:
    """An agent's keeper and watcher on HOST; the leases that it came to hold, the first included."""
    held: list[Lease] = []
    own = keeper(store, held.append, preferred)
    watcher = Watcher(store, own.saw)
    threads = [threading.Thread(target=own.run), threading.Thread(target=watcher.run)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: held)
        yield held
    finally:
        own.stop()
        watcher.stop()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


# --- reserving ---


def test_host_takes_what_is_reserved_for_it_with_its_mac_and_keeps_it_over_restarts(store: EtcdStore) -> None:
    assert reserve(store, CONFIG, SUBNET, HOST) == "10.5.34.0/24 is reserved for 192.168.0.5"
    reserved = records(store)[KEY]
    assert (reserved.value, reserved.etcd_lease) == (reserved_value(CONFIG, SUBNET, HOST), 0)

    first = keeper(store, preferred="10.5.77.0/24").acquire()
    assert first is not None
    assert (first.subnets, first.reserved) == (SUBNET, True)
    taken = records(store)
    assert taken.keys() == {KEY}
    assert decode_attrs(taken[KEY].value) == decode_attrs(reserved.value)._replace(node_name="node-5")

    assert keeper(store).acquire() == first
    kept = release_lease(store, Identity(HOST))
    assert kept is not None
    assert kept.reserved
    assert records(store) == taken


def test_other_hosts_leave_a_reserved_subnet_alone(store: EtcdStore) -> None:
    reserve(store, CONFIG, SUBNET, HOST)
    other = Keeper(
        store, CONFIG, Identity(OTHER), lambda lease: own_attrs(lease, OTHER), ttl=60, renew_margin=20,
        preferred=SUBNET, on_lease=lambda _: None,
    )  # fmt: skip
    lease = other.acquire()
    assert lease is not None
    assert lease.subnets != SUBNET


def test_reserving_again_what_is_reserved_alike_writes_nothing(store: EtcdStore) -> None:
    reserve(store, CONFIG, SUBNET, HOST)
    before = records(store)
    assert reserve(store, CONFIG, SUBNET, HOST) == "10.5.34.0/24 is reserved for 192.168.0.5 already"
    assert records(store) == before


def test_lease_of_a_running_host_becomes_its_reservation(store: EtcdStore) -> None:
    with running(store, str(SUBNET[0])) as held:
        before = records(store)[KEY]
        said = reserve(store, CONFIG, SUBNET, HOST)
        assert said == "10.5.34.0/24, which 192.168.0.5 leased, is reserved for it from now on"
        wait_until(lambda: held[-1].reserved)
        assert len(held) == 2
    after = records(store)[KEY]
    assert (after.value, after.etcd_lease, after.create_revision) == (before.value, 0, before.create_revision)
    # The etcd lease that is left holds nothing any more.
    store.revoke(before.etcd_lease)
    assert records(store)[KEY] == after


def test_refused_reservation_writes_nothing(store: EtcdStore) -> None:
    store.create(KEY, encode_attrs(own_attrs(None, OTHER)), store.grant(60))
    before = records(store)
    with pytest.raises(ReservationRefused, match=r"^10.5.34.0/24 is leased by 192.168.0.6 \(node-5\); "):
        reserve(store, CONFIG, SUBNET, HOST)
    assert records(store) == before


# --- who is faster ---


class Overtaken:
    """A store on which `happens` take place, one just before each call of `name`."""

    def __init__(self, store: EtcdStore, name: str, *happens: Callable[[], object]) -> None:
        self._store, self._name, self._happens = store, name, list(happens)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name != self._name:
            return method

        def overtaken(*args: object) -> object:
            if self._happens:
                self._happens.pop(0)()
            return method(*args)

        return overtaken


def test_host_that_takes_another_subnet_meanwhile_keeps_it_and_the_reservation_is_withdrawn(store: EtcdStore) -> None:
    def meanwhile() -> None:
        store.create("10.5.9.0-24", encode_attrs(own_attrs(None)), store.grant(60))

    with pytest.raises(ReservationRefused, match=r"^192.168.0.5 has 10.5.9.0/24 leased already; "):
        reserve(Overtaken(store, "create", meanwhile), CONFIG, SUBNET, HOST)
    assert records(store).keys() == {"10.5.9.0-24"}


def test_host_that_takes_its_first_subnet_meanwhile_moves_to_what_is_reserved(store: EtcdStore) -> None:
    """The reservation is made after the host has looked, and before it takes another subnet."""
    held: list[Lease] = []
    late = Overtaken(store, "create", lambda: reserve(store, CONFIG, SUBNET, HOST))
    own = keeper(late, held.append)
    watcher = Watcher(store, own.saw)
    threads = [threading.Thread(target=own.run), threading.Thread(target=watcher.run)]
    revision = store.snapshot().revision
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: held and held[-1].subnets == SUBNET)
    finally:
        own.stop()
        watcher.stop()
        for thread in threads:
            thread.join(10)
    first, last = held
    assert not first.reserved
    assert last.reserved
    assert last.attrs == first.attrs, "peers know its MAC by now"
    assert records(store).keys() == {KEY}
    # A flanneld that forgets the MAC with the old key learns it again with the new one.
    changes = iter(store.watch(revision + 1))
    events = []
    while len(events) < 4:
        events += next(changes).events
    assert [type(event) for event in events] == [Record, Record, Deleted, Record]
    assert (events[2].key, events[3].key) == (first.key, KEY)
    assert events[2].mod_revision == events[3].mod_revision


def test_reservation_that_its_host_takes_before_it_is_withdrawn_stays(store: EtcdStore) -> None:
    """`reserve` sees what the host took first, and wants to withdraw; the host has moved already."""
    own = keeper(Overtaken(store, "create", lambda: create_only(store)))
    first = own.acquire()
    assert first is not None

    def moves() -> None:
        own.check()
        assert own.acquire() is not None

    # As the second half of `reserve`: what it created is there, and so is the host's lease.
    class Half(Overtaken):
        def snapshot(self) -> Snapshot:
            if not self.begun:
                self.begun = True
                return Snapshot((), 0, 0)
            return store.snapshot()

        def create(self, key: str, value: bytes, etcd_lease: int) -> int:
            return records(store)[KEY].create_revision

        begun = False

    said = reserve(Half(store, "delete", moves), CONFIG, SUBNET, HOST)
    assert said.startswith("10.5.34.0/24 is reserved for 192.168.0.5")
    assert records(store).keys() == {KEY}


def create_only(store: EtcdStore) -> None:
    store.create(KEY, reserved_value(CONFIG, SUBNET, HOST), 0)


def test_another_host_that_takes_the_subnet_meanwhile_keeps_it(store: EtcdStore) -> None:
    def meanwhile() -> None:
        store.create(KEY, encode_attrs(own_attrs(None, OTHER)), store.grant(60))

    with pytest.raises(ReservationRefused, match=r"^10.5.34.0/24 is leased by 192.168.0.6 "):
        reserve(Overtaken(store, "create", meanwhile), CONFIG, SUBNET, HOST)
    assert decode_attrs(records(store)[KEY].value).public_ip == OTHER


def test_host_that_takes_the_subnet_meanwhile_gets_it_as_its_reservation(store: EtcdStore) -> None:
    def meanwhile() -> None:
        store.create(KEY, encode_attrs(own_attrs(None)), store.grant(60))

    reserve(Overtaken(store, "create", meanwhile), CONFIG, SUBNET, HOST)
    assert (records(store)[KEY].etcd_lease, records(store)[KEY].value) == (0, encode_attrs(own_attrs(None)))


def rewrite(store: EtcdStore, number: int) -> None:
    """What its host does that has something new to say."""
    record = records(store)[KEY]
    value = encode_attrs(own_attrs(None)._replace(mtu=1000 + number, node_name="", extra={}))
    assert store.replace(KEY, value, record.etcd_lease, record.mod_revision)


def test_value_that_its_host_changes_meanwhile_is_kept(store: EtcdStore) -> None:
    store.create(KEY, encode_attrs(own_attrs(None)), store.grant(60))
    reserve(Overtaken(store, "replace", lambda: rewrite(store, 1)), CONFIG, SUBNET, HOST)
    assert (decode_attrs(records(store)[KEY].value).mtu, records(store)[KEY].etcd_lease) == (1001, 0)
    said = unreserve(Overtaken(store, "replace", lambda: rewrite(store, 2)), SUBNET)
    assert said.startswith("10.5.34.0/24 is leased by 192.168.0.5 from now on")
    assert decode_attrs(records(store)[KEY].value).mtu == 1002


def test_key_that_keeps_changing_is_given_up_and_leaves_no_etcd_lease_behind(store: EtcdStore) -> None:
    def always(number: int) -> Callable[[], None]:
        return lambda: rewrite(store, number)

    leased = store.grant(60)
    store.create(KEY, encode_attrs(own_attrs(None)), leased)
    with pytest.raises(ReservationRefused, match="its key keeps changing; run the command again"):
        reserve(Overtaken(store, "replace", *map(always, range(10))), CONFIG, SUBNET, HOST)
    assert records(store)[KEY].etcd_lease == leased

    reserve(store, CONFIG, SUBNET, HOST)
    granted: list[int] = []

    class Granting(Overtaken):
        def grant(self, ttl: int) -> int:
            granted.append(store.grant(ttl))
            return granted[-1]

    with pytest.raises(ReservationRefused, match="its key keeps changing; run the command again"):
        unreserve(Granting(store, "replace", *map(always, range(10))), SUBNET)
    assert [store.time_left(each) for each in granted] == [0] * reservations.ATTEMPTS
    assert records(store)[KEY].etcd_lease == 0


def test_reservation_made_by_many_at_once_is_one(etcd: EtcdProcess, prefix: str, store: EtcdStore) -> None:
    def once(_: int) -> str:
        with contextlib.closing(etcd.store(prefix)) as own:
            return reserve(own, CONFIG, SUBNET, HOST)

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(once, range(8)))
    assert set(said) <= {"10.5.34.0/24 is reserved for 192.168.0.5", "10.5.34.0/24 is reserved for 192.168.0.5 already"}
    record = records(store)[KEY]
    assert (record.etcd_lease, record.mod_revision) == (0, record.create_revision)


# --- taking it back ---


def test_reservation_that_no_host_has_taken_is_free_at_once(store: EtcdStore) -> None:
    reserve(store, CONFIG, SUBNET, HOST)
    assert unreserve(store, SUBNET) == "10.5.34.0/24 is free: 192.168.0.5 had not come for it"
    assert records(store) == {}
    assert unreserve(store, SUBNET) == "10.5.34.0/24 is neither reserved nor leased"


def test_running_host_renews_what_was_its_reservation(store: EtcdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve(store, CONFIG, SUBNET, HOST)
    with running(store) as held:
        before = wait_until(lambda: next((r for r in records(store).values() if b"node-5" in r.value), None))
        # Of 24 h it would renew the half of it at the latest; this is the same within seconds.
        monkeypatch.setattr(reservations, "LEASE_TTL_S", 4)
        assert unreserve(store, SUBNET).startswith(
            "10.5.34.0/24 is leased by 192.168.0.5 (node-5) from now on: the lease ends"
        )
        after = records(store)[KEY]
        assert after == before._replace(etcd_lease=after.etcd_lease, mod_revision=after.mod_revision)
        wait_until(lambda: held[-1].etcd_lease == after.etcd_lease)

        left = [4]

        def renewed_twice() -> bool:
            left.append(store.time_left(after.etcd_lease))
            return sum(later > earlier for earlier, later in pairwise(left)) >= 2

        wait_until(renewed_twice)
        assert records(store)[KEY] == after
    assert [lease.subnets for lease in held] == [SUBNET] * len(held)


def test_reservation_of_a_host_that_does_not_run_ends_by_itself(
    store: EtcdStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve(store, CONFIG, SUBNET, HOST)
    keeper(store).acquire()
    monkeypatch.setattr(reservations, "LEASE_TTL_S", 1)
    unreserve(store, SUBNET)
    wait_until(lambda: not records(store))


def test_lease_is_left_as_it_is(store: EtcdStore) -> None:
    store.create(KEY, encode_attrs(own_attrs(None)), store.grant(60))
    before = records(store)
    said = unreserve(store, SUBNET)
    assert said == (
        "10.5.34.0/24 is leased by 192.168.0.5 (node-5), not reserved: "
        "the lease ends by itself unless its host renews it"
    )
    assert records(store) == before


def test_key_without_a_readable_value_is_freed(store: EtcdStore) -> None:
    store.create("10.5.9.0-24", b"", 0)
    store.create("0-nonsense", b"", 0)
    said = unreserve(store, [Prefix.parse("10.5.9.0/24")])
    assert said == "10.5.9.0/24 is free: its value was unreadable"
    assert records(store).keys() == {"0-nonsense"}


def test_host_that_comes_while_its_reservation_is_taken_back_keeps_the_subnet(store: EtcdStore) -> None:
    reserve(store, CONFIG, SUBNET, HOST)
    came = Overtaken(store, "delete", lambda: keeper(store).acquire())
    assert unreserve(came, SUBNET).startswith("10.5.34.0/24 is leased by 192.168.0.5 (node-5) from now on")
    assert records(store)[KEY].etcd_lease


# --- the commands ---


def command(endpoint: str, prefix: str, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "agent", *words, "--config", "/dev/null"]
    argv += ["--etcd-endpoints", endpoint, "--etcd-prefix", prefix]
    return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=ROOT, env={}, timeout=60)


def test_commands_reserve_list_and_take_back(etcd: EtcdProcess, prefix: str, store: EtcdStore) -> None:
    def run(*words: str) -> str:
        done = command(etcd.endpoint, prefix, *words)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert run("leases") == "No leases in 10.5.0.0/16.\n"
    assert run("reserve", "10.5.34.0/24", "--public-ip", "192.168.0.5").startswith("10.5.34.0/24 is reserved for ")
    store.create("10.5.7.0-24", encode_attrs(own_attrs(None, OTHER)), store.grant(60))
    lines = run("leases").splitlines()
    assert lines[0].split() == ["SUBNET", "HOST", "PUBLIC", "IP", "VTEP", "MAC", "TTL", "LEFT", "REVISION"]
    assert lines[1].split()[:4] == ["10.5.7.0/24", "node-5", "192.168.0.6", format_mac(OWN_MAC)]
    assert lines[2].split()[:3] == ["10.5.34.0/24", "-", "192.168.0.5"]
    assert "reserved" in lines[2]
    leases = json.loads(run("leases", "--json"))["leases"]
    assert 50 < leases[0]["ttl_s"] <= 60
    assert [lease["reserved"] for lease in leases] == [False, True]
    assert [lease["ttl_s"] for lease in json.loads(run("leases", "--json", "--no-ttl"))["leases"]] == [None, None]
    assert run("unreserve", "10.5.34.0/24") == "10.5.34.0/24 is free: 192.168.0.5 had not come for it\n"


@pytest.mark.parametrize(
    "words", [("leases",), ("leases", "--json"), ("reserve", "10.5.34.0/24", "--public-ip", "192.168.0.5")]
)
def test_commands_say_that_there_is_no_configuration(etcd: EtcdProcess, words: tuple[str, ...]) -> None:
    done = command(etcd.endpoint, "/nothing/here", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "overlay-agent: there is no key /nothing/here/config in etcd; it is the operator who writes it\n"
    )


@pytest.mark.parametrize(
    ("words", "failure"),
    [
        (("leases",), "the leases cannot be listed"),
        (("reserve", "10.5.34.0/24", "--public-ip", "192.168.0.5"), "10.5.34.0/24 is not reserved"),
        (("unreserve", "10.5.34.0/24"), "the reservation of 10.5.34.0/24 stays as it was"),
    ],
)
def test_commands_say_that_etcd_cannot_be_reached(words: tuple[str, ...], failure: str) -> None:
    done = command("http://127.0.0.1:9", "/net", *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"overlay-agent: {failure}: no connection to http://127.0.0.1:9, or no leader in its cluster\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("reserve",),
        ("reserve", "10.5.34.0/24"),
        ("reserve", "10.5.34.7/24", "--public-ip", "192.168.0.5"),
        ("reserve", "10.5.34.0/24", "--public-ip", "host"),
        ("unreserve",),
    ],
)
def test_wrong_usage_has_exit_code_2(words: tuple[str, ...]) -> None:
    done = command("http://127.0.0.1:9", "/net", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("overlay-agent: ")


def test_refused_reservation_is_one_line_and_exit_code_1(etcd: EtcdProcess, prefix: str, store: EtcdStore) -> None:
    done = command(etcd.endpoint, prefix, "reserve", "10.9.34.0/24", "--public-ip", "192.168.0.5")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("overlay-agent: 10.9.34.0/24 is not reserved: 10.9.34.0/24 does not lie between ")
    assert records(store) == {}


def test_etcd_that_goes_while_the_times_are_asked_for_is_a_failure(etcd: EtcdProcess, store: EtcdStore) -> None:
    from overlay.listing import rows_of, times_left

    for number in range(1, 40):
        store.create(f"10.5.{number}.0-24", encode_attrs(own_attrs(None)), store.grant(60))
    rows = rows_of(CONFIG, store.snapshot())
    assert len(times_left(store, rows)) == 39
    store.close()
    with pytest.raises(StoreUnavailable):
        times_left(store, rows)
