"""The layout of `status` for people: what fits a terminal, what is spared, and what may reach a terminal at all."""

import dataclasses

import pytest

from overlay import status as view
from overlay.causes import Finding
from overlay.model import Entry, Guard, Key, Put, Refusal
from overlay.status_text import as_text, duration
from subnet_lease.model import NetworkConfig
from tests.unit.status_facts import DEVICE, FACTS, HOST_GW, LOCAL, document, entries, lease, standings


def dataplane(**changes: object) -> view.DataplanePart:
    assert FACTS.dataplane
    return {**FACTS.dataplane, **changes}  # type: ignore[typeddict-item]


def gap_of(*numbers: int) -> dict[Key, Entry | None]:
    return {entry[0]: None for number in numbers for entry in entries(lease(number))}


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_text_keeps_to_the_terminal(columns: int) -> None:
    names = [lease(number, "a-very-long-name-of-a-host.example.org") for number in (1, 2, 3)]
    problem = Finding("forwarding_off", "", ("net.ipv4.ip_forward = 0 " * 9,), {"setting": "net.ipv4.ip_forward"})
    found = document(standings(*names, gap=gap_of(1)), dataplane=dataplane(missing=5, surplus=1), problems=[problem])
    lines = as_text(found, columns).splitlines()
    assert max(map(len, lines)) <= columns
    assert "1 in the way" in as_text(found)


def test_text_of_a_wide_terminal_has_all_columns_and_a_narrow_one_spares_some() -> None:
    wide, narrow = as_text(document(), 200), as_text(document(), 40)
    assert "VTEP MAC" in wide and "MTU   " not in narrow.split("PEERS")[1] and "VTEP MAC" not in narrow
    assert "UNDERLAY" in narrow


def test_text_lists_those_amiss_and_says_how_many_more_there_are() -> None:
    leases = [lease(number) for number in range(1, 40)]
    found = document(standings(*leases, gap={entries(leases[30])[1][0]: None}), most=3)
    text = as_text(found)
    assert "PEERS 39: 38 programmed, 1 incomplete" in text and "and 35 more, all in order" in text
    assert "10.0.31.0/24 lacks fdb 02:00:00:00:00:1f dst 172.30.0.31" in text
    assert "and " not in as_text(document(standings(*leases))).split("PEERS 39")[1]


def test_many_peers_with_missing_entries_are_cut_and_counted() -> None:
    leases = [lease(number) for number in range(1, 71)]
    text = as_text(document(standings(*leases, gap=gap_of(*range(1, 71)))))
    assert "PEERS WITH MISSING ENTRIES 70" in text and "  and 6 more\n" in text


def test_measured_paths_have_columns_and_a_cause_stands_for_the_state() -> None:
    good: view.PathPart = {
        "reachable": True, "rtt_ms": 0.26, "loss": 0.0, "path_mtu": 1450, "path_verified_ago_s": 3.0, "cause": None,
    }  # fmt: skip
    bad: view.PathPart = {**good, "reachable": False, "rtt_ms": None, "loss": 1.0, "cause": "port_blocked"}
    paths = {lease(1).key: good, lease(2).key: bad}
    text = as_text(document(standings(lease(1), lease(2), lease(3), path=paths.get)))
    head, first, second, third = text.splitlines()[-4:]
    assert "RTT" in head and "PATH MTU" in head
    assert first.startswith("!  10.0.2.0/24") and "port_blocked" in first and "100%" in first
    assert "0.3 ms" in second and "programmed" in second
    assert third.split()[:5] == ["10.0.3.0/24", "172.30.0.3", "programmed", "-", "-"]
    assert "RTT" not in as_text(document())


def test_nothing_from_outside_reaches_a_terminal_but_printable_ascii() -> None:
    found = document(
        standings(lease(1, "\x1b[2J\u202e")),
        rejected=[("\x1b]0;x\a", "the name is '\u0430'")],
        rejected_count=9,
        problems=[Finding("lease_invalid", "\x1b[1m", ("\u0430\n",)), Finding("lease_invalid", "\x1b[2m")],
        agent={**FACTS.agent, "node_name": "\x1b[31m"},
    )
    text = as_text(found, 80)
    assert text.isascii() and all(line.isprintable() for line in text.splitlines())
    assert "and 8 more" in text


def test_problems_say_what_is_seen_and_what_mends_it() -> None:
    found = document(problems=[Finding("rp_filter", "flannel.1", ("the sight",), {"setting": "a.b", "interface": "i"})])
    lines = as_text(found).splitlines()
    assert lines[0] == "overlay on h1: DEGRADED"
    assert lines[1].startswith("  ! rp_filter: the strict reverse path filter of i ")
    assert lines[2] == "    seen: the sight"
    assert lines[3].startswith("    mend: Run `sudo sysctl -w a.b=2`")


def test_one_cause_with_many_subjects_is_told_once() -> None:
    found = document(problems=[Finding("fdb_wrong", f"10.0.{n}.0/24", (f"{n} is gone",)) for n in range(1, 9)])
    text = as_text(found)
    assert text.count("mend:") == 1 and text.count("fdb_wrong") == 1
    assert "    also: 10.0.2.0/24, 10.0.3.0/24, 10.0.4.0/24 and 4 more" in text
    two = as_text(document(problems=[Finding("fdb_wrong", "10.0.1.0/24"), Finding("fdb_wrong", "", what="another")]))
    assert "    also: another\n" in two


def test_evidence_that_says_the_same_is_left_out() -> None:
    text = as_text(document(problems=[Finding("lease_invalid", "k", ("it is bad",), what="it is bad")]))
    assert text.count("it is bad") == 1


def test_colours_mark_the_verdict_and_the_problems_only_if_wanted() -> None:
    found = document(problems=[Finding("rp_filter")])
    assert "\033[1;33mDEGRADED\033[0m" in as_text(found, colour=True)
    assert "\033" not in as_text(found)


def test_text_says_what_is_not_known_or_missing() -> None:
    found = document(
        [], lease_left=None, etcd={"connected": False, "data_age_s": None, "revision": 0, "reason": "no"},
        devices=[("flannel.1", None)], checksums={}, refused=[Refusal(Put(Guard(LOCAL)), 1)],
        dataplane=dataplane(last_change=None), config=HOST_GW, nexthops=False,
        firewall={"guard": "off", "strangers": None, "impostors": None, "strays": None},
        underlay=dataclasses.replace(FACTS.underlay, runner_up=""),
    )  # fmt: skip
    text = as_text(found)
    for said in ("not confirmed by etcd", "AWAY, no data yet", "flannel.1 is missing", "plain gateways", "guard off",
                 "guard 172.30.0.200: EPERM", "PEERS 0"):  # fmt: skip
        assert said in text


def test_long_changes_are_told_in_seconds_and_large_numbers_can_be_read() -> None:
    change: view.ChangePart = {"ago_s": 5.0, "took_ms": 1459.4, "put": 75000, "dropped": 0, "refused": 0}
    text = as_text(document(dataplane=dataplane(wanted=75000, last_change=change)))
    assert "75,000 of 75,000 in place" in text and "5 s ago, in 1.5 s: 75,000 put" in text


def test_commands_are_not_broken_at_their_hyphens() -> None:
    found = document(problems=[Finding("agent_stalled")])
    for columns in range(60, 90):
        assert "overlay-agent doctor" in as_text(found, columns).replace("\n          ", " ")


def test_age_of_data_is_told_while_etcd_is_away() -> None:
    text = as_text(document(etcd={"connected": False, "data_age_s": 90.0, "revision": 7, "reason": "no"}))
    assert "AWAY, data 1 min 30 s old, revision 7" in text


def test_reserved_leases_direct_routing_and_devices_that_are_down_are_told() -> None:
    direct = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan","DirectRouting":true}}')
    down = dataclasses.replace(DEVICE, up=False)
    text = as_text(document(lease=lease(200, etcd_lease=0), config=direct, devices=[("flannel.1", down)]))
    assert "reserved" in text and "with direct routing" in text and "flannel.1 DOWN" in text


def test_what_is_not_known_at_all_takes_no_lines() -> None:
    found = view.from_kernel(Finding("agent_not_running"), [], [])
    text = as_text(found)
    assert text.splitlines()[0] == "overlay: DOWN" and "read from it: no agent answers" in text
    found["peers"] = None
    assert "PEERS" not in as_text(found)


def test_document_of_another_schema_still_tells_the_verdict() -> None:
    found = document(problems=[Finding("rp_filter")])
    found["schema"] = 2
    text = as_text(found, 80)
    assert "DEGRADED" in text and "rp_filter" in text and "of schema 2" in text and "PEERS" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (86399, "23 h 59 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
