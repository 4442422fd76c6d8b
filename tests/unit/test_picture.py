"""The document of the web page: what is said of a cluster of any size, and that it stays small."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import picture
from overlay.picture import (
    ALL,
    DEGRADED,
    DOWN,
    FRESH_S,
    HEALTHY,
    UNKNOWN,
    Asked,
    Facts,
    Path,
    Paths,
    Report,
    asked,
    document,
)
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, pack_address

STATUS = {"schema": 1, "health": "healthy", "agent": {"node_name": "here"}, "network": {"blocks": ["10.0.0.0/8"]}}

FINE = Path(True, 0.41234, 0.0, 1450, "", 3.0)
LOSSY = Path(True, 5.0, 0.25, 1450, "", 3.0)
SILENT = Path(False, None, 1.0, None, "peer_down", 3.0)


def lease(number: int, name: str = "", *, ipv6: bool = False) -> Lease:
    subnet = Prefix(bytes((10, number >> 8, number & 255, 0)), 24)
    subnet6 = Prefix.parse(f"fd00:{number:x}::/64") if ipv6 else None
    vtep = Vtep(1, b"\x02\x00" + number.to_bytes(4, "big"))
    vtep6 = Vtep(1, b"\x06\x00" + number.to_bytes(4, "big")) if ipv6 else None
    attrs = LeaseAttrs(
        bytes((172, 16, number >> 8, number & 255)),
        "vxlan",
        vtep,
        pack_address(f"fd30::{number:x}") if ipv6 else None,
        vtep6,
        1450 if number % 2 else 0,
        name,
    )
    return Lease(subnet, subnet6, attrs, number, number, number)


def key(number: int) -> str:
    return lease(number).key


def facts(number: int, **other: Any) -> Facts:
    """This host is number 1, so many peers follow."""
    found = {key(each): lease(each) for each in range(2, number + 2)}
    return Facts(**{"made_at": 1000.0, "status": STATUS, "own": lease(1), "peers": found, **other})


def telling(published: Mapping[str, Paths]) -> dict[str, Any]:
    """Facts of peers that published these paths."""

    def towards(target: str) -> Paths:
        return {source: paths[target] for source, paths in published.items() if target in paths}

    return {"published": lambda source: published.get(source, {}), "towards": towards}


def shown(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(host["key"], host["health"]) for host in made["hosts"]]


# --- who fares how ---


def test_worst_hosts_come_first_and_each_kind_by_subnet() -> None:
    paths = {key(2): FINE, key(3): SILENT, key(4): LOSSY, key(7): FINE}
    made = document(
        facts(6, paths=paths, lacking={key(7): ["route 10.0.7.0/24"]}, unreachable=[key(6)]),
    )
    assert shown(made) == [
        (key(3), DOWN),
        (key(6), DOWN),
        (key(7), DOWN),
        (key(4), DEGRADED),
        (key(5), UNKNOWN),
        (key(2), HEALTHY),
    ]
    assert made["counts"] == {DOWN: 3, DEGRADED: 1, UNKNOWN: 1, HEALTHY: 1}
    assert [host["state"] for host in made["hosts"]] == [
        "programmed",
        "unreachable",
        "incomplete",
        "programmed",
        "programmed",
        "programmed",
    ]


@pytest.mark.parametrize(
    ("path", "health"),
    [
        (None, UNKNOWN),
        (FINE, HEALTHY),
        (LOSSY, DEGRADED),
        (SILENT, DOWN),
        (FINE._replace(cause="path_mtu"), DEGRADED),
        (FINE._replace(reachable=None), UNKNOWN),
        (SILENT._replace(age_s=FRESH_S + 1), UNKNOWN),
    ],
)
def test_a_path_counts_as_long_as_it_is_fresh(path: Path | None, health: str) -> None:
    assert picture.path_health(path) == health


@pytest.mark.parametrize(
    ("says", "age", "path", "health"),
    [
        ("down", 5.0, FINE, DEGRADED),
        ("degraded", 5.0, None, DEGRADED),
        ("degraded", 5.0, SILENT, DOWN),
        ("down", FRESH_S + 1, FINE, HEALTHY),
        ("healthy", 5.0, FINE, HEALTHY),
        (None, 5.0, None, UNKNOWN),
    ],
)
def test_a_host_that_says_it_is_ill_is_at_best_degraded(
    says: str | None, age: float, path: Path | None, health: str
) -> None:
    made = document(facts(1, paths={key(2): path} if path else {}, reports={key(2): Report(says, age)}))
    assert shown(made) == [(key(2), health)]
    assert made["hosts"][0]["says"] == {"health": says, "ago_s": age}


def test_what_was_not_measured_is_null() -> None:
    made = document(facts(1))
    assert made["measured"] is False
    assert (made["hosts"][0]["path"], made["hosts"][0]["says"], made["hosts"][0]["changed_ago_s"]) == (None, None, None)
    assert document(facts(1, paths={}))["measured"] is True
    unmeasured = Path(None, None, None, None, "", 1.0)
    assert document(facts(1, paths={key(2): unmeasured}))["hosts"][0]["path"] == {
        "health": UNKNOWN,
        "reachable": None,
        "rtt_ms": None,
        "loss": None,
        "mtu": None,
        "cause": None,
        "ago_s": 1.0,
    }


def test_this_host_fares_as_its_status_says_and_has_a_row_of_its_own() -> None:
    made = document(facts(0, own=lease(1, "here")))
    assert (made["here"]["name"], made["here"]["health"], made["here"]["mtu"]) == ("here", HEALTHY, 1450)
    assert document(facts(0, status={"health": "odd"}))["here"]["health"] == UNKNOWN


def test_a_row_says_when_the_lease_changed() -> None:
    made = document(facts(2, changed={2: 7.5}.get))
    assert [host["changed_ago_s"] for host in made["hosts"]] == [7.5, None]


def test_a_row_has_both_families_and_what_is_missing_in_parts() -> None:
    missing = [f"route {number}" for number in range(20)]
    two = lease(2, "n" * 999, ipv6=True)
    made = document(facts(0, peers={two.key: two}, lacking={two.key: missing}))
    host = made["hosts"][0]
    assert host["subnets"] == ["10.0.2.0/24", "fd00:2::/64"]
    assert host["underlay"] == ["172.16.0.2", "fd30::2"]
    assert host["macs"] == ["02:00:00:00:00:02", "06:00:00:00:00:02"]
    assert (len(host["missing"]), host["missing_count"], host["mtu"]) == (picture.MOST_MISSING, 20, None)
    assert len(host["name"]) == picture.MOST_TEXT


def test_an_agent_that_starts_or_whose_reconciler_is_silent_has_no_hosts() -> None:
    made = document(Facts(made_at=1.0, status={"health": "down"}))
    assert (made["here"], made["counts"], made["hosts"], made["events"]) == (None, None, [], None)
    without_lease = document(facts(1, own=None))
    assert (without_lease["here"], without_lease["host"], shown(without_lease)) == (None, None, [(key(2), UNKNOWN)])


# --- parts of it ---


def test_a_query_is_taken_by_its_parts() -> None:
    assert asked("find=+10.0.2.9&start=5&most=7&host=10.0.2.0-24") == Asked("10.0.2.9", 5, 7, "10.0.2.0-24")
    assert asked("") == ALL
    assert asked("start=-1&most=many&start=3") == ALL
    assert asked("&".join("a=b" for _ in range(99))) == ALL
    assert asked("most=99999&start=12345678901").most == picture.MOST_HOSTS


@given(st.text())
def test_no_query_is_too_odd(query: str) -> None:
    found = asked(query)
    assert len(found.find) <= picture.MOST_TEXT
    assert 0 <= found.most <= picture.MOST_HOSTS
    picture.encode(document(facts(3), found))


def test_the_hosts_asked_for_are_listed_and_the_last_if_there_are_fewer() -> None:
    made = document(facts(9), Asked(start=4, most=3))
    assert (made["start"], [host["key"] for host in made["hosts"]]) == (4, [key(6), key(7), key(8)])
    made = document(facts(9), Asked(start=400, most=3))
    assert (made["start"], [host["key"] for host in made["hosts"]]) == (6, [key(8), key(9), key(10)])
    assert document(facts(0), Asked(start=400))["start"] == 0


def test_a_document_of_many_hosts_that_all_measure_is_small() -> None:
    peers = 15_000
    name = "a-node-with-a-long-name.example.org"
    found = {key(number): lease(number, name) for number in range(2, peers + 2)}
    paths = dict.fromkeys(found, FINE)
    reports = dict.fromkeys(found, Report("healthy", 1.0))
    events = [(1.0, "drift", {"entry": "x" * 9999, "by": ["y" * 9999] * 99}) for _ in range(999)]
    made = document(
        facts(
            0,
            peers=found,
            paths=paths,
            reports=reports,
            events=events,
            **telling(dict.fromkeys(list(found)[:1000], paths)),
        )
    )
    assert sum(made["counts"].values()) == peers
    assert len(picture.encode(made)) < 200_000
    assert len(picture.encode(document(facts(0, peers=found)))) < 40_000


# --- paths ---


def test_pairs_tell_what_this_host_measured_and_what_others_published() -> None:
    told = {key(2): {key(1): LOSSY, key(3): FINE, "9.9.9.0-24": FINE}, "8.8.8.0-24": {key(1): FINE}}
    made = document(facts(2, paths={key(2): FINE, key(3): SILENT}, **telling(told)))
    place = {host["key"]: number for number, host in enumerate(made["hosts"], 1)}
    two, three = place[key(2)], place[key(3)]
    assert sorted(made["pairs"]) == sorted(
        [
            [0, two, HEALTHY, 0.412, 0.0, 1450, None, 3.0],
            [0, three, DOWN, None, 1.0, None, "peer_down", 3.0],
            [two, 0, DEGRADED, 5.0, 0.25, 1450, None, 3.0],
            [two, three, HEALTHY, 0.412, 0.0, 1450, None, 3.0],
        ]
    )


def test_pairs_leave_out_a_path_to_oneself_and_this_host_before_it_has_a_lease() -> None:
    told = {key(2): {key(2): FINE, key(3): FINE}}
    made = document(facts(2, own=None, paths={key(2): FINE}, **telling(told)))
    assert shown(made) == [(key(3), UNKNOWN), (key(2), HEALTHY)]
    assert [pair[:2] for pair in made["pairs"]] == [[2, 1]]


def test_the_host_that_is_looked_at_comes_with_its_paths_worst_first() -> None:
    told = {key(2): {key(1): FINE, key(3): LOSSY, key(4): SILENT, key(5): UNMEASURED}}
    everything = facts(4, own=lease(1, "one"), paths={key(2): FINE}, **telling(told))
    assert everything.peers is not None
    everything = replace(everything, peers={**everything.peers, key(3): lease(3, "three")})
    host = document(everything, Asked(host=key(2)))["host"]
    assert (host["key"], host["health"]) == (key(2), HEALTHY)
    assert [(path["key"], path["name"], path["health"]) for path in host["outward"]] == [
        (key(4), None, DOWN),
        (key(3), "three", DEGRADED),
        (key(5), None, UNKNOWN),
        (key(1), "one", HEALTHY),
    ]
    assert [path["key"] for path in host["inward"]] == [key(1)]
    silent = document(everything, Asked(host=key(3)))["host"]
    assert (silent["outward"], [path["key"] for path in silent["inward"]]) == ([], [key(2)])


UNMEASURED = Path(None, None, None, None, "", 1.0)


def test_this_host_is_looked_at_unless_another_is() -> None:
    everything = facts(2, paths={key(2): FINE})
    for chosen in ("", key(1)):
        host = document(everything, Asked(host=chosen))["host"]
        assert (host["key"], [path["key"] for path in host["outward"]]) == (key(1), [key(2)])
    assert document(everything, Asked(host="9.9.9.0-24"))["host"] is None
    assert document(facts(1), Asked(host=key(1)))["host"]["outward"] == []


# --- search ---


@pytest.mark.parametrize(
    ("text", "kind", "found", "here"),
    [
        ("10.0.3.7", "address", [3], False),
        ("10.0.1.7", "address", [], True),
        ("172.16.0.2", "address", [2], False),
        ("10.9.9.9", "address", [], False),
        ("10.0.2.0/23", "subnet", [2, 3], False),
        ("10.0.2.9/23", "subnet", [2, 3], False),
        ("02:00:00:00:00:03", "mac", [3], False),
        ("10.0.", "text", [2, 3, 4], True),
        ("172.16.0.4", "address", [4], False),
        ("172.16.0.", "text", [2, 3, 4], True),
        ("THREE", "text", [3], False),
        ("<script>", "text", [], False),
    ],
)
def test_search_finds_who_holds_it(text: str, kind: str, found: list[int], here: bool) -> None:
    peers = {key(2): lease(2), key(3): lease(3, "number-Three"), key(4): lease(4)}
    made = document(facts(0, peers=peers), Asked(find=text))
    assert [host["key"] for host in made["hosts"]] == [key(number) for number in found]
    assert (made["search"]["kind"], made["search"]["here"]) == (kind, here)
    assert made["search"]["counts"][UNKNOWN] == len(found)
    assert made["counts"][UNKNOWN] == 3


def test_search_knows_what_lies_in_the_overlay_and_holds_of_both_families() -> None:
    two = lease(2, ipv6=True)
    for text, inside in (("10.99.0.1", True), ("192.0.2.1", False), ("10.0.", False)):
        assert document(facts(1), Asked(find=text))["search"]["inside"] is inside
    for text in ("fd00:2::5", "fd30::2", "06:00:00:00:00:02", "fd30:"):
        made = document(facts(0, peers={two.key: two}, status={}), Asked(find=text))
        assert len(made["hosts"]) == 1, text
        assert made["search"]["inside"] is False
    assert document(facts(1, own=None), Asked(find="10.0.1.7"))["search"]["here"] is False


# --- events ---


def test_events_become_text_of_bounded_length() -> None:
    facts_of = {"entry": "route", "found": None, "names": ["a", 2], "before": {"mtu": 1450}}
    events = [(5.0, "drift", facts_of), (6.0, "started", {})]
    made = document(facts(0, events=events))
    assert made["events"] == [
        {
            "at": 5.0,
            "kind": "drift",
            "facts": {"entry": "route", "found": "None", "names": "a, 2", "before": "mtu: 1450"},
        },
        {"at": 6.0, "kind": "started", "facts": {}},
    ]
    much = {f"{number:03}" * 99: "x" * 999 for number in range(99)}
    many = document(facts(0, events=[(1.0, "x" * 999, much)] * 999))["events"]
    found = len(many), len(many[0]["kind"]), len(many[0]["facts"])
    assert found == (picture.MOST_EVENTS, picture.MOST_TEXT, picture.MOST_FACTS)


def test_the_encoding_is_json_whatever_names_hold() -> None:
    odd = "</script><script>alert(1)</script>\u2028\ud800\u0000"
    made = picture.encode(document(facts(0, peers={key(2): lease(2, odd)})))
    assert json.loads(made)["hosts"][0]["name"] == odd
    assert made.isascii()
