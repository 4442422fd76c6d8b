"""`overlay-agent leases`: the leases and reservations of the cluster, for people and for programs.

Owns the rows, their JSON and their layout. What agents make of each is told by the same table that they decide with,
as a host sees it that is in nobody's way.

Nothing from etcd reaches a terminal but printable ASCII: whoever can write a key could have it do things.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from textwrap import fill
from typing import Any

from overlay.text import plain, shortened, table
from subnet_lease.model import (
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    decode_attrs,
    format_address,
    format_mac,
    format_subnets,
    parse_subnet_key,
)
from subnet_lease.store import Snapshot, Store
from subnet_lease.table import NOBODY, LeaseTable, Reason

MAX_NAME = 40
"""Columns that a name may take."""

CALLS_AT_ONCE = 8
"""etcd tells what is left of one lease per call: thousands of them one by one would wait for the network only."""


@dataclass(frozen=True, slots=True)
class Row:
    """One key below `subnets/`. Both subnets are None if the key names none, `attrs` if the value cannot be read.

    `rejected` is why agents do not use it, None if they do.
    """

    key: str
    subnet: Prefix | None
    subnet6: Prefix | None
    attrs: LeaseAttrs | None
    etcd_lease: int
    create_revision: int
    mod_revision: int
    rejected: Reason | None

    @property
    def subnets(self) -> tuple[Prefix, ...]:
        """Those that there are, IPv4 first."""
        return tuple(subnet for subnet in (self.subnet, self.subnet6) if subnet is not None)


def rows_of(config: NetworkConfig, snapshot: Snapshot) -> list[Row]:
    """All keys by address, those that name no subnet last."""
    judge = LeaseTable(config, NOBODY)
    judge.replace(snapshot)
    rejected = judge.rejected
    rows = []
    for record in snapshot.records:
        subnet = subnet6 = attrs = None
        try:
            subnet, subnet6 = parse_subnet_key(record.key)
            attrs = decode_attrs(record.value)
        except LeaseInvalid:
            pass  # The table says why.
        facts = record.etcd_lease, record.create_revision, record.mod_revision, rejected.get(record.key)
        rows.append(Row(record.key, subnet, subnet6, attrs, *facts))
    return sorted(rows, key=lambda row: (not row.subnets, row.subnet is None, row.subnets, row.key))


def times_left(store: Store, rows: Sequence[Row]) -> dict[int, int]:
    """Seconds that each etcd lease of the rows still has: a call for each. StoreError."""
    etcd_leases = list(dict.fromkeys(row.etcd_lease for row in rows if row.etcd_lease))
    with ThreadPoolExecutor(CALLS_AT_ONCE, "ttl") as pool:
        return dict(zip(etcd_leases, pool.map(store.time_left, etcd_leases), strict=True))


# --- for programs ------------------------------------------------------------------------------------------------


def as_json(networks: Sequence[Prefix], revision: int, rows: Sequence[Row], ttls: Mapping[int, int]) -> str:
    """The schema of docs/reservations.md, on one line. Keys may be added to it; none changes its meaning."""
    by_family = {len(network.base): str(network) for network in networks}
    leases = [_object(row, ttls) for row in rows]
    head = {"network": by_family.get(4), "ipv6_network": by_family.get(16), "revision": revision}
    return json.dumps({**head, "leases": leases})


def _object(row: Row, ttls: Mapping[int, int]) -> dict[str, Any]:
    attrs = row.attrs or _UNREADABLE
    return {
        "key": row.key,
        "subnet": str(row.subnet) if row.subnet else None,
        "ipv6_subnet": str(row.subnet6) if row.subnet6 else None,
        "node_name": attrs.node_name or None,
        "public_ip": format_address(attrs.public_ip) if attrs.public_ip else None,
        "public_ipv6": format_address(attrs.public_ip6) if attrs.public_ip6 else None,
        "backend_type": attrs.backend_type if row.attrs else None,
        "vtep_mac": format_mac(attrs.vtep.mac) if attrs.vtep else None,
        "vtep_mac_ipv6": format_mac(attrs.vtep6.mac) if attrs.vtep6 else None,
        "mtu": attrs.mtu or None,
        "reserved": row.etcd_lease == 0,
        "ttl_s": ttls.get(row.etcd_lease),
        "create_revision": row.create_revision,
        "mod_revision": row.mod_revision,
        "rejected": row.rejected,
    }


_UNREADABLE = LeaseAttrs(None, "", None)


# --- for people --------------------------------------------------------------------------------------------------


def as_text(
    networks: Sequence[Prefix], rows: Sequence[Row], ttls: Mapping[int, int] | None, columns: int | None = None
) -> str:
    """A table, a summary, and why rejected ones are. `ttls` None if they are not wanted.

    What no row has takes no column. `columns` is the width of the terminal: where they are few, columns that can be
    spared are left out, then names are shortened. None for all that there is.
    """
    if not rows:
        return f"No leases in {format_subnets(networks)}."
    cells = _columns([row for row in rows if row.subnets], ttls)
    spared = [head for head in _SPARED if head in cells]
    while columns is not None and _width(_table(cells)) > columns and spared:
        del cells[spared.pop(0)]
    if columns is not None and (excess := _width(_table(cells)) - columns) > 0:
        room = max(8, max(map(len, cells["HOST"])) - excess)
        cells["HOST"] = [shortened(name, room) for name in cells["HOST"]]
    reserved = sum(not row.etcd_lease for row in rows)
    rejected = [row for row in rows if row.rejected]
    marked = ", marked with !" if rejected else ""
    networks_text = format_subnets(networks)
    lines = [
        *(_table(cells), ""),
        f"{len(rows)} in {networks_text}, {reserved} reserved, {len(rejected)} rejected by agents{marked}",
    ]
    for row in rejected:
        reason = f"  {_subject(row)}: {_escaped(row.rejected or '')}"
        lines.append(fill(reason, columns, subsequent_indent="    ") if columns else reason)
    return "\n".join(lines)


_SPARED = "REVISION", "IPV6 VTEP MAC", "PUBLIC IPV6"
"""Columns that are left out where there is no room, the first first."""


def _columns(rows: Sequence[Row], ttls: Mapping[int, int] | None) -> dict[str, list[str]]:
    """The cells of each column by its head."""
    columns = {
        "!": ["!" if row.rejected else "" for row in rows],
        "SUBNET": [_cell(row.subnet) for row in rows],
        "IPV6 SUBNET": [_cell(row.subnet6) for row in rows],
        "HOST": [shortened(plain((row.attrs.node_name if row.attrs else "") or "-"), MAX_NAME) for row in rows],
    }
    told = [row.attrs or _UNREADABLE for row in rows]
    columns["PUBLIC IP"] = [format_address(attrs.public_ip) if attrs.public_ip else "-" for attrs in told]
    columns["PUBLIC IPV6"] = [format_address(attrs.public_ip6) if attrs.public_ip6 else "-" for attrs in told]
    columns["VTEP MAC"] = [format_mac(attrs.vtep.mac) if attrs.vtep else "-" for attrs in told]
    columns["IPV6 VTEP MAC"] = [format_mac(attrs.vtep6.mac) if attrs.vtep6 else "-" for attrs in told]
    columns["KIND" if ttls is None else "TTL LEFT"] = [_time(row, ttls) for row in rows]
    columns["REVISION"] = [str(row.create_revision) for row in rows]
    optional = {"!": "", "IPV6 SUBNET": "-", "PUBLIC IPV6": "-", "IPV6 VTEP MAC": "-"}
    if any(row.subnet6 for row in rows):
        optional["SUBNET"] = "-"
    if any(attrs.public_ip6 for attrs in told):
        optional |= {"PUBLIC IP": "-", "VTEP MAC": "-"}
    for head, nothing in optional.items():
        if set(columns[head]) <= {nothing}:
            del columns[head]
    return columns


def _cell(subnet: Prefix | None) -> str:
    return "-" if subnet is None else str(subnet)


def _table(columns: Mapping[str, list[str]]) -> str:
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def _time(row: Row, ttls: Mapping[int, int] | None) -> str:
    if not row.etcd_lease:
        return "reserved"
    if ttls is None:
        return "leased"
    hours, rest = divmod(ttls[row.etcd_lease], 3600)
    minutes, seconds = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _subject(row: Row) -> str:
    return format_subnets(row.subnets) if row.subnets else f"key {shortened(plain(row.key), MAX_NAME)}"


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def holder(attrs: LeaseAttrs) -> str:
    """A host, for a message: its underlay address, and its name if it has given one."""
    name, address = attrs.node_name, attrs.underlay_ip
    called = format_address(address) if address else "a host without an address"
    return called + (f" ({shortened(plain(name), MAX_NAME)})" if name else "")


def _escaped(reason: str) -> str:
    """A reason, in which the odd characters of a value are quoted and escaped already, but for foreign letters."""
    return reason.encode("ascii", "backslashreplace").decode()
