"""What a running agent tells of itself: the answer to `status`, and its findings for the health pages.

Owns what is asked of whom, and what is told while a start is under way; `verdict` judges, `status` makes the document.
Nothing here is kept up to date: it costs nothing as long as nobody asks. Called from the threads of those who answer;
the reconciler is asked for a look between two passes, and nobody else waits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from overlay import causes, status, verdict
from overlay.causes import Finding
from overlay.checksum_watch import ChecksumWatch
from overlay.device import FoundDevice, Underlay
from overlay.firewall import IMPOSTORS, STRANGERS, STRAYS
from overlay.kernel import KernelRefused
from overlay.model import Key
from overlay.reconciler import Inspection, Reconciler
from overlay.status import AgentPart, DataplanePart, EtcdPart, FirewallPart
from subnet_lease.model import Lease, NetworkConfig, format_subnets
from subnet_lease.store import StoreError, kind_of

if TYPE_CHECKING:
    from overlay.journal import Journal
    from overlay.prober import Prober

INSPECTION_S = 3.0
"""Seconds that a question waits for the reconciler: longer than its longest pass."""

REFRESH_S = 1.0
"""Seconds that a question waits for a look at other tools' firewalls."""

_OF_STORE = {
    "StoreUnavailable": "etcd_unreachable",
    "StoreDenied": "etcd_denied",
    "TlsFailed": "etcd_certificate",
}


def cause_of(error: StoreError) -> str:
    """The cause that stands behind a failure of the store."""
    return _OF_STORE[kind_of(error)]


class Failing(Protocol):
    """A loop that asks the store: why it cannot be had, None if it can."""

    @property
    def failure(self) -> StoreError | None: ...


class Holding(Failing, Protocol):
    """What is asked of the keeper."""

    @property
    def lease(self) -> Lease | None: ...
    @property
    def shortage(self) -> str: ...
    def seconds_left(self) -> float | None: ...


class Watching(Failing, Protocol):
    """What is asked of the watcher."""

    @property
    def connected(self) -> bool: ...
    def age(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class About:
    """What does not change about the agent. `margin` is how many seconds before its end a lease is renewed, `guard` the
    mode of the source guard; `started` is on the clock.
    """

    version: str
    pid: int
    node_name: str
    prefix: str
    endpoint: str
    margin: float
    guard: str
    started: float


@dataclass(frozen=True, slots=True)
class Sources:
    """Who knows what, once the loops run. `here` gives configuration and underlay as they are in use."""

    here: Callable[[], tuple[NetworkConfig, Underlay]]
    reconciler: Reconciler
    watcher: Watching
    config_watch: Failing
    checksums: ChecksumWatch
    underlay_gone: Callable[[], str]


@dataclass(slots=True)
class Insight:
    """Attributes are set as they become known; methods may be called all along, from any thread.

    `stalled` gives the loops that seem dead; `device_up` whether an interface is up, None without one; `find_device`
    what the kernel knows of one, KernelRefused included; `counters` are the firewall's. `refresh(seconds)` has a new
    look taken at what costs processes. `others` give findings of those who know best; `questions` are what the agent's
    socket answers, by whom. `prober` and `journal` know paths and events; None where there is none.
    """

    about: About
    clock: Callable[[], float]
    stalled: Callable[[], Mapping[str, str]]
    device_up: Callable[[str], bool | None]
    find_device: Callable[[str], FoundDevice | None]
    counters: Callable[[], Mapping[str, int]]
    waiting: Finding = field(default_factory=lambda: verdict.starting("etcd and the network configuration"))
    keeper: Holding | None = None
    sources: Sources | None = None
    config: Finding | None = None
    refresh: Callable[[float], None] = lambda seconds: None
    others: list[Callable[[], Iterable[Finding]]] = field(default_factory=list)
    questions: dict[str, Callable[[Mapping[str, Any]], Iterable[str]]] = field(default_factory=dict)
    prober: "Prober | None" = None
    journal: "Journal | None" = None

    # --- findings ---

    def findings(self) -> list[Finding]:
        """What is wrong as far as it is known without asking the reconciler: cheap enough for a probe every second."""
        return causes.roots(verdict.of_host(self._known()))

    def _known(self) -> verdict.Known:
        about, sources, keeper = self.about, self.sources, self.keeper
        stalled = {name: trouble for name, trouble in self.stalled().items() if trouble}
        if sources is None or keeper is None:
            return verdict.Known(about.prefix, about.endpoint, waiting=self._waiting(), stalled=stalled)
        state, (_, underlay) = sources.reconciler.state, sources.here()
        others = [finding for give in self.others for finding in give()]
        others += self._of_paths(sources)
        failure = sources.watcher.failure or keeper.failure or sources.config_watch.failure
        return verdict.Known(
            about.prefix,
            about.endpoint,
            stalled=stalled,
            ready=state.ready,
            trouble=state.trouble,
            occupied=state.occupied,
            left=keeper.seconds_left(),
            margin=about.margin,
            etcd=(cause_of(failure), str(failure)) if failure else None,
            exhausted=keeper.shortage,
            devices={spec.name: self.device_up(spec.name) for spec in sources.reconciler.plan.devices},
            underlay=(underlay.name, self.device_up(underlay.name)),
            underlay_gone=sources.underlay_gone(),
            others=[*([self.config] if self.config else []), *others],
        )

    def _of_paths(self, sources: Sources) -> Iterator[Finding]:
        if self.prober is None:
            return iter(())
        config, underlay = sources.here()
        devices = sources.reconciler.plan.devices
        return verdict.of_paths(
            self.prober.paths.failing(),
            device=devices[0].name if devices else underlay.name,
            interface=underlay.name,
            port=config.backend.port,
            prefix=self.about.prefix,
            measured=len(self.prober.paths),
        )

    def _waiting(self) -> Finding:
        """What a start stands at: a subnet cannot be had for reasons that the keeper knows."""
        keeper, values = self.keeper, {"prefix": self.about.prefix, "endpoint": self.about.endpoint}
        if keeper is not None and keeper.shortage:
            return verdict.starting(keeper.shortage, "subnets_exhausted", values)
        if keeper is not None and keeper.failure:
            return verdict.starting(str(keeper.failure), cause_of(keeper.failure), values)
        return self.waiting

    # --- status ---

    def answer(self, question: Mapping[str, Any]) -> Iterator[str]:
        """To `status`, as docs/status.md has it. `peers`: all (true), none (false), or how many of those in order."""
        sources, keeper = self.sources, self.keeper
        if sources is None or keeper is None:
            yield from status.pieces(status.starting(self._agent(), self.findings()), ())
            return
        self.refresh(REFRESH_S)
        asked = question.get("peers", True)
        most = None if isinstance(asked, bool) or not isinstance(asked, int) else max(0, asked)
        seen = sources.reconciler.inspect(INSPECTION_S)
        peers = self._standings(seen) if seen else []
        head = status.head(self._facts(sources, keeper, seen, peers))
        yield from status.pieces(head, None if asked is False else self._rows(seen, status.chosen(peers, most)))

    def look(self, seconds: float) -> tuple[status.Head, Inspection | None, list[status.Standing]]:
        """The document of `status` without its peers, what the reconciler said within so many seconds, and those peers
        that lack entries or can have none. Takes no new look at what costs processes, and a fifth of the time."""
        sources, keeper = self.sources, self.keeper
        if sources is None or keeper is None:
            return status.starting(self._agent(), self.findings()), None, []
        seen = sources.reconciler.inspect(seconds)
        amiss = [peer for peer in self._standings(_suspects(seen)) if peer.state != status.PROGRAMMED] if seen else []
        head = status.head(self._facts(sources, keeper, seen, amiss))
        if seen and (counts := head["peer_counts"]):
            counts["total"] = len(seen.peers)
            counts["programmed"] = len(seen.peers) - len(amiss)
        return head, seen, amiss

    def _standings(self, seen: Inspection) -> list[status.Standing]:
        now, measured = self.clock(), self.prober.paths.rows() if self.prober else ()
        paths = {path.target.key: status.path_part(path, now) for path in measured}
        return status.standings(seen.peers, seen.wanted, seen.unreachable, seen.gap, routes=seen.routes, path=paths.get)

    def _rows(self, seen: Inspection | None, peers: Iterable[status.Standing]) -> Iterator[status.PeerPart]:
        now = self.clock()

        def changed(revision: int) -> float | None:
            when = seen.timeline.when(revision) if seen else None
            return None if when is None else round(now - when, 1)

        return status.peer_rows(peers, changed)

    def _facts(
        self, sources: Sources, keeper: Holding, seen: Inspection | None, peers: list[status.Standing]
    ) -> status.Facts:
        (config, underlay), state, left = sources.here(), sources.reconciler.state, keeper.seconds_left()
        age = sources.watcher.age()
        etcd: EtcdPart = {
            "connected": sources.watcher.connected,
            "data_age_s": None if age is None else round(age, 1),
            "revision": state.revision,
            "reason": str(sources.watcher.failure) if sources.watcher.failure else None,
        }
        return status.Facts(
            problems=self._problems(seen, peers),
            agent=self._agent(),
            lease=keeper.lease,
            lease_left=None if left is None or left == float("inf") else round(left, 1),
            config=config,
            nexthops=seen is not None and seen.nexthops,
            mtu=sources.reconciler.plan.mtu,
            devices=[(spec.name, self._device(spec.name)) for spec in sources.reconciler.plan.devices],
            checksums=sources.checksums.findings,
            underlay=underlay,
            etcd=etcd,
            dataplane=self._dataplane(seen) if seen else None,
            rejected=seen.rejected if seen else (),
            rejected_count=state.rejected,
            firewall=self._firewall(),
            refused=list(seen.refused.values()) if seen else (),
            peers=status.counts(peers) if seen else None,
        )

    def _problems(self, seen: Inspection | None, peers: list[status.Standing]) -> list[Finding]:
        found = list(verdict.of_host(self._known()))
        if seen is None:
            silence = f"the reconciler did not answer within {INSPECTION_S:g} s"
            return causes.roots([*found, Finding("agent_stalled", evidence=(silence,))])
        most = status.MOST_LISTED
        found += (verdict.of_rejection(key, reason, self.about.prefix) for key, reason in seen.rejected[:most])
        cut_off = [peer.lease for peer in peers if peer.state == status.UNREACHABLE]
        found += verdict.of_unreachable(cut_off[:most], "no underlay in common")
        if seen.refused:
            owners = {entry[0]: key for key, entries in seen.wanted.items() for entry in entries}
            names = {key: format_subnets(lease.subnets) for key, lease in seen.peers}
            some = dict(list(seen.refused.items())[:most])

            def peer_of(key: Key) -> str:
                return names.get(owners.get(key, ""), "")

            found += verdict.of_refusals(some, len(seen.refused), seen.gap, peer_of)
        return causes.roots(found)

    def _agent(self) -> AgentPart:
        state = self.sources.reconciler.state if self.sources else None
        about = self.about
        return {
            "version": about.version,
            "pid": about.pid,
            "node_name": about.node_name,
            "running_s": round(self.clock() - about.started, 1),
            "ready": state is not None and state.ready,
            "trouble": state.trouble if state else self._waiting().evidence[0],
        }

    def _dataplane(self, seen: Inspection) -> DataplanePart:
        now, state, change = self.clock(), seen.state, seen.last_change
        return {
            "wanted": state.entries,
            "missing": seen.missing,
            "surplus": len(seen.gap) - seen.missing,
            "drift": state.drift,
            "last_pass_ago_s": round(now - state.beat, 1),
            "last_change": {
                "ago_s": round(now - change.at, 1),
                "took_ms": round(1000 * change.seconds, 1),
                "put": change.put,
                "dropped": change.dropped,
                "refused": change.refused,
            }
            if change
            else None,
        }

    def _device(self, name: str) -> FoundDevice | None:
        try:
            return self.find_device(name)
        except KernelRefused:
            return None  # Whether it is up is known all the same, see `_known`.

    def _firewall(self) -> FirewallPart:
        counters = self.counters()
        return {
            "guard": self.about.guard,
            "strangers": counters.get(STRANGERS),
            "impostors": counters.get(IMPOSTORS),
            "strays": counters.get(STRAYS),
        }


def _suspects(seen: Inspection) -> Inspection:
    """The same without the peers whose entries all stand."""
    gap, wanted, unreachable = seen.gap, seen.wanted, seen.unreachable
    suspects = [
        peer
        for peer in seen.peers
        if (entries := wanted.get(peer[0])) is None
        or peer[0] in unreachable
        or (gap and any(entry[0] in gap for entry in entries))
    ]
    return seen._replace(peers=suspects)
