"""What all scenarios stand on: one etcd with clusters of several sizes in it, and hosts on which agents run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overlay.netns import Namespace
from subnet_lease.etcd import EtcdStore
from subnet_lease.keeper import Identity, release_lease
from subnet_lease.model import Lease, pack_address
from tests.bench import agents
from tests.bench.peers import ETCD_ENDPOINT, OWN_IP, leases, load
from tests.bench.place import compare, fresh_place, inside
from tests.faults.etcd_process import SOCKET, EtcdProcess

Samples = dict[str, dict[str, list[Any]]]
"""What was measured -> number of peers -> one sample a repetition."""


@dataclass(frozen=True, slots=True)
class Options:
    """How much is measured: `sizes` where there are several, `full` peers where there is one size."""

    sizes: tuple[int, ...]
    full: int
    repeat: int
    idle_s: float


@dataclass(frozen=True, slots=True)
class Host:
    """A host of a cluster of `len(peers)` others, whose leases are in etcd below `prefix`. Its kernel starts empty."""

    place: Namespace
    own_ip: str
    prefix: str
    peers: Sequence[Lease]
    directory: Path
    pycache: Path
    store: EtcdStore

    def agent(self, *argv: str) -> contextlib.AbstractContextManager[agents.Agent]:
        """An agent that has become ready; see `agents.running`."""
        argv = argv or agents.AGENT
        return agents.running(self.place, ETCD_ENDPOINT, self.prefix, self.directory, self.pycache, argv)

    def compare(self, others: Sequence[Lease] = ()) -> None:
        """Mismatch unless the kernel holds exactly what the peers, and `others` beside them, call for."""
        compare(self.place, [*self.peers, *others], nexthops=True)


@dataclass(frozen=True, slots=True)
class Testbed:
    """`hub` is the namespace where etcd lives; `say` tells people what is being done."""

    hub: Namespace
    etcd: EtcdProcess
    directory: Path
    options: Options
    say: Callable[[str], None]
    _clusters: dict[int, list[Lease]] = field(default_factory=dict)

    def peers(self, size: int) -> list[Lease]:
        """The leases of a cluster of so many peers; they are in etcd from the first call on."""
        if size not in self._clusters:
            self._clusters[size] = leases(size)
            load(self.etcd.endpoint, _prefix(size), self._clusters[size])
        return self._clusters[size]

    @contextlib.contextmanager
    def host(self, size: int, own_ip: str = OWN_IP) -> Iterator[Host]:
        """A host that joins the cluster of `size` peers, and leaves it at the end."""
        peers = self.peers(size)
        with fresh_place(self.hub, own_ip) as place:
            directory = self.directory / place.netns
            directory.mkdir(exist_ok=True)
            # What an agent remembers of the last subnet would spare this one the choice.
            (directory / "subnet.env").unlink(missing_ok=True)
            store = self.etcd.store(_prefix(size))
            try:
                yield Host(place, own_ip, _prefix(size), peers, directory, self.directory / "pycache", store)
            finally:
                release_lease(store, Identity(pack_address(own_ip)))
                store.close()


def _prefix(size: int) -> str:
    return f"/bench/{size}"


@contextlib.contextmanager
def etcd_in(hub: Namespace, directory: Path) -> Iterator[EtcdProcess]:
    """etcd in the hub: on the underlay for the agents, on a unix socket for us."""
    urls = f"unix://{SOCKET},http://0.0.0.0:{ETCD_ENDPOINT.rpartition(':')[2]}"
    etcd = EtcdProcess(directory, unix=True, arguments=[f"--listen-client-urls={urls}"])
    inside(hub, etcd.start)
    try:
        yield etcd
    finally:
        etcd.kill()


def note(samples: Samples, what: str, size: int, sample: Any) -> None:
    """Keep a sample."""
    samples.setdefault(what, {}).setdefault(str(size), []).append(sample)
