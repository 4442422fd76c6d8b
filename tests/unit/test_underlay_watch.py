"""The underlay's watch: when it looks, and what it makes of what it finds. Time and events are the test's own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import structlog
from structlog.testing import capture_logs

from overlay.device import Underlay
from overlay.underlay_watch import SETTLE_S, UnderlayWatch
from subnet_lease.model import pack_address

ETH0 = Underlay("eth0", 2, 1500, (pack_address("192.168.0.5"),), (), (), "test")
ETH1 = Underlay("eth1", 3, 1500, (pack_address("192.168.1.5"),), (), (), "test")


class Nothing(Exception):
    """No interface fits."""


class World:
    """A host whose links change as a script says. Time passes while the watch waits, and not otherwise."""

    def __init__(self, *script: tuple[float, set[int]]) -> None:
        self.now = 0.0
        self.found: Underlay | Nothing = ETH0
        self.looks: list[float] = []
        self.changes: list[Underlay] = []
        self.at_event: Callable[[], None] = lambda: None
        self._script = list(script)
        self.watch = UnderlayWatch(
            self, self._find, (Nothing,), ETH0, self.changes.append, structlog.get_logger(), lambda: self.now
        )

    def _find(self, present: Underlay) -> Underlay:
        assert present == (self.changes[-1] if self.changes else ETH0)
        self.looks.append(self.now)
        if isinstance(self.found, Nothing):
            raise self.found
        return self.found

    def wait(self, seconds: float | None) -> set[int]:
        """The next event of the script, if it comes within `seconds`; the watch is stopped after the last."""
        until = float("inf") if seconds is None else self.now + seconds
        if self._script and self._script[0][0] <= until:
            self.now, concerned = self._script.pop(0)
            self.at_event()
            return concerned
        if until == float("inf"):
            self.watch.stop()
            return {0}
        self.now = until
        return set()

    def interrupt(self) -> None:
        """What `stop` calls: the script comes to its end by itself."""

    def run(self) -> "World":
        self.watch.run()
        return self


@pytest.mark.parametrize(
    ("script", "looks"),
    [
        ([], [SETTLE_S]),
        ([(10.0, {2})], [SETTLE_S, 10.0]),
        ([(10.0, {0})], [SETTLE_S, 10.0]),
        ([(10.0, {7})], [SETTLE_S, 10.0 + SETTLE_S]),
        ([(10.0, {7}), (10.1, {8}), (10.4, {9})], [SETTLE_S, 10.0 + SETTLE_S]),
        ([(10.0, {7}), (10.1, {2, 8})], [SETTLE_S, 10.1]),
        ([(10.0, set()), (20.0, {2}), (20.1, {2})], [SETTLE_S, 20.0, 20.1]),
    ],
    ids=[
        "once after the start",
        "at once for the underlay's own link",
        "at once for a default route",
        "after a while for another link",
        "once for many of these",
        "at once if the underlay's is among them",
        "as often as something happens",
    ],
)
def test_looks_when_something_happens(script: list[tuple[float, set[int]]], looks: list[float]) -> None:
    world = World(*script).run()
    assert world.looks == pytest.approx(looks)
    assert world.changes == []


def test_what_changed_is_told_once_and_is_present_from_then_on() -> None:
    world = World((10.0, {3}), (20.0, {3}), (30.0, {2}))
    world.found = ETH1
    world.run()
    assert world.changes == [ETH1]
    assert world.looks == pytest.approx([SETTLE_S, 10.0, 20.0, 30.0 + SETTLE_S]), "the former link is one of many now"


@pytest.mark.parametrize("change", [{"mtu": 9000}, {"addresses": ETH1.addresses}, {"name": "renamed"}, {"index": 9}])
def test_whatever_is_different_is_told(change: dict[str, object]) -> None:
    world = World()
    world.found = replace(ETH0, **change)  # type: ignore[arg-type]
    assert world.run().changes == [world.found]


def test_underlay_that_is_gone_is_said_once_for_each_reason_and_stays_what_it_was() -> None:
    world = World((10.0, {2}), (20.0, {2}), (30.0, {2}), (40.0, {2}))
    states = iter([Nothing("no link"), Nothing("no link"), Nothing("no address"), ETH0])

    def happens() -> None:
        world.found = next(states)

    world.at_event = happens
    with capture_logs() as logs:
        world.run()
    assert world.changes == []
    assert logs == [
        {"event": "underlay_gone", "log_level": "warning", "reason": reason, "effect": "stays on eth0"}
        for reason in ("no link", "no address")
    ] + [{"event": "underlay_back", "log_level": "info", "interface": "eth0"}]
