"""The lease store in etcd (v3 API), and the only place that knows etcd3 and grpc.

Of etcd3 only the protobuf messages and stubs are used, on channels of our own. One endpoint is in use at a time; after
a failure the next one is. So the certificate of each member is verified against the name of that very member, and a
member that answers but has lost its leader is left too. Reads and other repeatable calls go on to the next endpoint by
themselves; a transaction is sent once, for its outcome is unknown after a failure.

Channel options, each for a reason:
- keepalive every 10 s (etcd punishes less than 5 s with too_many_pings), answered within 5 s, calls or not: a host that
  vanished or a process that stopped is noticed within 20 s; `http2.ping_timeout_ms` is what makes the core act on it;
- 64 MiB answers; no HTTP proxy from the environment between a host and its etcd;
- a subchannel pool of its own: two stores in one process do not share fate;
- connection attempts last up to 5 s, and are repeated after 0.25 to 5 s.

Errors are told apart by status code, never by text; the text of grpc goes to the debug log only.
"""

import contextlib
import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import grpc
import structlog
from etcd3 import etcdrpc as rpc
from etcd3.etcdrpc import kv_pb2

from subnet_lease.store import (
    Changes,
    Deleted,
    Record,
    Snapshot,
    StoreConfigInvalid,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    TlsFailed,
    WatchInterrupted,
    kind_of,
)
from subnet_lease.tls import TlsFiles

PAGE = 1000
"""Keys per read: some 200 kB, where 18,700 leases in one answer would break grpc's default of 4 MiB."""

DIAGNOSIS_S = 30.0
"""For how long what was found to be wrong with TLS is taken to be so still."""

PAGE_ATTEMPTS = 4
"""How often a page after the first is asked for before the whole read fails."""

_REQUESTS = {"RangeRequest": "read", "TxnRequest": "write", "PutRequest": "write"}
"""What requests are to an operator; all others are about leases."""

_FAILURES = {"StoreUnavailable": "unavailable", "TlsFailed": "tls", "StoreDenied": "denied"}

CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # the time one attempt may take, despite its name
    ("grpc.max_reconnect_backoff_ms", 5_000),
)

log = structlog.get_logger()

# How often a thread that waits for a watch wakes up, in seconds. grpc has 0.1, so that signal handlers get their turn
# in the main thread; that was most of what an idle agent did, and ours are called by way of a file descriptor.
setattr(importlib.import_module("grpc._common"), "MAXIMUM_WAIT_TIMEOUT", 60.0)  # noqa: B010


class EtcdStore:
    """`subnet_lease.store.Store` over the keys `<prefix>/config` and `<prefix>/subnets/*`, for use from any thread."""

    def __init__(
        self,
        endpoints: Sequence[str],
        prefix: str,
        *,
        cafile: str | None = None,
        certfile: str | None = None,
        keyfile: str | None = None,
        username: str | None = None,
        password: str | None = None,
        timeout: float = 5.0,
        observe: Callable[[str, float, str], None] = lambda request, seconds, failure: None,
    ) -> None:
        """Connects on first use. `timeout` is each call's deadline in seconds; StoreConfigInvalid names a wrong option.

        `observe` hears of each request, in the thread that made it: read, write, lease, login or watch; how many
        seconds it took, of a watch until it stood; and what failed: nothing (empty), unavailable, tls or denied.

        `endpoints`: `http://host:port`, `https://host:port`, `host:port` (plaintext) or `unix:///path`.
        """
        self._endpoints = _endpoints(endpoints)
        self._files = TlsFiles(cafile, certfile, keyfile)
        secure = self._endpoints[0].startswith("https:")
        if any(endpoint.startswith("https:") != secure for endpoint in self._endpoints):
            raise StoreConfigInvalid("endpoints", "either all or none must be https")
        if secure:
            self._files.check()
        elif option := self._files.first_given():
            raise StoreConfigInvalid(option, f"given, but {self._endpoints[0]} is not https")
        if password is not None and username is None:
            raise StoreConfigInvalid("username", "missing, though a password is given")
        if username is not None and password is None:
            raise StoreConfigInvalid("password", "missing, though a user name is given")
        if not prefix.strip("/"):
            raise StoreConfigInvalid("prefix", "must not be empty")
        self._secure = secure
        self._config_key = f"{prefix.rstrip('/')}/config".encode()
        self._subnets = f"{prefix.rstrip('/')}/subnets/".encode()
        self._subnets_end = self._subnets[:-1] + b"0"  # "0" follows "/"
        self._username, self._password = username, password
        self._token: str | None = None
        self._timeout = timeout
        self._observe = observe
        self._lock = threading.Lock()
        self._turn = 0
        self._connection: _Connection | None = None
        self._diagnosis: tuple[float, object, str | None] = 0.0, None, None
        self._closed = False

    # --- the Store protocol ---

    def read_config(self) -> bytes | None:
        answer = self._call(lambda c: c.kv.Range, rpc.RangeRequest(key=self._config_key), self._config_key)
        return answer.kvs[0].value if answer.kvs else None

    def write_config(self, value: bytes) -> None:
        request = rpc.PutRequest(key=self._config_key, value=value)
        self._call(lambda c: c.kv.Put, request, self._config_key)

    def snapshot(self) -> Snapshot:
        records: list[Record] = []
        with ThreadPoolExecutor(1, "page") as ahead:
            page = self._page(self._subnets)
            revision = page.header.revision
            while page.more:
                # etcd looks the next page up while this one is taken apart.
                following = ahead.submit(self._page, page.kvs[-1].key + b"\0", revision)
                records += map(self._record, page.kvs)
                page = following.result()
            records += map(self._record, page.kvs)
        return Snapshot(tuple(records), revision, page.header.cluster_id)

    def _page(self, key: bytes, revision: int = 0) -> Any:
        """Up to PAGE leases from `key` on. A first page is the cluster's latest word (revision 0: a quorum is asked).

        What it held at that revision never changes, so all further pages come from the member itself, and one that is
        too busy is asked for the same page again: to begin anew would make it busier.
        """
        request = rpc.RangeRequest(
            key=key, range_end=self._subnets_end, limit=PAGE, revision=revision, serializable=bool(revision)
        )
        for _ in range(PAGE_ATTEMPTS - 1 if revision else 0):
            with contextlib.suppress(StoreUnavailable):
                return self._call(lambda c: c.kv.Range, request, self._subnets)
        return self._call(lambda c: c.kv.Range, request, self._subnets)

    def watch(self, revision: int, cluster_id: int = 0, witness: Record | None = None) -> "EtcdWatch":
        return EtcdWatch(self, revision, cluster_id, witness)

    def grant(self, ttl: int) -> int:
        answer = self._call(lambda c: c.lease.LeaseGrant, rpc.LeaseGrantRequest(TTL=ttl), b"")
        return int(answer.ID)

    def keep_alive(self, etcd_lease: int) -> int:
        request = rpc.LeaseKeepAliveRequest(ID=etcd_lease)
        answer = self._call(lambda c: _one_answer(c.lease.LeaseKeepAlive), request, b"")
        return max(int(answer.TTL), 0)

    def time_left(self, etcd_lease: int) -> int:
        request = rpc.LeaseTimeToLiveRequest(ID=etcd_lease)
        return max(int(self._call(lambda c: c.lease.LeaseTimeToLive, request, b"").TTL), 0)

    def revoke(self, etcd_lease: int) -> None:
        with contextlib.suppress(_LeaseGone):
            self._call(lambda c: c.lease.LeaseRevoke, rpc.LeaseRevokeRequest(ID=etcd_lease), self._subnets)

    def create(self, key: str, value: bytes, etcd_lease: int) -> int:
        return self._transact({key: 0}, self._put(key, value, etcd_lease))

    def replace(self, key: str, value: bytes, etcd_lease: int, mod_revision: int) -> int:
        return self._transact({key: mod_revision}, self._put(key, value, etcd_lease))

    def delete(self, key: str, mod_revision: int) -> bool:
        return bool(self._transact({key: mod_revision}, self._deletion(key)))

    def move(self, old: str, old_revision: int, key: str, value: bytes, etcd_lease: int, mod_revision: int) -> int:
        revisions = {old: old_revision, key: mod_revision}
        return self._transact(revisions, self._deletion(old), self._put(key, value, etcd_lease))

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.channel.close()

    # --- calls ---

    def _full(self, key: str) -> bytes:
        return self._subnets + key.encode("utf-8", "surrogateescape")

    def _record(self, kv: Any) -> Record:
        created, modified = kv.create_revision, kv.mod_revision
        # One number for both, of most leases: thousands are kept.
        return Record(self._short(kv), kv.value, kv.lease, created, created if modified == created else modified)

    def _short(self, kv: Any) -> str:
        return str(kv.key[len(self._subnets) :], "utf-8", "surrogateescape")

    def _look_back(self, revision: int, witness: Record | None) -> None:
        """WatchInterrupted unless the cluster, asked through its leader, has this revision and the witness as known.

        It has not what is compacted or yet to come. A store that was restored and has grown since has it with others.
        """
        key = self._full(witness.key) if witness else self._subnets
        try:
            answer = self._call(lambda c: c.kv.Range, rpc.RangeRequest(key=key, revision=revision), self._subnets)
        except _NoSuchRevision:
            raise WatchInterrupted(f"etcd does not have revision {revision}: restored, or compacted since") from None
        if witness is not None and [self._record(kv)[2:] for kv in answer.kvs] != [witness[2:]]:
            raise WatchInterrupted(f"etcd has another revision {revision}: restored from a backup", same_history=False)

    def _put(self, key: str, value: bytes, etcd_lease: int) -> Any:
        return rpc.RequestOp(request_put=rpc.PutRequest(key=self._full(key), value=value, lease=etcd_lease))

    def _deletion(self, key: str) -> Any:
        return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=self._full(key)))

    def _transact(self, revisions: dict[str, int], *operations: Any) -> int:
        """Do it all if each key was last changed at its revision (0: does not exist); the revision it made, else 0."""
        request = rpc.TxnRequest(compare=[self._is_from(*each) for each in revisions.items()], success=operations)
        answer = self._call(lambda c: c.kv.Txn, request, self._full(next(iter(revisions))), repeat=False)
        return int(answer.header.revision) if answer.succeeded else 0

    def _is_from(self, key: str, revision: int) -> Any:
        compare = rpc.Compare
        return compare(key=self._full(key), target=compare.MOD, result=compare.EQUAL, mod_revision=revision)

    def _call(self, method: Callable[["_Connection"], Any], request: Any, key: bytes, *, repeat: bool = True) -> Any:
        """The answer to one request about `key`; where it may be repeated, from the first endpoint that gives one."""
        for _ in self._endpoints[1:] if repeat else ():
            with contextlib.suppress(StoreUnavailable):
                return self._call_once(method, request, key)
        return self._call_once(method, request, key)

    def _call_once(self, method: Callable[["_Connection"], Any], request: Any, key: bytes) -> Any:
        connection = self._connect()
        try:
            return self._with_token(
                connection,
                lambda metadata: self._send(connection, method(connection), request, key, metadata),
            )
        except (_LeaseGone, _NoSuchRevision):
            raise
        except StoreUnavailable:
            self._leave(connection)
            raise

    def _send(self, connection: "_Connection", method: Any, request: Any, key: bytes, metadata: Any) -> Any:
        with self._observed(_REQUESTS.get(type(request).__name__, "lease")):
            try:
                return method(request, timeout=self._timeout, metadata=metadata)
            except grpc.RpcError as error:
                raise self._translated(error, connection, key) from None
            except ValueError:
                # What grpc raises on a channel that another thread has just closed.
                raise StoreUnavailable(f"the connection to {connection.endpoint} was given up") from None

    @contextlib.contextmanager
    def _observed(self, request: str) -> Iterator[None]:
        """Have `observe` hear of the request in the block."""
        started, failure = time.monotonic(), ""
        try:
            yield
        except (_LeaseGone, _NoSuchRevision, WatchInterrupted):
            raise  # That is an answer.
        except StoreError as error:
            failure = _FAILURES[kind_of(error)]
            raise
        finally:
            self._observe(request, time.monotonic() - started, failure)

    def _with_token(self, connection: "_Connection", attempt: Callable[[list[tuple[str, str]]], Any]) -> Any:
        """Run `attempt` with the metadata of the logged-in user; log in anew once if it is denied: tokens expire."""
        if self._username is None:
            return attempt([])
        token = self._token
        if token is not None:
            with contextlib.suppress(_NotLoggedIn):
                return attempt(_token_metadata(token))
        return attempt(_token_metadata(self._log_in(connection)))

    def _log_in(self, connection: "_Connection") -> str:
        """A new token; empty where etcd has authentication switched off."""
        request = rpc.AuthenticateRequest(name=self._username, password=self._password)
        with self._observed("login"):
            try:
                token = str(connection.auth.Authenticate(request, timeout=self._timeout).token)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                    token = ""
                elif error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                    raise StoreDenied("etcd refused the user name or password") from None
                else:
                    raise self._translated(error, connection, b"") from None
            except ValueError:
                raise StoreUnavailable(f"the connection to {connection.endpoint} was given up") from None
        self._token = token
        return token

    def _translated(self, error: grpc.RpcError, connection: "_Connection", key: bytes) -> StoreError:
        """The error for an operator. The only place where grpc's status codes get their meaning."""
        code, endpoint = error.code(), connection.endpoint
        log.debug("etcd_call_failed", endpoint=endpoint, code=code.name, details=error.details())
        match code:
            case grpc.StatusCode.UNAVAILABLE:
                if self._secure and (reason := self._tls_trouble(connection)):
                    return TlsFailed(reason)
                return StoreUnavailable(f"no connection to {endpoint}, or no leader in its cluster")
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return StoreUnavailable(f"no answer from {endpoint} within {self._timeout:g} s")
            case grpc.StatusCode.PERMISSION_DENIED:
                subject = f" on {key.decode('utf-8', 'backslashreplace')}" if key else ""
                return StoreDenied(f"etcd denied permission{subject}")
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.INVALID_ARGUMENT if self._username is None:
                return StoreDenied("etcd refused the request; it may want a user name and password")
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.INVALID_ARGUMENT:
                # etcd answers INVALID_ARGUMENT to a request without a token, and to a token older than its user table.
                return _NotLoggedIn("etcd refused the request and the login it was made with")
            case grpc.StatusCode.RESOURCE_EXHAUSTED:
                return StoreUnavailable(f"etcd at {endpoint} is overloaded or its database is full")
            case grpc.StatusCode.OUT_OF_RANGE:
                return _NoSuchRevision(
                    f"etcd at {endpoint} does not have the revision that was being read, or no longer"
                )
            case grpc.StatusCode.NOT_FOUND:
                return _LeaseGone("the etcd lease has ended meanwhile")
            case grpc.StatusCode.CANCELLED:
                return StoreUnavailable(f"the connection to {endpoint} was given up")
            case _:
                return StoreUnavailable(f"etcd at {endpoint} answered with status {code.name}")

    def _tls_trouble(self, connection: "_Connection") -> str | None:
        """What TLS has against this endpoint. What was found holds for a while: an outage fails many times alike."""
        now, which = time.monotonic(), (connection.endpoint, connection.stamps)
        asked_at, about, reason = self._diagnosis
        if reason is None or about != which or now - asked_at > DIAGNOSIS_S:
            reason = self._files.trouble(connection.endpoint)
            self._diagnosis = now, which, reason
        return reason

    # --- connections ---

    def _connect(self) -> "_Connection":
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the store is closed")
            if self._connection is None:
                endpoint = self._endpoints[self._turn % len(self._endpoints)]
                self._connection = _Connection.open(endpoint, self._files if self._secure else None)
            return self._connection

    def reconnect(self) -> None:
        """Leave the present connection, for this host's address on it may be gone: what waits for an answer fails at
        once, and what follows opens another one. From any thread."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.channel.close()

    def _leave(self, failed: "_Connection") -> None:
        """After a failure: go to the next endpoint, or read TLS files again that have changed.

        A lone endpoint with unchanged files keeps its channel, which reconnects by itself.
        """
        with self._lock:
            if self._connection is not failed:
                return
            if len(self._endpoints) == 1 and (not self._secure or failed.stamps == self._files.stamps()):
                return
            self._turn += 1
            self._connection = None
        failed.channel.close()


class EtcdWatch:
    """`subnet_lease.store.Watch` on a stream of its own. To be iterated once."""

    def __init__(self, store: EtcdStore, revision: int, cluster_id: int, witness: Record | None) -> None:
        self._store = store
        self._revision = revision
        self._cluster_id = cluster_id
        self._witness = witness
        self._lock = threading.Lock()
        self._cancelled = False
        self._late = threading.Event()
        self._stream: Any = None
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            stream = self._stream
        if stream is not None:
            stream.cancel()

    def __iter__(self) -> Iterator[Changes]:
        store = self._store
        connection = store._connect()
        try:
            with store._observed("watch"):
                first = store._with_token(connection, lambda metadata: self._begin(connection, metadata))
            yield first
            for response in self._stream:
                yield self._changes(response)
            if not self._ended_by_us():
                raise WatchInterrupted(f"etcd at {connection.endpoint} ended the watch", resumable=True)
        except grpc.RpcError as error:
            if not self._ended_by_us():
                store._leave(connection)
                raise WatchInterrupted(
                    str(store._translated(error, connection, store._subnets)), resumable=True
                ) from None
        except StoreUnavailable:
            if not self._ended_by_us():
                store._leave(connection)
                raise
        finally:
            self._end()

    def _begin(self, connection: "_Connection", metadata: list[tuple[str, str]]) -> Changes:
        """Open the stream and wait until etcd says that the watch stands: a refused watch may just stay silent."""
        store = self._store
        self._end()
        self._requests.put(self._request())
        late = threading.Timer(store._timeout, self._give_up)
        try:
            stream = connection.watch.Watch(iter(self._requests.get, None), metadata=[("hasleader", "true"), *metadata])
            with self._lock:
                self._stream = stream
                if self._cancelled:
                    stream.cancel()
            late.start()
            response = next(stream, None)
        except grpc.RpcError as error:
            if self._late.is_set():
                raise StoreUnavailable(
                    f"no answer from {connection.endpoint} to the watch within {store._timeout:g} s"
                ) from None
            raise store._translated(error, connection, store._subnets) from None
        except ValueError:
            raise StoreUnavailable(f"the connection to {connection.endpoint} was given up") from None
        finally:
            late.cancel()
        if response is None:
            raise StoreUnavailable(f"etcd at {connection.endpoint} ended the watch at once")
        if response.watch_id == -1 or (response.created and response.canceled and not response.compact_revision):
            raise _NotLoggedIn(f"etcd denied permission to watch {store._subnets.decode()}")
        changes = self._changes(response)
        # Where it is compacted up to where the watch begins, etcd before 3.4.34 and 3.5.16 says nothing and leaves out
        # what was deleted at that very revision.
        store._look_back(self._revision - 1, self._witness)
        return changes

    def _request(self) -> Any:
        create = rpc.WatchCreateRequest(
            key=self._store._subnets,
            range_end=self._store._subnets_end,
            start_revision=self._revision,
            progress_notify=True,
        )
        return rpc.WatchRequest(create_request=create)

    def _changes(self, response: Any) -> Changes:
        # etcd's own proxy (3.4) leaves the header empty for those who join a watch that it has already.
        if self._cluster_id and response.header.cluster_id not in (0, self._cluster_id):
            raise WatchInterrupted("another etcd cluster answers")
        if response.compact_revision:
            raise WatchInterrupted(f"etcd no longer keeps the changes before revision {response.compact_revision}")
        if response.canceled:
            raise WatchInterrupted("etcd cancelled the watch")
        store = self._store
        events = tuple(
            Deleted(store._short(event.kv), event.kv.mod_revision)
            if event.type == kv_pb2.Event.DELETE
            else store._record(event.kv)
            for event in response.events
        )
        # While the watch catches up, the header runs ahead of the events.
        return Changes(events, events[-1].mod_revision if events else response.header.revision)

    def _ended_by_us(self) -> bool:
        return self._cancelled or self._store._closed

    def _give_up(self) -> None:
        self._late.set()
        with self._lock:
            stream = self._stream
        if stream is not None:
            stream.cancel()

    def _end(self) -> None:
        """End the stream, and with it the thread in which grpc waits for more requests."""
        with self._lock:
            stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()
            self._requests.put(None)
            self._requests = queue.SimpleQueue()


class _LeaseGone(StoreUnavailable):
    """The etcd lease named in a request does not exist."""


class _NoSuchRevision(StoreUnavailable):
    """A revision was asked for that is compacted or has not been yet."""


class _NotLoggedIn(StoreDenied):
    """Denied in a way that a new login may mend."""


def _token_metadata(token: str) -> list[tuple[str, str]]:
    return [("token", token)] if token else []


def _one_answer(method: Any) -> Any:
    """A stream call as a plain one: one request, one answer."""

    def call(request: Any, **options: Any) -> Any:
        stream = method(iter((request,)), **options)
        answer = next(stream, None)
        stream.cancel()
        if answer is None:
            raise StoreUnavailable("etcd ended the call without an answer")
        return answer

    return call


@dataclass(frozen=True, slots=True)
class _Connection:
    """A channel to one endpoint, its stubs, and the state of the TLS files it was opened with."""

    endpoint: str
    channel: grpc.Channel
    stamps: tuple[object, ...]
    kv: Any
    lease: Any
    watch: Any
    auth: Any

    @classmethod
    def open(cls, endpoint: str, files: "TlsFiles | None") -> "_Connection":
        """Makes no connection yet; StoreUnavailable while TLS files are missing or do not fit together."""
        # dns: resolves host names each time it connects and takes plain addresses as they are.
        target = endpoint if endpoint.startswith("unix:") else f"dns:///{urlsplit(endpoint).netloc}"
        if files is None:
            stamps: tuple[object, ...] = ()
            channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        else:
            stamps = files.stamps()
            contents = files.contents()
            credentials = grpc.ssl_channel_credentials(
                contents["cafile"], private_key=contents.get("keyfile"), certificate_chain=contents.get("certfile")
            )
            channel = grpc.secure_channel(target, credentials, options=CHANNEL_OPTIONS)
        stubs = rpc.KVStub(channel), rpc.LeaseStub(channel), rpc.WatchStub(channel), rpc.AuthStub(channel)
        return cls(endpoint, channel, stamps, *stubs)


def _endpoints(given: Sequence[str]) -> tuple[str, ...]:
    """Endpoints in full form: `http://host:port`, `https://host:port` or `unix:///path`."""
    if not given:
        raise StoreConfigInvalid("endpoints", "none given")
    return tuple(map(_endpoint, given))


def _endpoint(text: str) -> str:
    full = text if "://" in text else f"http://{text}"
    try:
        url = urlsplit(full)
        port = url.port
    except ValueError:
        raise StoreConfigInvalid("endpoints", f"{text!r} is not a URL") from None
    if "@" in url.netloc:
        raise StoreConfigInvalid("endpoints", "user name and password do not belong into a URL")
    if url.scheme == "unix" and not url.netloc and url.path.startswith("/"):
        return f"unix://{url.path}"
    if url.scheme not in ("http", "https") or not url.hostname or port is None or url.path.strip("/"):
        raise StoreConfigInvalid("endpoints", f"{text!r} is not of the form http://host:port or https://host:port")
    return f"{url.scheme}://{url.netloc}"
