"""What the journal holds: records of what happened on this host and among its peers, and their form on disk.

Owns the kinds of records, the codec of one line, what a lease comes to in a record, and which record tells the
difference between two standings of a key. A line is the CRC-32 of what follows in 8 hexadecimal digits, a blank, a
JSON object with `at` (seconds since 1970) and `kind` beside the facts, and a newline: a torn or spoilt line is told by
its sum, and the lines after it are read as if it were not there.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from zlib import crc32

from overlay.model import Entry, Route
from subnet_lease.model import Lease, format_address, format_mac

MAX_LINE = 1 << 14
"""Bytes of a line: what is longer is no record."""

MAX_TEXT = 300
MAX_ITEMS = 16
"""What one fact of a record may hold: whoever can write a key in etcd could fill the journal by one line."""


class Record(NamedTuple):
    """`kind` happened at `at`, in seconds since 1970 by this host's clock. `facts` are JSON values by name."""

    at: float
    kind: str
    facts: Mapping[str, Any]


class Event(NamedTuple):
    """Something that happened, for the journal."""

    kind: str
    facts: Mapping[str, Any]


class Turns(NamedTuple):
    """How some keys stand now, for the journal: the accepted lease, why it is rejected, or None if it is gone."""

    standings: Mapping[str, Lease | str | None]


class Table(NamedTuple):
    """How all keys stand, for the journal, whose own the mapping is from then on."""

    standings: dict[str, Lease | str]


News = Event | Turns | Table
Tell = Callable[[News], None]

KINDS: Mapping[str, tuple[str, ...]] = {
    "agent": ("started", "stopped", "missed", "journal_began"),
    "peers": ("joined", "left", "changed", "taken_over", "rejected"),
    "conflicts": ("rejected", "taken_over"),
    "drift": ("drift", "firewall_altered", "notifications_lost"),
    "repairs": ("repaired", "refused"),
    "own": ("lease_acquired", "lease_published", "lease_lost", "subnet_changed", "subnet_exhausted"),
    "underlay": ("underlay_chosen", "underlay_changed", "underlay_gone", "underlay_back"),
    "config": ("config_changed", "config_gone", "config_needs_restart", "config_unusable"),
    "store": (
        "store_unreachable",
        "store_denied",
        "store_reachable",
        "store_went_back",
        "watch_interrupted",
        "started_from_cache",
    ),
}
"""Group -> kinds. A kind may be of two groups."""

LOGGED = frozenset(chosen for group in ("own", "underlay", "config", "store") for chosen in KINDS[group])
"""Kinds that are events of the log, and recorded with what the log says of them."""

HELD = "held"
"""Kind of the records of a base: how a key stood when the segment began, and since when. No event."""

BASE = "base"
"""Kind of the record that ends a base: `leases` are in it, `uncovered` had no room."""

LEASE_KINDS = frozenset({*KINDS["peers"], HELD})
"""Records with a `key` that say how it stands from then on."""


# --- one line ----------------------------------------------------------------------------------------------------


def encode(record: Record) -> bytes:
    """The record as a line. What is too long of its facts is cut."""
    facts = {name: _bounded(value) for name, value in record.facts.items()}
    body = _json({**facts, "at": round(record.at, 3), "kind": record.kind})
    if len(body) > MAX_LINE - 10:
        body = _json({"at": round(record.at, 3), "kind": record.kind, "cut": True})
    return b"%08x %s\n" % (crc32(body), body)


def decode(line: bytes) -> Record | None:
    """The record of a line; None unless it is complete and as it was written."""
    if line[8:9] != b" " or line[-1:] != b"\n":
        return None
    body = line[9:-1]
    try:
        if int(line[:8], 16) != crc32(body):
            return None
        facts = json.loads(body)
        at, kind = facts.pop("at"), facts.pop("kind")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    if type(kind) is not str or type(at) not in (int, float) or not math.isfinite(at):
        return None
    return Record(float(at), kind, facts)


def json_of(record: Record) -> str:
    """A record for programs: its facts beside `at` and `kind`."""
    return json.dumps({"at": record.at, "kind": record.kind, **record.facts})


def answer_of(records: Iterable[Record], trouble: str) -> str:
    """The agent's answer to the question `events`, as JSON: its schema is in docs/events.md."""
    told = ", ".join(map(json_of, records))
    return f'{{"events": [{told}], "failing": {json.dumps(trouble or None)}}}'


def _json(facts: Mapping[str, Any]) -> bytes:
    return _compact(facts).encode("ascii")


_compact = json.JSONEncoder(separators=(",", ":")).encode


def _bounded(value: object, depth: int = 3) -> object:
    if type(value) is str:
        return value if len(value) <= MAX_TEXT else value[:MAX_TEXT]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping) and depth:
        some = list(value.items())[:MAX_ITEMS]
        return {str(name)[:MAX_TEXT]: _bounded(item, depth - 1) for name, item in some}
    if isinstance(value, list | tuple) and depth:
        return [_bounded(item, depth - 1) for item in value[:MAX_ITEMS]]
    return str(value)[:MAX_TEXT]


# --- leases ------------------------------------------------------------------------------------------------------

Standing = Mapping[str, Any]
"""How a key stands, as facts of a record: `subnets`, `hosts` (underlay addresses), `macs`, `backend`, `mtu`, `reserved`
and `created` (etcd's revision) of an accepted lease; `reason` alone of a rejected one."""


def standing_of(lease: Lease | str) -> Standing:
    """The facts of an accepted lease, or of a rejection for this reason. What does not apply is left out."""
    if isinstance(lease, str):
        return {"reason": lease[:MAX_TEXT]}
    attrs = lease.attrs
    facts = {
        "subnets": [str(subnet) for subnet in lease.subnets],
        "hosts": [format_address(each) for each in (attrs.public_ip, attrs.public_ip6) if each],
        "macs": [format_mac(vtep.mac) for vtep in (attrs.vtep, attrs.vtep6) if vtep],
        "backend": attrs.backend_type[:MAX_TEXT],
        "mtu": attrs.mtu,
        "reserved": lease.reserved,
        "created": lease.create_revision,
    }
    return {name: value for name, value in facts.items() if value}


def turned(key: str, before: Standing | None, now: Standing | None) -> Event | None:
    """What became of the key; None if nothing that matters.

    The record has all facts that hold from now on, so that none before it is needed; `before` has those that were
    otherwise. A lease that left says what it was. Of a key longer than any lease's nothing is told.
    """
    if before == now or len(key) > MAX_TEXT:
        return None
    was_held = before is not None and "reason" not in before
    if now is None:
        return Event("left", {"key": key, **(before or {})})
    if "reason" in now:
        return Event("rejected", {"key": key, **now, **({"before": before} if was_held else {})})
    if before is None or not was_held:
        return Event("joined", {"key": key, **now, **({"before": before} if before else {})})
    differs = {
        name: before.get(name) for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    }
    theirs, ours = before.get("hosts", ()), now.get("hosts", ())
    kind = "taken_over" if theirs and ours and not set(theirs).intersection(ours) else "changed"
    return Event(kind, {"key": key, **now, "before": differs})


_OF_A_LEASE = ("subnets", "hosts", "macs", "backend", "mtu", "reserved", "created", "reason")


def standing_in(record: Record) -> tuple[str, Standing | None] | None:
    """(key, how it stands from then on) by a record; None if that says nothing of a key."""
    key = record.facts.get("key")
    if record.kind not in LEASE_KINDS or type(key) is not str:
        return None
    if record.kind == "left":
        return key, None
    facts = {name: record.facts[name] for name in _OF_A_LEASE if name in record.facts}
    return key, ({"reason": facts.get("reason", "")} if "reason" in facts else facts)


def folded(held: Iterable[Record], later: Iterable[Record]) -> Iterator[Record]:
    """The base that stands for a base and what came later: how each key stands at the end, and since when.

    `later` is read first, and of its keys one line each is in memory; of the base no more than one record.
    """
    runs: dict[str, tuple[bool, bytes]] = {}
    """By key: whether it has been one host's ever since the base, and its last line; none if it left."""
    for record in later:
        if (found := standing_in(record)) is None:
            continue
        key, standing = found
        unbroken, line = runs.get(key, (True, b""))
        former = decode(line)
        if standing is None:
            runs[key] = False, b""
        elif former is not None and _same_host(former.facts, standing):
            runs[key] = unbroken, encode(_still(former, key, standing))
        else:
            runs[key] = key not in runs, encode(_still(record, key, standing))
    for record in held:
        key = record.facts["key"]
        if key not in runs:
            yield record
            continue
        unbroken, line = runs.pop(key)
        last = decode(line)
        if last is not None:
            same = unbroken and _same_host(record.facts, last.facts)
            yield _still(record, key, last.facts) if same else last
    for _, line in runs.values():
        if (last := decode(line)) is not None:
            yield last


def _same_host(before: Standing, now: Standing) -> bool:
    """Whether one host has the key in both: a change of its MTU does not make it another's."""
    return before.get("hosts") == now.get("hosts")


def _still(first: Record, key: str, standing: Standing) -> Record:
    """The key stands so, and that it is this host's began with `first`."""
    facts = {name: standing[name] for name in _OF_A_LEASE if name in standing}
    doubt = {name: first.facts[name] for name in ("found", "away_since") if name in first.facts}
    return Record(first.at, HELD, {"key": key, **facts, **doubt})


def differences(held: Iterable[Record], now: Mapping[str, Lease | str], *, complete: bool) -> Iterator[Event]:
    """What became of the keys between a base and `now`. Where the base is not `complete`, what it lacks is as found."""
    unseen = set(now)
    for record in held:
        found = standing_in(record)
        if found is None:
            continue
        key, before = found
        unseen.discard(key)
        lease = now.get(key)
        event = turned(key, before, None if lease is None else standing_of(lease))
        if event is not None:
            yield event
    for key in unseen:
        event = turned(key, None, standing_of(now[key]))
        if event is not None:
            yield event if complete else Event(HELD, {**event.facts, "found": True})


def fingerprint(standings: Mapping[str, Lease | str]) -> str:
    """Tells apart two tables of one cluster, or of a restored one, at a twentieth of the cost of `differences`.

    Whatever is put in etcd gets a revision that is its own.
    """
    sum32 = 0
    for key in sorted(standings):
        lease = standings[key]
        told = lease if isinstance(lease, str) else (*lease[3:], lease.attrs.public_ip)
        sum32 = crc32(f"{key} {told}\n".encode("utf-8", "backslashreplace"), sum32)
    return f"{len(standings)}-{sum32:08x}"


# --- who did it --------------------------------------------------------------------------------------------------

DAEMONS = {
    9: "ra", 10: "mrt", 11: "zebra", 12: "bird", 13: "dnrouted", 14: "xorp", 15: "ntk", 16: "dhcp", 17: "mrouted",
    18: "keepalived", 42: "babel", 84: "ovn", 99: "openr", 186: "bgp", 187: "isis", 188: "ospf", 189: "rip",
    192: "eigrp",
}  # fmt: skip
"""rtm_protocol of programs (source: rtnetlink.h, iproute2's rt_protos). 3 and 4 are anybody's."""


def author(found: Entry | None, by: int | str | None) -> Mapping[str, Any]:
    """Who put `found` where an entry of ours was: the facts `by` and, if the kernel told, `port` of the socket.

    `by` as in `Seen`. Of routes the mark that routing daemons leave tells more.
    """
    port = {"port": by} if isinstance(by, int) else {}
    if isinstance(by, str):
        return {"by": by}
    daemon = DAEMONS.get(found.protocol) if isinstance(found, Route) else None
    return {"by": f"a program with routes of protocol {daemon}" if daemon else "unknown", **port}
