"""One run of the benchmark: every contender at every size, interleaved, `repeat` times over."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import structlog

from overlay.netns import Namespace
from subnet_lease.keeper import release_lease
from subnet_lease.model import Lease, pack_address
from tests.bench import contenders, joins, machine
from tests.bench.peers import ETCD_ENDPOINT, OWN_IP, leases, load
from tests.bench.place import compare, fresh_place, hub, inside
from tests.faults.etcd_process import SOCKET, EtcdProcess

SMALL = 2
"""Peers in the smallest cluster measured: three hosts with this one. What is spent there is spent at any size."""

JOINS = 200
"""Hosts that join and leave again in each repetition."""

PYROUTE2_MOST = 1000
"""Peers beyond which pyroute2 is not measured: its cost is linear, and tens of seconds by then."""

Samples = dict[str, dict[str, list[Any]]]
"""Contender -> number of peers -> one sample a repetition: seconds, or the fields of a `contenders.Start`."""


def run(sizes: Sequence[int], repeat: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure; the result is what `--json` writes and `report.render` reads."""
    # Until etcd answers there are refused connections, which is no news here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    samples: Samples = {}
    clusters = {size: leases(size) for size in (SMALL, *sizes)}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overlay-agent-bench-")))
        home = stack.enter_context(hub())
        etcd = stack.enter_context(_etcd(home, directory / "etcd"))
        for size, peers in clusters.items():
            load(etcd.endpoint, _prefix(size), peers)
        progress("one start that is not counted: Python compiles, files come into memory")
        _agent({}, home, etcd, directory, SMALL, clusters[SMALL])
        for number in range(1, repeat + 1):
            for size, peers in clusters.items():
                progress(f"run {number} of {repeat}: {size} peers")
                _agent(samples, home, etcd, directory, size, peers)
                if size != SMALL:
                    _rivals(samples, home, directory, size, peers)
    return {"machine": machine.facts(), "sizes": list(sizes), "repeat": repeat, "samples": samples}


@contextlib.contextmanager
def _etcd(home: Namespace, directory: Path) -> Iterator[EtcdProcess]:
    """etcd in the hub: on the underlay for the agents, on a unix socket for us."""
    urls = f"unix://{SOCKET},http://0.0.0.0:{ETCD_ENDPOINT.rpartition(':')[2]}"
    etcd = EtcdProcess(directory, unix=True, arguments=[f"--listen-client-urls={urls}"])
    inside(home, etcd.start)
    try:
        yield etcd
    finally:
        etcd.kill()


def _prefix(size: int) -> str:
    return f"/bench/{size}"


def _agent(
    samples: Samples, home: Namespace, etcd: EtcdProcess, directory: Path, size: int, peers: Sequence[Lease]
) -> None:
    """A first start on an empty kernel, then one that finds everything in place; then others join and leave."""
    store = etcd.store(_prefix(size))

    def others_come_and_go() -> None:
        _note(samples, "changes", size, dataclasses.asdict(joins.measure(place, store, JOINS)))

    with fresh_place(home) as place:
        for name, meanwhile in (("agent", lambda: None), ("restart", others_come_and_go)):
            start = contenders.start_agent(place, ETCD_ENDPOINT, _prefix(size), directory, meanwhile)
            compare(place, peers, nexthops=True)
            _note(samples, name, size, dataclasses.asdict(start))
    release_lease(store, pack_address(OWN_IP))
    store.close()


def _rivals(samples: Samples, home: Namespace, directory: Path, size: int, peers: Sequence[Lease]) -> None:
    for name, ack_each in (("kernel", False), ("kernel_acks", True)):
        with fresh_place(home) as place:
            _note(samples, name, size, contenders.kernel_alone(place, peers, ack_each=ack_each))
            compare(place, peers, nexthops=True)
    for name, nexthops in (("iproute2", False), ("iproute2_nexthops", True)):
        with fresh_place(home) as place:
            _note(samples, name, size, contenders.iproute2(place, peers, directory, nexthops=nexthops))
            compare(place, peers, nexthops=nexthops)
    if size <= PYROUTE2_MOST:
        with fresh_place(home) as place:
            _note(samples, "pyroute2", size, contenders.pyroute2(place, peers))
            compare(place, peers, nexthops=False)


def _note(samples: Samples, contender: str, size: int, sample: Any) -> None:
    samples.setdefault(contender, {}).setdefault(str(size), []).append(sample)
