"""What each kind of request costs etcd, with bare clients and nothing of the agent: the units of docs/scale.md.

One etcd on loopback, its data on disk but not synced; the clients run on the same processors, so wall-clock times are
worse than with clients elsewhere, while etcd's CPU time is its own.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import grpc
from etcd3 import etcdrpc as rpc

from subnet_lease.etcd import PAGE
from subnet_lease.model import Lease, encode_attrs, subnet_key
from tests.bench.cluster_h2 import Connection, Swarm
from tests.bench.cluster_meter import Meter, cost_of, etcd_at, loopback, spread
from tests.bench.peers import LEASE_TTL, leases, load

PREFIX = "/load"
SUBNETS = f"{PREFIX}/subnets/".encode()
SUBNETS_END = f"{PREFIX}/subnets0".encode()

RANGE = "/etcdserverpb.KV/Range"
WATCH = "/etcdserverpb.Watch/Watch"

KEEPALIVE_S = 10.0
"""How often an agent's connection sends a ping, see `subnet_lease.etcd.CHANNEL_OPTIONS`."""

PROGRESS_S = 4
"""How often etcd sends progress notifications while their cost is measured; its default is 600 s."""

CHANGES = 10
"""Changes, one after the other, at each number of watches."""

BURST = 50
"""Changes with no wait between them, at each number of watches."""

OPENING = 50
"""Watches that are being opened at a time."""

READS = 10
"""Full reads of each kind, in turns."""


class Subject(NamedTuple):
    """An etcd under measurement. `aside` is a second endpoint, a unix socket, for what prepares and changes things."""

    meter: Meter
    endpoint: str
    aside: str
    certificate: tuple[Path, Path] | None = None


def measure(
    directory: Path, size: int, levels: Sequence[int], idle_s: float, progress: Callable[[str], None]
) -> dict[str, Any]:
    """All units, with a table of `size` leases and up to the last of `levels` watches; `idle_s` seconds of silence."""
    peers = leases(size)
    some = levels[0]
    figures: dict[str, Any] = {"leases": size, "changes": CHANGES, "burst": BURST, "idle_s": idle_s}
    with _etcd(directory / "reads", peers) as etcd:
        progress(f"etcd alone: full reads of {size} leases, one after the other and {some // 5} at once")
        figures["reads"] = _reads(etcd)
        figures["crowd"] = _crowd(etcd, some // 5)
        progress("etcd alone: renewals and first leases")
        figures["renewal_cpu_s"] = _renewals(etcd, 2 * some)
        figures["first_lease_cpu_s"] = _first_leases(etcd, some)
    with _etcd(directory / "watches", peers) as etcd:
        progress(f"etcd alone: {', '.join(map(str, levels))} watches, and {idle_s:g} s of silence twice")
        figures["watches"] = _watches(etcd, peers, levels, idle_s)
    with _etcd(directory / "progress", peers, f"--experimental-watch-progress-notify-interval={PROGRESS_S}s") as etcd:
        progress("etcd alone: progress notifications")
        figures["progress_cpu_s"] = _notifications(etcd, 2 * some)
    with _etcd(directory / "tls", peers, certificate=_certificate(directory)) as etcd:
        progress("etcd alone: watches over TLS")
        figures["tls"] = _watches(etcd, peers, [some // 2, some])
    with _etcd(directory / "behind", peers) as etcd, _proxy(directory, etcd) as (endpoint, meter):
        progress("etcd alone: watches through etcd's proxy")
        figures["proxy"] = _watches(etcd._replace(endpoint=endpoint), peers, [some // 2, some], also=meter)
    return figures


@contextlib.contextmanager
def _etcd(
    directory: Path, peers: Sequence[Lease], *arguments: str, certificate: tuple[Path, Path] | None = None
) -> Iterator[Subject]:
    """An etcd with these leases; with TLS, verified on both sides, if there is a certificate."""
    endpoint = loopback("https" if certificate else "http")
    options = list(arguments)
    if certificate:
        options += [f"--cert-file={certificate[0]}", f"--key-file={certificate[1]}"]
        options += [f"--trusted-ca-file={certificate[0]}", "--client-cert-auth"]
    with etcd_at(endpoint, directory, *options) as etcd:
        load(etcd.endpoint, PREFIX, peers)
        yield Subject(Meter(etcd.pid), endpoint, etcd.endpoint, certificate)


def _certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for loopback that vouches for itself, and its key."""
    certificate, key = directory / "tls.pem", directory / "tls.key"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=etcd", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*argv, *names, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key


@contextlib.contextmanager
def _proxy(directory: Path, etcd: Subject) -> Iterator[tuple[str, Meter]]:
    """`etcd grpc-proxy` before this etcd: its endpoint and its meter."""
    endpoint = loopback()
    address = endpoint.removeprefix("http://")
    argv = ["etcd", "grpc-proxy", "start", f"--endpoints={etcd.endpoint}", f"--listen-addr={address}"]
    with (directory / "proxy.log").open("ab") as log:
        process = subprocess.Popen(
            [*argv, f"--data-dir={directory / 'proxy'}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        with grpc.insecure_channel(address) as channel:
            rpc.KVStub(channel).Range(rpc.RangeRequest(key=SUBNETS), wait_for_ready=True, timeout=30)
        yield endpoint, Meter(process.pid)
    finally:
        process.kill()
        process.wait()


# --- watches -----------------------------------------------------------------------------------------------------


def _watches(
    etcd: Subject, peers: Sequence[Lease], levels: Sequence[int], idle_s: float = 0, also: Meter | None = None
) -> dict[str, Any]:
    """Open watches up to each level and make changes there, one by one and in a burst; at last, silence, twice.

    `idle_s` is how long each silence lasts; `also` a process whose CPU and memory is noted too.
    """
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {"levels": rows}
    with Swarm(etcd.endpoint, etcd.certificate) as swarm, _Writer(etcd, peers) as writer:
        idle_cpu_s = _idle(swarm, etcd.meter, idle_s)
        for level in (0, *levels):
            with cost_of(etcd.meter) as opening:
                _open_watches(etcd, swarm, level)
            # Garbage in the heap is counted as well: it is what an operator sees.
            row: dict[str, Any] = {"streams": level, "rss_mb": etcd.meter.rss_mb, "files": etcd.meter.files}
            row |= {"open_cpu_s": opening.cpu_s, "open_s": opening.wall_s}
            received, also_cpu_s = _received(swarm), also.cpu_s if also else 0
            with cost_of(etcd.meter) as cost:
                last_s = [_change(swarm, writer) for _ in range(CHANGES)]
            row |= {"cpu_s": cost.cpu_s, "last_s": spread(last_s), "bytes": _received(swarm) - received}
            if also:
                row |= {"also_cpu_s": also.cpu_s - also_cpu_s, "also_rss_mb": also.rss_mb}
            rows.append(row | {"burst": _burst(swarm, etcd, writer)})
        if idle_s:
            figures["idle_cpu_s"] = idle_cpu_s
            figures["silent_cpu_s"] = _idle(swarm, etcd.meter, idle_s)
            figures["pings_cpu_s"], figures["pings"] = _idle_with_pings(swarm, etcd.meter, idle_s)
        figures["rss_mb"] = etcd.meter.rss_mb
    return figures


def _open_watches(etcd: Subject, swarm: Swarm, level: int) -> None:
    """Up to `level` watches, each on a connection of its own, from the present revision on, as an agent's."""
    with _aside(etcd) as (kv, _):
        revision = kv.Range(rpc.RangeRequest(key=SUBNETS)).header.revision
    request = rpc.WatchRequest(
        create_request=rpc.WatchCreateRequest(
            key=SUBNETS, range_end=SUBNETS_END, start_revision=revision + 1, progress_notify=True
        )
    )
    while len(swarm.connections) < level:
        fresh = [swarm.add() for _ in range(min(OPENING, level - len(swarm.connections)))]
        for connection in fresh:
            connection.call(WATCH, request.SerializeToString(), last=False, hasleader="true")
        waiting = set(fresh)

        def opened(connection: Connection, waiting: set[Connection] = waiting) -> None:
            if connection.messages:
                waiting.discard(connection)

        swarm.run_until(lambda waiting=waiting: not waiting, "watches open", opened)  # type: ignore[misc]
        for connection in fresh:
            answer = rpc.WatchResponse.FromString(connection.last)
            assert answer.created and not answer.canceled, answer


class _Writer:
    """Changes one lease after the other: the values stay as the agents write them."""

    def __init__(self, etcd: Subject, peers: Sequence[Lease]) -> None:
        self._channel = grpc.insecure_channel(etcd.aside.replace("unix://", "unix:"))
        self._kv = rpc.KVStub(self._channel)
        puts = [
            rpc.PutRequest(key=SUBNETS + subnet_key(peer.subnet).encode(), value=encode_attrs(peer.attrs))
            for peer in peers[:1000]
        ]
        self._puts = cycle(puts)
        # The connection stands before anything is measured.
        self.change()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def change(self) -> Any:
        """Begin to put a lease again; the call, whose result is etcd's answer."""
        return self._kv.Put.future(next(self._puts))


def _change(swarm: Swarm, writer: _Writer) -> float:
    """Seconds from the start of a put until the last watch has its event."""
    started = time.monotonic()
    put = writer.change()
    swarm.run_until(put.done, "the put is answered")
    return _await_revision(swarm, put.result().header.revision) - started


def _burst(swarm: Swarm, etcd: Subject, writer: _Writer) -> dict[str, float]:
    """BURST changes at once: etcd's CPU seconds, seconds until the last watch has the last event, answers in all.

    etcd gives up puts that wait for too long; it may carry them out all the same.
    """
    messages = sum(connection.messages for connection in swarm.connections)
    with _aside(etcd) as (kv, _), cost_of(etcd.meter) as cost:
        started = time.monotonic()
        puts = [writer.change() for _ in range(BURST)]
        swarm.run_until(lambda: all(put.done() for put in puts), "the puts are answered")
        last_s = _await_revision(swarm, kv.Range(rpc.RangeRequest(key=SUBNETS)).header.revision) - started
    return {
        "cpu_s": cost.cpu_s,
        "last_s": last_s,
        "answers": sum(connection.messages for connection in swarm.connections) - messages,
        "given_up": sum(put.exception() is not None for put in puts),
    }


def _await_revision(swarm: Swarm, revision: int) -> float:
    """Wait until every watch has the event of this revision; when the last had it."""
    behind = {connection for connection in swarm.connections if _revision(connection) < revision}

    def seen(connection: Connection) -> None:
        if connection in behind and _revision(connection) >= revision:
            behind.discard(connection)

    swarm.run_until(lambda: not behind, "all watches have the event", seen)
    return max((connection.at for connection in swarm.connections), default=time.monotonic())


def _revision(connection: Connection) -> int:
    """Of the latest event on this watch."""
    events = rpc.WatchResponse.FromString(connection.last).events
    return int(events[-1].kv.mod_revision) if events else 0


def _idle(swarm: Swarm, meter: Meter, seconds: float) -> float:
    """etcd's CPU seconds in so many seconds in which nobody wants anything."""
    deadline = time.monotonic() + seconds
    with cost_of(meter) as cost:
        while (left := deadline - time.monotonic()) > 0:
            swarm.turn(left)
    return cost.cpu_s


def _idle_with_pings(swarm: Swarm, meter: Meter, seconds: float) -> tuple[float, int]:
    """The same with a keepalive ping every KEEPALIVE_S on each connection, evenly spread: CPU seconds, pings sent."""
    if not seconds:
        return 0.0, 0
    rate = len(swarm.connections) / KEEPALIVE_S
    sent, turns = 0, cycle(swarm.connections)
    started = time.monotonic()
    with cost_of(meter) as cost:
        while (passed := time.monotonic() - started) < seconds:
            while sent < passed * rate:
                next(turns).ping()
                sent += 1
            swarm.turn(0.01)
    return cost.cpu_s, sent


def _notifications(etcd: Subject, count: int) -> float:
    """etcd's CPU seconds for one progress notification, over what it takes without a client."""
    with Swarm(etcd.endpoint) as swarm:
        nothing = _idle(swarm, etcd.meter, PROGRESS_S) / PROGRESS_S
        _open_watches(etcd, swarm, count)
        messages = sum(connection.messages for connection in swarm.connections)
        seconds = 3 * PROGRESS_S
        cpu_s = _idle(swarm, etcd.meter, seconds) - nothing * seconds
        return cpu_s / (sum(connection.messages for connection in swarm.connections) - messages)


def _received(swarm: Swarm) -> int:
    return sum(connection.received for connection in swarm.connections)


# --- reads -------------------------------------------------------------------------------------------------------


def _pages(revision: int, keys: Sequence[bytes], serializable: Sequence[bool]) -> list[bytes]:
    """Requests for all pages at one revision; the first asks for the present if it is linearizable."""
    return [
        rpc.RangeRequest(
            key=key,
            range_end=SUBNETS_END,
            limit=PAGE,
            revision=revision if number else 0,
            serializable=serializable[min(number, 1)],
        ).SerializeToString()
        for number, key in enumerate(keys)
    ]


def _read(swarm: Swarm, connection: Connection, request: bytes) -> bytes:
    connection.call(RANGE, request)
    swarm.run_until(lambda: not connection.open, "a page is read")
    return connection.last


def _first_read(etcd: Subject) -> tuple[int, list[bytes]]:
    """The present revision, and the keys at which the pages begin."""
    keys, revision = [SUBNETS], 0
    with Swarm(etcd.endpoint) as swarm:
        connection = swarm.add()
        while True:
            request = rpc.RangeRequest(key=keys[-1], range_end=SUBNETS_END, limit=PAGE, revision=revision)
            answer = rpc.RangeResponse.FromString(_read(swarm, connection, request.SerializeToString()))
            revision = revision or int(answer.header.revision)
            if not answer.more:
                return revision, keys
            keys.append(answer.kvs[-1].key + b"\0")


KINDS = {"linearizable": (False, False), "first linearizable": (False, True), "serializable": (True, True)}
"""Name -> whether the first page, and the others, are read serializable: from one member, without asking the leader."""


def _reads(etcd: Subject) -> dict[str, Any]:
    """Full reads, one after the other: etcd's CPU seconds, bytes and seconds each, by kind."""
    revision, keys = _first_read(etcd)
    figures: dict[str, dict[str, Any]] = {kind: {"cpu_s": [], "wall_s": []} for kind in KINDS}
    with Swarm(etcd.endpoint) as swarm:
        connection = swarm.add()
        for _ in range(READS):
            for kind, serializable in KINDS.items():
                received = connection.received
                with cost_of(etcd.meter) as cost:
                    for request in _pages(revision, keys, serializable):
                        _read(swarm, connection, request)
                figures[kind]["cpu_s"].append(cost.cpu_s)
                figures[kind]["wall_s"].append(cost.wall_s)
                figures[kind]["bytes"] = connection.received - received
    return {"pages": len(keys), "kinds": figures}


def _crowd(etcd: Subject, readers: int) -> dict[str, Any]:
    """That many full reads at the same time, the first page linearizable."""
    requests = _pages(*_first_read(etcd), KINDS["first linearizable"])
    with Swarm(etcd.endpoint) as swarm:
        left: dict[Connection, Iterator[bytes]] = {swarm.add(): iter(requests) for _ in range(readers)}
        asked: dict[Connection, float] = {}
        page_s: list[float] = []

        def go_on(connection: Connection) -> None:
            if connection.open or connection not in left:
                return
            if connection in asked:
                page_s.append(time.monotonic() - asked[connection])
            request = next(left[connection], None)
            if request is None:
                del left[connection]
            else:
                asked[connection] = time.monotonic()
                connection.call(RANGE, request)

        with cost_of(etcd.meter) as cost:
            for connection in list(left):
                go_on(connection)
            swarm.run_until(lambda: not left, "all have read everything", go_on)
        return {"readers": readers, "cpu_s": cost.cpu_s, "wall_s": cost.wall_s, "page_s": spread(page_s)}


# --- leases ------------------------------------------------------------------------------------------------------


def _renewals(etcd: Subject, count: int) -> float:
    """etcd's CPU seconds for one renewal: a stream of its own with one request, as an agent does it."""
    with _aside(etcd) as (_, lease):
        grant = lease.LeaseGrant(rpc.LeaseGrantRequest(TTL=LEASE_TTL)).ID
    request = rpc.LeaseKeepAliveRequest(ID=grant).SerializeToString()
    with Swarm(etcd.endpoint) as swarm:
        connection = swarm.add()
        with cost_of(etcd.meter) as cost:
            for _ in range(count):
                connection.call("/etcdserverpb.Lease/LeaseKeepAlive", request)
                swarm.run_until(lambda: not connection.open, "a lease is renewed")
                assert rpc.LeaseKeepAliveResponse.FromString(connection.last).TTL == LEASE_TTL
    return cost.cpu_s / count


def _first_leases(etcd: Subject, count: int) -> float:
    """etcd's CPU seconds for one host that has no lease yet: a grant, and a transaction that puts the key."""
    value = encode_attrs(leases(1)[0].attrs)
    with _aside(etcd) as (kv, lease), cost_of(etcd.meter) as cost:
        for number in range(count):
            key = b"%sfirst-%d" % (SUBNETS, number)
            grant = lease.LeaseGrant(rpc.LeaseGrantRequest(TTL=LEASE_TTL)).ID
            compare = rpc.Compare(key=key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=0)
            put = rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value, lease=grant))
            assert kv.Txn(rpc.TxnRequest(compare=[compare], success=[put])).succeeded
    return cost.cpu_s / count


@contextlib.contextmanager
def _aside(etcd: Subject) -> Iterator[tuple[Any, Any]]:
    """Stubs for keys and leases, on the endpoint that is not measured."""
    with grpc.insecure_channel(etcd.aside.replace("unix://", "unix:")) as channel:
        yield rpc.KVStub(channel), rpc.LeaseStub(channel)
