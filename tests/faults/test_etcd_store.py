"""EtcdStore against real etcd processes: every call, pages, races, outages, logins, certificates."""

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from etcd3 import etcdrpc as rpc

from overlay.cluster import wait_until
from subnet_lease import etcd
from subnet_lease.etcd import EtcdStore
from subnet_lease.store import (
    Changes,
    Deleted,
    Record,
    StoreConfigInvalid,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    WatchInterrupted,
)
from tests.faults.etcd_process import EtcdProcess, EtcdProxy, refusing_ports

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    """An etcd that tests leave running; each uses a prefix of its own."""
    with EtcdProcess(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture
def store(shared: EtcdProcess, request: pytest.FixtureRequest) -> Iterator[EtcdStore]:
    with contextlib.closing(shared.store(f"/test/{request.node.name}")) as store:
        yield store


def raw_channel(etcd: EtcdProcess) -> contextlib.closing[grpc.Channel]:
    """A channel for what the store does not offer."""
    return contextlib.closing(grpc.insecure_channel(etcd.endpoint.removeprefix("http://")))


def threads() -> set[threading.Thread]:
    return set(threading.enumerate())


# --- calls ---


def test_config_is_read_as_written(store: EtcdStore) -> None:
    assert store.read_config() is None
    store.write_config(b'{"Network":"10.5.0.0/16"}')
    assert store.read_config() == b'{"Network":"10.5.0.0/16"}'


def test_every_request_is_told_with_its_kind_its_time_and_what_failed(tmp_path: Path) -> None:
    told: list[tuple[str, float, str]] = []
    with (
        EtcdProcess(tmp_path / "etcd") as etcd,
        contextlib.closing(etcd.store(observe=lambda *each: told.append(each), timeout=2.0)) as store,
    ):
        lease = store.grant(60)
        assert store.create("10.5.1.0-24", b"one", lease)
        store.snapshot()
        store.revoke(12345)
        etcd.kill()
        with pytest.raises(StoreUnavailable):
            store.read_config()
    assert [(request, failure) for request, _, failure in told] == [
        ("lease", ""), ("write", ""), ("read", ""), ("lease", ""), ("read", "unavailable"),
    ]  # fmt: skip
    assert all(0 < seconds < 10 for _, seconds, _ in told)


def test_a_key_is_created_once_and_replaced_only_at_its_revision(store: EtcdStore) -> None:
    lease = store.grant(60)
    created = store.create("10.5.1.0-24", b"one", lease)
    assert created
    assert store.create("10.5.1.0-24", b"two", lease) == 0
    assert store.snapshot().records == (Record("10.5.1.0-24", b"one", lease, created, created),)
    replaced = store.replace("10.5.1.0-24", b"three", 0, created)
    assert replaced > created
    assert store.replace("10.5.1.0-24", b"four", 0, created) == 0
    assert store.snapshot().records == (Record("10.5.1.0-24", b"three", 0, created, replaced),)
    assert not store.delete("10.5.1.0-24", created)
    assert store.delete("10.5.1.0-24", replaced)
    assert not store.delete("10.5.1.0-24", replaced)
    assert store.snapshot().records == ()


def test_a_lease_is_renewed_until_it_is_revoked(store: EtcdStore) -> None:
    lease = store.grant(100)
    store.create("10.5.1.0-24", b"", lease)
    assert store.keep_alive(lease) == 100
    assert 90 < store.time_left(lease) <= 100
    store.revoke(lease)
    store.revoke(lease)
    assert store.snapshot().records == ()
    assert store.keep_alive(lease) == 0
    assert store.time_left(lease) == 0


def test_a_write_with_a_lease_that_has_ended_is_no_answer_and_no_write(store: EtcdStore) -> None:
    lease = store.grant(60)
    store.revoke(lease)
    with pytest.raises(StoreUnavailable, match="lease has ended"):
        store.create("10.5.1.0-24", b"", lease)
    assert store.snapshot().records == ()


def test_a_snapshot_of_many_pages_is_complete_and_of_one_revision(store: EtcdStore) -> None:
    keys = [f"10.{n >> 8}.{n & 255}.0-24" for n in range(2500)]
    for key in keys:
        store.create(key, b"x" * 100, 0)
    revision = store.snapshot().revision
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            store.write_config(b"{}")

    churner = threading.Thread(target=churn)
    churner.start()
    try:
        snapshots = [store.snapshot() for _ in range(5)]
    finally:
        stop.set()
        churner.join()
    for snapshot in snapshots:
        assert sorted(keys) == [record.key for record in snapshot.records]
        assert snapshot.revision >= revision
        assert snapshot.cluster_id


def test_a_page_that_comes_too_late_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etcd, "PAGE", 10)
    pages: list[int] = []
    with EtcdProcess(tmp_path) as process, contextlib.closing(process.store(timeout=0.5)) as store:
        keys = [f"10.5.{n}.0-24" for n in range(25)]
        for key in keys:
            store.create(key, b"", 0)

        def asked(store: EtcdStore, key: bytes, revision: int = 0, page: Any = EtcdStore._page) -> Any:
            pages.append(revision)
            if len(pages) == 2:
                process.pause()
                resume.start()
            return page(store, key, revision)

        resume = threading.Timer(0.75, process.resume)
        monkeypatch.setattr(EtcdStore, "_page", asked)
        snapshot = store.snapshot()
        resume.join()
    assert sorted(keys) == [record.key for record in snapshot.records]
    assert pages == [0, snapshot.revision, snapshot.revision]


def test_keys_of_other_prefixes_and_bytes_beyond_utf8_are_kept_apart(shared: EtcdProcess, store: EtcdStore) -> None:
    with contextlib.closing(shared.store("/test/elsewhere")) as other:
        other.create("10.5.1.0-24", b"", 0)
    store.write_config(b"{}")
    store.create("\udcff\udc80", b"\xff", 0)
    assert [(record.key, record.value) for record in store.snapshot().records] == [("\udcff\udc80", b"\xff")]
    assert store.delete("\udcff\udc80", store.snapshot().records[0].mod_revision)


def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    with EtcdProcess(tmp_path / "e", unix=True) as etcd, contextlib.closing(etcd.store()) as store:
        assert store.create("10.5.1.0-24", b"", 0)
        assert len(store.snapshot().records) == 1


def test_a_host_name_and_a_bare_endpoint_serve_as_well(shared: EtcdProcess) -> None:
    port = shared.endpoint.rpartition(":")[2]
    for endpoint in (f"http://localhost:{port}", f"127.0.0.1:{port}", f"http://127.0.0.1:{port}/"):
        with contextlib.closing(EtcdStore([endpoint], "/test/names")) as store:
            assert store.read_config() is None


# --- watches ---


def test_a_watch_begins_with_a_sign_of_life_and_gives_each_change(store: EtcdStore) -> None:
    base = store.snapshot()
    watch = store.watch(base.revision + 1, base.cluster_id)
    changes = iter(watch)
    assert next(changes).events == ()
    lease = store.grant(60)
    first = store.create("10.5.1.0-24", b"one", lease)
    assert next(changes) == Changes((Record("10.5.1.0-24", b"one", lease, first, first),), first)
    store.write_config(b"not a lease")
    store.revoke(lease)
    gone = next(changes)
    assert gone.events == (Deleted("10.5.1.0-24", gone.revision),)
    watch.cancel()
    assert list(changes) == []


def test_a_watch_from_the_past_gives_what_happened_since(store: EtcdStore) -> None:
    base = store.snapshot().revision
    revisions = [store.create(f"10.5.{n}.0-24", b"", 0) for n in range(1500 // 10)]
    watch = store.watch(base + 1)
    seen: list[int] = []
    for changes in watch:
        seen += [event.mod_revision for event in changes.events]
        assert not changes.events or changes.revision == seen[-1]
        if len(seen) == len(revisions):
            break
    watch.cancel()
    assert seen == revisions


def test_a_silent_watch_sleeps(store: EtcdStore) -> None:
    watch = store.watch(store.snapshot().revision + 1)
    stands = threading.Event()

    def follow() -> None:
        for _ in watch:
            stands.set()

    def wakings() -> int:
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])

    thread = threading.Thread(target=follow)
    thread.start()
    assert stands.wait(5)
    # Once it has settled down: what is measured is a second of silence.
    time.sleep(0.5)
    before = wakings()
    time.sleep(1)
    silent = wakings() - before
    watch.cancel()
    thread.join(5)
    assert silent <= 2


def test_cancelling_from_another_thread_ends_the_iteration_quietly_and_leaves_no_thread(store: EtcdStore) -> None:
    before = threads()
    watch = store.watch(store.snapshot().revision + 1)
    begun = threading.Event()
    got: list[Changes] = []

    def consume() -> None:
        for changes in watch:
            got.append(changes)
            begun.set()

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert begun.wait(10)
    watch.cancel()
    watch.cancel()
    consumer.join(10)
    assert not consumer.is_alive()
    assert len(got) == 1
    wait_until(lambda: not threads() - before)


def test_a_watch_cancelled_before_it_began_gives_nothing(store: EtcdStore) -> None:
    before = threads()
    watch = store.watch(1)
    watch.cancel()
    assert list(watch) == []
    wait_until(lambda: not threads() - before)


def test_closing_the_store_ends_watches_quietly_and_refuses_calls(shared: EtcdProcess) -> None:
    before = threads()
    store = shared.store()
    changes = iter(store.watch(1))
    next(changes)
    store.close()
    store.close()
    assert list(changes) == []
    with pytest.raises(StoreUnavailable, match="closed"):
        store.snapshot()
    wait_until(lambda: not threads() - before)


def test_an_interpreter_exits_in_silence_with_a_watch_open(shared: EtcdProcess) -> None:
    program = f"""
import threading
from subnet_lease import etcd
from subnet_lease.etcd import EtcdStore
store = EtcdStore(["{shared.endpoint}"], "/test/exit")
begun = threading.Event()
def consume():
    for _ in store.watch(1):
        begun.set()
threading.Thread(target=consume, daemon=True).start()
assert begun.wait(10)
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")


def test_a_compacted_revision_interrupts_the_watch_for_good(shared: EtcdProcess, store: EtcdStore) -> None:
    base = store.snapshot().revision
    last = [store.create(f"10.5.{n}.0-24", b"", 0) for n in range(3)][-1]
    with raw_channel(shared) as channel:
        rpc.KVStub(channel).Compact(rpc.CompactionRequest(revision=last), timeout=5)
    with pytest.raises(WatchInterrupted, match="does not have revision") as caught:
        list(store.watch(base + 1))
    assert not caught.value.resumable


def test_another_cluster_at_the_same_address_interrupts_the_watch_for_good(store: EtcdStore) -> None:
    base = store.snapshot()
    with pytest.raises(WatchInterrupted, match="another etcd cluster") as caught:
        list(store.watch(base.revision + 1, base.cluster_id ^ 1))
    assert not caught.value.resumable


def test_a_watch_that_a_proxy_joins_to_others_goes_on(
    shared: EtcdProcess, store: EtcdStore, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    prefix = f"/test/{request.node.name}"
    snapshot = store.snapshot()
    with EtcdProxy(tmp_path, shared.endpoint) as proxy, contextlib.ExitStack() as stack:
        streams = []
        for _ in range(3):
            behind = stack.enter_context(contextlib.closing(EtcdStore([proxy.endpoint], prefix)))
            watch = behind.watch(snapshot.revision + 1, snapshot.cluster_id)
            stack.callback(watch.cancel)
            streams.append(iter(watch))
            next(streams[-1])
        store.create("10.5.1.0-24", b"", 0)
        for stream in streams:
            changes = next(each for each in stream if each.events)
            assert [event.key for event in changes.events] == ["10.5.1.0-24"]


def test_a_store_that_went_back_behind_the_revision_interrupts_the_watch_for_good(store: EtcdStore) -> None:
    base = store.snapshot()
    with pytest.raises(WatchInterrupted, match="does not have revision") as caught:
        list(store.watch(base.revision + 100, base.cluster_id))
    assert not caught.value.resumable


def test_an_etcd_that_stops_or_dies_interrupts_the_watch_for_now(tmp_path: Path) -> None:
    with EtcdProcess(tmp_path / "e") as etcd, contextlib.closing(etcd.store()) as store:
        for end in (etcd.stop, etcd.kill):
            changes = iter(store.watch(1))
            next(changes)
            end()
            with pytest.raises(WatchInterrupted) as caught:
                list(changes)
            assert caught.value.resumable
            etcd.start()
            wait_until(lambda: answers(store))


def test_an_etcd_that_is_frozen_is_noticed_by_calls_and_watches(tmp_path: Path) -> None:
    with EtcdProcess(tmp_path / "e") as etcd, contextlib.closing(etcd.store(timeout=1.0)) as store:
        changes = iter(store.watch(1))
        next(changes)
        etcd.pause()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no answer from http://127\.0\.0\.1:\d+ within 1 s"):
            store.snapshot()
        with pytest.raises(StoreUnavailable, match=r"no answer from .* to the watch within 1 s"):
            list(store.watch(1))
        with pytest.raises(WatchInterrupted) as caught:
            list(changes)
        assert caught.value.resumable
        assert time.monotonic() - began < 25
        etcd.resume()
        wait_until(lambda: answers(store))


# --- outages ---


def answers(store: EtcdStore) -> bool:
    try:
        store.read_config()
    except StoreError:
        return False
    return True


def test_nobody_there_is_said_in_plain_words() -> None:
    with refusing_ports(1) as (port,), contextlib.closing(EtcdStore([f"127.0.0.1:{port}"], "/p")) as store:
        with pytest.raises(StoreUnavailable) as caught:
            store.snapshot()
        assert str(caught.value) == f"no connection to http://127.0.0.1:{port}, or no leader in its cluster"
        with pytest.raises(StoreUnavailable):
            list(store.watch(1))


def test_reads_go_on_to_the_next_endpoint_and_writes_follow(shared: EtcdProcess) -> None:
    with refusing_ports(2) as ports:
        dead = [f"127.0.0.1:{port}" for port in ports]
        with contextlib.closing(EtcdStore([*dead, shared.endpoint], "/test/failover")) as store:
            assert store.snapshot().records == ()
            assert store.create("10.5.1.0-24", b"", 0)
            changes = iter(store.watch(1))
            next(changes)
        with contextlib.closing(EtcdStore([dead[0], shared.endpoint], "/test/failover2")) as store:
            with pytest.raises(StoreUnavailable):
                store.create("10.5.1.0-24", b"", 0)
            assert store.create("10.5.1.0-24", b"", 0)
        with contextlib.closing(EtcdStore([dead[0], shared.endpoint], "/test/failover2")) as store:
            with pytest.raises(StoreUnavailable):
                next(iter(store.watch(1)))
            next(iter(store.watch(1)))


# --- logins ---


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[EtcdProcess]:
    """etcd with authentication: user root, and `agent` (password `secret`) for the default prefix alone."""
    with EtcdProcess(tmp_path / "guarded", arguments=["--auth-token-ttl=2", "--bcrypt-cost=4"]) as etcd:
        with raw_channel(etcd) as channel:
            auth = rpc.AuthStub(channel)
            for user, password in (("root", "top"), ("agent", "secret")):
                auth.UserAdd(rpc.AuthUserAddRequest(name=user, password=password), timeout=5)
                auth.RoleAdd(rpc.AuthRoleAddRequest(name=user), timeout=5)
                auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=user, role=user), timeout=5)
            grant = rpc.AuthRoleGrantPermissionRequest(name="agent")
            grant.perm.permType = 2  # READWRITE
            grant.perm.key, grant.perm.range_end = b"/coreos.com/network/", b"/coreos.com/network0"
            auth.RoleGrantPermission(grant, timeout=5)
            auth.AuthEnable(rpc.AuthEnableRequest(), timeout=5)
        yield etcd


def test_the_right_password_opens_and_an_expired_login_is_renewed(guarded: EtcdProcess) -> None:
    with contextlib.closing(guarded.store(username="agent", password="secret")) as store:
        assert store.create("10.5.1.0-24", b"", store.grant(60))
        first = iter(store.watch(1))
        assert next(first).events == ()
        assert len(next(first).events) == 1
        token = store._token
        assert token

        with raw_channel(guarded) as channel:

            def expired() -> bool:
                try:
                    rpc.KVStub(channel).Range(
                        rpc.RangeRequest(key=b"/coreos.com/network/config"), timeout=5, metadata=[("token", token)]
                    )
                except grpc.RpcError as error:
                    return error.code() is grpc.StatusCode.UNAUTHENTICATED
                # Each use keeps a token alive for its whole time.
                time.sleep(3)
                return False

            wait_until(expired)
        second = iter(store.watch(1))
        assert next(second).events == ()
        assert store._token != token
        assert len(store.snapshot().records) == 1


def test_a_login_lost_in_a_restart_is_renewed_by_the_next_call(guarded: EtcdProcess) -> None:
    with contextlib.closing(guarded.store(username="agent", password="secret")) as store:
        store.snapshot()
        guarded.restart()
        wait_until(lambda: answers(store))
        assert store.create("10.5.1.0-24", b"", 0)


def test_a_wrong_password_is_denied_without_being_shown(guarded: EtcdProcess) -> None:
    with contextlib.closing(guarded.store(username="agent", password="wr0ng")) as store:
        for attempt in (store.snapshot, lambda: list(store.watch(1)), lambda: store.grant(60)):
            with pytest.raises(StoreDenied) as caught:
                attempt()
            assert str(caught.value) == "etcd refused the user name or password"


def test_no_password_is_denied_with_a_hint(guarded: EtcdProcess) -> None:
    with contextlib.closing(guarded.store()) as store:
        with pytest.raises(StoreDenied, match="user name and password"):
            store.snapshot()
        with pytest.raises(StoreDenied, match=r"permission to watch /coreos\.com/network/subnets/"):
            list(store.watch(1))


def test_missing_permission_is_denied_with_the_key(guarded: EtcdProcess) -> None:
    with contextlib.closing(guarded.store("/other", username="agent", password="secret")) as store:
        with pytest.raises(StoreDenied, match="permission on /other/subnets/"):
            store.snapshot()
        with pytest.raises(StoreDenied, match="permission on /other/subnets/10"):
            store.create("10.5.1.0-24", b"", 0)
        with pytest.raises(StoreDenied, match="permission to watch /other/subnets/"):
            list(store.watch(1))


def test_a_login_where_none_is_asked_for_does_no_harm(shared: EtcdProcess) -> None:
    with contextlib.closing(shared.store("/test/open", username="agent", password="secret")) as store:
        assert store.snapshot().records == ()
        next(iter(store.watch(1)))


# --- TLS ---


def make_authority(directory: Path, name: str) -> Path:
    """A CA; its certificate's path."""
    key, certificate = directory / f"{name}.key", directory / f"{name}.pem"
    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")(
        "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(certificate)
    )
    return certificate


def make_certificate(authority: Path, name: str, names: str = "IP:127.0.0.1", days: int = 2) -> tuple[Path, Path]:
    """A certificate signed by the CA for `names`, and its key; with `days` below 0 it has expired."""
    directory = authority.parent
    key, request, certificate = (directory / f"{name}.{ending}" for ending in ("key", "csr", "pem"))
    extensions = directory / f"{name}.ext"
    extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")(
        "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(request)
    )
    openssl("x509", "-req", "-days", str(days), "-CAcreateserial", "-CA", str(authority))(
        *("-CAkey", str(authority.with_suffix(".key")), "-in", str(request), "-extfile", str(extensions)),
        *("-out", str(certificate)),
    )
    return certificate, key


def openssl(*first: str) -> Callable[..., None]:
    def run(*rest: str) -> None:
        subprocess.run(["openssl", *first, *rest], check=True, capture_output=True)

    return run


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_authority(tmp_path_factory.mktemp("pki"), "ca")


@pytest.fixture(scope="module")
def secured(authority: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdProcess]:
    """etcd that asks its clients for a certificate."""
    certificate, key = make_certificate(authority, "server")
    arguments = ["--client-cert-auth"]
    etcd = EtcdProcess(tmp_path_factory.mktemp("tls"), tls=(certificate, key, authority), arguments=arguments)
    etcd.start(wait=False)
    client, client_key = make_certificate(authority, "client")
    try:
        with contextlib.closing(etcd.store(certfile=str(client), keyfile=str(client_key))) as store:
            wait_until(lambda: answers(store), 30)
        yield etcd
    finally:
        etcd.kill()


def client_files(authority: Path) -> dict[str, str]:
    directory = authority.parent
    return {
        "cafile": str(authority),
        "certfile": str(directory / "client.pem"),
        "keyfile": str(directory / "client.key"),
    }


def test_certificates_that_fit_open(secured: EtcdProcess, authority: Path) -> None:
    with contextlib.closing(EtcdStore([secured.endpoint], "/test/tls", **client_files(authority))) as store:
        assert store.create("10.5.1.0-24", b"", 0)
        next(iter(store.watch(1)))


def refusal(endpoint: str, files: dict[str, str]) -> str:
    with (
        contextlib.closing(EtcdStore([endpoint], "/test/tls", **files)) as store,  # type: ignore[arg-type]
        pytest.raises(StoreUnavailable) as caught,
    ):
        store.snapshot()
    return str(caught.value)


def test_what_tls_has_against_a_connection_is_said(
    secured: EtcdProcess, shared: EtcdProcess, authority: Path, tmp_path: Path
) -> None:
    files = client_files(authority)
    foreign = str(make_authority(tmp_path, "foreign"))
    stranger, key = make_certificate(Path(foreign), "stranger")
    port = secured.endpoint.rpartition(":")[2]
    assert f"not signed by the CA in {foreign}" in refusal(secured.endpoint, {**files, "cafile": foreign})
    assert "is not for localhost" in refusal(f"https://localhost:{port}", files)
    assert "wants a client certificate" in refusal(secured.endpoint, {"cafile": str(authority)})
    theirs = {**files, "certfile": str(stranger), "keyfile": str(key)}
    assert f"does not accept the certificate in {stranger}" in refusal(secured.endpoint, theirs)
    assert "does not speak TLS" in refusal(shared.endpoint.replace("http:", "https:"), files)
    with refusing_ports(1) as (nobody,):
        assert refusal(f"https://127.0.0.1:{nobody}", files).startswith("no connection to")


def test_a_server_whose_certificate_has_expired_is_told(authority: Path, tmp_path: Path) -> None:
    certificate, key = make_certificate(authority, "old-server", days=-1)
    etcd = EtcdProcess(tmp_path, tls=(certificate, key, authority))
    etcd.start(wait=False)
    try:
        wait_until(lambda: "has expired" in refusal(etcd.endpoint, {"cafile": str(authority)}), 30)
    finally:
        etcd.kill()


def test_an_own_certificate_that_has_expired_is_refused_with_the_day(authority: Path) -> None:
    certificate, key = make_certificate(authority, "old-client", days=-1)
    with pytest.raises(StoreConfigInvalid, match=rf"{certificate} has expired on 20\d\d-\d\d-\d\d") as caught:
        EtcdStore(["https://a:1"], "/test", cafile=str(authority), certfile=str(certificate), keyfile=str(key))
    assert caught.value.option == "certfile"


def test_files_that_were_replaced_are_read_again(secured: EtcdProcess, authority: Path, tmp_path: Path) -> None:
    cafile = make_authority(tmp_path, "foreign")
    with contextlib.closing(
        EtcdStore([secured.endpoint], "/test/tls", **{**client_files(authority), "cafile": str(cafile)})
    ) as store:
        assert not answers(store)
        cafile.unlink()
        assert not answers(store)
        cafile.write_bytes(authority.read_bytes())
        wait_until(lambda: answers(store))


def test_members_are_verified_each_by_its_own_name(secured: EtcdProcess, authority: Path) -> None:
    port = secured.endpoint.rpartition(":")[2]
    # The first name is in no certificate; the second one's is good for itself, not for the first.
    endpoints = [f"https://localhost:{port}", secured.endpoint]
    with contextlib.closing(EtcdStore(endpoints[:1], "/test/tls", **client_files(authority))) as store:
        assert not answers(store)
    with contextlib.closing(EtcdStore(endpoints, "/test/tls", **client_files(authority))) as store:
        assert answers(store)


# --- options ---


@pytest.mark.parametrize(
    ("endpoints", "options", "culprit"),
    [
        ([], {}, "endpoints"),
        (["http://a:1", "https://b:1"], {"cafile": "CA"}, "endpoints"),
        (["ftp://a:1"], {}, "endpoints"),
        (["http://a"], {}, "endpoints"),
        (["http://a:x"], {}, "endpoints"),
        (["http://a:1/path"], {}, "endpoints"),
        (["http://user:pass@a:1"], {}, "endpoints"),
        (["unix://relative"], {}, "endpoints"),
        (["https://a:1"], {}, "cafile"),
        (["https://a:1"], {"certfile": "CERT", "keyfile": "KEY"}, "cafile"),
        (["https://a:1"], {"cafile": "CA", "certfile": "CERT"}, "keyfile"),
        (["https://a:1"], {"cafile": "CA", "keyfile": "KEY"}, "certfile"),
        (["https://a:1"], {"cafile": "/nowhere"}, "cafile"),
        (["https://a:1"], {"cafile": "KEY"}, "cafile"),
        (["https://a:1"], {"cafile": "CA", "certfile": "CERT", "keyfile": "/nowhere"}, "keyfile"),
        (["https://a:1"], {"cafile": "CA", "certfile": "CA", "keyfile": "KEY"}, "certfile"),
        (["http://a:1"], {"cafile": "CA"}, "cafile"),
        (["unix:///a"], {"certfile": "CERT", "keyfile": "KEY"}, "certfile"),
        (["http://a:1"], {"username": "u"}, "password"),
        (["http://a:1"], {"password": "p"}, "username"),
    ],
)
def test_options_that_contradict_are_refused_by_name(
    secured: EtcdProcess, authority: Path, endpoints: list[str], options: dict[str, str], culprit: str
) -> None:
    files = client_files(authority)
    places = {"CA": files["cafile"], "CERT": files["certfile"], "KEY": files["keyfile"]}
    with pytest.raises(StoreConfigInvalid) as caught:
        EtcdStore(endpoints, "/p", **{name: places.get(value, value) for name, value in options.items()})
    assert caught.value.option == culprit
    assert isinstance(caught.value, ValueError)
    assert "pass@" not in str(caught.value)


def test_an_empty_prefix_is_refused() -> None:
    with pytest.raises(StoreConfigInvalid, match="prefix"):
        EtcdStore(["a:1"], "/")


def test_a_trailing_slash_of_the_prefix_makes_no_difference(shared: EtcdProcess) -> None:
    with (
        contextlib.closing(shared.store("/test/slash")) as one,
        contextlib.closing(shared.store("/test/slash/")) as other,
    ):
        one.write_config(b"{}")
        assert other.read_config() == b"{}"
