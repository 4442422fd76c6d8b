"""The reconciler: the one loop that writes the dataplane.

Owns the mailbox of facts (what the store says of leases), the lease table, the tracker, and the order of a pass:

    facts -> table -> want      monitor, dumps -> have      want - have -> one batch -> kernel -> acks -> have

Other threads only `post` facts and read `state`. Every event takes this one road; nothing is undone and nothing is
remembered but the difference. No peer entry is written before the first complete snapshot and the first complete dump.
"""

import errno
import queue
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeVar

import structlog

from overlay.backends import Here, backend_of, ours
from overlay.device import DeviceSpec, Underlay, overlay_mtu
from overlay.kernel import DeviceOccupied, KernelRefused
from overlay.metrics import Passes
from overlay.model import Entry, Guard, Key, NextHop, Op, Put, Refusal, Route, Seen
from overlay.records import Event, Table, Tell, Turns, author
from overlay.timeline import Timeline
from overlay.tracker import Drift, Tracker
from subnet_lease.model import Lease, NetworkConfig, Prefix
from subnet_lease.pulse import Pulse
from subnet_lease.store import Changes, Snapshot
from subnet_lease.table import Host, LeaseTable, Reason

RETRY = 0.1
RETRY_MOST = 10.0
"""Seconds until refused entries are tried again: doubled from the first to the second."""

LINGER = 60.0
"""Seconds for which peers are kept that a store does not have any more since it was restored or replaced: longer than
their agents take to notice it and to write their leases again."""

FOLLOW = 60.0
"""Seconds for which hosts of another backend or VNI are reached as they were before: longer than it takes to restart
all agents after such a change."""

HEARTBEAT = 5.0
"""Seconds after which a pass runs although nothing happened, as a sign of life."""

SHOWN = 4
"""How many drifted or refused entries, or rejected leases, one log line names."""

PASS_S = 30.0
"""Longest that a pass may take: the first one with 15,000 peers takes two seconds."""

TOLD = 64
"""How many drifted or refused entries of one pass the journal is told of one by one."""

SURVEYED = 64
"""How many rejected leases an inspection names."""

Looked = TypeVar("Looked")

SHOWN_KEY = 64
"""How much of a key that may be anybody's is shown."""


class Dataplane(Protocol):
    """What the reconciler needs of the kernel; see `dataplane.HostDataplane`."""

    @property
    def tunnels(self) -> Mapping[int, int]: ...
    def wait(self, seconds: float | None) -> None: ...
    def interrupt(self) -> None: ...
    def observe(self) -> Seen: ...
    def apply(self, ops: list[Op]) -> list[Refusal]: ...
    def dump(self, nexthops: bool) -> Iterable[Entry]: ...
    def has_nexthops(self) -> bool: ...
    def ensure_devices(self, specs: Sequence[DeviceSpec], link: int) -> Mapping[str, tuple[str, ...]]: ...
    def remove_strays(self, names: Collection[str]) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Stop:
    """A fact: end the loop, leave the dataplane as it is."""


class Pass(NamedTuple):
    """A pass that changed something: when it ended on the injected clock, and how long it took, in seconds; entries
    put, dropped and refused."""

    at: float
    seconds: float
    put: int
    dropped: int
    refused: int


class Census(NamedTuple):
    """The accepted leases, the table's revision and cluster; what a lease calls for on this host, and on which devices
    (interface indexes by the length of an underlay address).
    """

    leases: list[Lease]
    revision: int
    cluster: int
    entries: Callable[[Lease], tuple[Entry, ...]]
    tunnels: Mapping[int, int]


class Inspection(NamedTuple):
    """All that the loop knows, as of one moment between two passes.

    `peers` are the accepted leases by their keys, `wanted` the entries that each calls for, `unreachable` the keys of
    those that can have none. `gap` is what stands, or that nothing does, under each key where the kernel is not as it
    should be, `refused` what of it the kernel refuses. `rejected` are some of the rejected leases, with reasons.
    `routes`: whether anything is to be programmed at all; `nexthops`: whether by nexthop objects.
    """

    state: "State"
    plan: "Plan"
    peers: list[tuple[str, Lease]]
    wanted: Mapping[str, tuple[Entry, ...]]
    unreachable: Set[str]
    gap: Mapping[Key, Entry | None]
    missing: int
    refused: Mapping[Key, Refusal]
    rejected: Sequence[tuple[str, Reason]]
    timeline: Timeline
    last_change: Pass | None
    routes: bool
    nexthops: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """A fact: somebody wants to look at what only the loop's thread may touch."""

    look: Callable[[], None]


class Some(NamedTuple):
    """Some of the accepted leases by their keys, with what each calls for on this host, and this host as it is."""

    leases: dict[str, tuple[Lease, tuple[Entry, ...]]]
    plan: "Plan"
    here: Here
    underlay: Underlay
    port: int


Fact = Snapshot | Changes | Lease | NetworkConfig | Underlay | Survey | Stop


@dataclass(frozen=True, slots=True)
class State:
    """What others may know of the loop, replaced whole. Times are on the injected clock, in seconds.

    `trouble` kept the latest pass from its end, empty if nothing did; `occupied`: a device's name is taken.
    """

    ready: bool = False
    beat: float = 0.0
    peers: int = 0
    entries: int = 0
    gap: int = 0
    refused: int = 0
    rejected: int = 0
    unreachable: int = 0
    drift: int = 0
    revision: int = 0
    trouble: str = ""
    occupied: bool = False
    rejected_by: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What this host's lease calls for: pods' subnets, IPv4 first; devices (for some backends none) over the interface
    `underlay`; the MTU of the pods in bytes."""

    subnets: tuple[Prefix, ...]
    devices: tuple[DeviceSpec, ...]
    underlay: str
    mtu: int


class Reconciler:
    """Keeps this host's devices and their entries. `run` in one thread; `post` and `state` from any.

    `prepare(plan)` is called whenever a device is made, the firewall altered or the plan changes, before any entry is
    written (sysctls, the guard's sets); `protect(plan)` on the same occasions, once the entries are in place, for what
    would be in the way before (firewall rules); `on_ready(plan)` after the first pass that tried everything, and again
    after the plan changed. `listed`: whether the firewall wants to know the hosts' addresses. `nexthops`: whether
    routes may go through nexthop objects, where the kernel has them. `passes` takes the counts of what was done.
    `tell`, after a pass, hears how leases turned, what drifted and what became of it; it may not block.
    """

    def __init__(
        self,
        kernel: Dataplane,
        config: NetworkConfig,
        underlay: Underlay,
        lease: Lease,
        *,
        prepare: Callable[[Plan], None],
        protect: Callable[[Plan], None],
        on_ready: Callable[[Plan], None],
        clock: Callable[[], float],
        listed: bool = False,
        nexthops: bool = True,
        passes: Passes | None = None,
        tell: Tell | None = None,
    ) -> None:
        self._kernel = kernel
        self._tell = tell
        self._config = config
        self._underlay = underlay
        self._prepare = prepare
        self._protect = protect
        self._on_ready = on_ready
        self._clock = clock
        self._listed = listed
        self._nexthops = nexthops and kernel.has_nexthops()
        self._log = structlog.get_logger("reconciler")
        self.passes = passes or Passes()
        self._mailbox: deque[tuple[Fact, float]] = deque()
        """Facts, and when they were posted."""
        self._since: float | None = None
        """When the first change of leases was posted that the next pass carries out."""
        self.pulse = Pulse(PASS_S, clock)
        self._tracker = Tracker(lambda entry: ours(entry, self._here) and not self._keeps(entry))
        self._unreachable: set[str] = set()
        self._plan = Plan((), (), "", 0)
        self._placed = False
        """Whether our devices are there, so that entries can be worked out."""
        self._lease = lease
        self._table = self._empty_table()
        """Which leases are accepted; `_outdated` if that is by what this host was before, until the next snapshot."""
        self._complete = False
        """Whether a snapshot has been taken in, so that what is not wanted may be removed."""
        self._turned: set[str] = set()
        """Keys that may stand otherwise than was told, all of them if there is a new snapshot."""
        self._renewed = False
        self._doubt = True
        """Whether the devices or the entries may differ from what we believe, in ways only a dump shows."""
        self._moved: set[int] = set()
        """Devices that send from elsewhere now, while their FDB entries remember the way as it was."""
        self._replan()
        self._retry = 0.0
        self._let_go_at: float | None = None
        self._follow_by: float | None = None
        """Up to when hosts of another backend or VNI are waited for; `_awaiting` until then."""
        self._awaiting = False
        self._strays = False
        """Whether there may be devices of ours that the plan does not call for."""
        self._drift = 0
        self._timeline = Timeline()
        self._last_change: Pass | None = None
        self.state = State()

    def _empty_table(self) -> LeaseTable:
        """A table for this host as it is now, to be filled by the next snapshot."""
        self._outdated = False
        lease, attrs = self._lease, self._lease.attrs
        host = Host(
            key=lease.key,
            subnets=lease.subnets,
            addresses=self._underlay.addresses,
            macs=tuple(vtep.mac for vtep in (attrs.vtep, attrs.vtep6) if vtep is not None),
            links=self._underlay.links,
        )
        return LeaseTable(self._config, host)

    def _replan(self) -> None:
        """Work out what lease, configuration and underlay call for. It is carried out in the next pass."""
        config, underlay = self._config, self._underlay
        self._backend = backend = backend_of(config)
        mtu = overlay_mtu(config, underlay, tunnels=backend.tunnels)
        plan = Plan(self._lease.subnets, backend.devices(config, self._lease, underlay), underlay.name, mtu)
        here = Here.of(config, underlay, mtu, nexthops=self._nexthops, listed=self._listed)
        self._here = replace(here, tunnels=dict(self._kernel.tunnels))
        if plan != self._plan:
            self._plan = plan
            self._prepared = self._protected = self._announced = False
            self._doubt = True

    # --- for other threads ---

    def post(self, fact: Fact) -> None:
        """Hand over a fact. Facts of one thread are taken in their order."""
        self._mailbox.append((fact, self._clock()))
        self._kernel.interrupt()

    def survey(self, seconds: float) -> Census | None:
        """The peers as they are now; None if the loop does not say within `seconds`."""
        return self._asked(self._census, seconds)

    def inspect(self, seconds: float) -> Inspection | None:
        """All that there is to see; as `survey`, and dearer: a millisecond for 15,000 peers."""
        return self._asked(self._inspection, seconds)

    def _asked(self, look: Callable[[], Looked], seconds: float) -> Looked | None:
        answers: queue.SimpleQueue[Looked] = queue.SimpleQueue()
        self.post(Survey(lambda: answers.put(look())))
        try:
            return answers.get(timeout=seconds)
        except queue.Empty:
            return None

    def some(self, choose: Callable[[LeaseTable], Iterable[str]], seconds: float) -> Some | None:
        """The peers that `choose` names, which runs in the loop and must not take long; None as of `survey`."""
        return self._asked(lambda: self._some(choose(self._table)), seconds)

    def wants(self, key: Key) -> bool:
        """Whether any peer calls for an entry under this key."""
        return self._tracker.wants(key)

    @property
    def plan(self) -> Plan:
        """What lease, configuration and underlay call for."""
        return self._plan

    @property
    def awaiting(self) -> bool:
        """Whether what reaches hosts of another backend or VNI is kept, until they follow or it takes too long."""
        return self._awaiting

    # --- the loop ---

    def run(self) -> None:
        """Until a `Stop` is posted. Failures of the kernel are reported and tried again; anything else is a defect."""
        while True:
            # A first look, and one after a doubt, waits for nothing but the pause after a failure.
            pause = self._retry or (0.0 if self._doubt else HEARTBEAT)
            self.pulse.rest(pause)
            self._kernel.wait(pause)
            self.pulse.work()
            if not self._read_mail():
                return
            try:
                self._pass()
            except (KernelRefused, DeviceOccupied) as trouble:
                self._doubt = True
                self._postpone()
                self.passes.failed()
                if str(trouble) != self.state.trouble:
                    self._log.error("dataplane_refused", reason=str(trouble))
                self._publish(str(trouble), occupied=isinstance(trouble, DeviceOccupied))
            self._tell_leases()

    def _read_mail(self) -> bool:
        """Take in all facts; False if one says to stop."""
        while self._mailbox:
            fact, posted = self._mailbox.popleft()
            match fact:
                case Stop():
                    return False
                case Lease() as lease:
                    moved = lease.subnets != self._lease.subnets
                    if moved or lease.attrs != self._lease.attrs:
                        self._lease, self._outdated = lease, True
                        self._turned.add(lease.key)
                        self._replan()
                    if moved:
                        # What the table accepts may overlap what is ours now.
                        self._table, self._complete = self._empty_table(), False
                case Snapshot() as snapshot:
                    if self._outdated:
                        self._table = self._empty_table()
                    changed = self._table.replace(snapshot)
                    del snapshot  # The entries that are made next find room where it was.
                    self._want(changed)
                    self._timeline.note(self._table.revision, self._clock())
                    known = self._tracker.owners | self._unreachable
                    self._want([owner for owner in known if self._table.accepted(owner) is None])
                    self._complete = self._renewed = True
                    self._wait_for_lingering()
                case Changes() as changes:
                    if self._complete:
                        changed = self._table.apply(changes)
                        self._want(changed)
                        self._turned.update(changed, (event.key for event in changes.events))
                        self._timeline.note(self._table.revision, self._clock())
                        self._since = posted if self._since is None else self._since
                case NetworkConfig() as config:
                    # Of the same network and devices: what else the operator may change does not concern the table.
                    self._config = config
                    self._replan()
                    self._want_all()
                case Underlay() as underlay:
                    # What this host publishes follows in a lease.
                    self._underlay, self._outdated = underlay, True
                    self._replan()
                    self._want_all()
                case Survey() as survey:
                    survey.look()
        return True

    def _tell_leases(self) -> None:
        """Say of the keys that may have turned how they stand. Our own lease is not the table's: it is no peer's."""
        if not self._complete or not (self._renewed or self._turned):
            return
        table, own = self._table, self._lease
        if self._tell is not None and self._renewed:
            standings: dict[str, Lease | str] = dict(table.peers())
            standings.update(table.rejected)
            standings[own.key] = own
            self._tell(Table(standings))
        elif self._tell is not None:
            self._tell(Turns({key: own if key == own.key else table.standing(key) for key in self._turned}))
        self._renewed = False
        self._turned.clear()

    def _census(self) -> Census:
        leases = [lease for _, lease in self._table.peers()]
        backend, here = self._backend, self._here
        return Census(
            leases,
            self._table.revision,
            self._table.cluster_id,
            lambda lease: backend.entries(lease, here),
            here.tunnels,
        )

    def _inspection(self) -> Inspection:
        tracker = self._tracker
        return Inspection(
            state=self.state,
            plan=self._plan,
            peers=list(self._table.peers()),
            wanted=tracker.by_owner,
            unreachable=frozenset(self._unreachable),
            gap=tracker.amiss,
            missing=tracker.missing,
            refused=dict(tracker.refused),
            rejected=self._table.some_rejected(SURVEYED),
            timeline=self._timeline.copy(),
            last_change=self._last_change,
            routes=self._backend.routes,
            nexthops=self._here.nexthops is not None,
        )

    def _some(self, keys: Iterable[str]) -> Some:
        found = ((key, self._table.accepted(key)) for key in keys)
        leases = {key: (lease, self._backend.entries(lease, self._here)) for key, lease in found if lease}
        return Some(leases, self._plan, self._here, self._underlay, self._config.backend.port)

    def _wait_for_lingering(self) -> None:
        if self._table.lingering and self._let_go_at is None:
            self._let_go_at = self._clock() + LINGER
            self._log.warning(
                "store_went_back", peers_kept=self._table.lingering, effect=f"kept for {LINGER:g} s unless they return"
            )
            if self._tell is not None:
                self._tell(Event("store_went_back", {"peers_kept": self._table.lingering}))

    def _keeps(self, entry: Entry) -> bool:
        """Whether it reaches a host that has not followed a change of the network yet, or that we have not."""
        behind = self._table.behind if self._awaiting else ()
        match entry:
            case Route():
                return entry.destination in behind
            case NextHop() if self._config.network is not None and self._here.nexthops is not None:
                first = (entry.id - self._here.nexthops).to_bytes(4, "big")
                return Prefix(first, self._config.subnet_len) in behind
            case Guard():
                return entry.address in behind
        return False

    def _await_followers(self) -> None:
        """While hosts have another backend or VNI, leave what reaches them as it is, and let go when it takes long."""
        now = self._clock()
        if not self._table.behind:
            self._follow_by = None
        elif self._follow_by is None:
            self._follow_by = now + FOLLOW
        before, self._awaiting = self._awaiting, self._follow_by is not None and now < self._follow_by
        # What was not ours to remove now is, or the other way round.
        self._doubt = self._doubt or before != self._awaiting

    def _let_go(self) -> None:
        """Withdraw the peers that were kept and did not return, when it is time."""
        if self._let_go_at is not None and (not self._table.lingering or self._clock() >= self._let_go_at):
            self._let_go_at = None
            gone = self._table.let_go()
            self._want(gone)
            self._turned.update(gone)

    def _want(self, keys: Iterable[str]) -> None:
        """Work out anew what these leases call for. As long as there is no device it is nothing: see `_look_again`."""
        for key in keys if self._placed else ():
            lease = self._table.accepted(key)
            entries = self._backend.entries(lease, self._here) if lease else ()
            self._tracker.want(key, entries)
            if lease and not entries and self._backend.routes:
                self._unreachable.add(key)
            else:
                self._unreachable.discard(key)

    def _want_all(self) -> None:
        self._want(key for key, _ in self._table.peers())

    def _pass(self) -> None:
        started = self._clock()
        self._let_go()
        self._await_followers()
        seen = self._kernel.observe()
        drifts = self._tracker.saw(seen.sights)
        if seen.lost:
            self.passes.lost += 1
            self._log.warning("notifications_lost", remedy="all entries are read again and compared")
        if seen.altered_by:
            self._log.warning("firewall_altered", by=list(seen.altered_by), remedy="our rules are loaded again")
        if seen.firewall_changed:
            self._prepared = self._protected = False
        if self._doubt or seen.lost or seen.device_changed or seen.firewall_changed:
            drifts += self._look_again()
        puts, drops, refusals = self._close_gap() if self._complete else (0, 0, [])
        if refusals:
            self._postpone()
            self._doubt = self._doubt or any(refusal.errno == errno.ENODEV for refusal in refusals)
        else:
            self._retry = 0.0
        if self._tell is not None:
            self._tell_entries(self._tell, seen, drifts, refusals)
        self._report(puts, drops, refusals, drifts, started)
        if self._complete and not self._protected:
            self._protected = True
            self._protect(self._plan)
        if self._complete and not self._announced:
            self._announced = True
            self._on_ready(self._plan)
            self._strays = True
        # What is refused at first may be in its old place until then, and would be in none.
        if self._announced and self._strays and not self._awaiting and (not refusals or self._retry == RETRY_MOST):
            self._strays = False
            self._remove_strays()
        self._publish("")

    def _close_gap(self) -> tuple[int, int, list[Refusal]]:
        """Write what is pending: how many entries were put, how many dropped, and what was refused."""
        ops = self._tracker.pending()
        if not ops:
            return 0, 0, []
        refusals = self._kernel.apply(ops)
        self._tracker.settle(refusals)
        puts = sum(isinstance(op, Put) for op in ops) - sum(isinstance(refusal.op, Put) for refusal in refusals)
        return puts, len(ops) - len(refusals) - puts, refusals

    def _look_again(self) -> list[Drift]:
        """Mend the devices, then read everything from the kernel."""
        changes = self._kernel.ensure_devices(self._plan.devices, self._underlay.index)
        for spec in self._plan.devices:
            if spec.name in changes:
                self._log.info("device_set", device=spec.name, changes=list(changes[spec.name]), mtu=spec.mtu)
                if {"link", "local"}.intersection(changes[spec.name]):
                    self._moved.add(self._kernel.tunnels[len(spec.local)])
        if self._here.tunnels != self._kernel.tunnels or not self._placed:
            self._here = replace(self._here, tunnels=dict(self._kernel.tunnels))
            self._placed = True
            self._want_all()
        if changes or not self._prepared:
            self._prepared, self._protected = True, False
            self._prepare(self._plan)
        drifts = self._tracker.saw_all(self._kernel.dump(self._nexthops))
        self._tracker.renew(self._moved)
        self._moved.clear()
        self._doubt = False
        return drifts

    def _remove_strays(self) -> None:
        """Take away devices of ours that nothing runs over any more, after all that replaces them is in place."""
        for name in self._kernel.remove_strays([spec.name for spec in self._plan.devices]):
            self._log.info("device_removed", device=name, reason="the network configuration does not call for it")

    def _postpone(self) -> None:
        self._retry = min(2 * self._retry, RETRY_MOST) if self._retry else RETRY

    # --- what people see ---

    def _report(self, puts: int, drops: int, refusals: list[Refusal], drifts: list[Drift], started: float) -> None:
        """The counts of a pass, and the one line of one that changed something."""
        now, since, self._since = self._clock(), self._since, None
        seconds = now - started
        self.passes.passed(seconds, puts, drops, refusals, drifts, None if since is None else now - since)
        self._drift += len(drifts)
        facts: dict[str, object] = {}
        if drifts:
            facts["drift"] = len(drifts)
            facts["drifted"] = [_drifted(drift) for drift in drifts[:SHOWN]]
        if refusals:
            facts["refusals"] = [_refused(refusal) for refusal in refusals[:SHOWN]]
        news = puts or drops or drifts or len(refusals) != self.state.refused
        if news:
            self._last_change = Pass(self._clock(), seconds, puts, drops, len(refusals))
            log = self._log.warning if drifts or refusals else self._log.info
            log(
                "reconciled",
                put=puts,
                dropped=drops,
                refused=len(refusals),
                revision=self._table.revision,
                ms=round(seconds * 1000, 1),
                **facts,
            )

    def _tell_entries(self, tell: Tell, seen: Seen, drifts: Sequence[Drift], refusals: Sequence[Refusal]) -> None:
        """Say what drifted and who did it, what was mended of it, and what the kernel refuses anew."""
        if seen.lost:
            tell(Event("notifications_lost", {}))
        if seen.altered_by:
            tell(Event("firewall_altered", {"by": ", ".join(seen.altered_by)}))
        for drift in drifts[:TOLD]:
            found = "nothing" if drift.found is None else str(drift.found)
            who = author(drift.found, seen.by.get(drift.want[0]))
            tell(Event("drift", {"entry": str(drift.want), "found": found, **who}))
        if len(drifts) > TOLD:
            tell(Event("drift", {"more": len(drifts) - TOLD, "by": "unknown"}))
        refused = {refusal.op.entry[0] for refusal in refusals}
        if drifts and self._complete:
            mended = sum(drift.want[0] not in refused for drift in drifts)
            tell(Event("repaired", {"entries": mended, "refused": len(drifts) - mended}))
        if len(refusals) != self.state.refused:
            for refusal in refusals[:TOLD]:
                code = errno.errorcode.get(refusal.errno, str(refusal.errno))
                tell(Event("refused", {"entry": str(refusal.op.entry), "errno": code}))

    def _publish(self, trouble: str, *, occupied: bool = False) -> None:
        tracker = self._tracker
        if self._table.rejected_count > self.state.rejected:
            reasons = [f"{key[:SHOWN_KEY]}: {reason}" for key, reason in self._table.some_rejected(SHOWN)]
            self._log.warning("leases_rejected", rejected=self._table.rejected_count, reasons=reasons)
        if len(self._unreachable) > self.state.unreachable:
            peers = sorted(self._unreachable)[:SHOWN]
            reason = "no underlay in common" if self._backend.tunnels else "on no link of this host"
            self._log.warning("peers_unreachable", unreachable=len(self._unreachable), peers=peers, reason=reason)
        self.state = State(
            ready=self._announced and not trouble,
            beat=self._clock(),
            peers=len(tracker.owners),
            entries=tracker.wanted,
            gap=tracker.gap,
            refused=len(tracker.refused),
            rejected=self._table.rejected_count,
            unreachable=len(self._unreachable),
            drift=self._drift,
            revision=self._table.revision,
            trouble=trouble,
            occupied=occupied,
            rejected_by=self._table.rejected_by_sort,
        )


def _drifted(drift: Drift) -> str:
    return f"{drift.want} {'was removed' if drift.found is None else f'became {drift.found}'}"


def _refused(refusal: Refusal) -> str:
    return f"{refusal.op.entry}: {errno.errorcode.get(refusal.errno, refusal.errno)}"
