"""Who claims what, and who has claimed it longest.

A claim is anything hashable that several leases may call theirs; a holder is its age, (create revision, key), of which
the lesser is the elder. Adding, removing and asking cost the logarithm of the number of holders at most, so that
thousands of leases that all claim one thing slow nothing down.
"""

import heapq
from collections.abc import Collection, Hashable

Age = tuple[int, str]


class _Several:
    """The holders of a claim that has more than one. The heap may still list some that have gone."""

    __slots__ = ("heap", "present")

    def __init__(self, ages: list[Age]) -> None:
        self.heap = sorted(ages)
        self.present = set(ages)


class Claims:
    """Claims and their holders. Nearly all claims have one holder, which costs one entry of a dict."""

    def __init__(self) -> None:
        self._holders: dict[Hashable, Age | _Several] = {}

    def add(self, claim: Hashable, age: Age) -> Age | None:
        """`age` holds `claim` from now on. Returns the eldest of those who held it before."""
        held = self._holders.setdefault(claim, age)
        if held is age:
            return None
        if isinstance(held, _Several):
            eldest = held.heap[0]
            held.present.add(age)
            heapq.heappush(held.heap, age)
            return eldest
        self._holders[claim] = _Several([held, age])
        return held

    def remove(self, claim: Hashable, age: Age) -> None:
        """`age`, which held `claim`, does so no more."""
        held = self._holders[claim]
        if not isinstance(held, _Several):
            del self._holders[claim]
            return
        held.present.remove(age)
        if len(held.present) == 1:
            self._holders[claim] = next(iter(held.present))
        while held.heap[0] not in held.present:
            heapq.heappop(held.heap)

    def eldest(self, claim: Hashable) -> Age | None:
        """Who has held `claim` longest, None if nobody holds it."""
        held = self._holders.get(claim)
        return held.heap[0] if isinstance(held, _Several) else held

    def holders(self, claim: Hashable) -> Collection[Age]:
        """All who hold `claim`, in no order."""
        held = self._holders.get(claim)
        if held is None:
            return ()
        return held.present if isinstance(held, _Several) else (held,)
