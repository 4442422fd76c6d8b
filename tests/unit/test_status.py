"""The document of `status`: of the host and its peers, of the kernel alone, and its JSON against docs/status.md."""

import dataclasses
import json
import re
from pathlib import Path
from typing import get_type_hints

import pytest

from overlay import status as view
from overlay.causes import CAUSES, Finding
from overlay.checksums import Finding as ChecksumFinding
from overlay.checksums import Verdict
from overlay.model import Entry, Fdb, Guard, Key, Neighbour, Put, Refusal, Route
from subnet_lease.model import Lease, Prefix, Vtep
from tests.unit.status_facts import (
    CONFIG,
    DEVICE,
    FACTS,
    HOST_GW,
    LOCAL,
    document,
    entries,
    lease,
    mac,
    path_to,
    standings,
)

SILENCE = Finding("agent_not_running", "", ("nobody listens",))

# --- the host ----------------------------------------------------------------------------------------------------


def test_host_in_order_is_healthy_and_has_no_problem() -> None:
    found = document()
    assert (found["health"], found["problems"], found["schema"]) == ("healthy", [], 1)
    assert view.EXIT_CODES == {"healthy": 0, "degraded": 1, "down": 2}


def test_worst_problem_decides_the_health_and_each_says_what_mends_it() -> None:
    found = document(problems=[Finding("rp_filter", values={"setting": "s"}), Finding("lease_lost")])
    assert found["health"] == "down"
    assert [problem["cause"] for problem in found["problems"]] == ["rp_filter", "lease_lost"]
    assert found["problems"][0] == {
        "cause": "rp_filter",
        "severity": "degraded",
        "subject": None,
        "what": found["problems"][0]["what"],
        "evidence": [],
        "remedy": found["problems"][0]["remedy"],
    }
    assert "sysctl -w s=2" in found["problems"][0]["remedy"]
    assert document(problems=[Finding("rp_filter")])["health"] == "degraded"


def test_parts_of_the_host_are_told() -> None:
    found = document()
    assert found["lease"] == {"subnets": ["10.0.200.0/24"], "reserved": False, "left_s": 86400.0}
    assert found["network"] == {
        "blocks": ["10.0.0.0/8"], "backend": "vxlan", "direct_routing": False, "nexthop_objects": True,
        "vni": 1, "port": 8472, "mtu": 1450,
    }  # fmt: skip
    assert found["devices"] == [
        {
            "name": "flannel.1", "up": True, "mac": "02:00:00:00:00:01", "mtu": 1450, "vni": 1, "port": 8472,
            "local": "172.30.0.200", "addresses": ["10.0.200.0/32"], "checksum_offload": "on: TCP and UDP arrive",
        }
    ]  # fmt: skip
    assert found["underlay"] == {
        "interface": "eth0", "addresses": ["172.30.0.200"], "mtu": 1500, "why": "the default route's",
        "runner_up": "eth1",
    }  # fmt: skip


def test_what_does_not_apply_or_is_missing_is_null() -> None:
    found = document(config=HOST_GW, lease=None, devices=[("flannel.1", None)], checksums={}, dataplane=None)
    assert found["lease"] is None and found["dataplane"] is None
    assert found["network"] and (found["network"]["vni"], found["network"]["port"]) == (None, None)
    (device,) = found["devices"]
    assert {key for key, value in device.items() if value not in (None, [])} == {"name"}


def test_refused_entries_and_rejected_leases_are_cut_and_counted() -> None:
    refused = [Refusal(Put(entries(lease(2))[4]), 17), Refusal(Put(entries(lease(2))[1]), 9999)]
    found = document(refused=refused * 40, rejected=[("k" * 100, "bad")], rejected_count=7)
    assert (len(found["refused"]), found["refused_count"], found["rejected_count"]) == (view.MOST_LISTED, 80, 7)
    assert [each["error"] for each in found["refused"][:2]] == ["EEXIST", "9999"]
    assert found["rejected"] == [{"key": "k" * view.MAX_KEY, "reason": "bad"}]


def test_agent_that_starts_has_problems_and_little_else() -> None:
    text = "".join(view.pieces(view.starting(FACTS.agent, [Finding("config_missing")]), ()))
    found = json.loads(text)
    assert (found["health"], found["agent"]["pid"], found["lease"], found["peers"]) == ("down", 47, None, [])


# --- peers -------------------------------------------------------------------------------------------------------


def test_peers_come_worst_first_and_then_by_subnet() -> None:
    leases = [lease(number) for number in (9, 4, 3, 2, 7, 8)]
    gap: dict[Key, Entry | None] = {entries(lease(4))[4][0]: None, entries(lease(4))[2][0]: None}
    bad: view.PathPart = {
        "reachable": False, "rtt_ms": None, "loss": 1.0, "path_mtu": None, "path_verified_ago_s": 3.0,
        "cause": "port_blocked",
    }  # fmt: skip
    paths = {lease(8).key: bad, lease(9).key: {**bad, "reachable": True, "cause": None}}
    found = standings(*leases, gap=gap, unreachable={lease(3).key}, path=lambda key: paths.get(key))  # type: ignore[arg-type,return-value]
    assert [(each.lease.create_revision, each.state) for each in found] == [
        (4, "incomplete"),
        (3, "unreachable"),
        (8, "programmed"),
        (2, "programmed"),
        (7, "programmed"),
        (9, "programmed"),
    ]
    assert view.counts(found) == {"total": 6, "programmed": 4, "incomplete": 1, "unreachable": 1}
    rows = list(view.peer_rows(found, lambda revision: 7.5 if revision == 4 else None))
    assert rows[0]["missing"] == [str(entries(lease(4))[2]), str(entries(lease(4))[4])]
    assert [row["changed_ago_s"] for row in rows[:2]] == [7.5, None]
    assert rows[2]["cause"] == "port_blocked" and "cause" not in rows[3]
    assert [peer.lease.create_revision for peer in view.chosen(found, 1)] == [4, 3, 8, 2]
    assert [peer.lease.create_revision for peer in view.chosen(found, 0)] == [4, 3, 8]
    assert len(list(view.chosen(found, None))) == 6


def test_what_was_measured_of_a_path_is_told_in_the_units_of_the_document() -> None:
    assert view.path_part(path_to(2, "path_mtu", mtu=1370), 8.0) == {
        "reachable": False, "rtt_ms": 2.0, "loss": 0.25, "path_mtu": 1370, "path_verified_ago_s": 3.0,
        "cause": "path_mtu",
    }  # fmt: skip
    fine = view.path_part(path_to(2, "")._replace(rtt_median=None), 8.0)
    assert fine == {
        "reachable": True, "rtt_ms": None, "loss": 0.25, "path_mtu": None, "path_verified_ago_s": None, "cause": None,
    }  # fmt: skip


def test_lease_without_entries_is_incomplete_unless_there_is_nothing_to_program() -> None:
    peers = [(lease(1).key, lease(1))]
    assert [each.state for each in view.standings(peers, {}, set(), {})] == ["incomplete"]
    assert [each.state for each in view.standings(peers, {}, set(), {}, routes=False)] == ["programmed"]


def test_names_of_peers_are_texts_or_null() -> None:
    named, unnamed = view.peer_rows(standings(lease(1, "worker"), lease(2)), lambda revision: None)
    assert (named["node_name"], unnamed["node_name"]) == ("worker", None)


def test_peers_are_null_where_they_are_not_asked_for() -> None:
    assert json.loads("".join(view.pieces(view.head(FACTS), None)))["peers"] is None


def test_large_answers_come_in_pieces_and_make_one_document() -> None:
    peers = standings(*(lease(number) for number in range(1, 201)))
    found = list(view.pieces(view.head(FACTS), view.peer_rows(peers, lambda revision: None)))
    assert len(found) == 6 and max(map(len, found)) < 64 * 400
    assert len(json.loads("".join(found))["peers"]) == 200


# --- the schema --------------------------------------------------------------------------------------------------


def test_every_key_is_documented_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "docs/status.md").read_text()
    parts = [view.Document, view.Problem, view.AgentPart, view.LeasePart, view.NetworkPart, view.DevicePart,
             view.UnderlayPart, view.EtcdPart, view.DataplanePart, view.ChangePart, view.RefusedPart,
             view.RejectedPart, view.FirewallPart, view.CountsPart, view.PeerPart]  # fmt: skip
    documented = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    assert documented == {key for part in parts for key in get_type_hints(part)}


def test_what_is_measured_of_a_peer_is_optional_in_its_row() -> None:
    measured = get_type_hints(view.PathPart).keys()
    assert measured == view.PeerPart.__optional_keys__


# --- the kernel alone --------------------------------------------------------------------------------------------


def causes_of(found: view.Document) -> list[tuple[str, str | None]]:
    assert {problem["cause"] for problem in found["problems"]} <= CAUSES.keys()
    return [(problem["cause"], problem["subject"]) for problem in found["problems"]]


def test_kernel_alone_tells_which_peers_are_complete() -> None:
    stand = [*entries(lease(1)), *entries(lease(2))]
    found = view.from_kernel(SILENCE, [DEVICE], stand)
    assert found["health"] == "down" and causes_of(found) == [("agent_not_running", None)]
    assert found["problems"][0]["evidence"] == ["nobody listens"]
    first, second = found["peers"] or ()
    assert (first["subnets"], first["underlay"], first["macs"], first["state"], first["entries"]) == (
        ["10.0.1.0/24"], ["172.30.0.1"], ["02:00:00:00:00:01"], "programmed", 4,
    )  # fmt: skip
    assert second["state"] == "programmed"
    assert found["peer_counts"] == {"total": 2, "programmed": 2, "incomplete": 0, "unreachable": 0}


@pytest.mark.parametrize(
    ("without", "missing", "cause", "subject"),
    [
        (1, "fdb 02:00:00:00:00:02", "fdb_wrong", "10.0.2.0/24"),
        (2, "neighbour 10.0.2.0", "neighbour_wrong", "10.0.2.0/24"),
        (3, "nexthop 1862271488", "route_wrong", "10.0.2.0/24"),
        (4, "route via 10.0.2.0", "route_wrong", None),
    ],
)
def test_kernel_alone_shows_the_entry_that_is_missing(
    without: int, missing: str, cause: str, subject: str | None
) -> None:
    stand = [*entries(lease(1)), *(entry for entry in entries(lease(2)) if entry != entries(lease(2))[without])]
    found = view.from_kernel(SILENCE, [DEVICE], stand)
    assert found["peers"] is not None
    assert [peer["state"] for peer in found["peers"]] == ["incomplete", "programmed"]
    assert found["peers"][0]["missing"] == [missing]
    assert causes_of(found) == [("agent_not_running", None), (cause, subject)]


def test_device_that_is_down_has_no_routes_and_that_is_no_further_problem() -> None:
    down = dataclasses.replace(DEVICE, up=False)
    stand = [entry for entry in entries(lease(1)) if not isinstance(entry, Route)]
    found = view.from_kernel(SILENCE, [down], stand)
    assert causes_of(found) == [("agent_not_running", None), ("device_down", None)]
    assert found["problems"][1]["evidence"] == ["flannel.1 is down"]


def test_kernel_alone_tells_direct_routes_and_several_remotes_and_leaves_out_what_is_not_ours() -> None:
    direct = Route(Prefix.parse("10.0.9.0/24"), 0, bytes((172, 30, 0, 9)), 2)
    blackhole = Route(Prefix.parse("10.0.8.0/24"))
    foreign = Route(Prefix.parse("10.0.7.0/24"), 0, bytes((172, 30, 0, 7)), 2, protocol=4)
    several = [Fdb(each.at, b"") if isinstance(each, Fdb) else each for each in entries(lease(3))]
    stranger = Neighbour((2, bytes((10, 0, 77, 0))), mac(7))
    found = view.from_kernel(SILENCE, [DEVICE], [*several, direct, blackhole, foreign, stranger])
    assert [(peer["subnets"], peer["underlay"]) for peer in found["peers"] or ()] == [
        (["10.0.3.0/24"], []),
        (["10.0.8.0/24"], []),
        (["10.0.9.0/24"], ["172.30.0.9"]),
    ]


def test_checksums_that_were_not_examined_are_null() -> None:
    found = document(checksums={"flannel.1": ChecksumFinding(Verdict.ELSEWHERE, LOCAL, frozenset({"TCP"}))})
    assert "TCP is lost" in (found["devices"][0]["checksum_offload"] or "")
    assert document(checksums={})["devices"][0]["checksum_offload"] is None


def test_entries_are_those_of_the_leases() -> None:
    made = lease(5)
    assert isinstance(made, Lease) and made.attrs.vtep == Vtep(1, mac(5))
    assert isinstance(entries(made)[0], Guard) and CONFIG.backend.type == "vxlan"
