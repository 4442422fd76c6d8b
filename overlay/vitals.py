"""What /healthz, /readyz and /metrics say, from the loops as they are when somebody asks.

Owns the judgement of what is alive and what is ready, and which value stands for which metric. What is known grows as
the agent starts: until then a page says what is waited for. Nothing here waits for a loop or takes a lock that one of
the dataplane's holds.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from overlay import causes, metrics
from overlay.causes import Finding
from overlay.drops import CROWDED, SLOW
from overlay.metrics import ONE, Found, Requests, Value
from overlay.probe import Paths
from overlay.process import DeviceCounts, Usage
from overlay.reconciler import Plan, State


class LeaseState(Protocol):
    """What is asked of the keeper."""

    @property
    def lease(self) -> object | None: ...
    def seconds_left(self) -> float | None: ...


class TableState(Protocol):
    """What is asked of the watcher."""

    @property
    def connected(self) -> bool: ...
    def age(self) -> float | None: ...


class Vitals:
    """Pages of the health endpoint; `healthz`, `readyz` and `metrics` are called in its thread.

    `max_age`: seconds that the table of peers may be out of date while the host counts as ready. `troubles` gives the
    loops with what is wrong about them, `clock` steady seconds; `usage`, `devices` and `firewall` read what the kernel
    counts, and leave out what there is none of. All else is set when it is there.
    """

    def __init__(
        self,
        version: str,
        max_age: float,
        troubles: Callable[[], Mapping[str, str]],
        clock: Callable[[], float],
        *,
        usage: Callable[[], Usage],
        devices: Callable[[tuple[str, ...]], Mapping[str, DeviceCounts]],
        firewall: Callable[[], Mapping[str, int]],
    ) -> None:
        self._version = version
        self._max_age = max_age
        self._troubles = troubles
        self._clock = clock
        self._usage = usage
        self._devices = devices
        self._firewall = firewall
        self._lock = threading.Lock()
        self._requests = Requests()
        self._plan: Plan | None = None
        self.passes = metrics.Passes()
        self.findings: Callable[[], Sequence[Finding]] = tuple
        """What is wrong with the host."""
        self.probes = metrics.Probes()
        self.paths: Paths | None = None
        self.lease: LeaseState | None = None
        self.table: TableState | None = None
        self.state: Callable[[], State] | None = None
        self.table_from = clock()
        """Since when the table may be out of date that the agent began with: its start, or when it was put on disk."""
        self.connections_dropped = {CROWDED: 0, SLOW: 0}
        """By the health endpoint, which counts them."""
        self.underlay_changes = 0
        self.config_changes = 0

    # --- for the loops ---

    def requested(self, request: str, seconds: float, failure: str) -> None:
        """A request to the store has ended; from any thread."""
        with self._lock:
            self._requests.answered(request, seconds, failure)

    def planned(self, plan: Plan) -> None:
        """The dataplane is as `plan` says."""
        self._plan = plan

    # --- pages ---

    def healthz(self) -> tuple[bool, str]:
        """Whether all loops are alive, and the names of those that are or, if there are such, of those that are not."""
        troubles = self._troubles()
        dead = [f"{name}: {trouble}" for name, trouble in troubles.items() if trouble]
        if dead:
            return False, "\n".join(dead)
        return True, f"alive: {', '.join(troubles) or 'starting'}"

    def readyz(self) -> tuple[bool, str]:
        """Whether the host can be relied upon, and what it has or lacks: the causes that `status` names, if they are
        grave, or a table of peers that is too old.
        """
        found, age = self.findings(), self._age()
        reasons = [_told(each) for each in found if causes.severity(each) == causes.DOWN]
        if self.state is None:
            return False, f"not ready: {'; '.join(reasons)}"
        if not reasons and age > self._max_age:
            cause = next((each.cause for each in found if each.cause.startswith("etcd_")), "etcd_unreachable")
            old = f"the table of peers is {age:.0f} s old, at most {self._max_age:.0f} s are allowed"
            reasons = [f"{cause}: {old}: etcd is away"]
        state = self.state()
        counts = (
            f"{state.peers} peers, {state.entries} entries, {state.gap} not in place, "
            f"{state.rejected} leases rejected, {state.unreachable} unreachable"
        )
        return not reasons, f"not ready: {'; '.join([*reasons, counts])}" if reasons else f"ready: {counts}"

    def metrics(self) -> tuple[bool, str]:
        """The page for Prometheus."""
        found = self._of_the_agent() | self._of_the_store() | self._of_the_dataplane() | self._of_packets()
        return True, metrics.render(found | self._of_paths() | self._requests.found())

    def _age(self) -> float:
        """Seconds for which the table of peers may have been out of date."""
        age = self.table.age() if self.table else None
        return self._clock() - self.table_from if age is None else age

    # --- values ---

    def _of_the_agent(self) -> Found:
        usage = self._usage()
        return {
            metrics.BUILD: {(self._version, ".".join(map(str, sys.version_info[:3]))): 1},
            metrics.READY: {ONE: self.readyz()[0]},
            metrics.LOOP_ALIVE: {(name,): not trouble for name, trouble in self._troubles().items()},
            metrics.CPU: {ONE: usage.cpu_seconds},
            metrics.MEMORY: {ONE: usage.resident_bytes},
            metrics.THREADS: {ONE: usage.threads},
            metrics.DESCRIPTORS: {ONE: usage.descriptors},
            metrics.STARTED: {ONE: usage.started},
            metrics.CONNECTIONS: {(reason,): number for reason, number in self.connections_dropped.items()},
        }

    def _of_the_store(self) -> Found:
        if self.lease is None or self.table is None:
            return {}
        left = self.lease.seconds_left()
        return {
            metrics.CONNECTED: {ONE: self.table.connected},
            metrics.TABLE_AGE: {ONE: self._age()},
            metrics.LEASE_HELD: {ONE: left != 0},
            metrics.LEASE_LEFT: {} if left is None else {ONE: left},
            metrics.CONFIG_CHANGES: {ONE: self.config_changes},
        }

    def _of_the_dataplane(self) -> Found:
        if self.state is None:
            return {}
        state = self.state()
        return {
            metrics.REVISION: {ONE: state.revision},
            metrics.PEERS: {ONE: state.peers},
            metrics.ENTRIES: {ONE: state.entries},
            metrics.MISSING: {ONE: state.gap},
            metrics.REFUSED: {ONE: state.refused},
            metrics.UNREACHABLE: {ONE: state.unreachable},
            metrics.REJECTED: {(reason,): number for reason, number in state.rejected_by.items()},
            metrics.UNDERLAY_CHANGES: {ONE: self.underlay_changes},
            **self.passes.found(),
        }

    def _of_paths(self) -> Found:
        if self.paths is None:
            return {}
        return metrics.paths_found(len(self.paths), self.paths.causes()) | self.probes.found()

    def _of_packets(self) -> Found:
        names = tuple(spec.name for spec in self._plan.devices) if self._plan else ()
        counted = self._devices(names) if names else {}
        found: Found = {metrics.FIREWALL: {(name,): number for name, number in self._firewall().items()}}
        for which, family in metrics.DEVICE_COUNTERS.items():
            values: dict[tuple[str, ...], Value] = {(name,): counts[which] for name, counts in counted.items()}
            found[family] = values
        return found


def _told(finding: Finding) -> str:
    """Cause, what the matter is, and what was seen of it if that says more."""
    what = causes.what(finding)
    return ": ".join([finding.cause, what, *(seen for seen in finding.evidence[:1] if seen not in what)])
