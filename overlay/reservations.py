"""`overlay-agent reserve` and `unreserve`: a subnet that belongs to one host for as long as the operator wants.

A reservation is a lease key without an etcd lease, as in flannel: the host with its PublicIP takes the subnet, and no
time takes it away. One that is made before its host has come must already have a well-formed value, for flanneld drops
all its peers over a value that it cannot read. It carries a MAC of our making, which the host's agent adopts on its
first start, so that its peers have the right entries even before.

Every write is a transaction on the revision that was looked at, and a few are tried before giving up. After each the
store is looked at again: hosts write keys of their own meanwhile.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence

from overlay.device import derived_mac
from overlay.listing import holder
from subnet_lease.model import (
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    Vtep,
    decode_attrs,
    encode_attrs,
    format_address,
    format_mac,
    pack_address,
    parse_subnet_key,
    subnet_key,
)
from subnet_lease.store import Record, Store
from subnet_lease.table import UNROUTABLE

ATTEMPTS = 5

LEASE_TTL_S = 86400
"""What a reservation that is taken back gets, as any new lease does (flannel's subnetTTL)."""

_MACS = 8
"""MACs that a reservation may get: the first that no lease has."""


class ReservationRefused(Exception):
    """It cannot be reserved, or taken back; the text says why and how to mend it."""


def subnet_argument(text: str) -> Prefix:
    """SUBNET of a command line, for argparse."""
    try:
        subnet = Prefix.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len(subnet.base) != 4:
        raise argparse.ArgumentTypeError(f"{subnet} is not an IPv4 subnet")
    return subnet


def address_argument(text: str) -> bytes:
    """A packed IPv4 address of a command line, for argparse."""
    try:
        packed = pack_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if len(packed) != 4:
        raise argparse.ArgumentTypeError(f"{text} is not an IPv4 address")
    return packed


# --- reserve -----------------------------------------------------------------------------------------------------


def reserve(store: Store, config: NetworkConfig, subnet: Prefix, public_ip: bytes) -> str:
    """Reserve `subnet` for the host of `public_ip`; what was done, for people. StoreError, ReservationRefused.

    What the host leases already becomes its reservation, with the value that it has.
    """
    check(config, subnet, public_ip)
    key, host = subnet_key(subnet), format_address(public_ip)
    done = f"{subnet} is reserved for {host} already"
    created = 0
    for _ in range(ATTEMPTS):
        records = store.snapshot().records
        try:
            own = own_record(records, subnet, public_ip)
        except ReservationRefused:
            # The host took something else after the store was looked at first: it keeps that.
            if created:
                store.delete(key, created)
            raise
        if own is None:
            created = store.create(key, reserved_value(config, subnet, public_ip, records), 0)
            done = f"{subnet} is reserved for {host}"
        elif own.etcd_lease:
            # Its etcd lease is left to end by itself: who knows what else hangs on it.
            store.replace(key, own.value, 0, own.mod_revision)
            done = f"{subnet}, which {host} leased, is reserved for it from now on"
        else:
            return done
    raise ReservationRefused("its key keeps changing; run the command again")


def check(config: NetworkConfig, subnet: Prefix, public_ip: bytes) -> None:
    """ReservationRefused unless the agents, and flanneld, would use such a reservation."""
    low, high = format_address(config.subnet_min), format_address(config.subnet_max)
    if subnet.length != config.subnet_len:
        raise ReservationRefused(f"hosts of this network have a /{config.subnet_len} each; give one of that length")
    if not config.subnet_min <= subnet.base <= config.subnet_max:
        # flanneld deletes such a reservation when its host starts (source: isSubnetConfigCompat).
        raise ReservationRefused(
            f"it does not lie between SubnetMin {low} and SubnetMax {high}; choose another, or widen these"
        )
    if config.block.holds(public_ip):
        raise ReservationRefused(
            f"--public-ip {format_address(public_ip)} lies inside the overlay, {config.block}; "
            "give the host's address on the underlay"
        )
    if public_ip[0] in UNROUTABLE:
        raise ReservationRefused(f"--public-ip {format_address(public_ip)} cannot be a host's address")


def own_record(records: Iterable[Record], subnet: Prefix, public_ip: bytes) -> Record | None:
    """The record that `subnet` has if it is the host's; None if it is free. ReservationRefused if either has others."""
    own = None
    host, text = format_address(public_ip), format_address(public_ip).encode()
    for record in records:
        try:
            taken = parse_subnet_key(record.key)[0]
        except LeaseInvalid:
            continue
        if not taken.overlaps(subnet) and text not in record.value:
            continue  # spares decoding thousands of others
        kind = "leased" if record.etcd_lease else "reserved"
        attrs = _attrs(record)
        if attrs is not None and attrs.public_ip == public_ip:
            if record.key == subnet_key(subnet):
                own = record
                continue
            raise ReservationRefused(f"{host} has {taken} {kind} already; {_way_out(record, taken, same_host=True)}")
        if taken.overlaps(subnet):
            by = (
                f" {'by' if record.etcd_lease else 'for'} {holder(attrs)}"
                if attrs
                else ", with a value that cannot be read"
            )
            raise ReservationRefused(f"{taken} is {kind}{by}; {_way_out(record, taken, same_host=False)}")
    return own


def _way_out(record: Record, taken: Prefix, *, same_host: bool) -> str:
    if not record.etcd_lease:
        return f"take that back first: overlay-agent unreserve {taken}"
    if same_host:
        return "reserve that one, or stop its agent and give it back there: overlay-agent cleanup --release"
    return "choose another, or stop that host's agent and give it back there: overlay-agent cleanup --release"


def reserved_value(config: NetworkConfig, subnet: Prefix, public_ip: bytes, records: Sequence[Record] = ()) -> bytes:
    """What a reservation says before its host has come: the same at each call, with a MAC that none of `records` has.

    Backends without a tunnel have no BackendData.
    """
    vtep = None
    if config.backend.type == "vxlan":
        for mac in _macs(subnet, public_ip, config.backend.vni):
            text = format_mac(mac).encode()
            if not any(text in record.value.lower() for record in records):
                vtep = Vtep(config.backend.vni, mac)
                break
        else:
            raise ReservationRefused("other leases have all the MACs that it could get")
    return encode_attrs(LeaseAttrs(public_ip, config.backend.type, vtep))


def _macs(subnet: Prefix, public_ip: bytes, vni: int) -> Iterator[bytes]:
    for number in range(_MACS):
        yield derived_mac("reservation", str(subnet), format_address(public_ip), str(vni), str(number))


# --- unreserve ---------------------------------------------------------------------------------------------------


def unreserve(store: Store, subnet: Prefix) -> str:
    """Let time have `subnet` again; what was done, for people. StoreError, ReservationRefused.

    What no host has taken is deleted. Else the key stays as it is and gets an etcd lease: peers see no change, the
    host's agent renews that lease, and without one it ends.
    """
    for _ in range(ATTEMPTS):
        record = _record_of(store.snapshot().records, subnet)
        if record is None:
            return f"{subnet} is neither reserved nor leased"
        attrs = _attrs(record)
        if record.etcd_lease:
            by = f" by {holder(attrs)}" if attrs else ""
            return f"{subnet} is leased{by}, not reserved: it ends by itself unless its host renews it"
        if attrs is None or _untouched(record, subnet, attrs):
            if store.delete(record.key, record.mod_revision):
                why = f"{format_address(attrs.public_ip)} had not come for it" if attrs else "its value was unreadable"
                return f"{subnet} is free: {why}"
            continue
        etcd_lease = store.grant(LEASE_TTL_S)
        if store.replace(record.key, record.value, etcd_lease, record.mod_revision):
            return (
                f"{subnet} is leased by {holder(attrs)} from now on: it ends in {LEASE_TTL_S // 3600} h "
                "unless its host renews it"
            )
        store.revoke(etcd_lease)
    raise ReservationRefused("its key keeps changing; run the command again")


def _untouched(record: Record, subnet: Prefix, attrs: LeaseAttrs) -> bool:
    """Whether the value is still the one that `reserve` wrote: a host that takes it writes its own facts."""
    vtep = attrs.vtep
    return (
        record.mod_revision == record.create_revision
        and not attrs.extra
        and (vtep is None or vtep.mac in _macs(subnet, attrs.public_ip, vtep.vni))
    )


def _record_of(records: Iterable[Record], subnet: Prefix) -> Record | None:
    for record in records:
        try:
            if parse_subnet_key(record.key)[0] == subnet:
                return record
        except LeaseInvalid:
            continue
    return None


def _attrs(record: Record) -> LeaseAttrs | None:
    try:
        return decode_attrs(record.value)
    except LeaseInvalid:
        return None
