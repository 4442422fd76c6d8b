"""The cluster as one agent knows it, for the web page: facts -> one JSON document, small at any size of the cluster.

Owns the document (the schema of docs/page.md), what counts as healthy, the order of hosts (worst first, then by
subnet), and the search. The page asks for a part of the hosts; of all others it gets how many there are of each kind.
What was not measured is null, and so is what is not known. Texts of others go in as they came, but cut: who shows
them must take them as text.

Costs are some microseconds for each host, and nothing is kept.
"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from subnet_lease.model import Lease, Prefix, format_address, format_mac, pack_address, pack_mac

SCHEMA = 1
"""Version of the document."""

DOWN, DEGRADED, UNKNOWN, HEALTHY = "down", "degraded", "unknown", "healthy"

ORDER = DOWN, DEGRADED, UNKNOWN, HEALTHY
"""Worst first. Unknown: all entries stand, and nothing was measured."""

MOST_HOSTS = 200
"""How many hosts one document lists."""

MOST_PAIRED = 40
"""Between how many of the listed hosts the paths are told."""

MOST_PATHS = 32
"""How many paths from a host, and to it, are told of the one that is looked at."""

MOST_EVENTS = 50
MOST_FACTS = 16
MOST_MISSING = 8

MOST_TEXT = 200
"""Characters of a text that may be anybody's."""

FRESH_S = 3600.0
"""For how long what was measured or reported counts; older, it is shown and changes no colour. A host measures a few
paths at a time: among a thousand hosts it has been everywhere by then, and failed paths are measured all the time."""


class Path(NamedTuple):
    """What was measured of the way from one host to another, `age_s` seconds ago.

    `reachable` whether anything came back; `rtt_ms` the usual round trip; `loss` from 0 to 1; `mtu` the largest inner
    packet that passed, in bytes; `cause` a name of the vocabulary of causes, empty if nothing is wrong.
    """

    reachable: bool | None
    rtt_ms: float | None
    loss: float | None
    mtu: int | None
    cause: str
    age_s: float


class Report(NamedTuple):
    """What a peer published of itself `age_s` seconds ago: how it fares, None if it does not say."""

    health: str | None
    age_s: float


Event = tuple[float, str, Mapping[str, Any]]
"""When it happened, in seconds since 1970, its kind, and the facts by name, which are JSON values."""

Paths = Mapping[str, Path]
"""By the key of the host at the other end."""


def nothing(key: str) -> Paths:
    """What nobody published."""
    return {}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the agent knows at one moment; peers go by the key of their lease (`10.5.34.0-24`).

    `status` is the document of `overlay-agent status` without its peers. `peers` are the accepted leases by key, in the
    order of their subnets; None if the reconciler does not say. `lacking` are the entries that are not in place, as
    text, and `unreachable` the peers that can have none. `changed` gives the seconds since a revision of the store,
    None if that was before this agent. `paths` are this host's own measurements, None if it makes none. `published`
    gives the paths that a peer told of, `towards` those to a host that others told of: few are asked for.
    `events` are the latest, newest first, None if there is no journal. `made_at` is in seconds since 1970.
    """

    made_at: float
    status: Mapping[str, Any]
    own: Lease | None = None
    peers: Mapping[str, Lease] | None = None
    lacking: Mapping[str, Sequence[str]] = field(default_factory=dict)
    unreachable: Collection[str] = ()
    changed: Callable[[int], float | None] = lambda revision: None
    paths: Paths | None = None
    reports: Mapping[str, Report] = field(default_factory=dict)
    published: Callable[[str], Paths] = nothing
    towards: Callable[[str], Paths] = nothing
    events: Sequence[Event] | None = None


class Asked(NamedTuple):
    """What the page wants to see: hosts that `find` finds (empty: all), at most `most` of them after the first `start`,
    and the paths of `host`, a lease's key (empty: this host's)."""

    find: str = ""
    start: int = 0
    most: int = 100
    host: str = ""


ALL = Asked()
"""The first hosts there are."""


def asked(query: str) -> Asked:
    """From the query of a URL, `find=..&start=..&most=..&host=..`. What makes no sense is as if it were not there."""
    try:
        fields = parse_qs(query, max_num_fields=8)
    except ValueError:
        return ALL

    def number(name: str, default: int, most: int) -> int:
        text = fields.get(name, [""])[0]
        return min(int(text), most) if text.isascii() and text.isdigit() and len(text) < 10 else default

    return Asked(
        fields.get("find", [""])[0].strip()[:MOST_TEXT],
        number("start", ALL.start, 1 << 24),
        number("most", ALL.most, MOST_HOSTS),
        fields.get("host", [""])[0][:MOST_TEXT],
    )


def encode(document: Mapping[str, Any]) -> bytes:
    """The document as JSON, without blanks."""
    return json.dumps(document, separators=(",", ":")).encode()


def document(facts: Facts, asked: Asked = ALL) -> dict[str, Any]:
    """What the page shows, as docs/page.md describes it."""
    made: dict[str, Any] = {
        "schema": SCHEMA,
        "made_at": facts.made_at,
        "status": facts.status,
        "here": _here(facts),
        "measured": facts.paths is not None,
        "counts": None,
        "search": None,
        "start": 0,
        "hosts": [],
        "pairs": [],
        "host": None,
        "events": None if facts.events is None else [_event(event) for event in facts.events[:MOST_EVENTS]],
    }
    if facts.peers is None:
        return made
    by_health = _by_health(facts)
    counts = {health: len(keys) for health, keys in by_health.items()}
    made["counts"] = counts
    if asked.find:
        search = _Search(asked.find)
        by_health = {
            health: [key for key in keys if search.finds(facts.peers[key])] for health, keys in by_health.items()
        }
        made["search"] = {
            "text": asked.find,
            "kind": search.kind,
            "inside": search.address is not None and any(block.holds(search.address) for block in _blocks(facts)),
            "here": facts.own is not None and search.finds(facts.own),
            "counts": {health: len(keys) for health, keys in by_health.items()},
        }
    total = sum(map(len, by_health.values()))
    # Hosts may have left since the page last asked: the last of them are shown then, not nothing.
    start = asked.start if asked.start < total else max(0, total - asked.most)
    in_order = ((key, health) for health in ORDER for key in by_health[health])
    listed = list(islice(in_order, start, start + asked.most))
    made["start"] = start
    made["hosts"] = [_host(facts, key, facts.peers[key], health) for key, health in listed]
    made["pairs"] = _pairs(facts, [key for key, _ in listed[:MOST_PAIRED]])
    made["host"] = _looked_at(facts, asked.host)
    return made


# --- hosts -------------------------------------------------------------------------------------------------------


def path_health(path: Path | None) -> str:
    """What a measured path says of the way; unknown if it says nothing any more."""
    if path is None or path.age_s > FRESH_S or path.reachable is None:
        return UNKNOWN
    if not path.reachable:
        return DOWN
    return DEGRADED if path.cause or path.loss else HEALTHY


def _by_health(facts: Facts) -> dict[str, list[str]]:
    """The peers' keys by how they fare, as far as known here and from themselves; each list in the order of subnets."""
    found: dict[str, list[str]] = {health: [] for health in ORDER}
    for key in facts.peers or ():
        found[_health(facts, key)].append(key)
    return found


def _health(facts: Facts, key: str) -> str:
    if key in facts.lacking or key in facts.unreachable:
        return DOWN
    health = path_health(facts.paths.get(key)) if facts.paths else UNKNOWN
    return _worse(health, facts.reports[key]) if key in facts.reports else health


def _worse(health: str, report: Report) -> str:
    """A host that says of itself that it is not well is at best degraded: what reaches it is seen from here."""
    amiss = report.age_s <= FRESH_S and report.health in (DOWN, DEGRADED)
    return DEGRADED if amiss and health != DOWN else health


def _here(facts: Facts) -> dict[str, Any] | None:
    """This host, as a row; None before it has a lease. How it fares is what its status says."""
    if facts.own is None:
        return None
    health = facts.status.get("health")
    return {**_row(facts.own, facts.own.key), "health": health if health in ORDER else UNKNOWN}


def _row(lease: Lease, key: str) -> dict[str, Any]:
    attrs = lease.attrs
    return {
        "key": key,
        "name": _name(lease),
        "subnets": list(map(str, lease.subnets)),
        "underlay": [format_address(each) for each in (attrs.public_ip, attrs.public_ip6) if each is not None],
        "macs": [format_mac(vtep.mac) for vtep in (attrs.vtep, attrs.vtep6) if vtep is not None],
        "mtu": attrs.mtu or None,
    }


def _name(lease: Lease | None) -> str | None:
    return (lease.attrs.node_name[:MOST_TEXT] or None) if lease is not None else None


def _host(facts: Facts, key: str, lease: Lease, health: str) -> dict[str, Any]:
    path, report = (facts.paths or {}).get(key), facts.reports.get(key)
    missing = facts.lacking.get(key, ())
    state = "incomplete" if key in facts.lacking else "unreachable" if key in facts.unreachable else "programmed"
    return {
        **_row(lease, key),
        "health": health,
        "state": state,
        "missing": [text[:MOST_TEXT] for text in missing[:MOST_MISSING]],
        "missing_count": len(missing),
        "changed_ago_s": facts.changed(lease.mod_revision),
        "path": None if path is None else _path(path),
        "says": None if report is None else {"health": report.health, "ago_s": round(report.age_s, 1)},
    }


def _path(path: Path) -> dict[str, Any]:
    return {
        "health": path_health(path),
        "reachable": path.reachable,
        "rtt_ms": None if path.rtt_ms is None else round(path.rtt_ms, 3),
        "loss": None if path.loss is None else round(path.loss, 4),
        "mtu": path.mtu,
        "cause": path.cause or None,
        "ago_s": round(path.age_s, 1),
    }


# --- paths -------------------------------------------------------------------------------------------------------


def _measured_by(facts: Facts, key: str) -> Paths:
    """What this host measured, or another published."""
    if facts.own is not None and key == facts.own.key:
        return facts.paths or {}
    return facts.published(key)


def _pairs(facts: Facts, keys: Sequence[str]) -> list[list[Any]]:
    """What is known of the ways among these hosts and this one, a short list each, as there may be many: from and to
    (0 for this host, else 1 + the place in the list), then health, rtt_ms, loss, mtu, cause and ago_s as in `_path`."""
    place = {key: number for number, key in enumerate(keys, 1)}
    if facts.own is not None:
        place[facts.own.key] = 0
    return [
        [place[source], place[target], *(_path(path)[each] for each in _OF_A_PAIR)]
        for source in place
        for target, path in _of_these(_measured_by(facts, source), place)
        if target != source
    ]


_OF_A_PAIR = "health", "rtt_ms", "loss", "mtu", "cause", "ago_s"


def _of_these(paths: Paths, place: Mapping[str, int]) -> Iterable[tuple[str, Path]]:
    """Those that lead to one of these places: the smaller of the two mappings is gone through."""
    if len(paths) <= len(place):
        return ((key, path) for key, path in paths.items() if key in place)
    return ((key, paths[key]) for key in place if key in paths)


def _looked_at(facts: Facts, key: str) -> dict[str, Any] | None:
    """The host with this key, this one if it is empty, in full; None if there is none any more. Its paths come worst
    first."""
    peers = facts.peers or {}
    if facts.own is not None and not key:
        key = facts.own.key
    own = facts.own is not None and facts.own.key == key
    if key not in peers and not own:
        return None
    inward = dict(facts.towards(key))
    if facts.own is not None and facts.paths is not None and key in facts.paths:
        inward[facts.own.key] = facts.paths[key]
    host = _here(facts) if own else _host(facts, key, peers[key], _health(facts, key))
    return {**(host or {}), "outward": _worst(facts, _measured_by(facts, key)), "inward": _worst(facts, inward)}


def _worst(facts: Facts, paths: Paths) -> list[dict[str, Any]]:
    known = facts.peers or {}
    chosen = sorted(paths.items(), key=lambda each: (ORDER.index(path_health(each[1])), -(each[1].rtt_ms or 0.0)))
    return [
        {
            "key": key[:MOST_TEXT],
            "name": _name(facts.own if facts.own and key == facts.own.key else known.get(key)),
            **_path(path),
        }
        for key, path in chosen[:MOST_PATHS]
    ]


# --- search ------------------------------------------------------------------------------------------------------


class _Search:
    """Whom a text finds: whoever holds the address, whose subnets overlap the subnet, who has the MAC; or else whose
    name, subnet or underlay address it is a part of. `kind` says which: address, subnet, mac or text."""

    def __init__(self, text: str) -> None:
        self._text = text.casefold()
        self.address: bytes | None = None
        """The address that is asked for, if it is one."""
        self.kind, self.finds = self._chosen(text)

    def _chosen(self, text: str) -> tuple[str, Callable[[Lease], bool]]:
        try:
            self.address = address = pack_address(text)
            return "address", lambda lease: _holds(lease, address)
        except ValueError:
            pass
        try:
            wanted = Prefix.parse(text, strict=False)
            return "subnet", lambda lease: any(subnet.overlaps(wanted) for subnet in lease.subnets)
        except ValueError:
            pass
        try:
            mac = pack_mac(text)
            return "mac", lambda lease: any(
                vtep is not None and vtep.mac == mac for vtep in (lease.attrs.vtep, lease.attrs.vtep6)
            )
        except ValueError:
            return "text", self._mentions

    def _mentions(self, lease: Lease) -> bool:
        if self._text in lease.attrs.node_name.casefold():
            return True
        shown = map(str, lease.subnets)
        hosts = (format_address(each) for each in (lease.attrs.public_ip, lease.attrs.public_ip6) if each is not None)
        return any(self._text in each for each in chain(shown, hosts))


def _blocks(facts: Facts) -> Iterable[Prefix]:
    """The overlay's networks."""
    network = facts.status.get("network") or {}
    return map(Prefix.parse, network.get("blocks", ()))


def _holds(lease: Lease, address: bytes) -> bool:
    attrs = lease.attrs
    return address in (attrs.public_ip, attrs.public_ip6) or any(subnet.holds(address) for subnet in lease.subnets)


# --- events ------------------------------------------------------------------------------------------------------


def _event(event: Event) -> dict[str, Any]:
    """When and what, and the facts as text: whatever they are, they are shown, not understood."""
    at, kind, facts = event
    some = islice(facts.items(), MOST_FACTS)
    return {"at": at, "kind": kind[:MOST_TEXT], "facts": {name[:MOST_TEXT]: _shown(value) for name, value in some}}


def _shown(value: object) -> str:
    if isinstance(value, str):
        return value[:MOST_TEXT]
    if isinstance(value, Sequence):
        return ", ".join(_shown(each) for each in value[:MOST_MISSING])[:MOST_TEXT]
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_shown(each)}" for name, each in islice(value.items(), MOST_MISSING))[:MOST_TEXT]
    return str(value)[:MOST_TEXT]
