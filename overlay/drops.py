"""What this host's agent and its rules drop, for which reason, and when the operator hears of it.

Owns the table of reasons, which docs/drops.md lists, and the rate: the first of a kind is told at once, and what
follows at most once in AGAIN_S, with the number since. So neither a flood nor a fault that lasts fills a log, and
nothing that is counted here is kept silent. Who counts, and who asks, is others' affair.
"""

from collections.abc import Mapping
from typing import NamedTuple

from overlay.firewall import IMPOSTORS, STRANGERS, STRAYS

AGAIN_S = 600.0
"""Seconds between two lines on one reason."""

CROWDED, SLOW = "crowded", "slow"
"""Reasons to drop a connection to the health port."""


class Reason(NamedTuple):
    """Why something is dropped: what of it (`packets`, `connections`), what that means, and how to see more of it."""

    things: str
    meaning: str
    see: str


_PACKETS = "overlay-agent capture --filter remarks; nft list table inet overlay_agent"

REASONS: Mapping[str, Reason] = {
    STRANGERS: Reason(
        "packets",
        "they came to the tunnels' port from addresses that no host of the cluster has in its lease",
        _PACKETS,
    ),
    IMPOSTORS: Reason("packets", "they came out of a tunnel with a source in this host's own subnets", _PACKETS),
    STRAYS: Reason(
        "packets", "they came out of a tunnel for the overlay's networks, but not for this host's subnets", _PACKETS
    ),
    CROWDED: Reason(
        "connections", "more clients than are served at a time held the health port; the oldest made room", "ss -tnp"
    ),
    SLOW: Reason("connections", "clients of the health port had not ended within their time", "ss -tnp"),
}
"""By the name of its counter."""


class Dropped(NamedTuple):
    """How many were dropped for a reason since it was last told."""

    reason: str
    number: int


class Drops:
    """What is to be told, from counters as they are at one time after another.

    What they had counted before the first look was told, or not, by an earlier agent.
    """

    def __init__(self) -> None:
        self._told: dict[str, int] | None = None
        self._due: dict[str, float] = {}

    def look(self, counted: Mapping[str, int], now: float) -> list[Dropped]:
        """What is to be told at `now`, in steady seconds. `counted` lacks reasons that have no counter at present."""
        counted = {reason: counted[reason] for reason in REASONS if reason in counted}
        if self._told is None:
            self._told = counted
            return []
        found = []
        for reason, number in counted.items():
            # A counter that was made anew begins at zero.
            before = self._told[reason] = min(self._told.get(reason, 0), number)
            if number > before and now >= self._due.get(reason, now):
                found.append(Dropped(reason, number - before))
                self._told[reason] = number
                self._due[reason] = now + AGAIN_S
        return found


LATELY_S = 20.0
"""Seconds for which something counts as going on after it was last seen."""

STEP_S = 4.0
"""Seconds between two looks that count."""


class Lately:
    """Which counters keep rising: those that rose between two looks, and did so before, within LATELY_S.

    Once is nothing: the packets of a host that joins may be there before its lease.
    """

    def __init__(self) -> None:
        self._counted: dict[str, int] = {}
        self._rises: dict[str, tuple[float, float]] = {}
        self._next = -LATELY_S

    def look(self, counted: Mapping[str, int], now: float) -> None:
        """The counters as they are at `now`, in steady seconds."""
        if now < self._next:
            return
        self._next = now + STEP_S
        for reason, number in counted.items():
            if number > self._counted.get(reason, number):
                self._rises[reason] = self._rises.get(reason, (0.0, -LATELY_S))[1], now
        self._counted = dict(counted)

    def rising(self, now: float) -> list[str]:
        """Those that do at `now`."""
        return [reason for reason, (before, _) in self._rises.items() if now < before + LATELY_S]
