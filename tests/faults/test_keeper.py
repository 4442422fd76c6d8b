"""The keeper against real etcd processes: one host, one subnet, whatever happens to either."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from overlay.cluster import wait_until
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
    pack_address,
    subnet_key,
)
from subnet_lease.store import Changes, Deleted, Record, Snapshot, StoreUnavailable
from tests.faults.etcd_process import EtcdProcess

pytestmark = pytest.mark.fault

CONFIG = NetworkConfig.parse(b'{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')


def network(first: int, last: int) -> NetworkConfig:
    """10.5.0.0/16 of which 10.5.first.0/24 to 10.5.last.0/24 may be handed out."""
    text = '{"Network":"10.5.0.0/16","SubnetMin":"10.5.%d.0","SubnetMax":"10.5.%d.0","Backend":{"Type":"vxlan"}}'
    return NetworkConfig.parse((text % (first, last)).encode())


def address(number: int) -> bytes:
    return bytes((192, 168, number >> 8, number & 255))


def value_of(number: int) -> bytes:
    """What the host of this number publishes when it has no lease yet."""
    return encode_attrs(attrs(number))


def attrs(number: int, mac: bytes | None = None) -> LeaseAttrs:
    return LeaseAttrs(address(number), "vxlan", Vtep(1, mac or bytes((2, 0, 0, 0, number >> 8, number & 255))))


class Host:
    """A keeper and what it told its host. Its MAC is the one of its lease, else derived from its number."""

    def __init__(
        self,
        store: EtcdStore,
        number: int = 1,
        *,
        config: NetworkConfig = CONFIG,
        ttl: int = 60,
        renew_margin: int = 20,
        preferred: str | None = None,
        jitter: float = 0.5,
        identity: Identity | None = None,
    ) -> None:
        self.number = number
        self.address = address(number)
        self.leases: list[Lease] = []
        self.keeper = Keeper(
            store,
            config,
            identity or Identity(address(number)),
            self.attrs_for,
            ttl=ttl,
            renew_margin=renew_margin,
            preferred=tuple(map(Prefix.parse, preferred.split(","))) if preferred else (),
            on_lease=self.leases.append,
            jitter=lambda: jitter,
        )

    def attrs_for(self, previous: Lease | None) -> LeaseAttrs:
        vtep = previous.attrs.vtep if previous else None
        return attrs(self.number, vtep.mac if vtep else None)._replace(public_ip=self.address)

    def acquire(self) -> Lease:
        lease = self.keeper.acquire()
        assert lease is not None
        return lease

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.keeper.run)
        thread.start()
        try:
            yield
        finally:
            self.keeper.stop()
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    """An etcd that tests leave running; each uses a prefix of its own."""
    with EtcdProcess(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture
def store(shared: EtcdProcess, request: pytest.FixtureRequest) -> Iterator[EtcdStore]:
    with contextlib.closing(shared.store(f"/test/{request.node.name}")) as store:
        yield store


@pytest.fixture
def fragile(tmp_path: Path) -> Iterator[EtcdProcess]:
    """An etcd of the test's own, to be harmed."""
    with EtcdProcess(tmp_path / "etcd") as etcd:
        yield etcd


def records(store: EtcdStore) -> dict[str, Record]:
    return {record.key: record for record in store.snapshot().records}


# --- taking a subnet ---


def test_it_is_known_how_long_the_lease_still_lasts(store: EtcdStore) -> None:
    host = Host(store)
    assert host.keeper.seconds_left() == 0, "there is none"
    host.acquire()
    left = host.keeper.seconds_left()
    assert left is not None and 50 < left <= 60


def test_a_new_host_takes_a_free_subnet_with_an_etcd_lease(store: EtcdStore) -> None:
    lease = Host(store).acquire()
    record = records(store)[subnet_key(lease.subnet)]
    assert CONFIG.blocks[0].covers(lease.subnet)
    assert record.value == value_of(1)
    assert (record.etcd_lease, record.mod_revision) == (lease.etcd_lease, lease.mod_revision)
    assert 50 < store.time_left(lease.etcd_lease) <= 60


def test_hosts_that_race_for_the_last_subnets_all_get_one_of_their_own(shared: EtcdProcess) -> None:
    config = network(1, 20)
    leases: dict[int, Lease] = {}
    start = threading.Barrier(20)

    def take(number: int) -> None:
        with contextlib.closing(shared.store("/test/race", timeout=20.0)) as store:
            host = Host(store, number, config=config)
            start.wait()
            leases[number] = host.acquire()

    threads = [threading.Thread(target=take, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert leases.keys() == set(range(20))
    assert len({lease.subnet for lease in leases.values()}) == 20
    with contextlib.closing(shared.store("/test/race")) as store:
        found = records(store)
    assert len(found) == 20
    for number, lease in leases.items():
        assert found[subnet_key(lease.subnet)].value == value_of(number)
        assert found[subnet_key(lease.subnet)].etcd_lease == lease.etcd_lease


def test_a_preferred_subnet_is_taken_if_it_is_free_and_another_if_not(store: EtcdStore) -> None:
    assert str(Host(store, 1, preferred="10.5.77.0/24").acquire().subnet) == "10.5.77.0/24"
    assert str(Host(store, 2, preferred="10.5.77.0/24").acquire().subnet) != "10.5.77.0/24"


def test_keys_with_unreadable_values_are_not_handed_out(store: EtcdStore) -> None:
    for number in (1, 2, 4):
        store.create(f"10.5.{number}.0-24", b"garbage", 0)
    store.create("no subnet", b"", 0)
    assert str(Host(store, config=network(1, 4)).acquire().subnet) == "10.5.3.0/24"


def test_an_exhausted_network_is_said_once_and_served_when_a_subnet_is_freed(store: EtcdStore) -> None:
    taken = store.create("10.5.1.0-24", value_of(9), 0)
    host = Host(store, config=network(1, 1))
    with capture_logs() as logs, host.running():
        wait_until(lambda: any(entry["event"] == "subnet_exhausted" for entry in logs))
        time.sleep(1)
        assert store.delete("10.5.1.0-24", taken)
        wait_until(lambda: host.leases)
    assert str(host.leases[0].subnet) == "10.5.1.0/24"
    shouts = [entry for entry in logs if entry["event"] == "subnet_exhausted"]
    assert len(shouts) == 1
    assert shouts[0]["log_level"] == "error"
    assert "all 1 subnets of /24" in shouts[0]["reason"]


# --- coming back ---


def test_a_restart_finds_its_lease_and_writes_nothing(store: EtcdStore) -> None:
    first = Host(store).acquire()
    before = records(store)
    again = Host(store, preferred="10.5.200.0/24").acquire()
    assert again == first
    assert records(store) == before


def test_a_restart_renews_the_etcd_lease(store: EtcdStore) -> None:
    lease = Host(store, ttl=4).acquire()
    wait_until(lambda: store.time_left(lease.etcd_lease) <= 2)
    Host(store, ttl=4).acquire()
    assert store.time_left(lease.etcd_lease) >= 3


def test_a_lease_of_flanneld_is_taken_over_with_its_mac_and_etcd_lease(store: EtcdStore) -> None:
    etcd_lease = store.grant(86400)
    mac = bytes.fromhex("160ae4092d56")
    created = store.create("10.5.6.0-24", encode_attrs(attrs(1, mac)).replace(b'"VNI":1,', b'"VNI":1, '), etcd_lease)
    lease = Host(store).acquire()
    assert (str(lease.subnet), lease.etcd_lease, lease.create_revision) == ("10.5.6.0/24", etcd_lease, created)
    assert records(store)["10.5.6.0-24"].value == encode_attrs(attrs(1, mac))
    assert records(store)["10.5.6.0-24"].mod_revision == lease.mod_revision > created


def test_of_several_leases_the_eldest_is_kept_unless_another_is_preferred(store: EtcdStore) -> None:
    for number in (8, 3, 5):
        store.create(f"10.5.{number}.0-24", value_of(1), store.grant(60))
    assert str(Host(store).acquire().subnet) == "10.5.8.0/24"
    assert str(Host(store, preferred="10.5.5.0/24").acquire().subnet) == "10.5.5.0/24"


def test_leases_outside_the_network_are_not_ours_to_use(store: EtcdStore) -> None:
    for key in ("10.6.1.0-24", "10.5.128.0-17", "10.5.9.0-25"):
        store.create(key, value_of(1), store.grant(60))
    lease = Host(store).acquire()
    assert lease.subnet.length == 24
    assert CONFIG.blocks[0].covers(lease.subnet)
    assert not lease.subnet.overlaps(Prefix.parse("10.5.128.0/17"))


def test_a_reservation_is_used_as_it_is(store: EtcdStore) -> None:
    created = store.create("10.5.6.0-24", value_of(1), 0)
    host = Host(store)
    lease = host.acquire()
    assert (str(lease.subnet), lease.reserved, lease.mod_revision) == ("10.5.6.0/24", True, created)
    release_lease(store, Identity(address(host.number)))
    assert records(store)["10.5.6.0-24"] == Record("10.5.6.0-24", value_of(1), 0, created, created)


def test_a_reservation_with_another_value_is_published_and_stays_one(store: EtcdStore) -> None:
    store.create("10.5.6.0-24", b'{"PublicIP":"192.168.0.1","BackendType":"vxlan"}', 0)
    lease = Host(store).acquire()
    assert lease.reserved
    record = records(store)["10.5.6.0-24"]
    assert (record.value, record.etcd_lease, record.mod_revision) == (value_of(1), 0, lease.mod_revision)


# --- keeping it ---


def test_a_lease_is_renewed_before_its_end_without_a_write(store: EtcdStore) -> None:
    host = Host(store, ttl=3, renew_margin=2)
    lease = host.acquire()
    with capture_logs() as logs, host.running():
        wait_until(lambda: len([entry for entry in logs if entry["event"] == "lease_renewed"]) >= 3)
        assert store.time_left(lease.etcd_lease) > 0
    # Of its own record, not of the store: what other tests left there may run out meanwhile.
    assert records(store)[subnet_key(lease.subnet)].mod_revision == lease.mod_revision
    assert host.leases == []


def test_a_lease_that_ended_is_taken_again_with_the_same_subnet_and_mac(store: EtcdStore) -> None:
    host = Host(store, ttl=4, renew_margin=2)
    first = host.acquire()
    store.revoke(first.etcd_lease)
    with capture_logs() as logs, host.running():
        wait_until(lambda: host.leases)
    assert host.leases[0].subnet == first.subnet
    assert host.leases[0].etcd_lease != first.etcd_lease
    assert host.leases[0].attrs == first.attrs
    assert [entry["log_level"] for entry in logs if entry["event"] == "lease_lost"] == ["warning"]


def test_a_lease_that_expired_while_the_agent_was_away_is_taken_again(store: EtcdStore) -> None:
    first = Host(store, ttl=2).acquire()
    wait_until(lambda: not store.snapshot().records)
    assert Host(store, preferred=str(first.subnet)).acquire().subnet == first.subnet


def test_a_key_deleted_by_hand_comes_back_at_once(store: EtcdStore) -> None:
    host = Host(store)
    first = host.acquire()
    with host.running():
        assert store.delete(subnet_key(first.subnet), first.mod_revision)
        host.keeper.check()
        wait_until(lambda: host.leases, 3)
    assert host.leases[0].subnet == first.subnet
    assert records(store)[subnet_key(first.subnet)].value == value_of(1)


def test_a_key_taken_by_another_host_is_left_to_it(store: EtcdStore) -> None:
    host = Host(store)
    first = host.acquire()
    key = subnet_key(first.subnet)
    with capture_logs() as logs, host.running():
        assert store.replace(key, value_of(2), store.grant(60), first.mod_revision)
        host.keeper.check()
        wait_until(lambda: host.leases, 3)
    assert host.leases[0].subnet != first.subnet
    assert records(store)[key].value == value_of(2)
    assert any(entry["event"] == "lease_lost" for entry in logs)


def test_a_foreign_value_on_our_key_is_put_right(store: EtcdStore) -> None:
    host = Host(store)
    first = host.acquire()
    key = subnet_key(first.subnet)
    with host.running():
        forged = value_of(1).replace(b'"vxlan"', b'"udp"')
        assert store.replace(key, forged, first.etcd_lease, first.mod_revision)
        host.keeper.check()
        wait_until(lambda: records(store)[key].value == value_of(1), 3)
        wait_until(lambda: host.leases, 3)
    assert host.leases[0].subnet == first.subnet


def test_a_check_that_finds_all_well_writes_and_tells_nothing(store: EtcdStore) -> None:
    host = Host(store, ttl=60)
    host.acquire()
    before = records(store)
    with host.running():
        host.keeper.check()
        wait_until(lambda: not host.keeper._wake.is_set())
    assert (host.leases, records(store)) == ([], before)


# --- faults ---


def test_an_etcd_away_at_the_start_is_waited_for(fragile: EtcdProcess) -> None:
    fragile.stop()
    with contextlib.closing(fragile.store()) as store:
        host = Host(store)
        with capture_logs() as logs, host.running():
            wait_until(lambda: any(entry["event"] == "store_unreachable" for entry in logs))
            fragile.start()
            wait_until(lambda: host.leases)
        events = [entry["event"] for entry in logs if entry["log_level"] != "debug"]
        assert events == ["store_unreachable", "store_reachable", "lease_acquired"]


def test_an_etcd_away_beyond_the_end_of_the_lease_is_waited_for(fragile: EtcdProcess) -> None:
    with contextlib.closing(fragile.store()) as store:
        host = Host(store, ttl=2, renew_margin=1)
        first = host.acquire()
        with capture_logs() as logs, host.running():
            fragile.kill()
            wait_until(lambda: any(entry["event"] == "store_unreachable" for entry in logs))
            fragile.start()
            wait_until(lambda: any(entry["event"] == "store_reachable" for entry in logs))
            wait_until(lambda: records_or_none(store))
            assert [record.value for record in store.snapshot().records] == [value_of(1)]
            assert host.keeper.lease is not None
            assert host.keeper.lease.subnet == first.subnet


def records_or_none(store: EtcdStore) -> object:
    try:
        return store.snapshot().records
    except StoreUnavailable:
        return None


@pytest.mark.parametrize("applied", [True, False])
def test_a_create_without_an_answer_ends_in_exactly_one_lease(fragile: EtcdProcess, applied: bool) -> None:
    """The store is cut off right after, or right before, the transaction takes place."""
    with contextlib.closing(fragile.store(timeout=1.0)) as store, contextlib.closing(fragile.store()) as observer:
        create = store.create
        harmed: list[int] = []

        def harmful(key: str, value: bytes, etcd_lease: int) -> int:
            if harmed:
                return create(key, value, etcd_lease)
            harmed.append(etcd_lease)
            if applied:
                assert create(key, value, etcd_lease)
                fragile.pause()
                threading.Timer(2.5, fragile.resume).start()
                raise StoreUnavailable("cut off")
            # Sent to a frozen etcd, which finds it in its socket when it wakes: an answer nobody waits for.
            fragile.pause()
            threading.Timer(2.5, fragile.resume).start()
            return create(key, value, etcd_lease)

        store.create = harmful  # type: ignore[method-assign]
        host = Host(store)
        lease = host.acquire()
        assert harmed
        found = observer.snapshot().records
        assert [(record.key, record.etcd_lease) for record in found] == [(subnet_key(lease.subnet), lease.etcd_lease)]
        if applied:
            assert lease.etcd_lease == harmed[0]
        # The first grant is in use or ended; it cannot come true later.
        assert lease.etcd_lease == harmed[0] or observer.time_left(harmed[0]) == 0


def test_an_etcd_killed_in_the_middle_ends_in_exactly_one_lease(fragile: EtcdProcess) -> None:
    with contextlib.closing(fragile.store(timeout=1.0)) as store, contextlib.closing(fragile.store()) as observer:
        hosts = [Host(store, number) for number in range(5)]
        with contextlib.ExitStack() as stack:
            for host in hosts:
                stack.enter_context(host.running())
            fragile.restart()
            wait_until(lambda: all(host.keeper.lease for host in hosts))
        found = observer.snapshot().records
        assert sorted(record.value for record in found) == sorted(map(value_of, range(5)))


def test_a_stop_ends_a_wait_at_once(fragile: EtcdProcess) -> None:
    fragile.kill()
    with contextlib.closing(fragile.store()) as store, capture_logs() as logs:
        host = Host(store, jitter=1000)  # Its first wait would take minutes.
        got: list[Lease | None] = []
        thread = threading.Thread(target=lambda: got.append(host.keeper.acquire()))
        thread.start()
        wait_until(lambda: any(entry["event"] == "store_unreachable" for entry in logs))
        host.keeper.stop()
        thread.join(10)
        assert got == [None]


def test_an_etcd_that_is_away_costs_no_cpu(fragile: EtcdProcess) -> None:
    fragile.kill()
    with contextlib.closing(fragile.store()) as store, capture_logs() as logs:
        host = Host(store)
        with host.running():
            wait_until(lambda: any(entry["event"] == "store_unreachable" for entry in logs))
            spent = time.process_time()
            time.sleep(3)
            spent = time.process_time() - spent
    assert spent < 0.1


# --- whose it is ---


def host6(number: int, mac: bytes | None = None) -> LeaseAttrs:
    """What a host publishes whose underlay has no IPv4."""
    vtep = Vtep(1, mac or bytes((2, 6, 0, 0, 0, number)))
    return LeaseAttrs(None, "vxlan", None, pack_address(f"fd11::{number:x}"), vtep)


def test_a_host_without_ipv4_finds_its_lease_by_its_ipv6_address(store: EtcdStore) -> None:
    for number in (1, 2):
        store.create(f"10.5.{number}.0-24", encode_attrs(host6(number)), store.grant(60))
    host = Host(store, identity=Identity(None, pack_address("fd11::2")))
    host.attrs_for = lambda previous: host6(2)  # type: ignore[method-assign]
    assert str(host.acquire()) == "10.5.2.0/24"


@pytest.mark.parametrize("before", [attrs(7, b"\2\0\0\0\7\7"), host6(7, b"\2\0\0\0\7\7")])
def test_a_host_whose_address_changed_while_its_agent_was_down_keeps_its_subnet(
    store: EtcdStore, before: LeaseAttrs
) -> None:
    etcd_lease = store.grant(60)
    store.create("10.5.6.0-24", encode_attrs(before), etcd_lease)
    mac = b"\2\0\0\0\7\7"
    lease = Host(store, 1, identity=Identity(address(1), None, (mac,))).acquire()
    assert (str(lease), lease.etcd_lease) == ("10.5.6.0/24", etcd_lease)
    assert decode_attrs(records(store)["10.5.6.0-24"].value).public_ip == address(1)


def test_a_record_with_the_address_comes_before_one_with_the_mac(store: EtcdStore) -> None:
    mac = b"\2\0\0\0\7\7"
    store.create("10.5.6.0-24", encode_attrs(attrs(7, mac)), store.grant(60))
    store.create("10.5.7.0-24", value_of(1), store.grant(60))
    identity = Identity(address(1), None, (mac,))
    assert str(Host(store, 1, identity=identity).acquire()) == "10.5.7.0/24"
    assert decode_attrs(records(store)["10.5.6.0-24"].value) == attrs(7, mac)


def test_an_address_that_changes_is_published_at_once_and_the_subnet_stays(store: EtcdStore) -> None:
    host = Host(store)
    first = host.acquire()
    with capture_logs() as logs, host.running():
        host.address = address(9)
        host.keeper.use(identity=Identity(address(9)))
        wait_until(lambda: host.leases, 3)
    assert host.leases == [
        first._replace(attrs=attrs(1)._replace(public_ip=address(9)), mod_revision=host.leases[0][5])
    ]
    assert decode_attrs(records(store)[first.key].value).public_ip == address(9)
    assert [entry["event"] for entry in logs if entry["log_level"] != "debug"] == ["lease_published"]


@pytest.mark.parametrize("reserved", [True, False])
def test_an_address_that_changes_while_the_key_is_written_by_the_operator_keeps_the_subnet(
    store: EtcdStore, reserved: bool
) -> None:
    """Its etcd lease is another by then, its address the former."""
    host = Host(store)
    if not reserved:
        store.create("10.5.6.0-24", value_of(1), 0)
    first = host.acquire()
    host.address = address(9)
    host.keeper.use(identity=Identity(address(9)))
    store.replace(first.key, records(store)[first.key].value, 0 if reserved else store.grant(60), first.mod_revision)
    second = host.acquire()
    assert (second.subnet, second.reserved) == (first.subnet, reserved)
    assert second.attrs.public_ip == address(9)


def test_another_hosts_address_on_our_key_and_etcd_lease_is_put_right(store: EtcdStore) -> None:
    host = Host(store)
    first = host.acquire()
    store.replace(first.key, value_of(2), first.etcd_lease, first.mod_revision)
    assert host.acquire().subnet == first.subnet
    assert records(store)[first.key].value == value_of(1)


def test_a_reservation_that_is_given_to_another_host_is_left_to_it(store: EtcdStore) -> None:
    created = store.create("10.5.6.0-24", value_of(1), 0)
    host = Host(store)
    assert host.acquire().reserved
    store.replace("10.5.6.0-24", value_of(2), 0, created)
    assert str(host.acquire()) != "10.5.6.0/24"
    assert records(store)["10.5.6.0-24"].value == value_of(2)


# --- address families ---

BOTH = NetworkConfig.parse(
    b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'
)
IPV6 = NetworkConfig.parse(
    b'{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'
)


def test_a_host_of_a_dual_stack_network_takes_a_subnet_of_each_family(store: EtcdStore) -> None:
    lease = Host(store, config=BOTH, preferred="10.5.77.0/24,fd00:5:0:77::/64").acquire()
    assert str(lease) == "10.5.77.0/24 and fd00:5:0:77::/64"
    assert records(store).keys() == {lease.key} == {"10.5.77.0-24&fd00:5:0:77::-64"}
    other = Host(store, 2, config=BOTH, preferred="10.5.78.0/24,fd00:5:0:77::/64").acquire()
    assert str(other.subnet) == "10.5.78.0/24"
    assert other.subnet6 is not None and other.subnet6 != lease.subnet6
    assert Host(store, config=BOTH).acquire() == lease


def test_a_host_of_an_ipv6_network_takes_no_ipv4_subnet(store: EtcdStore) -> None:
    lease = Host(store, config=IPV6, preferred="fd00:5:0:77::/64,10.5.77.0/24").acquire()
    assert (lease.subnet, str(lease), lease.key) == (None, "fd00:5:0:77::/64", "0.0.0.0-0&fd00:5:0:77::-64")
    assert records(store).keys() == {lease.key}


@pytest.mark.parametrize("ttl", [60, 0])
@pytest.mark.parametrize(
    ("before", "config", "after"),
    [
        ("10.5.6.0-24", BOTH, "10.5.6.0/24 and fd00:5:0:9::/64"),
        ("0.0.0.0-0&fd00:5:0:6::-64", BOTH, "10.5.9.0/24 and fd00:5:0:6::/64"),
        ("10.5.6.0-24&fd99::-64", BOTH, "10.5.6.0/24 and fd00:5:0:9::/64"),
        ("10.5.6.0-24&fd00:5:0:6::-64", CONFIG, "10.5.6.0/24"),
        ("10.5.6.0-24&fd00:5:0:6::-64", IPV6, "fd00:5:0:6::/64"),
    ],
)
def test_a_lease_with_other_families_is_moved_with_the_subnet_that_stays(
    store: EtcdStore, before: str, config: NetworkConfig, after: str, ttl: int
) -> None:
    etcd_lease = store.grant(ttl) if ttl else 0
    created = store.create(before, value_of(1), etcd_lease)
    lease = Host(store, config=config, preferred="10.5.9.0/24,fd00:5:0:9::/64").acquire()
    assert (str(lease), lease.etcd_lease, lease.reserved) == (after, etcd_lease, not ttl)
    events: list[Record | Deleted] = []
    changes = iter(store.watch(created + 1))
    while len(events) < 2:
        events += next(changes).events
    # The deletion first: a flanneld forgets the MAC with it.
    moved = Record(lease.key, value_of(1), etcd_lease, lease.create_revision, lease.mod_revision)
    assert events == [Deleted(before, lease.mod_revision), moved]
    assert Host(store, config=config).acquire() == lease


def test_a_running_host_follows_when_the_network_gets_another_family(store: EtcdStore) -> None:
    host = Host(store)
    first = host.acquire()
    with host.running():
        host.keeper.use(BOTH)
        wait_until(lambda: host.leases, 3)
        second = host.leases[-1]
        assert (second.subnet, second.etcd_lease) == (first.subnet, first.etcd_lease)
        assert second.subnet6 is not None
        host.keeper.use(CONFIG)
        wait_until(lambda: len(host.leases) == 2, 3)
    assert (host.leases[-1].subnets, records(store).keys()) == (first.subnets, {first.key})


class Late:
    """A store whose first snapshot is an old one."""

    def __init__(self, store: EtcdStore) -> None:
        self._store, self._old = store, [store.snapshot()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def snapshot(self) -> Snapshot:
        return self._old.pop() if self._old else self._store.snapshot()


def test_of_two_hosts_that_take_one_subnet_in_two_keys_the_younger_takes_another(store: EtcdStore) -> None:
    late = Late(store)
    first = Host(store, 1, config=BOTH, preferred="10.5.7.0/24,fd00:5:0:7::/64").acquire()
    host = Host(late, 2, config=BOTH, preferred="10.5.8.0/24,fd00:5:0:7::/64")
    second = host.acquire()
    assert second.subnet6 == first.subnet6
    with host.running():
        host.keeper.saw(Changes((records(store)[first.key],), first.mod_revision))
        wait_until(lambda: host.leases, 3)
    (lease,) = host.leases
    assert (lease.subnet, lease.etcd_lease) == (second.subnet, second.etcd_lease)
    assert str(lease.subnet6) == "fd00:5:0:8::/64", "by the number of the other"
    assert records(store).keys() == {first.key, lease.key}


def test_subnets_of_both_families_have_one_number_so_that_hosts_that_race_cannot_share_one(store: EtcdStore) -> None:
    lease = Host(store, config=BOTH).acquire()
    assert lease.subnet is not None and lease.subnet6 is not None
    assert BOTH.ranges[0].number(lease.subnet) == BOTH.ranges[1].number(lease.subnet6)


# --- reservations beside leases ---


def test_a_reservation_made_later_does_not_move_the_pods_of_a_running_host(store: EtcdStore) -> None:
    host = Host(store)
    first = host.acquire()
    created = store.create("10.5.6.0-24", value_of(1), 0)
    before = records(store)
    with host.running():
        host.keeper.saw(Changes((before["10.5.6.0-24"],), created))
        wait_until(lambda: not host.keeper._wake.is_set())
    assert (host.keeper.lease, host.leases, records(store)) == (first, [], before)


def test_a_reservation_that_was_there_first_does_not_move_a_host_that_has_pods(store: EtcdStore) -> None:
    store.create("10.5.6.0-24", value_of(1), 0)
    store.create("10.5.7.0-24", value_of(1), store.grant(60))
    before = records(store)
    assert str(Host(store, preferred="10.5.7.0/24").acquire()) == "10.5.7.0/24"
    assert records(store) == before


def test_leases_beside_the_reservation_that_is_taken_are_given_up(store: EtcdStore) -> None:
    for number in (3, 5):
        store.create(f"10.5.{number}.0-24", value_of(1), store.grant(60))
    store.create("10.5.6.0-24", value_of(1), 0)
    other = store.create("10.5.9.0-24", value_of(2), store.grant(60))
    lease = Host(store, preferred="10.5.6.0/24").acquire()
    assert lease.reserved
    assert records(store).keys() == {"10.5.6.0-24", "10.5.9.0-24"}
    assert records(store)["10.5.9.0-24"].mod_revision == other


# --- giving it back ---


def test_what_is_released_may_be_known_by_its_mac(store: EtcdStore) -> None:
    lease = Host(store, 1).acquire()
    assert lease.attrs.vtep is not None
    assert release_lease(store, Identity(address(9))) is None
    assert release_lease(store, Identity(address(9), None, (lease.attrs.vtep.mac,))) == lease
    assert records(store) == {}


def test_a_lease_is_released_for_an_agent_that_no_longer_runs(store: EtcdStore) -> None:
    mine, other = Host(store, 1).acquire(), Host(store, 2).acquire()
    released = release_lease(store, Identity(address(1)))
    assert released == mine
    assert not released.reserved
    assert store.time_left(mine.etcd_lease) == 0
    assert records(store).keys() == {subnet_key(other.subnet)}
    assert release_lease(store, Identity(address(1))) is None


def test_a_reservation_is_not_released_and_is_reported(store: EtcdStore) -> None:
    store.create("10.5.6.0-24", value_of(1), 0)
    kept = release_lease(store, Identity(address(1)))
    assert kept is not None
    assert kept.reserved
    assert kept.attrs.public_ip == pack_address("192.168.0.1")
    assert records(store).keys() == {"10.5.6.0-24"}
