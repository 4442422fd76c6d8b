"""When revisions were heard of: what was there before is unknown, and memory is bounded."""

from overlay.timeline import MOST, Timeline


def line(*moments: tuple[int, float]) -> Timeline:
    made = Timeline()
    for revision, at in moments:
        made.note(revision, at)
    return made


def test_what_was_there_at_the_first_moment_has_no_time() -> None:
    assert Timeline().when(5) is None
    made = line((10, 100.0))
    assert made.when(9) is None and made.when(10) is None and made.when(11) is None


def test_revision_has_the_first_moment_that_knew_it() -> None:
    made = line((10, 100.0), (20, 105.0), (30, 110.0))
    assert [made.when(revision) for revision in (10, 11, 20, 21, 30, 31)] == [None, 105.0, 105.0, 110.0, 110.0, None]


def test_moments_close_to_each_other_are_one() -> None:
    made = line((10, 100.0), (11, 100.1), (20, 100.5), (30, 101.2))
    assert [made.when(revision) for revision in (11, 20, 30)] == [100.1, 100.1, 101.2]


def test_store_that_goes_back_has_another_history() -> None:
    made = line((10, 100.0), (20, 105.0), (15, 110.0), (16, 112.0))
    assert [made.when(revision) for revision in (12, 15, 16)] == [None, None, 112.0]


def test_copy_is_not_changed_by_what_follows() -> None:
    made = line((10, 100.0), (20, 105.0))
    copy = made.copy()
    made.note(30, 110.0)
    assert copy.when(30) is None and copy.when(20) == 105.0


def test_long_lives_are_remembered_in_bounded_memory_and_the_order_stays() -> None:
    made = line(*((number, 2.0 * number) for number in range(1, 10 * MOST)))
    times = [made.when(revision) for revision in range(2, 10 * MOST)]
    known = [time for time in times if time is not None]
    assert len(known) == len(times) and known == sorted(known) and len(set(known)) <= MOST
    assert all(time >= 2.0 * revision for revision, time in zip(range(2, 10 * MOST), known, strict=True))
    assert made.when(10 * MOST - 1) == 2.0 * (10 * MOST - 1)
