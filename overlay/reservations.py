"""`overlay-agent reserve` and `unreserve`: a subnet that belongs to one host for as long as the operator wants.

A reservation is a lease key without an etcd lease, as in flannel: the host with its PublicIP takes the subnets, and no
time takes them away. One that is made before its host has come must already have a well-formed value, for flanneld
drops all its peers over a value that it cannot read. It carries a MAC of our making, which the host's agent adopts on
its first start, so that its peers have the right entries even before.

Every write is a transaction on the revision that was looked at, and a few are tried before giving up. After each the
store is looked at again: hosts write keys of their own meanwhile.
"""

from collections.abc import Iterable, Iterator, Sequence

from overlay.device import derived_mac
from overlay.listing import holder
from overlay.options import argument
from subnet_lease.model import (
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    SubnetRange,
    Vtep,
    decode_attrs,
    encode_attrs,
    format_address,
    format_mac,
    format_subnets,
    pack_address,
    parse_subnet_key,
    subnet_key,
)
from subnet_lease.store import Record, Store
from subnet_lease.table import possible_host

ATTEMPTS = 5

LEASE_TTL_S = 86400
"""What a reservation that is taken back gets, as any new lease does (flannel's subnetTTL)."""

_MACS = 8
"""MACs that a reservation may get: the first that no lease has."""


class ReservationRefused(Exception):
    """It cannot be reserved, or taken back; the text says why and how to mend it."""


def _subnets(text: str) -> tuple[Prefix, ...]:
    subnets = tuple(sorted(map(Prefix.parse, text.split(",")), key=lambda subnet: len(subnet.base)))
    if len({len(subnet.base) for subnet in subnets}) < len(subnets):
        raise ValueError(f"{text[:64]!r} has several subnets of one address family")
    return subnets


subnets_argument = argument(_subnets)
"""SUBNET of a command line, `10.5.34.0/24` or `10.5.34.0/24,fd00:34::/64`: one of each address family, IPv4 first."""

address_argument = argument(pack_address)
"""A packed address of a command line."""


# --- reserve -----------------------------------------------------------------------------------------------------


def reserve(store: Store, config: NetworkConfig, subnets: Sequence[Prefix], address: bytes) -> str:
    """Reserve `subnets` for the host of `address`; what was done, for people. StoreError, ReservationRefused.

    `address` is of the underlay, of either family. What the host leases already becomes its reservation, with the value
    that it has.
    """
    check(config, subnets, address)
    key, text, host = _key(subnets), format_subnets(subnets), format_address(address)
    done = f"{text} {_is(subnets)} reserved for {host} already"
    created = 0
    for _ in range(ATTEMPTS):
        records = store.snapshot().records
        try:
            own = own_record(records, subnets, address)
        except ReservationRefused:
            # The host took something else after the store was looked at first: it keeps that, unless it has seen the
            # reservation meanwhile and is about to take it.
            if created and not store.delete(key, created):
                created = 0
                continue
            raise
        if own is None:
            created = store.create(key, reserved_value(config, subnets, address, records), 0)
            done = f"{text} {_is(subnets)} reserved for {host}"
        elif own.etcd_lease:
            # Its etcd lease is left to end by itself: who knows what else hangs on it.
            store.replace(key, own.value, 0, own.mod_revision)
            done = f"{text}, which {host} leased, {_is(subnets)} reserved for it from now on"
        else:
            return done
    raise ReservationRefused("its key keeps changing; run the command again")


def check(config: NetworkConfig, subnets: Sequence[Prefix], address: bytes) -> None:
    """ReservationRefused unless the agents, and flanneld, would use such a reservation."""
    ranges = {len(available.network.base): available for available in config.ranges}
    if {len(subnet.base) for subnet in subnets} != ranges.keys():
        # flanneld deletes any other when its host starts (source: isSubnetConfigCompat, isIPv6SubnetConfigCompat).
        example = ",".join(str(Prefix(each.first, each.length)) for each in config.ranges)
        raise ReservationRefused(f"hosts of this network have subnets as {example}; give such a one")
    for subnet in subnets:
        _check_range(ranges[len(subnet.base)], subnet)
    host = format_address(address)
    for block in config.blocks:
        if block.holds(address):
            raise ReservationRefused(
                f"--public-ip {host} lies inside the overlay, {block}; give the host's address on the underlay"
            )
    if not possible_host(address):
        raise ReservationRefused(f"--public-ip {host} cannot be a host's address")


def _check_range(available: SubnetRange, subnet: Prefix) -> None:
    if subnet.length != available.length:
        raise ReservationRefused(f"hosts of this network have a /{available.length} each; give one of that length")
    if not available.first <= subnet.base <= available.last:
        low, high = format_address(available.first), format_address(available.last)
        names = ("SubnetMin", "SubnetMax") if len(subnet.base) == 4 else ("IPv6SubnetMin", "IPv6SubnetMax")
        raise ReservationRefused(
            f"{subnet} does not lie between {names[0]} {low} and {names[1]} {high}; choose another, or widen these"
        )


def own_record(records: Iterable[Record], subnets: Sequence[Prefix], address: bytes) -> Record | None:
    """The record that `subnets` have if it is the host's; None if they are free. ReservationRefused if others are in
    the way."""
    own = None
    host, text = format_address(address), format_address(address).encode()
    for record in records:
        try:
            taken = tuple(filter(None, parse_subnet_key(record.key)))
        except LeaseInvalid:
            continue
        overlaps = any(one.overlaps(other) for one in taken for other in subnets)
        if not overlaps and text not in record.value:
            continue  # spares decoding thousands of others
        kind = "leased" if record.etcd_lease else "reserved"
        attrs = _attrs(record)
        if attrs is not None and address in (attrs.public_ip, attrs.public_ip6):
            if record.key == _key(subnets):
                own = record
                continue
            raise ReservationRefused(
                f"{host} has {format_subnets(taken)} {kind} already; {_way_out(record, taken, same_host=True)}"
            )
        if overlaps:
            by = (
                f" {'by' if record.etcd_lease else 'for'} {holder(attrs)}"
                if attrs
                else ", with a value that cannot be read"
            )
            raise ReservationRefused(
                f"{format_subnets(taken)} {_is(taken)} {kind}{by}; {_way_out(record, taken, same_host=False)}"
            )
    return own


def _key(subnets: Sequence[Prefix]) -> str:
    by_family = {len(subnet.base): subnet for subnet in subnets}
    return subnet_key(by_family.get(4), by_family.get(16))


def _is(subnets: Sequence[Prefix]) -> str:
    return "is" if len(subnets) == 1 else "are"


def _way_out(record: Record, taken: Sequence[Prefix], *, same_host: bool) -> str:
    if not record.etcd_lease:
        return f"take that back first: overlay-agent unreserve {','.join(map(str, taken))}"
    if same_host:
        return "reserve that one, or stop its agent and give it back there: overlay-agent cleanup --release"
    return "choose another, or stop that host's agent and give it back there: overlay-agent cleanup --release"


def reserved_value(
    config: NetworkConfig, subnets: Sequence[Prefix], address: bytes, records: Sequence[Record] = ()
) -> bytes:
    """What a reservation says before its host has come: the same at each call, with a MAC that none of `records` has.

    Backends without a tunnel have no VTEP.
    """
    vtep = None
    if config.backend.type == "vxlan":
        for mac in _macs(subnets, address, config.backend.vni):
            text = format_mac(mac).encode()
            if not any(text in record.value.lower() for record in records):
                vtep = Vtep(config.backend.vni, mac)
                break
        else:
            raise ReservationRefused("other leases have all the MACs that it could get")
    attrs = LeaseAttrs(None, config.backend.type, None)
    if len(address) == 4:
        return encode_attrs(attrs._replace(public_ip=address, vtep=vtep))
    return encode_attrs(attrs._replace(public_ip6=address, vtep6=vtep))


def _macs(subnets: Sequence[Prefix], address: bytes, vni: int) -> Iterator[bytes]:
    for number in range(_MACS):
        yield derived_mac("reservation", ",".join(map(str, subnets)), format_address(address), str(vni), str(number))


# --- unreserve ---------------------------------------------------------------------------------------------------


def unreserve(store: Store, subnets: Sequence[Prefix]) -> str:
    """Let time have `subnets` again; what was done, for people. StoreError, ReservationRefused.

    One of the subnets is enough to name a host's. What no host has taken is deleted. Else the key stays as it is and
    gets an etcd lease: peers see no change, the host's agent renews that lease, and without one it ends.
    """
    for _ in range(ATTEMPTS):
        record = _record_of(store.snapshot().records, subnets)
        if record is None:
            return f"{format_subnets(subnets)} {_is(subnets)} neither reserved nor leased"
        held = tuple(filter(None, parse_subnet_key(record.key)))
        text, verb = format_subnets(held), _is(held)
        attrs = _attrs(record)
        if record.etcd_lease:
            by = f" by {holder(attrs)}" if attrs else ""
            return f"{text} {verb} leased{by}, not reserved: the lease ends by itself unless its host renews it"
        if attrs is None or _untouched(record, held, attrs):
            if store.delete(record.key, record.mod_revision):
                why = f"{holder(attrs)} had not come for it" if attrs else "its value was unreadable"
                return f"{text} {verb} free: {why}"
            continue
        etcd_lease = store.grant(LEASE_TTL_S)
        if store.replace(record.key, record.value, etcd_lease, record.mod_revision):
            return (
                f"{text} {verb} leased by {holder(attrs)} from now on: the lease ends in {LEASE_TTL_S // 3600} h "
                "unless its host renews it"
            )
        store.revoke(etcd_lease)
    raise ReservationRefused("its key keeps changing; run the command again")


def _untouched(record: Record, subnets: Sequence[Prefix], attrs: LeaseAttrs) -> bool:
    """Whether the value is still the one that `reserve` wrote: a host that takes it writes its own facts."""
    vtep, address = attrs.vtep or attrs.vtep6, attrs.underlay_ip
    return (
        record.mod_revision == record.create_revision
        and not (attrs.extra or attrs.mtu or attrs.node_name)
        and (vtep is None or (address is not None and vtep.mac in _macs(subnets, address, vtep.vni)))
    )


def _record_of(records: Iterable[Record], subnets: Sequence[Prefix]) -> Record | None:
    for record in records:
        try:
            if set(subnets) <= set(parse_subnet_key(record.key)):
                return record
        except LeaseInvalid:
            continue
    return None


def _attrs(record: Record) -> LeaseAttrs | None:
    try:
        return decode_attrs(record.value)
    except LeaseInvalid:
        return None
