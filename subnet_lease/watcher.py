"""Keeps a consumer supplied with what the store holds: a snapshot, the changes after it, a snapshot again on any doubt.

Relies on the watch to end rather than to lose a change (etcd's guarantee), and on nothing else: while the connection
merely breaks and returns, the watch goes on after the last event, so that a restarted etcd is not asked by every host
for everything at once. After compaction, in another cluster, or in one that went back to a backup, a snapshot is taken;
what was deleted meanwhile shows only in its difference. A cluster that was restored and has since grown beyond the
revision seen here is told by a witness, the latest record seen, which stands otherwise in such a one. Should all of
that fail, there is a snapshot every few hours too.
"""

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from subnet_lease.pulse import STORE_WORK_S, Pulse
from subnet_lease.retry import Backoff, Outage
from subnet_lease.store import (
    Changes,
    Record,
    Snapshot,
    Store,
    StoreDenied,
    StoreError,
    Watch,
    WatchInterrupted,
    kind_of,
)

RELIST_S = 4 * 3600.0

RETURN_S_PER_LEASE = 0.0002
"""A lost member's watches come back spread over this much for each lease, 3 s at 15,000: to open one over TLS takes
etcd some 2 ms of CPU time (docs/scale.md)."""


class Watcher:
    """A thread's body: `run` delivers until `stop`. `deliver` gets a Snapshot first, then Changes that are never empty.

    `first` is a snapshot just taken, to begin with. `clock` gives seconds on a steady clock, `jitter` a number from 0
    up to 1. What `deliver` raises ends `run`.
    """

    def __init__(
        self,
        store: Store,
        deliver: Callable[[Snapshot | Changes], None],
        *,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
        relist_s: float = RELIST_S,
        first: Snapshot | None = None,
        log: Any = None,
    ) -> None:
        self._store = store
        self._deliver = deliver
        self._clock = clock
        self._jitter = jitter
        self._relist_s = relist_s
        self._log = log or structlog.get_logger()
        self._backoff = Backoff(jitter)
        self._outage = Outage()
        self._stopped = threading.Event()
        self._doubt = threading.Event()
        self._first = first
        self._watch: Watch | None = None
        self._resume = 0
        self._leases = 0
        self._witness: Record | None = None
        self._same_history = True
        self._cluster_id = 0
        self._relist_at = 0.0
        self._connected = False
        self._true_until: float | None = None
        """Up to when what was delivered is known to have been the store's latest, unless a watch stands."""
        self.failure: StoreError | None = None
        """Why the store cannot be had, None if it can as far as is known. A watch that is merely made anew is none."""
        self.pulse = Pulse(STORE_WORK_S, time.monotonic)

    @property
    def connected(self) -> bool:
        """Whether a watch stands now. The transport vouches for it: a store that falls silent ends it within 20 s."""
        return self._connected

    def age(self) -> float | None:
        """Seconds for which what was delivered may have been out of date: 0 while a watch stands, None before the first
        contact. A store that falls silent is noticed within 20 s, which are not counted.
        """
        until = self._true_until
        return None if until is None else 0.0 if self._connected else self._clock() - until

    def run(self) -> None:
        """Supply the consumer until `stop`."""
        while not self._stopped.is_set():
            try:
                self._supply()
            except StoreError as error:
                self._lose()
                if not isinstance(error, WatchInterrupted):
                    self.failure = error
                if isinstance(error, WatchInterrupted) and not error.resumable:
                    self._resume = 0
                    self._same_history = self._same_history and error.same_history
                self._report(error)
                delay = self._backoff.delay() + self._jitter() * self._leases * RETURN_S_PER_LEASE
                self.pulse.wait(self._stopped, delay)
        self._connected = False

    def stop(self) -> None:
        """End `run`, from any thread; at once while it watches or waits, within a call's deadline otherwise."""
        self._stopped.set()
        watch = self._watch
        if watch is not None:
            watch.cancel()

    def relist(self) -> None:
        """Have `run` deliver a snapshot at once: the consumer has lost its place. From any thread."""
        self._doubt.set()
        watch = self._watch
        if watch is not None:
            watch.cancel()

    def _supply(self) -> None:
        """Deliver until stopped, or until it is time for another snapshot."""
        self.pulse.work()
        if self._doubt.is_set():
            self._doubt.clear()
            self._resume = 0
        if not self._resume:
            self._list()
        self._watch = watch = self._store.watch(self._resume, self._cluster_id, self._witness)
        try:
            if not self._stopped.is_set() and not self._doubt.is_set():
                self._follow(watch)
        finally:
            watch.cancel()

    def _list(self) -> None:
        """Deliver a snapshot. It is not kept: the watch that follows lasts for hours."""
        snapshot, self._first = self._first or self._store.snapshot(), None
        self._heard()
        self._cluster_id = snapshot.cluster_id
        self._leases = len(snapshot.records)
        self._witness = max(snapshot.records, key=lambda record: record.mod_revision, default=None)
        self._relist_at = self._clock() + self._relist_s * (0.5 + self._jitter())
        self._deliver(snapshot._replace(same_history=self._same_history))
        self._same_history = True
        self._resume = snapshot.revision + 1

    def _follow(self, watch: Watch) -> None:
        self.pulse.rest()
        for changes in watch:
            self.pulse.work()
            self._heard()
            self._connected = True
            self._backoff.reset()
            if changes.events:
                self._remember(changes)
                self._deliver(changes)
                self._resume = changes.revision + 1
            if self._clock() >= self._relist_at:
                self._resume = 0
                return
            # The transport ends a watch whose store has fallen silent; until then there is nothing to do.
            self.pulse.rest()

    def _remember(self, changes: Changes) -> None:
        for event in changes.events:
            if isinstance(event, Record):
                self._witness = event
            elif self._witness is not None and event.key == self._witness.key:
                self._witness = None

    def _lose(self) -> None:
        if self._connected:
            # What stood until now was true until now.
            self._connected, self._true_until = False, self._clock()

    def _heard(self) -> None:
        self.failure = None
        self._true_until = now = self._clock()
        away = self._outage.ended(now)
        if away is not None:
            self._log.info("store_reachable", away_s=round(away, 1))

    def _report(self, error: StoreError) -> None:
        if isinstance(error, WatchInterrupted) and not error.resumable:
            self._log.warning("watch_interrupted", reason=str(error))
            return
        if self._outage.failed(self._clock(), kind_of(error)):
            event = "store_denied" if isinstance(error, StoreDenied) else "store_unreachable"
            self._log.warning(event, reason=str(error))
