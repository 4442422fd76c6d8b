"""When the store had which revision, so that a lease's age follows from the revision it was written at.

Owns a list of moments that is bounded however long an agent runs and however many hosts there are: where it is full,
every second moment is forgotten, and what is old is known less exactly. Pure: times are passed in.
"""

from array import array
from bisect import bisect_left
from typing import Self

MOST = 2048
"""Moments that are kept: 32 KB."""

STEP_S = 1.0
"""Moments closer than this are one."""


class Timeline:
    """Moments at which revisions were heard of, in their order. Times are seconds on any steady clock."""

    def __init__(self) -> None:
        self._revisions = array("q")
        self._times = array("d")

    def note(self, revision: int, now: float) -> None:
        """The store is known up to `revision` from `now` on. One that goes back has another history: begin anew."""
        if self._revisions and revision < self._revisions[-1]:
            self._revisions, self._times = array("q"), array("d")
        # The first moment stays alone: what is older than that was there before.
        if len(self._times) > 1 and now < self._times[-1] + STEP_S:
            self._revisions[-1] = revision
            return
        self._revisions.append(revision)
        self._times.append(now)
        if len(self._times) > MOST:
            del self._revisions[1::2], self._times[1::2]

    def copy(self) -> Self:
        """As it is now, for another thread."""
        made = type(self)()
        made._revisions, made._times = self._revisions[:], self._times[:]
        return made

    def when(self, revision: int) -> float | None:
        """When it was first heard of; None for what was there at the first moment already."""
        at = bisect_left(self._revisions, revision)
        return self._times[at] if 0 < at < len(self._times) else None
