"""The leases of the cluster as this host sees them: which are accepted, which are rejected and why.

Owns decoding of raw records, the validation of each lease against the network and this host, and the resolution of
conflicts between leases. The outcome depends only on the records, so all hosts decide alike, but for what protects a
host itself: no lease can capture its own subnet or address, or a block of its underlay.

Two leases contest each other where their subnets overlap, where one MAC stands for two underlay addresses, or one
underlay address for two MACs. Of contestants the eldest (by create revision, then by key) is accepted: whoever comes
later cannot take over traffic by writing a key. A host may hold several subnets with one VTEP; that is no contest, and
the eldest of them speaks for all.

Costs are in proportion to what changed. Nothing here reads a clock or a store.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import chain, islice
from typing import NamedTuple

from subnet_lease.claims import Age, Claims
from subnet_lease.model import (
    Lease,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    decode_attrs,
    format_address,
    format_mac,
    is_device_mac,
    parse_subnet_key,
)
from subnet_lease.store import Changes, Deleted, Record, Snapshot

Claim = bytes | Prefix

MAX_BLOCKS = 256
"""A lease may span this many subnets of the network's SubnetLen; no agent writes one that spans several."""

UNROUTABLE = frozenset({0, 127, *range(224, 256)})
"""First bytes of addresses where no VTEP can be: "this" network, loopback, multicast, reserved (RFC 6890)."""


YOUNGEST = 1 << 63
"""A create revision beyond any of etcd's."""


class _Lingers(NamedTuple):
    """The store does not have the key any more, which is no proof that its host has left."""

    key: str


@dataclass(frozen=True, slots=True)
class Host:
    """What this host must protect: its own lease's key, subnet, underlay address, and blocks that its links occupy."""

    key: str
    subnet: Prefix
    public_ip: bytes
    mac: bytes
    links: tuple[Prefix, ...] = ()


NOBODY = Host("\ud800", Prefix(b"", 0), b"", b"")
"""A host in nobody's way, for a table of what every agent rejects: no key decodes to its key, no address equals its."""


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
        self._contested: set[str] = set()
        self._lingering: set[str] = set()
        self._claims = Claims()
        self._odd: dict[Prefix, set[Prefix]] = {}
        """Block of SubnetLen -> the claimed subnets of any other length that lie in it or around it."""
        self.cluster_id = 0
        self.revision = 0

    # --- facts in, changed keys out ---

    def replace(self, snapshot: Snapshot) -> Set[str]:
        """Take over a complete set of records. Returns the keys whose accepted lease changed, came or went.

        They come in the order of the records: what is made of them then lies side by side in memory, as they do.
        """
        # In another cluster, or a restored one, the same revision may stand for another value.
        same = snapshot.same_history and snapshot.cluster_id == self.cluster_id
        continuous = same and snapshot.revision >= self.revision
        self.cluster_id = snapshot.cluster_id
        missing = (self._valid.keys() | self._invalid.keys()) - {record.key for record in snapshot.records}
        if not continuous:
            self._lingering |= {key for key in missing if self.accepted(key) is not None}
        absent: list[Deleted | _Lingers] = [
            _Lingers(key) if key in self._lingering else Deleted(key, snapshot.revision) for key in missing
        ]
        return self._apply([*absent, *snapshot.records], snapshot.revision, continuous)

    def apply(self, changes: Changes) -> Set[str]:
        """Take over changes in the store's order. Returns as `replace` does."""
        return self._apply(changes.events, changes.revision)

    def let_go(self) -> Set[str]:
        """Give up the leases that linger. Returns as `replace` does."""
        return self._apply([Deleted(key, self.revision) for key in self._lingering], self.revision)

    @property
    def lingering(self) -> int:
        """How many leases are accepted that the store does not have since it went back or was replaced.

        Their hosts may be about to write them again, and until it is known that they are not, nothing is withdrawn: see
        `let_go`. Whoever else has a claim to the same is heard first, for no age compares between two stores.
        """
        return len(self._lingering)

    def _apply(
        self, events: "Iterable[Record | Deleted | _Lingers]", revision: int, continuous: bool = True
    ) -> Set[str]:
        before: dict[str, Lease | None] = {}
        doubtful: set[str] = set()
        touched: dict[Claim, Age | None] = {}
        for event in events:
            key = event.key
            old = self._valid.get(key)
            if continuous and old is not None and isinstance(event, Record) and _same_put(old, event):
                continue
            before.setdefault(key, self.accepted(key))
            if old is not None or key in self._invalid:
                self._remove(key, touched)
            if isinstance(event, _Lingers):
                assert old is not None, "it was accepted"
                self._lingering.add(key)
                if self._insert(key, old._replace(create_revision=YOUNGEST), touched):
                    doubtful.add(key)
            elif isinstance(event, Record) and key != self._host.key and self._add(event, touched):
                doubtful.add(key)
        for claim, eldest in touched.items():
            if self._claims.eldest(claim) != eldest:
                doubtful.update(self._concerned(claim))
        for key in doubtful:
            before.setdefault(key, self.accepted(key))
            self._judge(key)
        self.revision = revision
        return {key: None for key, lease in before.items() if self.accepted(key) != lease}.keys()

    def _remove(self, key: str, touched: dict[Claim, Age | None]) -> None:
        self._invalid.pop(key, None)
        self._contested.discard(key)
        self._lingering.discard(key)
        lease = self._valid.pop(key, None)
        if lease is None:
            return
        for claim in _claims_of(lease):
            touched.setdefault(claim, self._claims.eldest(claim))
            self._claims.remove(claim, (lease.create_revision, key))
        if lease.subnet.length != self._config.subnet_len and self._claims.eldest(lease.subnet) is None:
            for block in self._blocks(lease.subnet):
                self._odd[block].discard(lease.subnet)
                if not self._odd[block]:
                    del self._odd[block]

    def _add(self, record: Record, touched: dict[Claim, Age | None]) -> bool:
        """As `_insert`, of what is yet to be decoded."""
        try:
            lease = self._decode(record)
        except LeaseInvalid as reason:
            self._invalid[record.key] = str(reason)
            return False
        return self._insert(record.key, lease, touched)

    def _insert(self, key: str, lease: Lease, touched: dict[Claim, Age | None]) -> bool:
        """Whether somebody else may have a claim to the same, so that elders must be asked."""
        self._valid[key] = lease
        age = lease.create_revision, key
        subnet = lease.subnet
        contested = False
        for claim in _claims_of(lease):
            eldest = self._claims.add(claim, age)
            # Nearly always nobody else claims it, and then nobody else is concerned; an overlapping subnet is.
            if eldest is not None or (claim is subnet and not self._stands_alone(subnet)):
                touched.setdefault(claim, eldest)
                contested = True
        if subnet.length != self._config.subnet_len:
            for block in self._blocks(subnet):
                self._odd.setdefault(block, set()).add(subnet)
        return contested

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
                return f"the subnet overlaps {link}, which a link of this host uses"
        if attrs.backend_type != config.backend.type:
            return f"the backend is {attrs.backend_type[:32]!r}, the network's is {config.backend.type!r}"
        if attrs.vtep is None:
            return "BackendData has no VtepMAC"
        if attrs.vtep.vni != config.backend.vni:
            return f"the VNI is {attrs.vtep.vni}, the network's is {config.backend.vni}"
        mac = attrs.vtep.mac
        if not is_device_mac(mac):
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

    def _blocks(self, subnet: Prefix) -> Iterator[Prefix]:
        """The blocks of SubnetLen that the subnet touches."""
        length = self._config.subnet_len
        block = Prefix(subnet.network(min(length, subnet.length)).base, length)
        for number in range(max(1, subnet.size // block.size)):
            yield Prefix(block.host(number * block.size), length)

    def _overlapping(self, subnet: Prefix) -> Iterator[Prefix]:
        """The claimed subnets that overlap this one, itself included; one may come more than once."""
        yield subnet
        if self._stands_alone(subnet):
            return
        for block in self._blocks(subnet):
            if subnet.length != self._config.subnet_len:
                yield block
            yield from (other for other in self._odd.get(block, ()) if other.overlaps(subnet))

    def _stands_alone(self, subnet: Prefix) -> bool:
        """Whether no other subnet can overlap it: one of SubnetLen, and no odd one lies in it or around it."""
        return subnet.length == self._config.subnet_len and subnet not in self._odd

    def _concerned(self, claim: Claim) -> Iterator[str]:
        """Whose acceptance may change with the eldest holder of `claim`."""
        if isinstance(claim, Prefix):
            # Only the eldest of a subnet's holders can be accepted.
            eldest = (self._claims.eldest(prefix) for prefix in self._overlapping(claim))
            yield from (age[1] for age in eldest if age is not None)
        else:
            yield from (age[1] for age in self._claims.holders(claim))

    def _judge(self, key: str) -> None:
        """Accept or contest one lease by its elders."""
        lease = self._valid.get(key)
        if lease is not None and self._elder(key, lease) is not None:
            self._contested.add(key)
        else:
            self._contested.discard(key)

    def _elder(self, key: str, lease: Lease) -> Age | None:
        """An elder lease that contests this one: by its VTEP, which is MAC and PublicIP together, or by its subnet."""
        age = lease.create_revision, key
        mac, public_ip, _ = _claims_of(lease)
        for claim in (mac, public_ip):
            eldest = self._claims.eldest(claim)
            if eldest is not None and eldest != age and _claims_of(self._valid[eldest[1]])[:2] != (mac, public_ip):
                return eldest
        for subnet in self._overlapping(lease.subnet):
            eldest = self._claims.eldest(subnet)
            if eldest is not None and eldest < age:
                return eldest
        return None

    def _contest(self, key: str) -> str:
        """Why a contested lease is rejected."""
        lease = self._valid[key]
        elder = self._elder(key, lease)
        assert elder is not None, "it is contested"
        other = self._valid[elder[1]]
        mac, public_ip, _ = _claims_of(lease)
        other_mac, other_ip, other_subnet = _claims_of(other)
        if other_mac == mac and other_ip != public_ip:
            return f"VtepMAC {format_mac(mac)} has longer been {format_address(other_ip)}'s"
        if other_ip == public_ip and other_mac != mac:
            return (
                f"PublicIP {format_address(public_ip)} has longer been that of {other_subnet} with VtepMAC "
                f"{format_mac(other_mac)}"
            )
        return f"the subnet overlaps {other_subnet}, which {format_address(other_ip)} has held for longer"

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
        return self._invalid | {key: self._contest(key) for key in self._contested}

    def some_rejected(self, most: int) -> list[tuple[str, str]]:
        """Up to `most` of them, without working out the reasons of all."""
        keys = islice(chain(self._invalid, self._contested), most)
        return [(key, self._invalid[key] if key in self._invalid else self._contest(key)) for key in keys]

    @property
    def rejected_count(self) -> int:
        """How many there are, without listing them."""
        return len(self._invalid) + len(self._contested)


def _claims_of(lease: Lease) -> tuple[bytes, bytes, Prefix]:
    """What a valid lease lays claim to: MAC, underlay address, subnet. Claims of two kinds never compare equal."""
    assert lease.attrs.vtep is not None, "a lease without one is not valid"
    return lease.attrs.vtep.mac, lease.attrs.public_ip, lease.subnet


def _same_put(lease: Lease, record: Record) -> bool:
    """Whether the record is as it was when `lease` was decoded from it.

    After a restored backup another put may bear the same revision; that it also hangs on the same etcd lease, whose id
    is drawn at random, takes more than chance.
    """
    return (lease.mod_revision, lease.create_revision, lease.etcd_lease) == (
        record.mod_revision,
        record.create_revision,
        record.etcd_lease,
    )
