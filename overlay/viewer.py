"""What the web page asks a running agent for: the document of `picture`, made of what the agent knows at that moment.

Owns whom is asked for which part, and that many viewers cost no more than a share of a core. Nothing is kept: without a
viewer it costs nothing. Called in the health endpoint's thread for documents.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from overlay import picture, status
from overlay.health import Answer
from overlay.insight import Insight
from overlay.picture import Facts, Path, Paths, Report
from subnet_lease.model import Lease

if TYPE_CHECKING:
    from overlay import probe
    from overlay.prober import Prober

INSPECTION_S = 2.0
"""Seconds that the reconciler is waited for: a client of the health endpoint has three."""

REST = 4
"""After each document the thread rests so many times as long as it has worked, however many ask."""

MOST_TELLERS = 128
"""Peers whose words are looked through for paths to one host, the latest first."""

JSON = "application/json"


class Viewer:
    """`answer` is what `/api/cluster` says. `wall` gives seconds since 1970, `clock` steady ones, `worked` those of the
    processor that this thread has had."""

    def __init__(
        self,
        insight: Insight,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        worked: Callable[[], float] = time.thread_time,
        rest: Callable[[float], None] = time.sleep,
    ) -> None:
        self._insight = insight
        self._clock = clock
        self._wall = wall
        self._worked = worked
        self._rest = rest
        self._free_at = 0.0

    def answer(self, query: str) -> Answer:
        """The document for this query of a URL."""
        self._rest(max(0.0, self._free_at - self._clock()))
        began = self._worked()
        body = picture.encode(picture.document(self._facts(), picture.asked(query)))
        took = self._worked() - began
        self._free_at = self._clock() + REST * took
        return Answer(body, JSON)

    def _facts(self) -> Facts:
        head, seen, amiss = self._insight.look(INSPECTION_S)
        prober, journal, now = self._insight.prober, self._insight.journal, self._clock()
        own = self._insight.keeper.lease if self._insight.keeper else None
        by_key = dict(sorted(seen.peers, key=_place)) if seen else {}
        words = _Words(prober, own, by_key, now) if prober else None

        def changed(revision: int) -> float | None:
            when = seen.timeline.when(revision) if seen else None
            return None if when is None else round(now - when, 1)

        return Facts(
            made_at=round(self._wall(), 1),
            status=head,
            own=own,
            peers=by_key if seen else None,
            lacking={each.key: list(map(str, each.missing)) for each in amiss if each.state == status.INCOMPLETE},
            unreachable={each.key for each in amiss if each.state == status.UNREACHABLE},
            changed=changed,
            paths={each.target.key: _path(each, now) for each in prober.paths.rows()} if prober else None,
            reports=words.reports if words else {},
            published=words.published if words else picture.nothing,
            towards=words.towards if words else picture.nothing,
            events=journal.latest(picture.MOST_EVENTS)[::-1] if journal else None,
        )


def _place(peer: tuple[str, Lease]) -> Any:
    return peer[1].subnet or peer[1].subnet6


def _path(found: "probe.Path", now: float) -> Path:
    rtt = None if found.rtt_median is None else 1000 * found.rtt_median
    return Path(found.reachable, rtt, found.loss, found.mtu or None, found.cause, now - found.when)


class _Words:
    """What peers told, by the keys of their leases: they speak of addresses in the overlay, the first of each subnet,
    or with host-gw of those on the underlay."""

    def __init__(self, prober: "Prober", own: Lease | None, peers: Mapping[str, Lease], now: float) -> None:
        self._heard = prober.heard
        self._now = now
        leases = {**peers, own.key: own} if own is not None else peers
        self._keys: dict[bytes, str] = {}
        for key, (subnet, subnet6, attrs, *_) in leases.items():
            for address in (subnet and subnet.base, subnet6 and subnet6.base, attrs.public_ip, attrs.public_ip6):
                if address is not None:
                    self._keys[address] = key
        self._tellers: dict[str, bytes] = {}
        self.reports: dict[str, Report] = {}
        for teller in prober.heard.peers():
            if (told := self._keys.get(teller.address)) is not None:
                self._tellers[told] = teller.address
                health = "down" if not teller.health.ready else "degraded" if teller.health.missing else "healthy"
                self.reports[told] = Report(health, now - teller.when)

    def published(self, key: str) -> Paths:
        """What this peer told of its paths."""
        address = self._tellers.get(key)
        rows = self._heard.rows(self._now, {address}) if address else ()
        return {self._keys[row.target]: _told(row) for row in rows if row.target in self._keys}

    def towards(self, key: str) -> Paths:
        """What the latest tellers told of their paths to this host."""
        latest = list(self._tellers.values())[-MOST_TELLERS:]
        rows = self._heard.rows(self._now, set(latest))
        return {
            source: _told(row)
            for row in rows
            if self._keys.get(row.target) == key and (source := self._keys.get(row.source)) is not None
        }


def _told(row: "probe.Row") -> Path:
    rtt = None if row.rtt is None else 1000 * row.rtt
    return Path(row.rtt is not None, rtt, row.loss / 100, row.mtu or None, row.cause, float(row.age))
