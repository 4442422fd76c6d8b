"""What is told of what is dropped, and how often."""

import re
from pathlib import Path

from overlay.drops import AGAIN_S, LATELY_S, REASONS, STEP_S, Dropped, Drops, Lately
from overlay.firewall import MASQUERADED, SAMPLED, STRANGERS, STRAYS


def test_the_first_of_a_kind_is_told_at_once_and_the_rest_seldom_and_whole() -> None:
    drops = Drops()
    assert drops.look({STRANGERS: 0}, 0) == []
    assert drops.look({STRANGERS: 1}, 5) == [Dropped(STRANGERS, 1)]
    for now in range(6, int(5 + AGAIN_S)):
        assert drops.look({STRANGERS: 1000 * now}, now) == []
    number = 1000 * (4 + int(AGAIN_S))
    # They have stopped meanwhile, and still there were as many.
    assert drops.look({STRANGERS: number}, 5 + AGAIN_S) == [Dropped(STRANGERS, number - 1)]
    assert drops.look({STRANGERS: number}, 10 * AGAIN_S) == []
    assert drops.look({STRANGERS: number + 2}, 10 * AGAIN_S + 1) == [Dropped(STRANGERS, 2)]


def test_each_kind_has_its_own_time() -> None:
    drops = Drops()
    drops.look({}, 0)
    assert drops.look({STRANGERS: 3, STRAYS: 0}, 1) == [Dropped(STRANGERS, 3)]
    assert drops.look({STRANGERS: 4, STRAYS: 1}, 2) == [Dropped(STRAYS, 1)]


def test_what_was_counted_before_the_first_look_is_not_told() -> None:
    drops = Drops()
    assert drops.look({STRANGERS: 7}, 0) == []
    assert drops.look({STRANGERS: 8}, 1) == [Dropped(STRANGERS, 1)]


def test_a_counter_that_was_made_anew_begins_at_zero() -> None:
    drops = Drops()
    drops.look({STRANGERS: 7}, 0)
    assert drops.look({STRANGERS: 2}, 1) == [] and drops.look({}, 2) == []
    assert drops.look({STRANGERS: 3}, 3) == [Dropped(STRANGERS, 1)]


def test_what_is_no_drop_is_not_told() -> None:
    drops = Drops()
    drops.look({}, 0)
    assert drops.look({MASQUERADED: 5}, 1) == []


def test_every_reason_is_in_the_documents() -> None:
    page = (Path(__file__).parents[2] / "docs/drops.md").read_text()
    assert set(REASONS) >= set(SAMPLED)
    assert set(REASONS) <= set(re.findall(r"`(\w+)`", page))


def test_what_rises_again_and_again_is_going_on_until_it_has_stopped_for_a_while() -> None:
    lately = Lately()
    rising = []
    for step, number in enumerate((7, 7, 8, 8, 9, 10, 10)):
        lately.look({STRANGERS: number, STRAYS: 1}, step * STEP_S)
        rising.append(lately.rising(step * STEP_S))
    assert rising == [[], [], [], [], [STRANGERS], [STRANGERS], [STRANGERS]]
    assert lately.rising(5 * STEP_S + LATELY_S) == []


def test_one_rise_is_nothing_however_soon_it_is_looked_at_again() -> None:
    lately = Lately()
    for number, now in ((0, 0.0), (5, STEP_S), (9, STEP_S + 0.1)):
        lately.look({STRANGERS: number}, now)
    assert lately.rising(STEP_S + 0.1) == []
