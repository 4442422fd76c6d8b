"""The reconciler: the one loop that writes the dataplane.

Owns the mailbox of facts (what the store says of leases), the lease table, the tracker, and the order of a pass:

    facts -> table -> want      monitor, dumps -> have      want - have -> one batch -> kernel -> acks -> have

Other threads only `post` facts and read `state`. Every event takes this one road; nothing is undone and nothing is
remembered but the difference. No peer entry is written before the first complete snapshot and the first complete dump.
"""

import errno
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from overlay.desired import Local, entries_for, ours
from overlay.device import DeviceSpec, Underlay, device_spec, occupied_links
from overlay.kernel import DeviceOccupied, KernelRefused, Seen
from overlay.model import Entry, Op, Put, Refusal
from overlay.tracker import Drift, Tracker
from subnet_lease.model import Lease, NetworkConfig, subnet_key
from subnet_lease.store import Changes, Snapshot
from subnet_lease.table import Host, LeaseTable

RETRY = 0.1
RETRY_MOST = 10.0
"""Seconds until refused entries are tried again: doubled from the first to the second."""

LINGER = 60.0
"""Seconds for which peers are kept that a store does not have any more since it was restored or replaced: longer than
their agents take to notice it and to write their leases again."""

HEARTBEAT = 5.0
"""Seconds after which a pass runs although nothing happened, as a sign of life."""

SHOWN = 4
"""How many drifted or refused entries, or rejected leases, one log line names."""

SHOWN_KEY = 64
"""How much of a key that may be anybody's is shown."""


class Dataplane(Protocol):
    """What the reconciler needs of the kernel; see `kernel.Kernel`."""

    device: int

    def wait(self, seconds: float | None) -> None: ...
    def interrupt(self) -> None: ...
    def observe(self) -> Seen: ...
    def apply(self, ops: list[Op]) -> list[Refusal]: ...
    def dump(self, nexthops: bool) -> Iterable[Entry]: ...
    def has_nexthops(self) -> bool: ...
    def ensure_device(self, spec: DeviceSpec) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class Stop:
    """A fact: end the loop, leave the dataplane as it is."""


@dataclass(frozen=True, slots=True)
class Survey:
    """A fact: somebody wants to know the accepted leases, with the table's revision and cluster."""

    answer: Callable[[list[Lease], int, int], None]


Fact = Snapshot | Changes | Lease | NetworkConfig | Survey | Stop


@dataclass(frozen=True, slots=True)
class State:
    """What others may know of the loop, replaced whole. Times are on the injected clock, in seconds."""

    ready: bool = False
    beat: float = 0.0
    peers: int = 0
    entries: int = 0
    gap: int = 0
    refused: int = 0
    rejected: int = 0
    drift: int = 0
    revision: int = 0
    trouble: str = ""


class Reconciler:
    """Keeps one device and its entries. `run` in one thread; `post` and `state` from any.

    `prepare(lease, spec)` is called whenever the device is made or its subnet changes (sysctls, firewall);
    `on_ready(lease, spec)` after the first pass that tried everything, and again after the subnet changed.
    """

    def __init__(
        self,
        kernel: Dataplane,
        config: NetworkConfig,
        underlay: Underlay,
        lease: Lease,
        *,
        prepare: Callable[[Lease, DeviceSpec], None],
        on_ready: Callable[[Lease, DeviceSpec], None],
        clock: Callable[[], float],
    ) -> None:
        self._kernel = kernel
        self._config = config
        self._underlay = underlay
        self._prepare = prepare
        self._on_ready = on_ready
        self._clock = clock
        self._log = structlog.get_logger("reconciler")
        self._mailbox: deque[Fact] = deque()
        self._tracker = Tracker(lambda entry: ours(entry, self._local))
        self._local = Local(config.block, 0, kernel.has_nexthops())
        self._hold(lease)
        self._complete = False
        """Whether a snapshot has been taken in, so that what is not wanted may be removed."""
        self._doubt = True
        """Whether the device or the entries may differ from what we believe, in ways only a dump shows."""
        self._retry = 0.0
        self._let_go_at: float | None = None
        self._drift = 0
        self.state = State()

    def _hold(self, lease: Lease) -> None:
        """Take `lease` as this host's own; the table starts over and waits for the next snapshot."""
        vtep = lease.attrs.vtep
        assert vtep is not None, "our own lease has a VTEP"
        self._lease = lease
        self._spec = device_spec(self._config, lease, self._underlay)
        key = subnet_key(lease.subnet, lease.subnet6)
        links = occupied_links(self._underlay, self._config.block, lease.subnet)
        self._table = LeaseTable(self._config, Host(key, lease.subnet, lease.attrs.public_ip, vtep.mac, links))
        self._prepared = self._announced = False

    # --- for other threads ---

    def post(self, fact: Fact) -> None:
        """Hand over a fact. Facts of one thread are taken in their order."""
        self._mailbox.append(fact)
        self._kernel.interrupt()

    # --- the loop ---

    def run(self) -> None:
        """Until a `Stop` is posted. Failures of the kernel are reported and tried again; anything else is a defect."""
        while True:
            # A first look, and one after a doubt, waits for nothing but the pause after a failure.
            self._kernel.wait(self._retry or (0.0 if self._doubt else HEARTBEAT))
            if not self._read_mail():
                return
            try:
                self._pass()
            except (KernelRefused, DeviceOccupied) as trouble:
                self._doubt = True
                self._postpone()
                if str(trouble) != self.state.trouble:
                    self._log.error("dataplane_refused", reason=str(trouble))
                self._publish(str(trouble))

    def _read_mail(self) -> bool:
        """Take in all facts; False if one says to stop."""
        while self._mailbox:
            match self._mailbox.popleft():
                case Stop():
                    return False
                case Lease() as lease:
                    if lease.subnet != self._lease.subnet or lease.attrs != self._lease.attrs:
                        self._hold(lease)
                        self._complete, self._doubt = False, True
                case Snapshot() as snapshot:
                    changed = self._table.replace(snapshot)
                    del snapshot  # The entries that are made next find room where it was.
                    self._want(changed)
                    self._want([owner for owner in self._tracker.owners if self._table.accepted(owner) is None])
                    self._complete = True
                    self._wait_for_lingering()
                case Changes() as changes:
                    if self._complete:
                        self._want(self._table.apply(changes))
                case NetworkConfig() as config:
                    # Of the same network and device: what else the operator may change does not concern the table.
                    self._config = config
                    self._spec = device_spec(config, self._lease, self._underlay)
                    self._doubt, self._announced = True, False
                case Survey() as survey:
                    leases = [lease for _, lease in self._table.peers()]
                    survey.answer(leases, self._table.revision, self._table.cluster_id)
        return True

    def _wait_for_lingering(self) -> None:
        if self._table.lingering and self._let_go_at is None:
            self._let_go_at = self._clock() + LINGER
            self._log.warning(
                "store_went_back", peers_kept=self._table.lingering, effect=f"kept for {LINGER:g} s unless they return"
            )

    def _let_go(self) -> None:
        """Withdraw the peers that were kept and did not return, when it is time."""
        if self._let_go_at is not None and (not self._table.lingering or self._clock() >= self._let_go_at):
            self._let_go_at = None
            self._want(self._table.let_go())

    def _want(self, keys: Iterable[str]) -> None:
        """Work out anew what these leases call for. As long as there is no device it is nothing: see `_look_again`."""
        for key in keys if self._local.device else ():
            lease = self._table.accepted(key)
            self._tracker.want(key, entries_for(lease, self._local) if lease else ())

    def _pass(self) -> None:
        started = self._clock()
        self._let_go()
        seen = self._kernel.observe()
        drifts = self._tracker.saw(seen.sights)
        if seen.lost:
            self._log.warning("notifications_lost", remedy="all entries are read again and compared")
        if self._doubt or seen.lost or seen.device_changed:
            drifts += self._look_again()
        puts, drops, refusals = self._close_gap() if self._complete else (0, 0, [])
        if refusals:
            self._postpone()
            self._doubt = self._doubt or any(refusal.errno == errno.ENODEV for refusal in refusals)
        else:
            self._retry = 0.0
        self._report(puts, drops, refusals, drifts, self._clock() - started)
        if self._complete and not self._announced:
            self._announced = True
            self._on_ready(self._lease, self._spec)
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
        """Mend the device, then read everything from the kernel."""
        changes = self._kernel.ensure_device(self._spec)
        if changes:
            self._log.info("device_set", device=self._spec.name, changes=list(changes), mtu=self._spec.mtu)
        if self._local.device != self._kernel.device:
            self._local = replace(self._local, device=self._kernel.device)
            self._want(key for key, _ in self._table.peers())
        if changes or not self._prepared:
            self._prepare(self._lease, self._spec)
            self._prepared = True
        drifts = self._tracker.saw_all(self._kernel.dump(self._local.nexthops))
        self._doubt = False
        return drifts

    def _postpone(self) -> None:
        self._retry = min(2 * self._retry, RETRY_MOST) if self._retry else RETRY

    # --- what people see ---

    def _report(self, puts: int, drops: int, refusals: list[Refusal], drifts: list[Drift], seconds: float) -> None:
        """The one line of a pass that changed something."""
        self._drift += len(drifts)
        facts: dict[str, object] = {}
        if drifts:
            facts["drift"] = len(drifts)
            facts["drifted"] = [_drifted(drift) for drift in drifts[:SHOWN]]
        if refusals:
            facts["refusals"] = [_refused(refusal) for refusal in refusals[:SHOWN]]
        news = puts or drops or drifts or len(refusals) != self.state.refused
        if news:
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

    def _publish(self, trouble: str) -> None:
        tracker = self._tracker
        if self._table.rejected_count > self.state.rejected:
            reasons = [f"{key[:SHOWN_KEY]}: {reason}" for key, reason in self._table.some_rejected(SHOWN)]
            self._log.warning("leases_rejected", rejected=self._table.rejected_count, reasons=reasons)
        self.state = State(
            ready=self._announced and not trouble,
            beat=self._clock(),
            peers=len(tracker.owners),
            entries=tracker.wanted,
            gap=tracker.gap,
            refused=len(tracker.refused),
            rejected=self._table.rejected_count,
            drift=self._drift,
            revision=self._table.revision,
            trouble=trouble,
        )


def _drifted(drift: Drift) -> str:
    return f"{drift.want} {'was removed' if drift.found is None else f'became {drift.found}'}"


def _refused(refusal: Refusal) -> str:
    return f"{refusal.op.entry}: {errno.errorcode.get(refusal.errno, refusal.errno)}"
