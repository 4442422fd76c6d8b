"""Waits between attempts, and how often a failure is mentioned."""

import random

from hypothesis import given
from hypothesis import strategies as st

from subnet_lease.retry import LONGEST_S, REPEAT_S, SHORTEST_S, Backoff, Outage


def test_waits_grow_to_the_longest_and_begin_anew() -> None:
    backoff = Backoff(lambda: 0.999)
    waits = [backoff.delay() for _ in range(8)]
    assert waits == sorted(waits)
    assert waits[0] < 2 * SHORTEST_S
    assert 0.9 * LONGEST_S < waits[-1] == waits[-2] < LONGEST_S
    backoff.reset()
    assert backoff.delay() == waits[0]


@given(st.randoms(use_true_random=False), st.integers(1, 50))
def test_waits_stay_within_their_bounds(chance: random.Random, count: int) -> None:
    backoff = Backoff(chance.random)
    assert all(SHORTEST_S <= backoff.delay() <= LONGEST_S for _ in range(count))


def test_an_outage_is_mentioned_at_once_and_then_once_in_a_while() -> None:
    outage = Outage()
    mentioned = [now for now in range(1000, 1200, 5) if outage.failed(now)]
    assert mentioned == [1000, 1000 + REPEAT_S, 1000 + 2 * REPEAT_S, 1000 + 3 * REPEAT_S]
    assert outage.ended(1300) == 300
    assert outage.ended(1301) is None
    assert outage.failed(1302)


def test_outage_of_another_kind_is_mentioned_at_once() -> None:
    outage = Outage()
    said = [outage.failed(now, kind) for now, kind in ((0, "gone"), (1, "gone"), (2, "denied"), (3, "gone"))]
    assert said == [True, False, True, False]
