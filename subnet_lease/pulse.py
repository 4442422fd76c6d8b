"""A loop's sign of life: whether it works or sleeps, since when, and for how long that is as it should be.

A loop that sleeps until somebody has work for it is as alive as one that works; dead is one that has worked for longer
than any of its work takes, or sleeps on past the time it had set itself. Pure: the clock is passed in.
"""

from collections.abc import Callable
from typing import Protocol

GRACE_S = 30.0
"""How late a sleeper may wake up: the machine may be that busy."""

STORE_WORK_S = 600.0
"""Longest work of a loop that talks to the store. Each call has its deadline, but a slow store may need several
attempts for each of many pages, and to end an agent for that would make the store no faster."""

LOCAL_WORK_S = 120.0
"""Longest work of a loop that asks this host, and perhaps a few peers."""


class Waitable(Protocol):
    """What a thread waits for; `threading.Event` is one."""

    def wait(self, timeout: float | None = None) -> bool: ...


class Pulse:
    """Written by the loop's own thread, read by any. `work_s`: the seconds that it may work without a word."""

    __slots__ = ("_clock", "_state", "_work_s")

    def __init__(self, work_s: float, clock: Callable[[], float]) -> None:
        self._work_s = work_s
        self._clock = clock
        self._state: tuple[bool, float, float | None] = False, clock(), work_s
        """Asleep?, since when, for how long at most: replaced whole, so that a reader sees no half of it."""

    def rest(self, seconds: float | None = None) -> None:
        """Asleep from now on: for up to `seconds`, or until somebody has work, however long that takes."""
        self._state = True, self._clock(), None if seconds is None else seconds + GRACE_S

    def work(self) -> None:
        """At work from now on, or at a new piece of it."""
        self._state = False, self._clock(), self._work_s

    def wait(self, awaited: Waitable, seconds: float | None = None) -> bool:
        """`awaited.wait(seconds)`, asleep meanwhile."""
        self.rest(seconds)
        try:
            return awaited.wait(seconds)
        finally:
            self.work()

    def trouble(self) -> str:
        """Why the loop counts as dead; empty while it is alive."""
        asleep, since, most = self._state
        passed = self._clock() - since
        if most is None or passed <= most:
            return ""
        return f"{'asleep' if asleep else 'busy'} for {passed:.0f} s, at most {most:.0f} s are usual"
