"""The vocabulary of causes is whole: each cause has all its words, and what hides others hides causes there are."""

import pytest

from overlay import causes
from overlay.causes import CAUSES, DEGRADED, DOWN, Cause, Finding


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_each_cause_has_all_its_words(cause: Cause) -> None:
    assert cause.severity in (DEGRADED, DOWN)
    assert cause.symptom and cause.what and cause.evidence and cause.remedy
    assert cause.hides <= CAUSES.keys() and cause.name not in cause.hides
    for text in (cause.what, cause.evidence, cause.remedy):
        filled = causes.generic(text)
        assert all(name.upper() in filled for name in causes.placeholders(text))


def test_same_cause_of_one_subject_is_one_finding_and_consequences_are_left_out() -> None:
    told = [
        Finding("fdb_wrong", "10.0.1.0/24", ("a",), {"peer": "h1"}),
        Finding("fdb_wrong", "10.0.1.0/24", ("b",)),
        Finding("port_blocked", "10.0.1.0/24"),
        Finding("port_blocked", "10.0.2.0/24"),
    ]
    found = {(each.cause, each.subject): each for each in causes.roots(told)}
    assert found.keys() == {("fdb_wrong", "10.0.1.0/24"), ("port_blocked", "10.0.2.0/24")}
    assert found["fdb_wrong", "10.0.1.0/24"].evidence == ("a", "b")
    assert "h1" in causes.what(found["fdb_wrong", "10.0.1.0/24"])
