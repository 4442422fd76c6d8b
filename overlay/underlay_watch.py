"""The underlay's watch: notices that another interface or address carries the overlay, or the same one differently.

Whatever happens to a link, an address or a default route, the choice is made anew, from the whole of what there is. As
long as nothing fits, what was chosen last stays: a link that went away may be on its way back. So may the only address
of a family, which the kernel or a network manager takes away for a moment: for that moment all stays, too.
"""

import time
from collections.abc import Callable
from typing import Any, Protocol

from overlay.device import Underlay
from subnet_lease.pulse import LOCAL_WORK_S, Pulse

SETTLE_S = 0.5
"""Seconds that events on other links are collected for: pods' links come and go. On the underlay's own every one counts
at once."""

RETURN_S = 0.5
"""Seconds that the last address of a family is waited for before the host is one of the other family alone."""


class Events(Protocol):
    """Where changes are heard of; see `underlay.Monitor`."""

    def wait(self, seconds: float | None) -> set[int]: ...
    def interrupt(self) -> None: ...


class UnderlayWatch:
    """A thread's body: `run` until `stop`; calls `on_change` with each underlay that differs from the one before.

    `find` makes the choice, given the present one; it raises one of `nothing` with the reason where nothing fits.
    """

    def __init__(
        self,
        events: Events,
        find: Callable[[Underlay], Underlay],
        nothing: tuple[type[Exception], ...],
        present: Underlay,
        on_change: Callable[[Underlay], None],
        log: Any,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._events = events
        self._find = find
        self._nothing = nothing
        self._present = present
        self._on_change = on_change
        self._log = log
        self._clock = clock
        self._stopped = False
        self.pulse = Pulse(LOCAL_WORK_S, time.monotonic)
        self._missing = ""
        self._reduced_since: float | None = None
        """When all addresses of a family were found to be gone."""

    def run(self) -> None:
        """Look, and look again whenever something happens, until `stop`."""
        # For what happened between the choice and the first look.
        due: float | None = self._clock() + SETTLE_S
        while not self._stopped:
            if due is not None and self._clock() >= due:
                due = self._look()
            pause = None if due is None else max(0.0, due - self._clock())
            self.pulse.rest(pause)
            concerned = self._events.wait(pause)
            self.pulse.work()
            if concerned & {0, self._present.index}:
                due = self._clock()
            elif concerned and due is None:
                due = self._clock() + SETTLE_S

    def _look(self) -> float | None:
        """Make the choice, and act on it; when to look again, if that is for time to tell."""
        try:
            found = self._find(self._present)
        except self._nothing as reason:
            if str(reason) != self._missing:
                self._missing = str(reason)
                self._log.warning("underlay_gone", reason=self._missing, effect=f"stays on {self._present.name}")
            return None
        if self._missing:
            self._missing = ""
            self._log.info("underlay_back", interface=found.name)
        if _families(self._present) <= _families(found):
            self._reduced_since = None
        else:
            self._reduced_since = self._reduced_since or self._clock()
            if self._clock() < self._reduced_since + RETURN_S:
                return self._reduced_since + RETURN_S
            self._reduced_since = None
        if found != self._present:
            self._present = found
            self._on_change(found)
        return None

    @property
    def missing(self) -> str:
        """Why there is nothing that could carry the overlay, empty if there is."""
        return self._missing

    def stop(self) -> None:
        """End `run`. From any thread."""
        self._stopped = True
        self._events.interrupt()


def _families(underlay: Underlay) -> set[int]:
    """By the lengths of addresses."""
    return set(map(len, underlay.addresses))
