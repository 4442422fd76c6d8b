"""The causes: one vocabulary, whole and without contradictions; findings merged, and consequences left out."""

import re

import pytest

from overlay import causes
from overlay.causes import CAUSES, Finding


def test_every_cause_says_all_there_is_to_say() -> None:
    for name, cause in CAUSES.items():
        assert name == cause.name
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert cause.severity in (causes.DEGRADED, causes.DOWN)
        for text in (cause.symptom, cause.what, cause.evidence, cause.remedy):
            assert text, name
        assert cause.symptom.endswith("."), name
        assert cause.remedy.count("`") % 2 == 0, name
        assert not cause.what.endswith("."), name
        assert cause.hides <= CAUSES.keys(), name
        for text in (cause.what, cause.evidence, cause.remedy):
            filled = causes.generic(text)
            assert all(placeholder.upper() in filled for placeholder in causes.placeholders(text)), name


def test_causes_hide_causes_and_none_itself_not_even_by_way_of_others() -> None:
    def reached(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, (*above, name)
        for hidden in CAUSES[name].hides:
            reached(hidden, (*above, name))

    for name in CAUSES:
        reached(name)


def test_words_are_filled_with_what_is_known_and_else_name_what_is_missing() -> None:
    found = Finding("device_down", values={"device": "flannel.1"})
    assert causes.what(found) == "the interface flannel.1 is down"
    assert "`sudo ip link set flannel.1 up`" in causes.remedy(found)
    assert causes.what(Finding("device_down")) == "the interface DEVICE is down"
    assert causes.generic("{prefix}/config '{{}}'") == "PREFIX/config '{}'"
    assert list(causes.placeholders("{a} {{b}} {c}")) == ["a", "c"]


def test_values_are_not_taken_for_placeholders() -> None:
    assert causes.what(Finding("device_down", values={"device": "{peer}"})) == "the interface {peer} is down"


def test_finding_may_know_better_than_its_cause() -> None:
    found = Finding("etcd_certificate", what="it ends", remedy="renew it", severity=causes.DOWN)
    assert (causes.what(found), causes.remedy(found), causes.severity(found)) == ("it ends", "renew it", "down")


def test_cause_is_told_once_for_each_subject_with_all_evidence() -> None:
    merged = causes.merged(
        [
            Finding("fdb_wrong", "10.1.1.0/24", ("seen here",), {"peer": "one"}),
            Finding("etcd_unreachable", evidence=("no answer",)),
            Finding(
                "fdb_wrong",
                "10.1.1.0/24",
                ("seen here", "seen there"),
                {"peer": "two", "mac": "m"},
                what="w",
                severity=causes.DOWN,
            ),
            Finding("fdb_wrong", "10.1.2.0/24"),
        ]
    )
    assert [(each.cause, each.subject) for each in merged] == [
        ("etcd_unreachable", ""),
        ("fdb_wrong", "10.1.1.0/24"),
        ("fdb_wrong", "10.1.2.0/24"),
    ]
    assert merged[1].evidence == ("seen here", "seen there")
    assert merged[1].values == {"peer": "one", "mac": "m"}
    assert (merged[1].what, causes.severity(merged[1])) == ("", causes.DEGRADED)


@pytest.mark.parametrize(
    ("found", "left"),
    [
        ([("device_missing", ""), ("fdb_wrong", "a"), ("port_blocked", "b")], {("device_missing", "")}),
        ([("fdb_wrong", "a"), ("port_blocked", "a")], {("fdb_wrong", "a")}),
        ([("fdb_wrong", "a"), ("port_blocked", "b")], {("fdb_wrong", "a"), ("port_blocked", "b")}),
        ([("port_blocked_in", ""), ("port_blocked_in", "a")], {("port_blocked_in", "")}),
        ([("rp_filter", "a"), ("rp_filter", "b")], {("rp_filter", "a"), ("rp_filter", "b")}),
        ([("agent_not_running", ""), ("fdb_wrong", "a")], {("agent_not_running", ""), ("fdb_wrong", "a")}),
        ([("clock_skew", ""), ("etcd_certificate", "x")], {("clock_skew", "")}),
    ],
)
def test_consequences_are_left_out(found: list[tuple[str, str]], left: set[tuple[str, str]]) -> None:
    assert {(each.cause, each.subject) for each in causes.roots(Finding(*each) for each in found)} == left


def test_finding_may_bring_about_more_than_its_cause_does() -> None:
    etcd = Finding("etcd_unreachable")
    assert causes.roots([Finding("device_down"), etcd])[0] == etcd
    only = causes.roots([Finding("device_down", hides=frozenset({"etcd_unreachable"})), etcd])
    assert [each.cause for each in only] == ["device_down"]


def test_worst_severity_counts() -> None:
    assert causes.worst([]) is None
    assert causes.worst([Finding("clock_skew")]) == causes.DEGRADED
    assert causes.worst([Finding("clock_skew"), Finding("device_down")]) == causes.DOWN


def test_finding_in_a_document_has_no_placeholder_left() -> None:
    document = causes.as_json(Finding("lease_invalid", "10.1.1.0/24", ("why",), {"key": "k", "prefix": "/p"}))
    assert document == {
        "cause": "lease_invalid",
        "severity": "degraded",
        "subject": "10.1.1.0/24",
        "what": "a lease cannot be believed, and is not used",
        "evidence": ["why"],
        "remedy": causes.remedy(Finding("lease_invalid", values={"key": "k", "prefix": "/p"})),
    }
    assert causes.as_json(Finding("clock_skew"))["subject"] is None


def test_a_cause_that_is_none_is_a_mistake_of_the_program() -> None:
    with pytest.raises(KeyError):
        causes.what(Finding("nonsense"))
