"""The leases of the cluster as this host sees them: which are accepted, which are rejected and why.

Owns decoding of raw records, the validation of each lease against the network and this host, and the resolution of
conflicts between leases. The outcome depends only on the records, so all hosts decide alike, but for what protects a
host itself: no lease can capture its own subnet or address, or a block of its underlay.

Two leases contest each other where their subnets overlap, where one MAC stands for two underlay addresses, or one
underlay address for two MACs. Of contestants the eldest (by create revision, then by key) is accepted: whoever comes
later cannot take over traffic by writing a key. A host may hold several subnets with one VTEP; that is no contest.

Costs are in proportion to what changed. Nothing here reads a clock or a store.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from subnet_lease.model import (
    Lease,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    decode_attrs,
    format_address,
    format_mac,
    parse_subnet_key,
)
from subnet_lease.store import Changes, Deleted, Record, Snapshot

MAX_BLOCKS = 256
"""A lease may span this many subnets of the network's SubnetLen; no agent writes one that spans several."""

UNROUTABLE = frozenset({0, 127, *range(224, 256)})
"""First bytes of addresses where no VTEP can be: "this" network, loopback, multicast, reserved (RFC 6890)."""


@dataclass(frozen=True, slots=True)
class Host:
    """What this host must protect: its own lease's key, subnet, underlay address, and blocks that its links occupy."""

    key: str
    subnet: Prefix
    public_ip: bytes
    mac: bytes
    links: tuple[Prefix, ...] = ()


class LeaseTable:
    """Accepted and rejected leases by key (`10.5.34.0-24`). This host's own lease is neither."""

    def __init__(self, config: NetworkConfig, host: Host) -> None:
        self._config = config
        self._network = config.block
        # Packed addresses compare as the numbers they are; a whole table is held against these two.
        self._first, self._last = self._network.base, self._network.host(self._network.size - 1)
        self._host = host
        self._valid: dict[str, Lease] = {}
        self._invalid: dict[str, str] = {}
        self._contested: dict[str, str] = {}
        self._claims: dict[bytes | Prefix, tuple[str, ...]] = {}
        self._cluster_id = 0
        self.revision = 0

    # --- facts in, changed keys out ---

    def replace(self, snapshot: Snapshot) -> set[str]:
        """Take over a complete set of records. Returns the keys whose accepted lease changed, came or went."""
        present = {record.key for record in snapshot.records}
        gone = [Deleted(key, snapshot.revision) for key in (self._valid.keys() | self._invalid.keys()) - present]
        # In another cluster, or a restored one, the same revision may stand for another value.
        continuous = snapshot.cluster_id == self._cluster_id and snapshot.revision >= self.revision
        self._cluster_id = snapshot.cluster_id
        return self._apply([*gone, *snapshot.records], snapshot.revision, continuous)

    def apply(self, changes: Changes) -> set[str]:
        """Take over changes in the store's order. Returns as `replace` does."""
        return self._apply(changes.events, changes.revision)

    def _apply(self, events: Iterable[Record | Deleted], revision: int, continuous: bool = True) -> set[str]:
        before: dict[str, Lease | None] = {}
        doubtful: set[str] = set()
        for event in events:
            old = self._valid.get(event.key)
            if continuous and old and isinstance(event, Record) and old.mod_revision == event.mod_revision:
                continue
            before.setdefault(event.key, self.accepted(event.key))
            self._remove(event.key, doubtful)
            if isinstance(event, Record) and event.key != self._host.key:
                self._add(event, doubtful)
        for key in doubtful:
            before.setdefault(key, self.accepted(key))
            self._judge(key)
        self.revision = revision
        return {key for key, lease in before.items() if self.accepted(key) != lease}

    def _remove(self, key: str, doubtful: set[str]) -> None:
        self._invalid.pop(key, None)
        self._contested.pop(key, None)
        lease = self._valid.pop(key, None)
        if lease is None:
            return
        for claim in self._claims_of(lease):
            left = tuple(holder for holder in self._claims[claim] if holder != key)
            if left:
                self._claims[claim] = left
                doubtful.update(left)
            else:
                del self._claims[claim]

    def _add(self, record: Record, doubtful: set[str]) -> None:
        try:
            lease = self._decode(record)
        except LeaseInvalid as reason:
            self._invalid[record.key] = str(reason)
            return
        self._valid[record.key] = lease
        alone = (record.key,)
        for claim in self._claims_of(lease):
            others = self._claims.setdefault(claim, alone)
            if others is not alone:
                self._claims[claim] = others + alone
                doubtful.add(record.key)
                doubtful.update(others)

    # --- one lease by itself ---

    def _decode(self, record: Record) -> Lease:
        subnet, subnet6 = parse_subnet_key(record.key)
        attrs = decode_attrs(record.value, extras=False)
        lease = Lease(subnet, subnet6, attrs, record.etcd_lease, record.create_revision, record.mod_revision)
        reason = self._objection(lease)
        if reason:
            raise LeaseInvalid(reason)
        return lease

    def _objection(self, lease: Lease) -> str | None:
        config, host, subnet, attrs = self._config, self._host, lease.subnet, lease.attrs
        if not self._first <= subnet.base <= self._last or subnet.length < self._network.length:
            return f"the subnet lies outside {self._network}"
        if subnet.length < config.subnet_len - MAX_BLOCKS.bit_length() + 1:
            return f"the subnet spans more than {MAX_BLOCKS} subnets of /{config.subnet_len}"
        if subnet.overlaps(host.subnet):
            return f"the subnet overlaps this host's own, {host.subnet}"
        for link in host.links:
            if subnet.overlaps(link):
                return f"the subnet overlaps {link}, which this host's underlay uses"
        if attrs.backend_type != config.backend.type:
            return f"the backend is {attrs.backend_type[:32]!r}, the network's is {config.backend.type!r}"
        if attrs.vtep is None:
            return "BackendData has no VtepMAC"
        if attrs.vtep.vni != config.backend.vni:
            return f"the VNI is {attrs.vtep.vni}, the network's is {config.backend.vni}"
        mac = attrs.vtep.mac
        if mac[0] & 1 or not any(mac):
            return f"VtepMAC {format_mac(mac)} is not the address of one device"
        if mac == host.mac:
            return f"VtepMAC {format_mac(mac)} is this host's own"
        if attrs.public_ip == host.public_ip:
            return f"PublicIP {format_address(attrs.public_ip)} is this host's own"
        if self._first <= attrs.public_ip <= self._last:
            return f"PublicIP {format_address(attrs.public_ip)} lies inside the overlay, {self._network}"
        if attrs.public_ip[0] in UNROUTABLE:
            return f"PublicIP {format_address(attrs.public_ip)} cannot be a host's address"
        return None

    # --- leases against each other ---

    def _claims_of(self, lease: Lease) -> Iterator[bytes | Prefix]:
        """What a lease lays claim to: its MAC, its underlay address, and the blocks of SubnetLen it touches."""
        assert lease.attrs.vtep is not None
        yield lease.attrs.vtep.mac
        yield lease.attrs.public_ip
        subnet, length = lease.subnet, self._config.subnet_len
        if subnet.length == length:
            yield subnet
            return
        block = Prefix(subnet.network(min(length, subnet.length)).base, length)
        for number in range(max(1, subnet.size // block.size)):
            yield Prefix(block.host(number * block.size), length)

    def _judge(self, key: str) -> None:
        """Accept or contest one valid lease by its elders."""
        lease = self._valid.get(key)
        if lease is None:
            return
        for claim in self._claims_of(lease):
            for other in self._claims[claim]:
                reason = self._contest(key, lease, other) if other != key else None
                if reason:
                    self._contested[key] = reason
                    return
        self._contested.pop(key, None)

    def _contest(self, key: str, lease: Lease, other_key: str) -> str | None:
        other = self._valid[other_key]
        if (other.create_revision, other_key) > (lease.create_revision, key):
            return None
        mine, theirs = lease.attrs, other.attrs
        assert mine.vtep is not None and theirs.vtep is not None
        if lease.subnet.overlaps(other.subnet):
            return f"the subnet overlaps {other.subnet}, which {format_address(theirs.public_ip)} has held for longer"
        if mine.vtep.mac == theirs.vtep.mac and mine.public_ip != theirs.public_ip:
            return f"VtepMAC {format_mac(mine.vtep.mac)} has longer been {format_address(theirs.public_ip)}'s"
        if mine.public_ip == theirs.public_ip and mine.vtep.mac != theirs.vtep.mac:
            return (
                f"PublicIP {format_address(mine.public_ip)} has longer been that of {other.subnet} with VtepMAC "
                f"{format_mac(theirs.vtep.mac)}"
            )
        return None

    # --- views ---

    def accepted(self, key: str) -> Lease | None:
        """The lease to program, None if there is none or it is rejected."""
        return None if key in self._contested else self._valid.get(key)

    def peers(self) -> Iterator[tuple[str, Lease]]:
        """All accepted leases."""
        return ((key, lease) for key, lease in self._valid.items() if key not in self._contested)

    @property
    def rejected(self) -> Mapping[str, str]:
        """Reasons by key, of what cannot be read or used and of what lost a contest."""
        return self._invalid | self._contested

    @property
    def rejected_count(self) -> int:
        """How many there are, without listing them."""
        return len(self._invalid) + len(self._contested)
