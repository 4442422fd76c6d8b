"""Real agents, each with a kernel of its own: as many as one machine bears, in network namespaces around one etcd."""

import contextlib
import os
import random
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from overlay import rtnl
from overlay.cluster import wait_until
from overlay.model import Gone, Route
from overlay.netns import Namespace, create, delete
from subnet_lease.etcd import EtcdStore
from subnet_lease.model import Lease, Prefix, decode_attrs, format_address, parse_subnet_key
from tests.bench import cluster_joins
from tests.bench.cluster_meter import DEADLINE_S, ROOT, Failed, Meter, etcd_at, spread
from tests.bench.peers import DEVICE, ETCD_ENDPOINT, ETCD_IP, UNDERLAY, load
from tests.bench.place import compare, inside
from tests.faults.etcd_process import EtcdProcess

RTNLGRP_IPV4_ROUTE = 7
SOL_NETLINK, ADD_MEMBERSHIP = 270, 1

FIRST_HOST = 1 << 16
"""Host number on the underlay of the first agent: beyond the addresses of synthetic peers."""


class Host(Namespace):
    """A host: `eth0` on the underlay, and one agent after the other."""

    def __init__(self, number: int, directory: Path) -> None:
        super().__init__(f"oacluster-{os.getpid()}-{number}")
        self.port = f"h{number}"
        self.underlay_ip = format_address(UNDERLAY.host(FIRST_HOST + number))
        self.directory = directory / self.port
        self.directory.mkdir()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.notify.bind(str(self.directory / "notify"))
        self.agent: subprocess.Popen[bytes] | None = None

    def start(self, prefix: str) -> None:
        """Start an agent; READY=1 comes on `notify`."""
        argv = [
            *(sys.executable, "-P", "-m", "agent", "run", "--config", os.devnull),
            *("--etcd-endpoints", ETCD_ENDPOINT, "--etcd-prefix", prefix, "--node-name", self.port),
            *("--iface", "eth0", "--subnet-file", str(self.directory / "subnet.env"), "--log-format", "json"),
            *("--control-socket", str(self.directory / "agent.sock")),
            *("--state-dir", str(self.directory / "state")),
        ]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "PYTHONPATH": str(ROOT),
            # Compiled once, by a start that is not counted, and not into the checkout.
            "PYTHONPYCACHEPREFIX": str(self.directory.parent / "pycache"),
            "NOTIFY_SOCKET": str(self.directory / "notify"),
        }

        def popen() -> "subprocess.Popen[bytes]":
            with (self.directory / "agent.log").open("wb") as log:
                return subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=self.directory
                )

        self.agent = inside(self, popen)

    def kill(self) -> None:
        """End the agent; what it has put into the kernel stays."""
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait()
            self.agent = None

    @property
    def cpu_s(self) -> float:
        return Meter(self.agent.pid).cpu_s if self.agent else 0.0


class _Routes:
    """When each host's kernel announced each route to a subnet, and each removal of one. A context manager."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._times: dict[tuple[Host, Prefix, bool], float] = {}
        self._held: dict[Host, set[Prefix]] = {host: set() for host in hosts}
        self._news = threading.Condition()
        self._ended = threading.Event()
        self._selector = selectors.DefaultSelector()
        for host in hosts:
            self._selector.register(inside(host, self._open), selectors.EVENT_READ, host)
        self._thread = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> "_Routes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    @staticmethod
    def _open() -> socket.socket:
        made = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        made.bind((0, 0))
        made.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, RTNLGRP_IPV4_ROUTE)
        return made

    def _read(self) -> None:
        while not self._ended.is_set():
            for key, _ in self._selector.select(0.2):
                buffer, now = key.fileobj.recv(65536), time.monotonic()  # type: ignore[union-attr]
                for message in rtnl.messages(buffer):
                    seen = rtnl.sight(buffer, message, ())
                    entry, gone = (seen.entry, True) if isinstance(seen, Gone) else (seen, False)
                    if isinstance(entry, Route) and entry.destination.length == 24:
                        self._note(key.data, entry.destination, gone, now)

    def _note(self, host: Host, subnet: Prefix, gone: bool, now: float) -> None:
        with self._news:
            self._times[host, subnet, gone] = now
            (self._held[host].discard if gone else self._held[host].add)(subnet)
            self._news.notify()

    def stamps(self, subnet: Prefix, gone: bool) -> list[float]:
        """`cluster_joins.Stamps`."""
        wanted = [(host, subnet, gone) for host in self._held]
        with self._news:
            assert self._news.wait_for(lambda: all(each in self._times for each in wanted), 30), f"news of {subnet}"
            return [self._times.pop(each) for each in wanted]

    def all_hold(self, count: int) -> float:
        """Wait until every host's kernel has `count` routes to subnets; when the last of them came."""
        with self._news:
            full = self._news.wait_for(lambda: all(len(held) == count for held in self._held.values()), DEADLINE_S)
            assert full, f"not every kernel has {count} routes: {sorted(map(len, self._held.values()))}"
            return max(self._times.values())

    def forget(self) -> None:
        """Start over: the devices are gone, and with them all routes, of which the kernel says nothing."""
        with self._news:
            self._times.clear()
            for held in self._held.values():
                held.clear()


def measure(
    directory: Path, count: int, spread_s: float, joins: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Starts of `count` agents, all at once and spread over `spread_s` seconds, a restart of all, `joins` joins."""
    with contextlib.ExitStack() as stack:
        progress(f"{count} real agents: namespaces")
        hub, hosts = stack.enter_context(_hosts(directory, count))
        etcd = stack.enter_context(_etcd(hub, directory / "etcd"))
        routes = stack.enter_context(_Routes(hosts))
        meter = Meter(etcd.pid)
        _once(hosts[0], etcd)

        def start(prefix: str, delays: Sequence[float]) -> dict[str, Any]:
            cpu_s = meter.cpu_s
            figures = _start(hosts, prefix, delays)
            complete = routes.all_hold(count - 1)
            figures["complete_s"] = max(complete - figures.pop("began"), figures["last_s"])
            return figures | {"etcd_cpu_s": meter.cpu_s - cpu_s, "etcd_rss_mb": meter.rss_mb}

        figures: dict[str, Any] = {"hosts": count, "spread_s": spread_s}
        dice = random.Random(count)
        for prefix in ("/spread", "/at-once"):
            load(etcd.endpoint, prefix, [])
        with contextlib.closing(etcd.store("/at-once")) as store:
            progress(f"{count} real agents: start spread over {spread_s:g} s")
            figures["spread"] = start("/spread", [spread_s * dice.random() for _ in hosts])
            for host in hosts:
                host.kill()
                host.ip(f"link delete {DEVICE}")
            routes.forget()
            progress(f"{count} real agents: start all at once")
            figures["at_once"] = start("/at-once", [0.0] * count)
            for host in hosts:
                host.kill()
            progress(f"{count} real agents: restart all at once")
            figures["again"] = start("/at-once", [0.0] * count)
            figures["agent_rss_mb"] = spread([Meter(host.agent.pid).rss_mb for host in hosts if host.agent])
            progress(f"{count} real agents: {joins} joins")
            agents = lambda: sum(host.cpu_s for host in hosts)  # noqa: E731
            figures["joins"] = cluster_joins.measure(store, joins, routes.stamps, meter, agents)
            _check(store, hosts)
        return figures


@contextlib.contextmanager
def _hosts(directory: Path, count: int) -> Iterator[tuple[Namespace, list[Host]]]:
    """The hub, and the hosts on its bridge."""
    hub = Namespace(f"oacluster-{os.getpid()}-hub")
    hosts = [Host(number, directory) for number in range(count)]
    names = [hub.netns, *(host.netns for host in hosts)]
    create(names)
    try:
        hub.ip(
            "link set lo up",
            "link add br0 type bridge forward_delay 0",
            f"addr add {ETCD_IP}/{UNDERLAY.length} dev br0",
            "link set br0 up",
            *(f"link add {host.port} master br0 type veth peer eth0 netns {host.netns}" for host in hosts),
            *(f"link set {host.port} up" for host in hosts),
        )

        def equip(host: Host) -> None:
            address = f"addr add {host.underlay_ip}/{UNDERLAY.length} dev eth0"
            host.ip("link set lo up", address, "link set eth0 up", f"route add default via {ETCD_IP}")

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(equip, hosts))
        wait_until(
            lambda: all(port["state"] == "forwarding" for port in hub.json("bridge", "link")), 30, "the bridge forwards"
        )
        yield hub, hosts
    finally:
        for host in hosts:
            host.kill()
            host.notify.close()
        delete(names)


@contextlib.contextmanager
def _etcd(hub: Namespace, directory: Path) -> Iterator[EtcdProcess]:
    """etcd in the hub."""
    etcd = etcd_at(ETCD_ENDPOINT, directory)
    inside(hub, etcd.start)
    try:
        yield etcd
    finally:
        etcd.kill()


def _once(host: Host, etcd: EtcdProcess) -> None:
    """A start that is not counted: Python compiles, files come into memory."""
    load(etcd.endpoint, "/warm", [])
    _start([host], "/warm", [0.0])
    host.kill()
    host.ip(f"link delete {DEVICE}")


def _start(hosts: Sequence[Host], prefix: str, delays: Sequence[float]) -> dict[str, Any]:
    """Start each agent after its delay, and wait for READY=1 of all. Times of each are counted from its own start."""
    with selectors.DefaultSelector() as selector:
        for host in hosts:
            selector.register(host.notify, selectors.EVENT_READ, host)
        began = time.monotonic()
        queue = sorted(zip(delays, hosts, strict=True), key=lambda pair: pair[0], reverse=True)
        forks: dict[Host, float] = {}
        ready: dict[Host, float] = {}
        while len(ready) < len(hosts):
            while queue and time.monotonic() - began >= queue[-1][0]:
                _, host = queue.pop()
                forks[host] = time.monotonic()
                host.start(prefix)
            due = queue[-1][0] - (time.monotonic() - began) if queue else 1.0
            for key, _ in selector.select(max(min(due, 1.0), 0)):
                if b"READY=1" in key.fileobj.recv(4096).split(b"\n"):  # type: ignore[union-attr]
                    ready.setdefault(key.data, time.monotonic())
            _complain(hosts, ready, began + max(delays))
    return {
        "began": began,
        "each_s": spread([ready[host] - forks[host] for host in hosts]),
        "last_s": max(ready.values()) - began,
        "agents_cpu_s": sum(host.cpu_s for host in hosts),
    }


def _complain(hosts: Sequence[Host], ready: Mapping[Host, float], since: float) -> None:
    for host in hosts:
        ended = host.agent is not None and host.agent.poll() is not None
        if host not in ready and (ended or time.monotonic() > since + DEADLINE_S):
            log = (host.directory / "agent.log").read_text()
            raise Failed(f"the agent on {host.port} {'ended' if ended else 'is not ready'}; its log:\n{log[-4000:]}")


def _check(store: EtcdStore, hosts: Sequence[Host]) -> None:
    """Mismatch unless every host's kernel holds exactly the entries of all others."""
    leases = []
    for record in store.snapshot().records:
        subnet, subnet6 = parse_subnet_key(record.key)
        attrs = decode_attrs(record.value)
        leases.append(Lease(subnet, subnet6, attrs, record.etcd_lease, record.create_revision, record.mod_revision))
    assert len(leases) == len(hosts), f"{len(leases)} leases of {len(hosts)} hosts"
    for host in hosts:
        others = [lease for lease in leases if format_address(lease.attrs.public_ip) != host.underlay_ip]
        compare(host, others, nexthops=True)
