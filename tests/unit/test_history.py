"""What the journal is asked: times in words, who held an address, which events are about what."""

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.history import (
    About,
    Answer,
    Coverage,
    Current,
    Filter,
    Holding,
    Whois,
    kinds_of,
    line_of,
    moment,
    plain,
    shown,
)
from overlay.records import BASE, HELD, Record, json_of
from subnet_lease.model import pack_address

NOW = datetime(2026, 11, 21, 15, 30, 0, tzinfo=timezone(timedelta(hours=1)))


def lease_record(at: float, kind: str, number: int = 7, host: int = 2, **facts: object) -> Record:
    standing = {
        "subnets": [f"10.244.{number}.0/24"],
        "hosts": [f"172.30.0.{host}"],
        "macs": [f"02:00:00:00:00:{host:02x}"],
    }
    return Record(at, kind, {"key": f"10.244.{number}.0-24", **standing, **facts})


def whois(address: str, *records: Record) -> Whois:
    search = Whois(pack_address(address))
    for record in records:
        search.saw(record)
    return search


# --- times ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", "2026-11-21 15:30:00+01:00"),
        ("2h", "2026-11-21 13:30:00+01:00"),
        ("-2h", "2026-11-21 13:30:00+01:00"),
        ("1d12h ago", "2026-11-20 03:30:00+01:00"),
        ("90m", "2026-11-21 14:00:00+01:00"),
        ("45s", "2026-11-21 15:29:15+01:00"),
        ("14:00", "2026-11-21 14:00:00+01:00"),
        ("today 14:00:05", "2026-11-21 14:00:05+01:00"),
        ("Yesterday 14:00", "2026-11-20 14:00:00+01:00"),
        ("yesterday", "2026-11-20 00:00:00+01:00"),
        ("2026-11-01", "2026-11-01 00:00:00+01:00"),
        ("2026-11-01 09:05", "2026-11-01 09:05:00+01:00"),
        ("2026-11-01T09:05:07Z", "2026-11-01 10:05:07+01:00"),
    ],
)
def test_times_are_read_as_people_write_them(text: str, expected: str) -> None:
    assert shown(moment(text, NOW), NOW.tzinfo) == expected


@pytest.mark.parametrize("text", ["", "soon", "2", "2x", "25:00", "yesterday noon", "2026-13-01", "999999d", "1h2"])
def test_what_is_no_time_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(ValueError, match="these are: now, 2h"):
        moment(text, NOW)


@given(st.text(max_size=20))
def test_any_text_is_a_time_or_a_value_error(text: str) -> None:
    try:
        assert isinstance(moment(text, NOW), float)
    except ValueError as error:
        assert "is no time" in str(error)


# --- whois ---


def test_a_lease_is_held_from_its_joining_to_its_leaving() -> None:
    search = whois("10.244.7.9", lease_record(10, "joined"), lease_record(20, "left"))
    (held,) = search.holdings
    assert (held.hosts, held.since, held.not_before, held.until) == (("172.30.0.2",), 10, 10, 20)
    assert [held.held_at(at) for at in (9, 10, 19, 20, 21)] == [False, True, True, False, False]


def test_a_subnet_used_again_gives_its_holders_in_order() -> None:
    search = whois(
        "10.244.7.9",
        lease_record(10, "joined"),
        lease_record(15, "changed", before={"mtu": 1}),
        lease_record(20, "taken_over", host=3),
        lease_record(30, "rejected", host=3, reason="no"),
        lease_record(40, "joined", host=4),
    )
    found = [(held.hosts, held.since, held.until) for held in search.holdings]
    assert found == [(("172.30.0.2",), 10, 20), (("172.30.0.3",), 20, 30), (("172.30.0.4",), 40, None)]


def test_hosts_are_found_by_their_underlay_address_too() -> None:
    assert [held.key for held in whois("172.30.0.2", lease_record(10, "joined")).holdings] == ["10.244.7.0-24"]
    assert whois("172.30.0.3", lease_record(10, "joined")).holdings == []


def test_what_happened_while_no_agent_ran_is_known_between_two_times_only() -> None:
    search = whois(
        "10.244.7.9",
        lease_record(5, "joined"),
        Record(50, "started", {"silent_since": 20}),
        lease_record(51, "taken_over", host=3, away_since=20),
    )
    first, second = search.holdings
    assert [first.held_at(at) for at in (19, 30, 51)] == [True, None, False]
    assert [second.held_at(at) for at in (19, 30, 51)] == [False, None, True]


def test_of_what_a_journal_began_with_nobody_knows_since_when() -> None:
    (held,) = whois("10.244.7.9", lease_record(10, HELD, found=True)).holdings
    assert [held.held_at(at) for at in (9, 10)] == [None, True]
    assert held.not_before is None


@pytest.mark.parametrize("facts", [{"subnets": "10.244.7.0/24"}, {"subnets": [7, "x"], "hosts": ["y"]}, {}])
def test_records_of_odd_shape_stand_for_nobody(facts: dict[str, object]) -> None:
    assert whois("10.244.7.9", Record(1, "joined", {"key": "k", **facts})).holdings == []


def answer(search: Whois, current: list[Current] | None, at: float | None = None, reason: str = "") -> Answer:
    holdings = [held for held in search.holdings if at is None or held.held_at(at) is not False]
    return Answer("10.244.7.9", at, current, reason, holdings, search.coverage)


def current(host: int, name: str | None = "h2", rejected: str | None = None) -> Current:
    return Current("10.244.7.0-24", name, ("10.244.7.0/24",), (f"172.30.0.{host}",), (), rejected)


def test_the_answer_joins_what_etcd_and_the_journal_say() -> None:
    search = whois(
        "10.244.7.9", Record(1, "started", {}), lease_record(10, "joined"), lease_record(20, "taken_over", host=3)
    )
    text = answer(search, [current(3, "h3")]).as_text(UTC)
    assert text.splitlines() == [
        "10.244.7.9: host h3, 172.30.0.3, lease 10.244.7.0/24, since 1970-01-01 00:00:20+00:00",
        "",
        "From the journal:",
        "HOST        NAME NOW  SUBNET         SINCE                      UNTIL",
        "172.30.0.2  -         10.244.7.0/24  1970-01-01 00:00:10+00:00  1970-01-01 00:00:20+00:00",
        "",
        "The journal begins at 1970-01-01 00:00:01+00:00.",
    ]
    data = json.loads(answer(search, [current(3, "h3")]).as_json())
    assert [each["since"] for each in data["current"]] == [20]
    assert [(each["hosts"], each["until"], each["node_name"]) for each in data["journal"]] == [
        (["172.30.0.2"], 20, None),
        (["172.30.0.3"], None, "h3"),
    ]
    assert data["covers"]["began"] == 1 and data["reason"] is None


def test_the_answer_for_a_time_names_who_held_it_then() -> None:
    search = whois("10.244.7.9", lease_record(10, "joined"), lease_record(20, "taken_over", host=3, away_since=15))
    assert "host h2, 172.30.0.2, lease 10.244.7.0/24 held it, since" in answer(search, [current(2)], 12).as_text(UTC)
    doubt = answer(search, [], 17)
    assert doubt.as_text(UTC).count("may have held it, since") == 2
    assert [each["certain"] for each in json.loads(doubt.as_json())["journal"]] == [False, False]
    nobody = answer(search, [], 5)
    assert "nobody held it that the journal knows of" in nobody.as_text(UTC)
    assert not nobody.known and doubt.known
    until = answer(search, [], 12).as_text(UTC)
    assert "until between 1970-01-01 00:00:15+00:00 and 1970-01-01 00:00:20+00:00" in until


def test_the_answer_says_what_is_not_known() -> None:
    empty = whois("10.244.7.9")
    text = answer(empty, None, reason="etcd is \x1b[31maway").as_text(UTC)
    assert "etcd does not say who holds it now: etcd is \\x1b[31maway" in text
    assert "The journal is empty" in text
    assert json.loads(answer(empty, None, reason="away").as_json())["current"] is None
    assert "no lease in etcd stands for it now" in answer(empty, []).as_text(UTC)
    rejected = answer(empty, [current(2, None, "it is bad")]).as_text(UTC)
    assert "since a time that the journal does not tell; agents reject it: it is bad" in rejected
    search = whois("10.244.7.9", lease_record(10, HELD, found=True), lease_record(20, "changed", host=2))
    assert "or earlier" in answer(search, []).as_text(UTC)
    assert "as far as the journal goes" in answer(search, []).as_text(UTC)
    nameless = Holding("k", (), (), (), 1, 1)
    assert "host without an address, lease k held it" in Answer("a", 2, [], "", [nameless], Coverage()).as_text(UTC)
    unseen = Answer("a", None, [], "", [nameless], Coverage()).as_text(UTC)
    assert unseen.splitlines()[4].startswith("-     -")


def test_coverage_tells_gaps_and_losses() -> None:
    coverage = Coverage()
    for record in (
        Record(100, "started", {"silent_since": 50}),
        Record(110, "missed", {"events": 3}),
        Record(111, "missed", {}),
        Record(112, "started", {"silent_since": "x"}),
        Record(130, "missed", {"events": 0, "silent_since": 120}),
        Record(131, BASE, {"leases": 2, "uncovered": 7}),
    ):
        coverage.saw(record)
    coverage.silent_since, coverage.damaged = 200, 2
    assert coverage.lines(UTC) == [
        "The journal begins at 1970-01-01 00:01:40+00:00.",
        "From 1970-01-01 00:00:50+00:00 to 1970-01-01 00:01:40+00:00 no agent ran.",
        "From 1970-01-01 00:02:00+00:00 to 1970-01-01 00:02:10+00:00 the journal could not be written.",
        "No agent has run since 1970-01-01 00:03:20+00:00.",
        "2 lines are damaged and tell nothing.",
        "3 events could not be written.",
        "7 leases had no room when it began; what they were is not known.",
    ]
    assert coverage.facts()["gaps"][0] == {"from": 50, "to": 100, "reason": "no agent ran"}
    assert coverage.facts()["uncovered"] == 7
    coverage.unreadable = "it is \x07 gone"
    assert coverage.lines() == ["Of the past nothing can be said: it is \\x07 gone."]


# --- events ---


def test_an_address_is_in_its_subnet_and_in_whatever_names_it() -> None:
    about = About("10.244.7.9")
    assert about.concerns(lease_record(1, "joined"))
    assert about.concerns(Record(1, "drift", {"entry": "route 10.244.7.0/24 nhid 1"}))
    assert not about.concerns(Record(1, "drift", {"entry": "fdb 02:00:00:00:00:02 dst 172.30.0.2", "port": 3}))
    assert About("02:00:00:00:00:02").concerns(Record(1, "drift", {"entry": "fdb 02:00:00:00:00:02 dst 1.2.3.4"}))
    assert About("10.244.0.0/16").concerns(lease_record(1, "joined"))


def test_a_peer_is_whatever_its_leases_name() -> None:
    about = About("172.30.0.2", learning=True)
    drift = Record(2, "drift", {"entry": "neighbour 10.244.7.0 lladdr 02:00:00:00:00:02"})
    fdb = Record(2, "drift", {"entry": "fdb 02:00:00:00:00:02 dst several"})
    assert not about.concerns(drift)
    assert about.concerns(lease_record(1, HELD))
    assert about.concerns(drift) and about.concerns(fdb)
    assert not about.concerns(lease_record(3, "joined", number=8, host=3))


def test_only_addresses_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match="neither an address nor a subnet"):
        About("h2")


def test_a_filter_takes_kinds_times_and_addresses_together() -> None:
    records = [lease_record(at, "joined", number=at) for at in range(1, 6)] + [Record(3, "drift", {"entry": "x"})]
    chosen = Filter(kinds_of(["peers"]), 2, 5, (About("10.244.0.0/16"),))
    assert [record.at for record in records if chosen.passes(record)] == [2, 3, 4]
    assert Filter().passes(records[0])
    assert not Filter().passes(lease_record(1, HELD)) and not Filter().passes(Record(1, BASE, {}))
    assert not Filter(frozenset({"left"})).passes(records[0])


def test_kinds_go_by_their_own_name_or_their_groups() -> None:
    assert kinds_of(["drift", "left"]) == {"drift", "firewall_altered", "notifications_lost", "left"}
    with pytest.raises(ValueError, match="groups are: agent, peers"):
        kinds_of(["nonsense"])


def test_a_line_is_for_people_and_harmless_to_a_terminal() -> None:
    record = lease_record(0, "changed", mtu=1400, before={"mtu": 1450}, away_since=-5)
    assert line_of(record, UTC) == (
        "1970-01-01 00:00:00+00:00  changed            subnets 10.244.7.0/24, hosts 172.30.0.2, "
        "macs 02:00:00:00:00:02, mtu 1400, before (mtu 1450), while nobody recorded it"
    )
    hostile = Record(0, "rejected", {"key": "a\x1b[2J\u202e", "reason": "no"})
    assert line_of(hostile, UTC).endswith("lease a\\x1b[2J\\u202e, reason no")
    assert json.loads(json_of(hostile)) == {"at": 0, "kind": "rejected", "key": "a\x1b[2J\u202e", "reason": "no"}
    assert plain("ok") == "ok"
