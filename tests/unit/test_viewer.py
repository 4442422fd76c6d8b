"""What the page gets of a running agent: from whom, and at which cost."""

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from overlay import status, verdict
from overlay.insight import About, Insight
from overlay.picture import MOST_EVENTS, Event
from overlay.viewer import MOST_TELLERS, REST, Viewer, _Words
from subnet_lease.model import Lease, LeaseAttrs, Prefix

ABOUT = About("1.2", 7, "here", "/prefix", "http://etcd", 60.0, "on", 0.0)


class Clock:
    """Time passes when somebody rests, and by what the work takes."""

    def __init__(self) -> None:
        self.now = 100.0
        self.worked = 0.0
        self.rests: list[float] = []

    def work(self) -> float:
        self.now += 0.25
        self.worked += 0.25
        return self.worked

    def rest(self, seconds: float) -> None:
        self.rests.append(seconds)
        self.now += seconds


class Row(NamedTuple):
    source: bytes
    target: bytes
    rtt: float | None = 0.001
    loss: int = 50
    mtu: int = 1450
    age: int = 9
    cause: str = ""


class Health(NamedTuple):
    ready: bool
    missing: int


class Teller(NamedTuple):
    address: bytes
    health: Health
    when: float


@dataclass
class Heard:
    told: Sequence[Row]
    tellers: Sequence[Teller]
    asked: list[Collection[bytes]] = field(default_factory=list)

    def peers(self) -> Sequence[Teller]:
        return self.tellers

    def rows(self, now: float, addresses: Collection[bytes]) -> Iterable[Row]:
        self.asked.append(addresses)
        return [row for row in self.told if row.source in addresses]


@dataclass
class Prober:
    heard: Heard
    paths: "Nothing" = field(default_factory=lambda: Nothing())


class Nothing:
    def rows(self) -> tuple[()]:
        return ()


class Journal:
    def latest(self, limit: int) -> Sequence[Event]:
        return [(float(number), "joined", {}) for number in range(limit)]


def insight(clock: Clock) -> Insight:
    """Of an agent that starts."""
    made = Insight(ABOUT, lambda: clock.now, dict, lambda name: None, lambda name: None, dict)
    made.waiting = verdict.starting("etcd")
    return made


def base(number: int) -> bytes:
    return bytes((10, 0, number, 0))


def lease(number: int) -> Lease:
    attrs = LeaseAttrs(bytes((172, 16, 0, number)), "vxlan", None)
    return Lease(Prefix(base(number), 24), None, attrs, 1, number, number)


def key(number: int) -> str:
    return lease(number).key


def test_an_agent_that_starts_is_shown_with_what_it_waits_for() -> None:
    clock = Clock()
    document = json.loads(
        Viewer(insight(clock), lambda: clock.now, lambda: 5.0, clock.work, clock.rest).answer("").body
    )
    assert document["status"]["health"] == status.DOWN
    assert document["status"]["problems"]
    assert (document["counts"], document["here"], document["measured"], document["events"]) == (None, None, False, None)
    assert document["made_at"] == 5.0


def test_the_latest_events_come_first() -> None:
    clock = Clock()
    made = insight(clock)
    made.journal = Journal()
    document = json.loads(Viewer(made, lambda: clock.now, lambda: 5.0, clock.work, clock.rest).answer("").body)
    assert [event["at"] for event in document["events"]] == [float(each) for each in reversed(range(MOST_EVENTS))]


def test_however_many_ask_at_most_a_fifth_of_the_time_is_worked() -> None:
    clock = Clock()
    viewer = Viewer(insight(clock), lambda: clock.now, lambda: 5.0, clock.work, clock.rest)
    for _ in range(20):
        viewer.answer("")
    assert clock.rests[0] == 0.0
    assert sum(clock.rests) == 19 * REST * 0.25
    clock.now += 1000
    viewer.answer("")
    assert clock.rests[-1] == 0.0


def test_what_peers_told_is_known_by_their_leases() -> None:
    tellers = [
        Teller(base(2), Health(True, 0), 90.0),
        Teller(base(3), Health(False, 5), 95.0),
        Teller(bytes((172, 16, 0, 4)), Health(True, 1), 99.0),
        Teller(base(77), Health(True, 0), 99.0),
    ]
    told = [
        Row(base(2), base(3)),
        Row(base(2), base(1), rtt=None, mtu=0, cause="peer_down"),
        Row(base(2), base(88)),
        Row(bytes((172, 16, 0, 4)), base(3)),
        Row(base(99), base(3)),
    ]
    heard = Heard(told, tellers)
    words = _Words(Prober(heard), lease(1), {key(number): lease(number) for number in (2, 3, 4)}, 100.0)
    assert {each: (report.health, report.age_s) for each, report in words.reports.items()} == {
        key(2): ("healthy", 10.0),
        key(3): ("down", 5.0),
        key(4): ("degraded", 1.0),
    }
    published = words.published(key(2))
    assert set(published) == {key(3), key(1)}
    assert published[key(3)][:4] == (True, 1.0, 0.5, 1450)
    assert published[key(1)][:5] == (False, None, 0.5, None, "peer_down")
    assert words.published(key(9)) == {}
    assert set(words.towards(key(3))) == {key(2), key(4)}


def test_a_bounded_number_of_peers_is_looked_through_for_paths_to_one() -> None:
    numbers = range(2, 202)
    heard = Heard([], [Teller(base(number), Health(True, 0), 90.0) for number in numbers])
    words = _Words(Prober(heard), None, {key(number): lease(number) for number in numbers}, 100.0)
    words.towards(key(5))
    assert heard.asked == [{base(number) for number in numbers[-MOST_TELLERS:]}]
