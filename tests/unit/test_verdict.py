"""Which cause an agent names for what it knows: its own for each trouble, and none for a host in order."""

import errno
from typing import Any

import pytest

from overlay import causes, verdict
from overlay.causes import CAUSES, Finding
from overlay.model import PROTOCOL_BOOT, Drop, Entry, Key, Put, Refusal, Route
from overlay.probe import Path
from overlay.verdict import Known, of_host, of_refusals, of_rejection, of_unreachable, starting
from subnet_lease.model import Prefix
from subnet_lease.table import CLASHES, Reason
from tests.unit.status_facts import entries, lease, path_to

DEVICES = {"flannel.1": True}
HEALTHY = Known("/net", "http://e:2379", left=86400.0, margin=3600.0, devices=DEVICES, underlay=("eth0", True))


def known(**changes: Any) -> Known:
    return Known(**{**{name: getattr(HEALTHY, name) for name in HEALTHY.__slots__}, **changes})


def found(**changes: Any) -> list[Finding]:
    return causes.roots(of_host(known(**changes)))


def test_host_in_order_has_no_finding() -> None:
    assert found() == []
    assert found(left=None) == [] and found(left=float("inf")) == []
    assert found(underlay=("eth0", None)) == [], "that it is gone is told with the reason"


@pytest.mark.parametrize(
    ("changes", "cause", "severity"),
    [
        ({"stalled": {"reconciler": "busy for 99 s"}}, "agent_stalled", "down"),
        ({"etcd": ("etcd_denied", "user")}, "etcd_denied", "degraded"),
        ({"exhausted": "all 9 are taken"}, "subnets_exhausted", "degraded"),
        ({"left": 0.0}, "lease_lost", "down"),
        ({"left": 1799.0}, "lease_expiring", "degraded"),
        ({"devices": {"flannel.1": None}}, "device_missing", "down"),
        ({"devices": {"flannel.1": False}}, "device_down", "down"),
        ({"devices": {"flannel.1": False}, "occupied": True, "trouble": "a bridge"}, "device_missing", "down"),
        ({"underlay": ("eth0", False)}, "device_down", "down"),
        ({"underlay_gone": "no interface has it"}, "underlay_choice", "degraded"),
        ({"trouble": "set up device: busy"}, "entries_refused", "down"),
        ({"ready": False}, "agent_starting", "down"),
        ({"others": [Finding("forwarding_off", values={"setting": "s", "value": "0"})]}, "forwarding_off", "down"),
        ({"waiting": starting("a subnet")}, "agent_starting", "down"),
        ({"waiting": starting("the configuration", "etcd_unreachable")}, "etcd_unreachable", "down"),
    ],
)
def test_each_trouble_has_its_cause(changes: dict[str, Any], cause: str, severity: str) -> None:
    (finding,) = found(**changes)
    assert (finding.cause, causes.severity(finding)) == (cause, severity)
    assert finding.cause in CAUSES
    assert set(causes.placeholders(CAUSES[cause].what)) <= finding.values.keys()


@pytest.mark.parametrize("trouble", [{"etcd": ("etcd_unreachable", "")}, {"exhausted": "all are taken"}])
def test_cause_of_a_lost_lease_is_as_grave_as_the_loss(trouble: dict[str, Any]) -> None:
    (finding,) = found(left=0.0, **trouble)
    assert finding.cause in ("etcd_unreachable", "subnets_exhausted") and causes.severity(finding) == "down"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"devices": {"flannel.1": None}, "trouble": "set up device: busy", "ready": False}, "device_missing"),
        ({"devices": {"flannel.1": False}, "ready": False}, "device_down"),
        ({"underlay": ("eth0", False), "underlay_gone": "it is down", "etcd": ("etcd_unreachable", "")}, "device_down"),
        ({"etcd": ("etcd_unreachable", ""), "left": 9.0}, "etcd_unreachable"),
        ({"stalled": {"reconciler": "busy"}, "ready": False}, "agent_stalled"),
    ],
)
def test_consequences_are_not_told_beside_their_cause(changes: dict[str, Any], cause: str) -> None:
    assert [finding.cause for finding in found(**changes)] == [cause]


def test_evidence_says_what_was_seen() -> None:
    (finding,) = found(devices={"flannel.1": None}, trouble="no memory")
    assert finding.evidence == ("there is no interface flannel.1", "no memory")
    (finding,) = found(left=600.0)
    assert "600 s left" in finding.evidence[0]


@pytest.mark.parametrize("clash", ["", *CLASHES])
def test_each_rejection_has_a_cause_and_its_lease_as_subject(clash: str) -> None:
    finding = of_rejection("10.0.1.0-24", Reason("it is bad", clash), "/net")
    assert finding.cause in CAUSES and (finding.cause == "lease_invalid") == (clash == "")
    assert (finding.subject, causes.what(finding)) == ("10.0.1.0/24", "it is bad")
    assert of_rejection("non\x1bsense" * 20, Reason("it is bad", clash), "/net").subject[:8] == "non\x1bsens"


def test_peers_that_can_have_no_entry_are_named() -> None:
    (finding,) = of_unreachable([lease(7)], "on no link of this host")
    assert (finding.cause, finding.subject) == ("underlay_unreachable", "10.0.7.0/24")
    assert finding.values["underlay"] == "172.30.0.7"
    nowhere = lease(7)._replace(attrs=lease(7).attrs._replace(public_ip=None))
    assert "underlay" not in next(of_unreachable([nowhere], "")).values


def test_route_of_another_tool_is_told_from_what_the_kernel_has_no_room_for() -> None:
    peer = lease(2)
    foreign = Route(Prefix.parse("10.0.2.0/24"), 0, b"\1\2\3\4", 9, PROTOCOL_BOOT)
    route, fdb = entries(peer)[4], entries(peer)[1]
    refused = {entry[0]: Refusal(Put(entry), errno.EEXIST) for entry in (route, fdb)}
    gap: dict[Key, Entry | None] = {route[0]: foreign, fdb[0]: None}
    first, second = of_refusals(refused, 2, gap, lambda key: "10.0.2.0/24")
    assert (first.cause, first.subject) == ("route_foreign", "10.0.2.0/24")
    assert "ip route del 10.0.2.0/24 proto 3" in first.values["command"]
    assert (second.cause, second.subject, second.evidence) == ("entries_refused", "", (f"{fdb}: EEXIST",))


def test_route_of_another_tool_alone_is_no_refusal_of_the_kernel() -> None:
    route = entries(lease(2))[4]
    foreign = Route(Prefix.parse("10.0.2.0/24"), 0, b"\1\2\3\4", 9, PROTOCOL_BOOT)
    refused = {route[0]: Refusal(Put(route), errno.EEXIST)}
    assert [each.cause for each in of_refusals(refused, 1, {route[0]: foreign}, str)] == ["route_foreign"]


def test_refusals_are_cut_and_counted() -> None:
    some = {lease(n).key.encode(): Refusal(Drop(entries(lease(n))[1]), 9999) for n in range(1, 8)}
    (finding,) = of_refusals(some, 100, {}, lambda key: "")
    assert len(finding.evidence) == verdict.MOST_SHOWN + 1
    assert finding.evidence[0].endswith(": 9999") and finding.evidence[-1] == "and 96 more"


# --- paths -------------------------------------------------------------------------------------------------------


def judged(*paths: Path) -> list[Finding]:
    asked = {"device": "flannel.1", "interface": "eth0", "port": 8472, "prefix": "/net"}
    return list(verdict.of_paths(paths, **asked, measured=9))  # type: ignore[arg-type]


def test_few_paths_that_fail_are_told_one_by_one() -> None:
    (found,) = judged(path_to(1, ""), path_to(2, "path_mtu", mtu=1370))
    assert (found.cause, found.subject, found.evidence) == ("path_mtu", "10.0.2.0/24", ("2 is silent",))
    told = causes.what(found) + causes.remedy(found)
    assert "10.0.2.0/24" in told and "172.16.0.2" in told and "1370" in told and "/net/config" in told
    # 1450 bytes in the tunnel are 1500 outside of it: what ping -s 1472 sends.
    assert found.values["payload"] == "1472"
    assert judged(path_to(2, "path_mtu", direct=True))[0].values["payload"] == "1422"


def test_many_paths_that_fail_alike_are_one_finding_about_the_host() -> None:
    (found,) = judged(*(path_to(number, "underlay_unreachable") for number in range(1, 8)))
    assert found.subject == "" and "7 hosts" in causes.what(found)
    assert found.evidence[:2] == ("of 9 paths measured 7 fail so", "10.0.1.0/24: 1 is silent")
    assert len(found.evidence) == 1 + verdict.MOST_SHOWN


def test_what_is_a_devices_fault_is_not_told_for_each_path() -> None:
    down = judged(path_to(1, "device_down"), path_to(2, "device_down"))
    assert [(each.cause, each.subject, each.values["device"]) for each in down] == [("device_down", "", "flannel.1")]
    spoiled = causes.roots(judged(path_to(1, "checksum_offload"), path_to(2, "checksum_offload")))
    assert [(each.cause, each.subject) for each in spoiled] == [("checksum_offload", "flannel.1")]
