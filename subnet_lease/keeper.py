"""Keeps this host's own lease: finds it, takes one, renews it, takes one again when it is lost, gives it back.

The host's lease is the record that carries its underlay address, as flannel has it, so an agent without memory finds
its own and takes over from flanneld; failing that, the one with the MAC of its VXLAN device, so that a host whose
address changed meanwhile keeps its subnet; see `own_records`.

Every write is a transaction on the key's last revision, and every round begins with what the store holds, so that a
write with an unknown outcome needs no care beyond one: the etcd lease granted for it is revoked before anything else is
written, unless our record hangs on it. A late write then fails, and there is never more than one.

A lease with other address families than the network has is moved to a key with the right ones, in one transaction that
deletes before it puts: a flanneld removes what it has for a MAC when a lease with that MAC goes.

A key is one host's because it is made by a transaction. That says nothing of one subnet of two in a key, so the second
is taken by the number of the first, and what an elder key names too is given up for another.

Nothing is written where the record is right already: a restart wakes nobody's watch, and a renewal extends the etcd
lease instead of putting the key. A record without an etcd lease is the operator's reservation and stays one. Where one
was made while the host took its first subnet, the host has two: it moves to the reservation, for which it would have
waited had it known. Later it does not: pods have addresses by then, and the operator decides (docs/reservations.md).

Time is counted on CLOCK_BOOTTIME, for a suspended host's lease runs out like any other.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import structlog

from subnet_lease.allocate import choose_subnet
from subnet_lease.model import (
    NO_SUBNET,
    Lease,
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    SubnetRange,
    decode_attrs,
    encode_attrs,
    format_address,
    format_mac,
    format_subnets,
    parse_subnet_key,
    subnet_key,
)
from subnet_lease.pulse import STORE_WORK_S, Pulse
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

JUST_TAKEN_S = 10.0
"""For so long after it was taken a subnet is given up for one that had been reserved before."""


class Identity(NamedTuple):
    """By what a host knows its own record among all: packed underlay addresses, and the MACs of its VXLAN devices."""

    public_ip: bytes | None
    public_ip6: bytes | None = None
    macs: tuple[bytes, ...] = ()

    def __str__(self) -> str:
        return " and ".join(format_address(each) for each in (self.public_ip, self.public_ip6) if each)

    def has_address(self, attrs: LeaseAttrs) -> bool:
        """Whether it is the host that `attrs` give the address of: by PublicIP if both have one, else by PublicIPv6."""
        if self.public_ip is not None and attrs.public_ip is not None:
            return self.public_ip == attrs.public_ip
        return self.public_ip6 is not None and self.public_ip6 == attrs.public_ip6

    def has_mac(self, attrs: LeaseAttrs) -> bool:
        """Whether a VTEP in `attrs` has the MAC of one of its devices."""
        return any(vtep is not None and vtep.mac in self.macs for vtep in (attrs.vtep, attrs.vtep6))


def boot_clock() -> float:
    """Seconds since boot, suspended ones included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Keeper:
    """Owns the host's lease. `acquire` once, then `run` as a thread's body; `check`, `saw`, `use` and `stop` from any.

    `attrs_for` gives what to publish, from the lease held before (its MAC is to be kept) or None. `ttl` is what a new
    etcd lease is granted, in seconds; it is renewed `renew_margin` seconds before its end, by chance up to half as many
    earlier, or after half of its time if that is later. `preferred` are the subnets to take if they are free; none that
    overlaps a block in `avoid` is taken. `assumed` is a lease known from earlier, held until the store says more.
    `on_lease` is called by `run` with each lease that differs from the last: another subnet, another etcd lease, or a
    value that had to be written.
    """

    def __init__(
        self,
        store: Store,
        config: NetworkConfig,
        identity: Identity,
        attrs_for: Callable[[Lease | None], LeaseAttrs],
        *,
        ttl: int,
        renew_margin: float,
        on_lease: Callable[[Lease], None],
        preferred: tuple[Prefix, ...] = (),
        avoid: Collection[Prefix] = (),
        assumed: Lease | None = None,
        clock: Callable[[], float] = boot_clock,
        pick: Callable[[int], int] = random.randrange,
        jitter: Callable[[], float] = random.random,
        log: Any = None,
    ) -> None:
        self._store = store
        self._config = config
        self._identity = identity
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
        self._loose_grant = self._granted = 0
        self._taken: tuple[str, float] | None = None
        """The key that was made last, and until when it is given up for a reservation made before it."""
        self._seen: Snapshot | None = None
        self._given: tuple[int, int] | None = None
        self.failure: StoreError | None = None
        """Why the store cannot be had, None if it can as far as is known."""
        self.shortage = ""
        """Why there is no subnet to be had, empty if there is or was."""
        self.pulse = Pulse(STORE_WORK_S, time.monotonic)

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

    def seconds_left(self) -> float | None:
        """Until the lease ends if it is not renewed; infinite for a reservation, 0 without a lease or after its end,
        None while it is assumed.
        """
        lease, ends_at = self._lease, self._ends_at
        if lease is None:
            return 0.0
        return max(0.0, ends_at - self._clock()) if ends_at else None

    @property
    def ends_at(self) -> float:
        """When the lease ends if it is not renewed, on `clock`; infinite for a reservation, 0 while it is assumed."""
        return self._ends_at

    def acquire(self) -> Lease | None:
        """Find or take the host's lease; waits until there is one. None if stopped before."""
        while not self._stopped.is_set():
            self.pulse.work()
            try:
                lease = self._round()
            except SubnetExhausted as error:
                self._reached()
                self.shortage = str(error)
                if self._exhausted.failed(self._clock()):
                    self._log.error("subnet_exhausted", reason=self.shortage)
                self.pulse.wait(self._stopped, self._backoff.delay())
            except StoreError as error:
                self._missed(error)
                self.pulse.wait(self._stopped, self._backoff.delay())
            else:
                if lease is not None:
                    self._exhausted.ended(self._clock())
                    self.shortage = ""
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
                self.pulse.wait(self._wake, min(self._renew_at - self._clock(), LONGEST_SLEEP_S))

    def check(self) -> None:
        """Have `run` compare the record with what it should be, at once: somebody else changed or deleted it."""
        self._wake.set()

    def saw(self, fact: Snapshot | Changes) -> None:
        """Look at what the watcher delivers: `check` if our own record is not as we left it, or another is ours."""
        if isinstance(fact, Snapshot) and (fact.revision, fact.cluster_id) == self._given:
            # Our own, from before the write that it led to. Once: a store that was wiped counts its revisions anew.
            self._given = None
        elif self._is_touched(fact) or self._is_shared(fact) or self._has_reservation(fact):
            self.check()

    def _is_touched(self, fact: Snapshot | Changes) -> bool:
        lease = self._lease
        if lease is None:
            return False
        key = lease.key
        if isinstance(fact, Changes):
            return any(event.key == key and event.mod_revision > lease.mod_revision for event in fact.events)
        # In another cluster or a restored one the same revision may be another host's put; its etcd lease differs, or,
        # of a reservation, its value. To look once too often writes nothing.
        own = next((record for record in fact.records if record.key == key), None)
        ours = lease.etcd_lease, lease.create_revision, lease.mod_revision
        if own is None or (own.etcd_lease, own.create_revision, own.mod_revision) != ours:
            return True
        return lease.reserved and own.value != encode_attrs(lease.attrs)

    def _is_shared(self, fact: Snapshot | Changes) -> bool:
        """Whether it has an elder key with a subnet of ours: with two in a key, two hosts may take one at a time."""
        lease = self._lease
        told = fact.events if isinstance(fact, Changes) else fact.records
        return lease is not None and any(
            _names_in_common(each.key, lease.key)
            for each in told
            if isinstance(each, Record) and each.create_revision < lease.create_revision
        )

    def _has_reservation(self, fact: Snapshot | Changes) -> bool:
        """Whether it has one for us that we do not hold: made while we take a subnet, it is in no snapshot of ours."""
        key = self._lease.key if self._lease else None
        told = fact.events if isinstance(fact, Changes) else fact.records
        reserved = (each for each in told if isinstance(each, Record) and not each.etcd_lease and each.key != key)
        return bool(own_records(reserved, self._identity))

    def use(self, config: NetworkConfig | None = None, identity: Identity | None = None) -> None:
        """Go by another configuration or identity from now on, and publish anew what `attrs_for` says."""
        self._config = config or self._config
        self._identity = identity or self._identity
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
        own = self._own(records)
        record, lease = self._chosen(own)
        self._note_loss(own)
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
        subnets = self._completed(lease, records)
        key = subnet_key(*subnets)
        if key != record.key and any(other.key == key for other in records):
            # Another's, or it would be our choice.
            subnets = self._completed(None, records)
            key = subnet_key(*subnets)
        created, modified = lease.create_revision, lease.mod_revision
        if key != record.key:
            created = modified = self._store.move(record.key, modified, key, value, etcd_lease, 0)
        elif surplus := self._surplus(lease, own):
            self._store.move(surplus.key, surplus.mod_revision, key, value, etcd_lease, modified)
            modified = 0
        elif record.value != value or etcd_lease != lease.etcd_lease:
            modified = self._store.replace(key, value, etcd_lease, modified)
        if not modified:
            return None
        self._loose_grant = 0
        return self._hold(Lease(*subnets, attrs, etcd_lease, created, modified), asked_at, seconds)

    def _take(self, records: Iterable[Record], attrs: LeaseAttrs, value: bytes) -> Lease | None:
        subnets = self._completed(None, records)
        key = subnet_key(*subnets)
        asked_at = self._clock()
        etcd_lease = self._grant()
        revision = self._store.create(key, value, etcd_lease)
        if not revision:
            return None
        self._loose_grant = 0
        self._taken = key, asked_at + JUST_TAKEN_S
        return self._hold(Lease(*subnets, attrs, etcd_lease, revision, revision), asked_at, self._ttl)

    def _completed(self, lease: Lease | None, records: Iterable[Record]) -> tuple[Prefix | None, Prefix | None]:
        """The subnets of `lease` as far as the network goes, and free ones of the families that it lacks."""
        kept = [_subnet_within(each, lease) if lease else None for each in self._config.ranges]
        if lease is not None and not lease.reserved:
            shared = self._shared(lease, records)
            kept = [None if subnet in shared else subnet for subnet in kept]
        chosen: dict[int, Prefix] = {}
        # What stays comes first, for the other goes by its number.
        for subnet, available in sorted(zip(kept, self._config.ranges, strict=True), key=lambda each: each[0] is None):
            if subnet is None:
                taken = chain(_subnets(records), self._avoid)
                wanted = (
                    *self._preferred,
                    *(twin for other in chosen.values() if (twin := self._twin(other, available))),
                )
                subnet = choose_subnet(available, taken, wanted, self._pick)
            chosen[len(subnet.base)] = subnet
        return chosen.get(4), chosen.get(16)

    def _twin(self, subnet: Prefix, available: SubnetRange) -> Prefix | None:
        """The subnet that has in `available` the number that `subnet` has in its own range, if there is such a one."""
        number = next(each.number(subnet) for each in self._config.ranges if len(each.first) == len(subnet.base))
        return available.subnet(number)

    def _shared(self, lease: Lease, records: Iterable[Record]) -> set[Prefix]:
        """The subnets of ours that an elder key names as well: whoever made it took them first."""
        found: set[Prefix] = set()
        for record in records:
            if record.create_revision < lease.create_revision and _names_in_common(record.key, lease.key):
                with contextlib.suppress(LeaseInvalid):
                    found.update(set(filter(None, parse_subnet_key(record.key))).intersection(lease.subnets))
        return found

    def _own(self, records: Iterable[Record]) -> list[tuple[Record, Lease]]:
        """Our records that have a subnet of the network's, the elder before the younger."""
        own = own_records(records, self._identity, held=self._lease, granted=self._granted, by_mac=self._former is None)
        ranges = self._config.ranges
        usable = [(record, lease) for record, lease in own if any(_subnet_within(each, lease) for each in ranges)]
        return sorted(usable, key=lambda found: found[1].create_revision)

    def _chosen(self, own: list[tuple[Record, Lease]]) -> tuple[Record, Lease] | tuple[None, None]:
        """That of the subnets preferred or held, else the eldest; but an elder reservation instead of what is new."""
        if not own:
            return None, None
        wanted = set(self._preferred)
        found = min(own, key=lambda each: -len(wanted.intersection(each[1].subnets)))
        if self._taken is not None and found[0].key == self._taken[0] and self._clock() < self._taken[1]:
            elders = own[: own.index(found)]
            found = next((each for each in elders if each[1].reserved), found)
        return found

    def _surplus(self, lease: Lease, own: list[tuple[Record, Lease]]) -> Lease | None:
        """A lease beside our reservation. It would end by itself, and a flanneld would then forget our MAC."""
        return next((other for _, other in own if not other.reserved), None) if lease.reserved else None

    def _grant(self) -> int:
        self._granted = self._loose_grant = self._store.grant(self._ttl)
        return self._granted

    def _settle_grant(self, lease: Lease | None) -> None:
        """Revoke the grant of a write that failed or may have failed, so that it cannot come true any more."""
        if self._loose_grant and (lease is None or lease.etcd_lease != self._loose_grant):
            self._store.revoke(self._loose_grant)
        self._loose_grant = 0

    def _hold(self, lease: Lease, asked_at: float, seconds: int) -> Lease:
        self._reached()
        before, self._lease = self._lease, lease
        self._former = lease
        wanted, self._preferred = self._preferred, lease.subnets
        if gone := [subnet for subnet in wanted if subnet not in lease.subnets]:
            self._log.warning(
                "subnet_changed",
                before=format_subnets(gone),
                now=str(lease),
                effect="pods keep addresses nobody routes to",
            )
        self._schedule(lease, asked_at, seconds)
        if before is None or before.subnets != lease.subnets or before.etcd_lease != lease.etcd_lease:
            self._log.info("lease_acquired", subnet=str(lease), reserved=lease.reserved)
        elif before.mod_revision != lease.mod_revision:
            self._log.info("lease_published", subnet=str(lease))
        return lease

    def _note_loss(self, own: list[tuple[Record, Lease]]) -> None:
        lost = self._lease
        if lost is not None and lost.key not in (record.key for record, _ in own):
            self._log.warning("lease_lost", subnet=str(lost), reason="its key is gone or another host's")
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
            self.pulse.wait(self._stopped, self._backoff.delay())
            return
        self._reached()
        self._backoff.reset()
        if seconds:
            self._schedule(lease, asked_at, seconds)
            self._log.debug("lease_renewed", subnet=str(lease), seconds=seconds)
        else:
            self._log.warning("lease_lost", subnet=str(lease), reason="its etcd lease has ended")
            self._lease = None

    # --- what the operator hears ---

    def _missed(self, error: StoreError) -> None:
        self.failure = error
        if self._outage.failed(self._clock(), kind_of(error)):
            event = "store_denied" if isinstance(error, StoreDenied) else "store_unreachable"
            self._log.warning(event, reason=str(error))

    def _reached(self) -> None:
        self.failure = None
        away = self._outage.ended(self._clock())
        if away is not None:
            self._log.info("store_reachable", away_s=round(away, 1))


def own_records(
    records: Iterable[Record],
    identity: Identity,
    *,
    held: Lease | None = None,
    granted: int = 0,
    by_mac: bool = False,
) -> list[tuple[Record, Lease]]:
    """The valid records that are the host's, decoded: those with its address, and the one that it holds.

    The latter is known by its key, and by the address it was last published with or the etcd lease that was `granted`
    to us; by one that it came to share, two hosts would have a claim to it for ever. Where there is none of either, and
    with `by_mac`, those with the MAC of one of its devices.
    """
    known = list(_decoded(records, identity, held, by_mac))
    own = [
        (record, lease)
        for record, lease in known
        if identity.has_address(lease.attrs) or (held is not None and _is_held(record, lease, held, granted))
    ]
    if not own and by_mac:
        return [(record, lease) for record, lease in known if identity.has_mac(lease.attrs)]
    return own


def _decoded(
    records: Iterable[Record], identity: Identity, held: Lease | None, by_mac: bool
) -> Iterator[tuple[Record, Lease]]:
    """The valid ones of those that may be the host's. Of the others, which are thousands, the bytes are looked at."""
    key = held.key if held else None
    addresses = [format_address(address) for address in (identity.public_ip, identity.public_ip6) if address]
    texts = [text.encode() for text in (*addresses, *map(format_mac, identity.macs if by_mac else ()))]
    for record in records:
        if record.key != key:
            for text in texts:
                if text in record.value:
                    break
            else:
                continue
        with contextlib.suppress(LeaseInvalid):
            attrs = decode_attrs(record.value)
            yield record, Lease(*parse_subnet_key(record.key), attrs, *record[2:])


def _is_held(record: Record, lease: Lease, held: Lease, granted: int) -> bool:
    if record.key != held.key:
        return False
    former = Identity(held.attrs.public_ip, held.attrs.public_ip6)
    return (not lease.reserved and lease.etcd_lease == granted) or former.has_address(lease.attrs)


def _subnet_within(available: SubnetRange, lease: Lease) -> Prefix | None:
    """The lease's subnet of this family, if it is of the network and of the length that all have."""
    return next((s for s in lease.subnets if s.length == available.length and available.network.covers(s)), None)


def _names_in_common(key: str, other: str) -> bool:
    """Whether two different keys name one subnet in the same way."""
    return key != other and not {NO_SUBNET}.issuperset({*key.split("&")}.intersection(other.split("&")))


def _subnets(records: Iterable[Record]) -> Iterator[Prefix]:
    """What the keys take, whatever their values are worth."""
    for record in records:
        with contextlib.suppress(LeaseInvalid):
            yield from filter(None, parse_subnet_key(record.key))


def release_lease(store: Store, identity: Identity) -> Lease | None:
    """Give back what the host leases, for a host whose agent no longer runs. StoreError.

    Returns a lease that was released; one with `reserved` set, left as it was, where the host has only a reservation;
    None where it has nothing.
    """
    released: Lease | None = None
    for _ in range(RELEASE_ATTEMPTS):
        own = own_records(store.snapshot().records, identity, by_mac=True)
        leased = [(record, lease) for record, lease in own if not lease.reserved]
        if not leased:
            return released or next((lease for _, lease in own), None)
        for record, lease in leased:
            if store.delete(record.key, record.mod_revision):
                store.revoke(lease.etcd_lease)
                released = lease
    raise StoreUnavailable(f"the lease of {identity} keeps changing; is its agent still running?")
