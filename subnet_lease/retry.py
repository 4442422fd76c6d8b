"""How long to wait before the next attempt, and when to speak of a failure again.

Pure: time and chance are passed in.
"""

from collections.abc import Callable

SHORTEST_S = 0.25
LONGEST_S = 5.0
REPEAT_S = 60.0
"""An outage is mentioned at most this often."""


class Backoff:
    """Waits that grow from SHORTEST_S to LONGEST_S, spread at random so that a cluster's agents do not return as one.

    `jitter()` gives a number from 0 up to 1, as `random.random` does.
    """

    def __init__(self, jitter: Callable[[], float]) -> None:
        self._jitter = jitter
        self._ceiling = 2 * SHORTEST_S

    def delay(self) -> float:
        """Seconds to wait now; the next wait will be longer."""
        ceiling, self._ceiling = self._ceiling, min(2 * self._ceiling, LONGEST_S)
        return SHORTEST_S + self._jitter() * (ceiling - SHORTEST_S)

    def reset(self) -> None:
        """Begin anew with the shortest wait."""
        self._ceiling = 2 * SHORTEST_S


class Outage:
    """A stretch of failures between two successes. Times are seconds on any steady clock."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._said: dict[str, float] = {}

    def failed(self, now: float, kind: str = "") -> bool:
        """Note a failure; whether to mention it: the first of its kind, and then one every REPEAT_S."""
        if self._since is None:
            self._since = now
        if kind in self._said and now < self._said[kind] + REPEAT_S:
            return False
        self._said[kind] = now
        return True

    def ended(self, now: float) -> float | None:
        """Note a success; the seconds since the first failure, None if there was none."""
        since, self._since = self._since, None
        self._said.clear()
        return None if since is None else now - since
