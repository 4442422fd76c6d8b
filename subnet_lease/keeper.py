"""Keeps this host's own lease: finds it, takes one, renews it, takes one again when it is lost, gives it back.

The host's lease is the record that carries its PublicIP, as flannel has it, so an agent without memory finds its own
and takes over from flanneld. Every write is a transaction on the key's last revision, and every round begins with what
the store holds, so that a write with an unknown outcome needs no care beyond one: the etcd lease granted for it is
revoked before anything else is written, unless our record hangs on it. A late write then fails, and there is never more
than one.

Nothing is written where the record is right already: a restart wakes nobody's watch, and a renewal extends the etcd
lease instead of putting the key. A record without an etcd lease is the operator's reservation and stays one.

Time is counted on CLOCK_BOOTTIME, for a suspended host's lease runs out like any other.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Any

import structlog

from subnet_lease.allocate import choose_subnet
from subnet_lease.model import (
    Lease,
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    decode_attrs,
    encode_attrs,
    format_address,
    parse_subnet_key,
    subnet_key,
)
from subnet_lease.retry import Backoff, Outage
from subnet_lease.store import (
    Changes,
    Record,
    Snapshot,
    Store,
    StoreDenied,
    StoreError,
    StoreUnavailable,
    SubnetExhausted,
    kind_of,
)

LONGEST_SLEEP_S = 60.0
"""Waits are counted by the kernel on a clock that stands still during suspend: look at the true time this often."""


RELEASE_ATTEMPTS = 5


def boot_clock() -> float:
    """Seconds since boot, suspended ones included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Keeper:
    """Owns the host's lease. `acquire` once, then `run` as a thread's body; `check`, `saw` and `stop` from any thread.

    `attrs_for` gives what to publish, from the lease held before (its MAC is to be kept) or None. `ttl` is what a new
    etcd lease is granted, in seconds; it is renewed `renew_margin` seconds before its end, by chance up to half as many
    earlier, or after half of its time if that is later. `preferred` is the subnet to take if it is free; none that
    overlaps a block in `avoid` is taken. `assumed` is a lease known from earlier, held until the store says more.
    `on_lease` is called by `run` with each lease that differs from the last: another subnet, another etcd lease, or a
    value that had to be written.
    """

    def __init__(
        self,
        store: Store,
        config: NetworkConfig,
        public_ip: bytes,
        attrs_for: Callable[[Lease | None], LeaseAttrs],
        *,
        ttl: int,
        renew_margin: float,
        on_lease: Callable[[Lease], None],
        preferred: Prefix | None = None,
        avoid: Collection[Prefix] = (),
        assumed: Lease | None = None,
        clock: Callable[[], float] = boot_clock,
        pick: Callable[[int], int] = random.randrange,
        jitter: Callable[[], float] = random.random,
        log: Any = None,
    ) -> None:
        self._store = store
        self._config = config
        self._public_ip = public_ip
        self._attrs_for = attrs_for
        self._ttl = ttl
        self._renew_margin = renew_margin
        self._on_lease = on_lease
        self._preferred = preferred
        self._avoid = avoid
        self._clock = clock
        self._pick = pick
        self._jitter = jitter
        self._backoff = Backoff(jitter)
        self._log = log or structlog.get_logger()
        self._outage = Outage()
        self._exhausted = Outage()
        self._stopped = threading.Event()
        self._wake = threading.Event()
        if assumed is not None:
            self._wake.set()
        self._lease = self._former = assumed
        self._renew_at = self._ends_at = 0.0
        self._loose_grant = 0
        self._seen: Snapshot | None = None
        self._given: tuple[int, int] | None = None

    def take_snapshot(self) -> Snapshot | None:
        """The snapshot that the latest round went by, once: a watcher can begin with it instead of reading all anew."""
        seen, self._seen = self._seen, None
        if seen is not None:
            self._given = seen.revision, seen.cluster_id
        return seen

    @property
    def lease(self) -> Lease | None:
        """The lease held, as far as is known."""
        return self._lease

    @property
    def ends_at(self) -> float:
        """When the lease ends if it is not renewed, on `clock`; infinite for a reservation, 0 while it is assumed."""
        return self._ends_at

    def acquire(self) -> Lease | None:
        """Find or take the host's lease; waits until there is one. None if stopped before."""
        while not self._stopped.is_set():
            try:
                lease = self._round()
            except SubnetExhausted as error:
                self._reached()
                if self._exhausted.failed(self._clock()):
                    self._log.error("subnet_exhausted", reason=str(error))
                self._stopped.wait(self._backoff.delay())
            except StoreError as error:
                self._missed(error)
                self._stopped.wait(self._backoff.delay())
            else:
                if lease is not None:
                    self._exhausted.ended(self._clock())
                    self._backoff.reset()
                    return lease
        return None

    def run(self) -> None:
        """Renew the lease, and re-acquire it when it is gone, until `stop`."""
        known = self._lease
        while not self._stopped.is_set():
            if self._wake.is_set() or self._lease is None:
                self._wake.clear()
                lease = self.acquire()
                if lease is not None and lease != known:
                    known = lease
                    self._on_lease(lease)
                self._seen = None
            elif self._clock() >= self._renew_at:
                self._renew(self._lease)
            else:
                self._wake.wait(min(self._renew_at - self._clock(), LONGEST_SLEEP_S))

    def check(self) -> None:
        """Have `run` compare the record with what it should be, at once: somebody else changed or deleted it."""
        self._wake.set()

    def saw(self, fact: Snapshot | Changes) -> None:
        """Look at what the watcher delivers: `check` if our own record is not as we left it."""
        lease = self._lease
        if lease is None:
            return
        key = subnet_key(lease.subnet, lease.subnet6)
        if isinstance(fact, Snapshot) and (fact.revision, fact.cluster_id) == self._given:
            # Our own, from before the write that it led to. Once: a store that was wiped counts its revisions anew.
            self._given = None
            return
        if isinstance(fact, Changes):
            touched = any(event.key == key and event.mod_revision > lease.mod_revision for event in fact.events)
        else:
            # In another cluster or a restored one the same revision may be another host's put; its etcd lease differs.
            # To look once too often writes nothing.
            own = next((record for record in fact.records if record.key == key), None)
            ours = lease.etcd_lease, lease.create_revision, lease.mod_revision
            touched = own is None or (own.etcd_lease, own.create_revision, own.mod_revision) != ours
        if touched:
            self.check()

    def use(self, config: NetworkConfig) -> None:
        """Take subnets by `config` from now on, and publish anew what `attrs_for` says. From any thread."""
        self._config = config
        self.check()

    def stop(self) -> None:
        """End `acquire` and `run`; at once while they wait, within a call's deadline otherwise. The lease stays."""
        self._stopped.set()
        self._wake.set()

    # --- one round: read, then at most one write ---

    def _round(self) -> Lease | None:
        """The lease, or None where another was faster: begin again."""
        asked_at = self._clock()
        self._seen = self._store.snapshot()
        records = self._seen.records
        record, lease = self._own(records)
        self._note_loss(lease)
        self._settle_grant(lease)
        # What we held says more than what stands there now, which anybody may have written.
        attrs = self._attrs_for(self._former or lease)
        value = encode_attrs(attrs)
        if record is None or lease is None:
            return self._take(records, attrs, value)
        etcd_lease, seconds = lease.etcd_lease, 0
        if not lease.reserved:
            seconds = self._store.keep_alive(etcd_lease)
            if not seconds:
                # About to vanish with its etcd lease. A put with a new one saves it, unless etcd deletes it first.
                seconds, etcd_lease = self._ttl, self._grant()
        if record.value != value or etcd_lease != lease.etcd_lease:
            revision = self._store.replace(record.key, value, etcd_lease, record.mod_revision)
            if not revision:
                return None
            self._loose_grant = 0
            lease = lease._replace(etcd_lease=etcd_lease, mod_revision=revision)
        return self._hold(lease._replace(attrs=attrs), asked_at, seconds)

    def _take(self, records: Iterable[Record], attrs: LeaseAttrs, value: bytes) -> Lease | None:
        subnet = choose_subnet(self._config, chain(_subnets(records), self._avoid), self._preferred, self._pick)
        asked_at = self._clock()
        etcd_lease = self._grant()
        revision = self._store.create(subnet_key(subnet), value, etcd_lease)
        if not revision:
            return None
        self._loose_grant = 0
        return self._hold(Lease(subnet, None, attrs, etcd_lease, revision, revision), asked_at, self._ttl)

    def _own(self, records: Iterable[Record]) -> tuple[Record, Lease] | tuple[None, None]:
        """Our record: of the subnet preferred or held, else the eldest."""
        network, length = self._config.block, self._config.subnet_len
        own = [
            (lease.subnet != self._preferred, lease.create_revision, record, lease)
            for record, lease in leases_of(records, self._public_ip)
            if lease.subnet.length == length and network.covers(lease.subnet)
        ]
        if not own:
            return None, None
        *_, record, lease = min(own, key=lambda candidate: candidate[:2])
        return record, lease

    def _grant(self) -> int:
        self._loose_grant = self._store.grant(self._ttl)
        return self._loose_grant

    def _settle_grant(self, lease: Lease | None) -> None:
        """Revoke the grant of a write that failed or may have failed, so that it cannot come true any more."""
        if self._loose_grant and (lease is None or lease.etcd_lease != self._loose_grant):
            self._store.revoke(self._loose_grant)
        self._loose_grant = 0

    def _hold(self, lease: Lease, asked_at: float, seconds: int) -> Lease:
        self._reached()
        before, self._lease = self._lease, lease
        self._former = lease
        wanted, self._preferred = self._preferred, lease.subnet
        if wanted is not None and wanted != lease.subnet:
            self._log.warning(
                "subnet_changed",
                before=str(wanted),
                now=str(lease.subnet),
                effect="pods keep addresses nobody routes to",
            )
        self._schedule(lease, asked_at, seconds)
        if before is None or before.subnet != lease.subnet or before.etcd_lease != lease.etcd_lease:
            self._log.info("lease_acquired", subnet=str(lease.subnet), reserved=lease.reserved)
        elif before.mod_revision != lease.mod_revision:
            self._log.info("lease_published", subnet=str(lease.subnet))
        return lease

    def _note_loss(self, found: Lease | None) -> None:
        lost = self._lease
        if lost is not None and (found is None or found.subnet != lost.subnet):
            self._log.warning("lease_lost", subnet=str(lost.subnet), reason="its key is gone or another host's")
            self._lease = None

    # --- time ---

    def _schedule(self, lease: Lease, asked_at: float, seconds: int) -> None:
        # Earlier by chance, so that hosts that started together do not renew together for ever after.
        margin = min(self._renew_margin * (1 + self._jitter() / 2), seconds / 2)
        self._ends_at = float("inf") if lease.reserved else asked_at + seconds
        self._renew_at = self._ends_at - margin

    def _renew(self, lease: Lease) -> None:
        asked_at = self._clock()
        try:
            seconds = self._store.keep_alive(lease.etcd_lease)
        except StoreError as error:
            self._missed(error)
            self._stopped.wait(self._backoff.delay())
            return
        self._reached()
        self._backoff.reset()
        if seconds:
            self._schedule(lease, asked_at, seconds)
            self._log.debug("lease_renewed", subnet=str(lease.subnet), seconds=seconds)
        else:
            self._log.warning("lease_lost", subnet=str(lease.subnet), reason="its etcd lease has ended")
            self._lease = None

    # --- what the operator hears ---

    def _missed(self, error: StoreError) -> None:
        if self._outage.failed(self._clock(), kind_of(error)):
            event = "store_denied" if isinstance(error, StoreDenied) else "store_unreachable"
            self._log.warning(event, reason=str(error))

    def _reached(self) -> None:
        away = self._outage.ended(self._clock())
        if away is not None:
            self._log.info("store_reachable", away_s=round(away, 1))


def leases_of(records: Iterable[Record], public_ip: bytes) -> Iterator[tuple[Record, Lease]]:
    """The valid records that carry `public_ip`, decoded."""
    text = format_address(public_ip).encode()
    for record in records:
        if text in record.value:  # spares decoding thousands of others
            with contextlib.suppress(LeaseInvalid):
                subnet, subnet6 = parse_subnet_key(record.key)
                attrs = decode_attrs(record.value)
                if attrs.public_ip == public_ip:
                    yield (
                        record,
                        Lease(subnet, subnet6, attrs, record.etcd_lease, record.create_revision, record.mod_revision),
                    )


def _subnets(records: Iterable[Record]) -> Iterator[Prefix]:
    """What the keys take, whatever their values are worth."""
    for record in records:
        try:
            yield parse_subnet_key(record.key)[0]
        except LeaseInvalid:
            continue


def release_lease(store: Store, public_ip: bytes) -> Lease | None:
    """Give back what the host of `public_ip` leases, for a host whose agent no longer runs. StoreError.

    Returns a lease that was released; one with `reserved` set, left as it was, where the host has only a reservation;
    None where it has nothing.
    """
    released: Lease | None = None
    for _ in range(RELEASE_ATTEMPTS):
        own = list(leases_of(store.snapshot().records, public_ip))
        leased = [(record, lease) for record, lease in own if not lease.reserved]
        if not leased:
            return released or next((lease for _, lease in own), None)
        for record, lease in leased:
            if store.delete(record.key, record.mod_revision):
                store.revoke(lease.etcd_lease)
                released = lease
    raise StoreUnavailable(f"the lease of {format_address(public_ip)} keeps changing; is its agent still running?")
