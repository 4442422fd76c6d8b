"""Signs of life: who sleeps by design is alive, who hangs is not."""

import threading

from subnet_lease.pulse import GRACE_S, Pulse


class Clock:
    """Steady seconds, as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_work_is_a_sign_of_life_for_as_long_as_it_may_take() -> None:
    clock = Clock()
    pulse = Pulse(60.0, clock)
    clock.now += 60
    assert pulse.trouble() == ""
    clock.now += 1
    assert pulse.trouble() == "busy for 61 s, at most 60 s are usual"
    pulse.work()
    assert pulse.trouble() == ""


def test_a_sleeper_is_alive_until_it_has_overslept() -> None:
    clock = Clock()
    pulse = Pulse(1.0, clock)
    pulse.rest(300)
    clock.now += 300 + GRACE_S
    assert pulse.trouble() == ""
    clock.now += 1
    assert pulse.trouble() == "asleep for 331 s, at most 330 s are usual"


def test_who_waits_for_work_is_alive_however_long_that_takes() -> None:
    clock = Clock()
    pulse = Pulse(1.0, clock)
    pulse.rest()
    clock.now += 1e9
    assert pulse.trouble() == ""


def test_a_wait_is_sleep_and_work_goes_on_after_it() -> None:
    clock = Clock()
    pulse = Pulse(10.0, clock)
    event = threading.Event()

    class Watched:
        def wait(self, timeout: float | None = None) -> bool:
            clock.now += 100
            assert pulse.trouble() == ""
            return event.wait(0)

    assert not pulse.wait(Watched(), 200)
    event.set()
    assert pulse.wait(Watched())
    clock.now += 11
    assert pulse.trouble().startswith("busy for 11 s")
