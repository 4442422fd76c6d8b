"""Hundreds of agents without kernels: everything as in `agent run`, but for the kernel edge, which is its twin.

Each has its own store and connection, keeper, watcher and reconciler, in a few processes of many agents each. One such
process runs `python -m tests.bench.cluster_simulated ENDPOINT FIRST COUNT`, takes commands as lines of JSON and answers
each with one line. Times are on the steady clock, which all processes share.
"""

import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import structlog

from overlay.device import Underlay
from overlay.model import Op, Put, Route
from overlay.reconciler import Reconciler, Stop
from subnet_lease.etcd import EtcdStore
from subnet_lease.keeper import Identity, Keeper
from subnet_lease.model import Lease, LeaseAttrs, NetworkConfig, Prefix, Vtep, parse_subnet_key
from subnet_lease.retry import Backoff
from subnet_lease.store import Changes, Snapshot, StoreError
from subnet_lease.watcher import Watcher
from tests.bench import cluster_joins
from tests.bench.cluster_meter import DEADLINE_S, ROOT, Failed, Meter, etcd_at, loopback, spread
from tests.bench.peers import LEASE_TTL, UNDERLAY, leases, load
from tests.fake_dataplane import FakeKernel

FIRST_HOST = 1 << 17
"""Host number on the underlay of the first agent: beyond the addresses of synthetic peers."""

PROCESSES = 4

RENEW_MARGIN = 3600


class _Kernel(FakeKernel):
    """The kernel's twin, which notes when the routes of joining hosts come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.news = threading.Condition()
        self.times: dict[tuple[Prefix, bool], float] = {}

    def write(self, op: Op, *, ours: bool) -> int:
        code = super().write(op, ours=ours)
        if isinstance(op.entry, Route) and op.entry.destination in cluster_joins.JOINING:
            with self.news:
                self.times[op.entry.destination, not isinstance(op, Put)] = time.monotonic()
                self.news.notify()
        return code

    def stamp(self, subnet: Prefix, gone: bool) -> float:
        """When the route came, or went; waits for it."""
        with self.news:
            assert self.news.wait_for(lambda: (subnet, gone) in self.times, DEADLINE_S), f"no news of {subnet}"
            return self.times.pop((subnet, gone))


class _Agent:
    """What `agent run` composes, in threads of this process."""

    def __init__(self, endpoint: str, prefix: str, number: int) -> None:
        self.kernel = _Kernel()
        self.ready_at = 0.0
        self.began = 0.0
        self._address = UNDERLAY.host(FIRST_HOST + number)
        self._mac = bytes((2, 251)) + number.to_bytes(4, "big")
        self.store = EtcdStore([endpoint], prefix)
        self.ready = threading.Event()
        self._stopped = threading.Event()
        self._ends: list[Callable[[], None]] = []
        self._threads: list[threading.Thread] = []

    def start(self, delay: float) -> None:
        """Run after `delay` seconds."""
        self._spawn(lambda: self._run(delay), self._stopped.set)

    def stop(self) -> None:
        """End all threads. The lease stays."""
        for end in self._ends:
            end()
        for thread in self._threads:
            thread.join()
        self.store.close()

    def subnets(self) -> set[Prefix]:
        """Those that have a route."""
        with self.kernel.lock:
            return set(self.kernel.routes)

    def owns(self, value: bytes) -> bool:
        """Whether a lease of this value is this agent's."""
        return b'"agent-%s"' % self._mac.hex().encode() in value

    def _spawn(self, body: Callable[[], None], end: Callable[[], None]) -> None:
        self._ends.insert(0, end)
        thread = threading.Thread(target=body, daemon=True)
        self._threads.insert(0, thread)
        thread.start()

    def _run(self, delay: float) -> None:
        self._stopped.wait(delay)
        self.began = time.monotonic()
        config = self._config()
        attrs = LeaseAttrs(self._address, "vxlan", Vtep(1, self._mac), node_name=f"agent-{self._mac.hex()}")
        underlay = Underlay("eth0", 2, 1500, (self._address,), (UNDERLAY,), (), "simulated")
        loops: list[tuple[Reconciler, Watcher]] = []

        def held(lease: Lease) -> None:
            if loops:
                reconciler, watcher = loops[0]
                reconciler.post(lease)
                watcher.relist()
                return
            reconciler = Reconciler(
                self.kernel,
                config,
                underlay,
                lease,
                prepare=lambda _: None,
                protect=lambda _: None,
                on_ready=lambda _: self._announce(),
                clock=time.monotonic,
            )

            def deliver(fact: Snapshot | Changes) -> None:
                reconciler.post(fact)
                keeper.saw(fact)

            watcher = Watcher(self.store, deliver, first=keeper.take_snapshot())
            loops.append((reconciler, watcher))
            self._spawn(reconciler.run, lambda: reconciler.post(Stop()))
            self._spawn(watcher.run, watcher.stop)

        keeper = Keeper(
            self.store,
            config,
            Identity(self._address),
            lambda _: attrs,
            ttl=LEASE_TTL,
            renew_margin=RENEW_MARGIN,
            on_lease=held,
        )
        self._ends.insert(0, keeper.stop)
        keeper.run()

    def _config(self) -> NetworkConfig:
        backoff = Backoff(random.random)
        while True:
            with contextlib.suppress(StoreError):
                if value := self.store.read_config():
                    return NetworkConfig.parse(value)
            self._stopped.wait(backoff.delay())

    def _announce(self) -> None:
        self.ready_at = self.ready_at or time.monotonic()
        self.ready.set()


# --- one process of many agents ----------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> None:
    """Obey commands until standard input ends."""
    endpoint, first, count = argv[0], int(argv[1]), int(argv[2])
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(30), logger_factory=structlog.PrintLoggerFactory(sys.stderr)
    )
    # A collection would look at the tables of all agents of the process; an agent looks at its own.
    gc.disable()
    agents: list[_Agent] = []
    for line in sys.stdin:
        command = json.loads(line)
        answer: Any = None
        match command["do"]:
            case "start":
                agents = [_Agent(endpoint, command["prefix"], first + number) for number in range(count)]
                for agent, delay in zip(agents, command["delays"], strict=True):
                    agent.start(delay)
                for agent in agents:
                    assert agent.ready.wait(DEADLINE_S), "an agent is not ready"
                answer = [(agent.began, agent.ready_at) for agent in agents]
            case "stamps":
                subnet = Prefix.parse(command["subnet"])
                answer = [agent.kernel.stamp(subnet, command["gone"]) for agent in agents]
            case "check":
                answer = sum(_await_all(agent) for agent in agents)
            case "stop":
                for agent in agents:
                    agent.stop()
                agents.clear()
                gc.collect()
        print(json.dumps(answer), flush=True)


def _await_all(agent: _Agent) -> bool:
    """Wait until the agent has a route to each subnet in etcd but its own; False if it does not get there."""
    wanted = {parse_subnet_key(each.key)[0] for each in agent.store.snapshot().records if not agent.owns(each.value)}
    deadline = time.monotonic() + DEADLINE_S
    while agent.subnets() != wanted:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class _Crowd:
    """The processes, as one."""

    def __init__(self, endpoint: str, count: int, log: Any) -> None:
        bounds = [number * count // PROCESSES for number in range(PROCESSES + 1)]
        self._shares = [range(first, end) for first, end in pairwise(bounds)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.bench.cluster_simulated", endpoint, str(share.start), str(len(share))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
            for share in self._shares
        ]

    def __enter__(self) -> "_Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def ask(self, do: str, **arguments: Any) -> list[Any]:
        """Give all the same command; their answers. `delays` are dealt out."""
        delays = arguments.pop("delays", None)
        for process, share in zip(self._processes, self._shares, strict=True):
            own = {"delays": delays[share.start : share.stop]} if delays else {}
            assert process.stdin
            process.stdin.write(json.dumps({"do": do, **arguments, **own}) + "\n")
            process.stdin.flush()
        return [json.loads(line) for line in self._lines()]

    def _lines(self) -> Iterator[str]:
        for process in self._processes:
            assert process.stdout
            if not (line := process.stdout.readline()):
                raise Failed("a process of simulated agents ended; its errors are in simulated.log")
            yield line

    @property
    def cpu_s(self) -> float:
        return sum(Meter(process.pid).cpu_s for process in self._processes)


def measure(
    directory: Path, count: int, size: int, spread_s: float, joins: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Starts of `count` agents in a table of `size` other leases, spread over `spread_s` seconds and at once; joins."""
    peers = leases(size)
    dice = random.Random(count)
    figures: dict[str, Any] = {"agents": count, "leases": size, "spread_s": spread_s}
    with contextlib.ExitStack() as stack:
        endpoint = loopback()
        etcd = stack.enter_context(etcd_at(endpoint, directory / "simulated"))
        log_path = directory / "simulated.log"
        log = stack.enter_context(log_path.open("w"))
        crowd = stack.enter_context(_Crowd(endpoint, count, log))
        meter = Meter(etcd.pid)
        for name, delays in (
            ("spread", [spread_s * dice.random() for _ in range(count)]),
            ("at_once", [0.0] * count),
        ):
            progress(f"{count} simulated agents among {size} leases: start {name.replace('_', ' ')}")
            prefix = f"/{name}"
            load(etcd.endpoint, prefix, peers)
            store = stack.enter_context(contextlib.closing(etcd.store(prefix)))
            crowd.ask("stop")
            unreachable = log_path.read_text().count("store_unreachable")
            etcd_s, agents_s, began = meter.cpu_s, crowd.cpu_s, time.monotonic()
            times = [pair for answer in crowd.ask("start", prefix=prefix, delays=delays) for pair in answer]
            known = sum(crowd.ask("check"))
            assert known == count, f"only {known} of {count} agents know all leases"
            figures[name] = {
                "each_s": spread([ready - start for start, ready in times]),
                "last_s": max(ready for _, ready in times) - began,
                "agents_cpu_s": crowd.cpu_s - agents_s,
                "etcd_cpu_s": meter.cpu_s - etcd_s,
                "etcd_rss_mb": meter.rss_mb,
                "unreachable": log_path.read_text().count("store_unreachable") - unreachable,
            }

        def stamps(subnet: Prefix, gone: bool) -> list[float]:
            return [at for answer in crowd.ask("stamps", subnet=str(subnet), gone=gone) for at in answer]

        progress(f"{count} simulated agents: {joins} joins")
        figures["joins"] = cluster_joins.measure(store, joins, stamps, meter, lambda: crowd.cpu_s)
    return figures


if __name__ == "__main__":
    main(sys.argv[1:])
