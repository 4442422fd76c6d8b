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

from overlay.lab import table
from subnet_lease.model import (
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    decode_attrs,
    format_address,
    format_mac,
    parse_subnet_key,
)
from subnet_lease.store import Snapshot, Store
from subnet_lease.table import NOBODY, LeaseTable

MAX_NAME = 40
"""Columns that a name may take."""

CALLS_AT_ONCE = 8
"""etcd tells what is left of one lease per call: thousands of them one by one would wait for the network only."""


@dataclass(frozen=True, slots=True)
class Row:
    """One key below `subnets/`. `subnet` is None if the key names none, `attrs` if the value cannot be read.

    `rejected` is why agents do not use it, None if they do.
    """

    key: str
    subnet: Prefix | None
    subnet6: Prefix | None
    attrs: LeaseAttrs | None
    etcd_lease: int
    create_revision: int
    mod_revision: int
    rejected: str | None


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
    return sorted(rows, key=lambda row: (row.subnet is None, row.subnet or (), row.key))


def times_left(store: Store, rows: Sequence[Row]) -> dict[int, int]:
    """Seconds that each etcd lease of the rows still has: a call for each. StoreError."""
    etcd_leases = list(dict.fromkeys(row.etcd_lease for row in rows if row.etcd_lease))
    with ThreadPoolExecutor(CALLS_AT_ONCE, "ttl") as pool:
        return dict(zip(etcd_leases, pool.map(store.time_left, etcd_leases), strict=True))


# --- for programs ------------------------------------------------------------------------------------------------


def as_json(network: Prefix, revision: int, rows: Sequence[Row], ttls: Mapping[int, int]) -> str:
    """The schema of docs/reservations.md, on one line. Keys may be added to it; none changes its meaning."""
    leases = [_object(row, ttls) for row in rows]
    return json.dumps({"network": str(network), "revision": revision, "leases": leases})


def _object(row: Row, ttls: Mapping[int, int]) -> dict[str, Any]:
    attrs = row.attrs
    return {
        "key": row.key,
        "subnet": str(row.subnet) if row.subnet else None,
        "ipv6_subnet": str(row.subnet6) if row.subnet6 else None,
        "node_name": _node_name(attrs),
        "public_ip": format_address(attrs.public_ip) if attrs else None,
        "backend_type": attrs.backend_type if attrs else None,
        "vtep_mac": format_mac(attrs.vtep.mac) if attrs and attrs.vtep else None,
        "reserved": row.etcd_lease == 0,
        "ttl_s": ttls.get(row.etcd_lease),
        "create_revision": row.create_revision,
        "mod_revision": row.mod_revision,
        "rejected": row.rejected,
    }


# --- for people --------------------------------------------------------------------------------------------------


def as_text(network: Prefix, rows: Sequence[Row], ttls: Mapping[int, int] | None, columns: int | None = None) -> str:
    """A table, a summary, and why rejected ones are. `ttls` None if they are not wanted.

    `columns` is the width of the terminal: where they are few the revision is left out, then names are shortened.
    None for all that there is.
    """
    if not rows:
        return f"No leases in {network}."
    shown = [row for row in rows if row.subnet is not None]
    heads, cells = _columns(shown, ttls)
    text = table(heads, list(zip(*cells, strict=True)))
    if columns is not None and _width(text) > columns:
        heads, cells = heads[:-1], cells[:-1]
        text = table(heads, list(zip(*cells, strict=True)))
    if columns is not None and _width(text) > columns:
        host = heads.index("HOST")
        room = max(8, max(map(len, cells[host])) - (_width(text) - columns))
        cells[host] = [_shortened(name, room) for name in cells[host]]
        text = table(heads, list(zip(*cells, strict=True)))
    reserved = sum(not row.etcd_lease for row in rows)
    rejected = [row for row in rows if row.rejected]
    marked = ", marked with !" if rejected else ""
    lines = [text, "", f"{len(rows)} in {network}, {reserved} reserved, {len(rejected)} rejected by agents{marked}"]
    for row in rejected:
        reason = f"  {_subject(row)}: {_escaped(row.rejected or '')}"
        lines.append(fill(reason, columns, subsequent_indent="    ") if columns else reason)
    return "\n".join(lines)


def _columns(rows: Sequence[Row], ttls: Mapping[int, int] | None) -> tuple[list[str], list[list[str]]]:
    """Heads, and the cells of each column. The last is the one that can best be spared."""
    columns = {
        "!": ["!" if row.rejected else "" for row in rows],
        "SUBNET": [str(row.subnet) for row in rows],
        "HOST": [_shortened(_plain(_node_name(row.attrs) or "-"), MAX_NAME) for row in rows],
        "PUBLIC IP": [format_address(row.attrs.public_ip) if row.attrs else "-" for row in rows],
        "VTEP MAC": [format_mac(row.attrs.vtep.mac) if row.attrs and row.attrs.vtep else "-" for row in rows],
        "KIND" if ttls is None else "TTL LEFT": [_time(row, ttls) for row in rows],
        "REVISION": [str(row.create_revision) for row in rows],
    }
    if not any(columns["!"]):
        del columns["!"]
    return list(columns), list(columns.values())


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
    return str(row.subnet) if row.subnet else f"key {_shortened(_plain(row.key), MAX_NAME)}"


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 2] + ".."


def holder(attrs: LeaseAttrs) -> str:
    """A host, for a message: its PublicIP, and its name if it has given one."""
    name = _node_name(attrs)
    return format_address(attrs.public_ip) + (f" ({_shortened(_plain(name), MAX_NAME)})" if name else "")


def _node_name(attrs: LeaseAttrs | None) -> str | None:
    """What the host calls itself; None if it does not, as flanneld never does."""
    name = attrs.extra.get("NodeName") if attrs else None
    return name if type(name) is str and name else None


def _plain(text: str) -> str:
    """The text itself if it is printable ASCII, else quoted and escaped."""
    return text if text.isascii() and text.isprintable() else ascii(text)


def _escaped(reason: str) -> str:
    """A reason, in which the odd characters of a value are quoted and escaped already, but for foreign letters."""
    return reason.encode("ascii", "backslashreplace").decode()
