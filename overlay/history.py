"""What the journal is asked: who held an address, and what happened.

Owns the grammar of a time, the two queries and their answers as text and as JSON. Records stream through; what is kept
is what matches. Nothing here reads a file or a clock.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from typing import Any

from overlay.records import BASE, HELD, KINDS, LEASE_KINDS, Record, standing_in
from overlay.text import table
from subnet_lease.model import Prefix, pack_address

MOST = 1000
"""Earlier holders of one address that are kept: the latest."""

TIMES = "now, 2h or 1d12h (ago), 14:00, yesterday 14:00, 2026-11-21, 2026-11-21 14:00:05, 2026-11-21T14:00Z"

_AGO = re.compile(r"-?((?:\d{1,6}[dhms])+)(?: ago)?")
_UNITS = {"d": "days", "h": "hours", "m": "minutes", "s": "seconds"}
_DAYS = {"today": 0, "yesterday": 1}


# --- times -------------------------------------------------------------------------------------------------------


def moment(text: str, now: datetime) -> float:
    """The time that `text` says, in seconds since 1970; ValueError if it says none.

    `now`, `2h`, `1d12h` (`2h ago` and `-2h` are the same), `14:00` or `today 14:00`, `yesterday`, `yesterday 14:00`, or
    ISO 8601. Without a zone it is that of `now`; a day without a time is its beginning.
    """
    words = text.strip().lower()
    if words == "now":
        return now.timestamp()
    try:
        if ago := _AGO.fullmatch(words):
            spans = {_UNITS[part[-1]]: int(part[:-1]) for part in re.findall(r"\d+[dhms]", ago[1])}
            return (now - timedelta(**spans)).timestamp()
        day, _, clock = words.partition(" ")
        if ":" in day and not clock and "-" not in day:
            day, clock = "today", day
        if day in _DAYS:
            date = now.date() - timedelta(days=_DAYS[day])
            words = f"{date.isoformat()} {clock.strip() or '00:00'}"
        found = datetime.fromisoformat(words.upper())
    except (ValueError, OverflowError):
        raise ValueError(f"{text[:40]!r} is no time; these are: {TIMES}") from None
    return (found if found.tzinfo else found.replace(tzinfo=now.tzinfo)).timestamp()


def shown(at: float, zone: Any = None) -> str:
    """The time for people, in `zone`, or this host's."""
    return datetime.fromtimestamp(at, zone).astimezone(zone).isoformat(" ", "seconds")


# --- what the journal covers -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Coverage:
    """Since when the journal tells what happened, and when nobody wrote it. Times in seconds since 1970."""

    began: float | None = None
    """When the oldest segment begins; None while there is none."""
    gaps: deque[tuple[float, float, str]] = field(default_factory=lambda: deque(maxlen=MOST))
    """From, to, why."""
    missed: int = 0
    """Events that could not be written."""
    uncovered: int = 0
    """Leases that there was no room for when the oldest segment began."""
    silent_since: float | None = None
    """When the journal was last written, if that is too long ago for an agent to run."""
    damaged: int = 0
    """Lines that could not be read."""
    unreadable: str = ""
    """Why there is nothing to read, or only a part."""

    def saw(self, record: Record) -> None:
        """Take in a record of a segment that is no base's."""
        if self.began is None:
            self.began = record.at
        since = _number(record.facts.get("silent_since"))
        if since is not None:
            why = "no agent ran" if record.kind == "started" else "the journal could not be written"
            self.gaps.append((since, record.at, why))
        if record.kind == "missed":
            self.missed += int(_number(record.facts.get("events")) or 0)
        if record.kind == BASE:
            self.uncovered = int(_number(record.facts.get("uncovered")) or 0)

    def lines(self, zone: Any = None) -> list[str]:
        """What it does not cover, for people."""
        if self.unreadable:
            return [f"Of the past nothing can be said: {plain(self.unreadable)}."]
        if self.began is None:
            return ["The journal is empty: it tells nothing of the past."]
        said = [f"The journal begins at {shown(self.began, zone)}."]
        said += [f"From {shown(start, zone)} to {shown(end, zone)} {why}." for start, end, why in self.gaps]
        if self.silent_since is not None:
            said.append(f"No agent has run since {shown(self.silent_since, zone)}.")
        if self.damaged:
            said.append(f"{self.damaged} lines are damaged and tell nothing.")
        if self.missed:
            said.append(f"{self.missed} events could not be written.")
        if self.uncovered:
            said.append(f"{self.uncovered} leases had no room when it began; what they were is not known.")
        return said

    def facts(self) -> dict[str, Any]:
        """The same for programs."""
        gaps = [{"from": start, "to": end, "reason": why} for start, end, why in self.gaps]
        return {
            "began": self.began,
            "silent_since": self.silent_since,
            "gaps": gaps,
            "missed": self.missed,
            "uncovered": self.uncovered,
            "damaged": self.damaged,
            "unreadable": self.unreadable or None,
        }


# --- who held an address -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holding:
    """`key` stood for the address in question, from `since` until `until` (None: as far as is known, still).

    `since` is when it was first seen; it began at `not_before` or later, None where nobody knows how much earlier.
    `until` likewise is when it was seen to have ended: that was after `until_not_before`.
    """

    key: str
    subnets: tuple[str, ...]
    hosts: tuple[str, ...]
    macs: tuple[str, ...]
    since: float
    not_before: float | None
    until: float | None = None
    until_not_before: float | None = None

    def held_at(self, at: float) -> bool | None:
        """Whether it was held then; None where that is not known."""
        if at < (self.since if self.not_before is None else self.not_before):
            return None if self.not_before is None else False
        if at < self.since:
            return None
        if self.until is None or at < (self.until_not_before or self.until):
            return True
        return None if at < self.until else False


class Whois:
    """Who held `address` (packed), from the records given to `saw`: those of the base first."""

    def __init__(self, address: bytes) -> None:
        self._address = address
        self._open: dict[str, Holding] = {}
        self._past: deque[Holding] = deque(maxlen=MOST)
        self.coverage = Coverage()

    def saw(self, record: Record) -> None:
        """Take in the next record."""
        if record.kind != HELD:
            self.coverage.saw(record)
        found = standing_in(record)
        if found is None:
            return
        key, standing = found
        away = _number(record.facts.get("away_since"))
        subnets, hosts = _texts(standing, "subnets"), _texts(standing, "hosts")
        old = self._open.get(key)
        concerns = stands_for(self._address, subnets, hosts)
        if old is not None and not (concerns and old.hosts == hosts):
            # Two of one moment: the end of the one is known as well as the beginning of the other.
            self._past.append(replace(old, until=record.at, until_not_before=away))
            del self._open[key]
            old = None
        if concerns and old is None:
            not_before = None if record.facts.get("found") else record.at if away is None else away
            macs = _texts(standing, "macs")
            self._open[key] = Holding(key, subnets, hosts, macs, record.at, not_before)

    @property
    def holdings(self) -> list[Holding]:
        """All there were, by their beginning."""
        return sorted((*self._past, *self._open.values()), key=lambda each: (each.since, each.key))


def stands_for(address: bytes, subnets: Iterable[str], hosts: Iterable[str]) -> bool:
    """Whether a lease of these subnets and underlay addresses stands for the address."""
    for text in subnets:
        prefix = _prefix(text)
        if prefix is not None and prefix.overlaps(Prefix(address, 8 * len(address))):
            return True
    return any(_address(text) == address for text in hosts)


def _texts(standing: Mapping[str, Any] | None, name: str) -> tuple[str, ...]:
    values = standing.get(name, ()) if standing else ()
    return tuple(value for value in values if isinstance(value, str)) if isinstance(values, list) else ()


def _number(value: object) -> float | None:
    return float(value) if type(value) in (int, float) else None  # type: ignore[arg-type]


def _address(text: str) -> bytes | None:
    try:
        return pack_address(text)
    except ValueError:
        return None


def _prefix(text: str) -> Prefix | None:
    try:
        return Prefix.parse(text, strict=False)
    except ValueError:
        return None


@dataclass(frozen=True, slots=True)
class Current:
    """A lease in etcd now that stands for the address. `rejected` is why agents do not use it, None if they do."""

    key: str
    node_name: str | None
    subnets: tuple[str, ...]
    hosts: tuple[str, ...]
    macs: tuple[str, ...]
    rejected: str | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What `whois` says. `current` None: etcd did not say, for this `reason`. `at` None: all times are asked for."""

    address: str
    at: float | None
    current: Sequence[Current] | None
    reason: str
    holdings: Sequence[Holding]
    coverage: Coverage

    @property
    def known(self) -> bool:
        """Whether anybody was found."""
        return bool(self.holdings or self.current)

    def _name(self, hosts: tuple[str, ...]) -> str | None:
        """What the host calls itself now that has this address now."""
        return next((c.node_name for c in self.current or () if set(c.hosts) & set(hosts) and c.rejected is None), None)

    def _since(self, current: Current) -> Holding | None:
        same = (h for h in self.holdings if h.key == current.key and h.hosts == current.hosts and h.until is None)
        return next(same, None)

    def as_json(self) -> str:
        """The schema of docs/events.md."""
        current = None
        if self.current is not None:
            current = [{**_facts(c), "since": h.since if (h := self._since(c)) else None} for c in self.current]
        at = self.at
        past = [
            {
                **_facts(h),
                "node_name": self._name(h.hosts),
                **({} if at is None else {"certain": h.held_at(at) is True}),
            }
            for h in self.holdings
        ]
        head = {"address": self.address, "at": at, "current": current, "reason": self.reason or None}
        return json.dumps({**head, "journal": past, "covers": self.coverage.facts()})

    def as_text(self, zone: Any = None) -> str:
        """For people."""
        lines = []
        if self.at is None:
            if self.current is None:
                lines.append(f"{self.address}: etcd does not say who holds it now: {plain(self.reason)}")
            elif not self.current:
                lines.append(f"{self.address}: no lease in etcd stands for it now.")
            for each in self.current or ():
                held = self._since(each)
                since = _since(held, zone) if held else "since a time that the journal does not tell"
                refused = f"; agents reject it: {plain(each.rejected)}" if each.rejected else ""
                lines.append(f"{self.address}: {_who(each.node_name, each)}, {since}{refused}")
        shown_already = {id(self._since(each)) for each in self.current or ()} if self.at is None else set()
        past = [h for h in self.holdings if id(h) not in shown_already]
        if self.at is not None:
            if not past:
                lines.append(f"{self.address}: at {shown(self.at, zone)} nobody held it that the journal knows of.")
            for h in past:
                verb = "held it" if h.held_at(self.at) else "may have held it"
                lines.append(
                    f"{self.address}: at {shown(self.at, zone)} {_who(self._name(h.hosts), h)} {verb}, "
                    f"{_since(h, zone)}{_until(h, zone)}"
                )
        elif past:
            head = ["HOST", "NAME NOW", "SUBNET", "SINCE", "UNTIL"]
            rows = [
                [
                    plain(" ".join(h.hosts) or "-"),
                    plain(self._name(h.hosts) or "-"),
                    plain(" ".join(h.subnets)),
                    _since(h, zone).removeprefix("since "),
                    _until(h, zone).removeprefix(" until ") or "as far as the journal goes",
                ]
                for h in past
            ]
            lines += ["", "From the journal:", table(head, rows)]
        return "\n".join([*lines, "", *self.coverage.lines(zone)])


def _facts(found: Current | Holding) -> dict[str, Any]:
    """Its fields, in their order."""
    values = {each.name: getattr(found, each.name) for each in fields(found)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _who(name: str | None, found: Current | Holding) -> str:
    called = plain(name) + ", " if name else ""
    hosts = " and ".join(found.hosts) or "without an address"
    return f"host {called}{plain(hosts)}, lease {plain(' '.join(found.subnets) or found.key)}"


def _since(held: Holding, zone: Any) -> str:
    if held.not_before is None:
        return f"since {shown(held.since, zone)} or earlier"
    if held.not_before < held.since:
        return f"since between {shown(held.not_before, zone)} and {shown(held.since, zone)}"
    return f"since {shown(held.since, zone)}"


def _until(held: Holding, zone: Any) -> str:
    if held.until is None:
        return ""
    if held.until_not_before is not None:
        return f" until between {shown(held.until_not_before, zone)} and {shown(held.until, zone)}"
    return f" until {shown(held.until, zone)}"


def plain(text: str) -> str:
    """The text in printable ASCII: whoever can write a key could else have a terminal do things."""
    escaped = text.encode("ascii", "backslashreplace").decode()
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in escaped)


# --- what happened -----------------------------------------------------------------------------------------------


_TOKEN = re.compile(r"[0-9A-Fa-f:.]{3,}(?:/\d{1,3})?")


class About:
    """Records that name one of some addresses, subnets or MACs. With `learning`, also whatever their leases name.

    ValueError if `text` is none of these.
    """

    def __init__(self, text: str, *, learning: bool = False) -> None:
        self._learning = learning
        self._words = {text.lower()}
        self._prefixes: set[Prefix] = set()
        if not re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", text.lower()):
            prefix = _as_prefix(text)
            if prefix is None:
                raise ValueError(f"{text[:60]!r} is neither an address nor a subnet")
            self._prefixes.add(prefix)

    def concerns(self, record: Record) -> bool:
        """Whether the record is about it. Of the base as well: that is where names are learnt from."""
        tokens = [token for text in _strings(record.facts) for token in _TOKEN.findall(text)]
        if not any(map(self._names, tokens)):
            return False
        if self._learning and record.kind in LEASE_KINDS:
            for name in ("subnets", "hosts", "macs"):
                for text in _texts(record.facts, name):
                    prefix = _as_prefix(text)
                    if prefix is None:
                        self._words.add(text.lower())
                    else:
                        self._prefixes.add(prefix)
        return True

    def _names(self, token: str) -> bool:
        if token.lower() in self._words:
            return True
        prefix = _as_prefix(token)
        return prefix is not None and any(map(prefix.overlaps, self._prefixes))


def _as_prefix(text: str) -> Prefix | None:
    address = _address(text)
    return _prefix(text) if address is None else Prefix(address, 8 * len(address))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


@dataclass(frozen=True, slots=True)
class Filter:
    """Which records to show: of these kinds (empty: of all), of this time, and about all of these."""

    kinds: frozenset[str] = frozenset()
    since: float | None = None
    until: float | None = None
    about: tuple[About, ...] = ()

    def passes(self, record: Record) -> bool:
        """Whether to show it. Every record is to be asked about, in order: later ones may depend on it."""
        concerned = [about.concerns(record) for about in self.about]
        return (
            record.kind not in (HELD, BASE)
            and all(concerned)
            and (not self.kinds or record.kind in self.kinds)
            and (self.since is None or record.at >= self.since)
            and (self.until is None or record.at < self.until)
        )


def kinds_of(words: Iterable[str]) -> frozenset[str]:
    """Kinds by the names of kinds or groups; ValueError for what is neither."""
    chosen: set[str] = set()
    every = {kind for kinds in KINDS.values() for kind in kinds}
    for word in words:
        if word not in KINDS and word not in every:
            raise ValueError(f"{word[:40]!r} is no kind of event; groups are: {', '.join(KINDS)}")
        chosen.update(KINDS.get(word, (word,)))
    return frozenset(chosen)


def line_of(record: Record, zone: Any = None) -> str:
    """A record for people, on one line."""
    return f"{shown(record.at, zone)}  {plain(record.kind):<18} {plain(_words(record.facts))}".rstrip()


_UNSAID = frozenset({"created", "key"})


def _words(facts: Mapping[str, Any]) -> str:
    if "subnets" not in facts and "key" in facts:
        facts = {"lease": facts["key"], **facts}
    if "away_since" in facts:
        facts = {name: value for name, value in facts.items() if name != "away_since"} | {"while": "nobody recorded it"}
    return ", ".join(f"{name} {_said(value)}" for name, value in facts.items() if name not in _UNSAID)


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return f"({_words(value)})"
    if isinstance(value, list):
        return " ".join(map(_said, value))
    return str(value)
