"""The journal's records: their lines survive only as they were written, and a key's turns can be told from them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.model import Guard, Route
from overlay.records import (
    HELD,
    KINDS,
    LOGGED,
    MAX_LINE,
    Event,
    Record,
    Standing,
    answer_of,
    author,
    decode,
    differences,
    encode,
    fingerprint,
    folded,
    standing_in,
    standing_of,
    turned,
)
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, pack_address

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FACTS = st.dictionaries(st.text(max_size=8).filter(lambda name: name not in ("at", "kind")), JSON, max_size=5)
RECORDS = st.builds(Record, st.integers(0, 2**40).map(lambda ms: ms / 1000), st.text(max_size=12), FACTS)


def lease(number: int, *, host: int = 0, mtu: int = 0, revision: int = 5) -> Lease:
    attrs = LeaseAttrs(bytes((10, 0, 0, host or number)), "vxlan", Vtep(1, bytes((2, 0, 0, 0, 0, number))), mtu=mtu)
    return Lease(Prefix.parse(f"10.244.{number}.0/24"), None, attrs, 77, revision, revision)


def key(number: int) -> str:
    return lease(number).key


def records_of(*events: tuple[float, Event | None]) -> list[Record]:
    return [Record(at, event.kind, event.facts) for at, event in events if event is not None]


# --- lines ---


@given(RECORDS)
def test_a_line_gives_the_record_back_unless_it_is_beyond_the_bounds(record: Record) -> None:
    line = encode(record)
    assert line.count(b"\n") == 1 and len(line) <= MAX_LINE
    found = decode(line)
    assert found is not None and (found.at, found.kind) == (record.at, record.kind)


@given(RECORDS, st.data())
def test_no_part_of_a_line_is_a_record(record: Record, data: st.DataObject) -> None:
    line = encode(record)
    assert decode(line[: data.draw(st.integers(0, len(line) - 1))]) is None


@given(RECORDS, st.data())
def test_no_line_with_a_flipped_bit_is_a_record(record: Record, data: st.DataObject) -> None:
    line = bytearray(encode(record))
    bit = data.draw(st.integers(0, 8 * len(line) - 1))
    line[bit // 8] ^= 1 << bit % 8
    # A hexadecimal digit may be of either case: the sum is the same, and so is the record.
    assert decode(bytes(line)) in (None, decode(encode(record)))
    assert bit // 8 < 8 or decode(bytes(line)) is None


@given(st.binary(max_size=200))
def test_bytes_that_nobody_wrote_are_no_record(data: bytes) -> None:
    assert decode(data) is None


@pytest.mark.parametrize(
    "body",
    [b"[]", b'"text"', b"{}", b'{"at": 1}', b'{"at": "1", "kind": "left"}', b'{"at": 1, "kind": 2}', b"[" * 9000,
     b'{"at": NaN, "kind": "left"}', b'{"at": true, "kind": "left"}', b'{"at": 1, "kind"'],
)  # fmt: skip
def test_a_line_with_the_right_sum_may_still_be_none_of_ours(body: bytes) -> None:
    import zlib

    assert decode(b"%08x %s\n" % (zlib.crc32(body), body)) is None


def test_facts_are_bounded_whatever_they_are() -> None:
    facts = {
        "text": "x" * 10_000, "list": list(range(1000)), "deep": {"a": {"b": {"c": {"d": 1}}}}, "nan": math.nan,
        "half": 0.5, "odd": 1j, "at": 99, "kind": "mine",
    }  # fmt: skip
    found = decode(encode(Record(1.0, "changed", facts)))
    assert found is not None and (found.at, found.kind) == (1.0, "changed")
    assert len(found.facts["text"]) == 300 and len(found.facts["list"]) == 16
    assert (found.facts["nan"], found.facts["half"], found.facts["odd"]) == (None, 0.5, "1j")
    assert isinstance(found.facts["deep"]["a"]["b"], str | dict)


def test_a_record_that_is_too_long_all_the_same_keeps_its_kind() -> None:
    facts = {f"n{number}": ["\u20ac" * 300] * 16 for number in range(16)}
    found = decode(encode(Record(1.0, "changed", facts)))
    assert found == Record(1.0, "changed", {"cut": True})


def test_what_the_log_is_asked_for_are_kinds() -> None:
    assert {kind for kinds in KINDS.values() for kind in kinds} >= LOGGED


# --- turns ---


def test_a_new_key_joins_and_a_missing_one_leaves_with_what_it_was() -> None:
    now = standing_of(lease(1))
    assert turned(key(1), None, now) == Event("joined", {"key": key(1), **now})
    assert turned(key(1), now, None) == Event("left", {"key": key(1), **now})
    assert turned(key(1), now, dict(now)) is None
    assert turned(key(1), None, None) is None


def test_a_change_says_what_it_is_now_and_what_was_otherwise() -> None:
    before, now = standing_of(lease(1, mtu=1450)), standing_of(lease(1, mtu=1400))
    event = turned(key(1), before, now)
    assert event == Event("changed", {"key": key(1), **now, "before": {"mtu": 1450}})


def test_another_host_takes_a_subnet_over() -> None:
    event = turned(key(1), standing_of(lease(1)), standing_of(lease(1, host=9)))
    assert event is not None and event.kind == "taken_over"
    assert event.facts["before"]["hosts"] == ["10.0.0.1"] and event.facts["hosts"] == ["10.0.0.9"]


def test_a_rejection_says_why_and_what_was_held_before() -> None:
    held, rejected = standing_of(lease(1)), standing_of("no")
    assert turned(key(1), None, rejected) == Event("rejected", {"key": key(1), "reason": "no"})
    assert turned(key(1), held, rejected) == Event("rejected", {"key": key(1), "reason": "no", "before": held})
    assert turned(key(1), rejected, held) == Event("joined", {"key": key(1), **held, "before": rejected})
    assert turned(key(1), rejected, None) == Event("left", {"key": key(1), "reason": "no"})
    assert turned(key(1), rejected, standing_of("why")) == Event("rejected", {"key": key(1), "reason": "why"})


def test_a_lease_of_two_families_is_told_whole() -> None:
    attrs = LeaseAttrs(
        pack_address("10.0.0.1"), "vxlan", Vtep(1, b"\2\0\0\0\0\1"), pack_address("fd00::1"), Vtep(1, b"\2\0\0\0\0\2")
    )
    both = Lease(Prefix.parse("10.244.1.0/24"), Prefix.parse("fd01::/64"), attrs, 0, 5, 5)
    assert standing_of(both) == {
        "subnets": ["10.244.1.0/24", "fd01::/64"], "hosts": ["10.0.0.1", "fd00::1"],
        "macs": ["02:00:00:00:00:01", "02:00:00:00:00:02"], "backend": "vxlan", "reserved": True, "created": 5,
    }  # fmt: skip


def test_of_a_key_that_is_longer_than_any_leases_nothing_is_told() -> None:
    assert turned("x" * 301, None, standing_of("not a subnet")) is None


# --- the base ---


def base_of(held: list[Record], later: list[Record]) -> list[Record]:
    """As it is on disk."""
    return [decoded for record in folded(held, later) if (decoded := decode(encode(record)))]


def standings(base: list[Record]) -> dict[str, object]:
    return {found[0]: found[1] for record in base if (found := standing_in(record))}


TURNS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(("none", "rejected", 1, 2, 3))), max_size=20)


@given(TURNS, st.integers(0, 20))
def test_a_base_says_how_each_key_stands_and_since_when_however_often_it_is_made(
    turns: list[tuple[int, str | int]], cut: int
) -> None:
    expected: dict[str, tuple[float, Standing]] = {}
    records = []
    for at, (number, kind) in enumerate(turns):
        since, before = expected.get(key(number), (0.0, None))
        now = None if kind == "none" else standing_of("no" if isinstance(kind, str) else lease(number, host=kind))
        records += records_of((float(at), turned(key(number), before, now)))
        if now is None:
            expected.pop(key(number), None)
        else:
            same = before is not None and before.get("hosts") == now.get("hosts")
            expected[key(number)] = since if same else float(at), now
    early, late = ([each for each in records if (each.at < cut) == first] for first in (True, False))
    base = base_of(base_of([], early), late)
    assert {record.facts["key"]: (record.at, standings([record])[record.facts["key"]]) for record in base} == expected
    assert all(record.kind == HELD for record in base)


def test_a_base_keeps_since_when_the_same_host_holds_it_and_what_is_in_doubt() -> None:
    first, second = standing_of(lease(1, mtu=1450)), standing_of(lease(1, mtu=1400))
    held = [Record(10.0, HELD, {"key": key(1), **first, "found": True})]
    later = [
        *records_of((20.0, turned(key(1), first, second))),
        Record(30.0, "drift", {"entry": "route"}),
        Record(31.0, "left", {"key": 7}),
        Record(32.0, "joined", {"key": key(2), **standing_of(lease(2, mtu=1400)), "away_since": 25.0}),
        *records_of((33.0, turned(key(2), standing_of(lease(2, mtu=1400)), standing_of(lease(2))))),
    ]
    assert base_of(held, later) == [
        Record(10.0, HELD, {"key": key(1), **second, "found": True}),
        Record(32.0, HELD, {"key": key(2), **standing_of(lease(2)), "away_since": 25.0}),
    ]


def test_what_differs_from_a_base_is_what_happened_since() -> None:
    held = [
        Record(1.0, HELD, {"key": key(number), **standing_of(lease(number))}) for number in (1, 2, 3)
    ] + [Record(1.0, "drift", {})]  # fmt: skip
    now: dict[str, Lease | str] = {key(1): lease(1), key(2): lease(2, host=9), key(4): lease(4), "x" * 301: "odd"}
    events = list(differences(held, now, complete=True))
    assert [(event.kind, event.facts["key"]) for event in events] == [
        ("taken_over", key(2)), ("left", key(3)), ("joined", key(4)),
    ]  # fmt: skip
    # What a base has no room for has not joined because it is not there.
    (*_, last) = differences(held, now, complete=False)
    assert last == Event(HELD, {"key": key(4), **standing_of(lease(4)), "found": True})


def test_a_fingerprint_tells_tables_apart() -> None:
    one: dict[str, Lease | str] = {key(1): lease(1), key(2): "no\ud800"}
    others: list[dict[str, Lease | str]] = [
        {}, {key(1): lease(1)}, {**one, key(2): "why"}, {**one, key(1): lease(1, revision=6)},
        {**one, key(1): lease(1, host=9)}, {**one, key(3): lease(3)},
    ]  # fmt: skip
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert len({fingerprint(each) for each in (one, *others)}) == len(others) + 1


# --- who did it ---


def test_the_author_is_whom_the_kernel_or_the_route_names() -> None:
    route = Route(Prefix.parse("10.244.1.0/24"))
    assert author(None, "nft") == {"by": "nft"}
    assert author(None, 77) == {"by": "unknown", "port": 77}
    assert author(route._replace(protocol=12), None) == {"by": "a program with routes of protocol bird"}
    assert author(route._replace(protocol=4), 77) == {"by": "unknown", "port": 77}
    assert author(Guard(b"1234"), None) == {"by": "unknown"}


def test_the_agents_answer_has_the_events_and_why_the_journal_fails() -> None:
    assert json.loads(answer_of([Record(1.0, "left", {"key": "k"})], "")) == {
        "events": [{"at": 1.0, "kind": "left", "key": "k"}], "failing": None,
    }  # fmt: skip
    assert json.loads(answer_of([], "No space left on device"))["failing"] == "No space left on device"
