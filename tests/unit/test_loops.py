"""Threads, and how their failure and signals reach the main thread."""

import os
import signal
import threading

import pytest
from structlog.testing import capture_logs

from overlay.loops import END_SIGNALS, LoopFailed, Loops, Terminated
from subnet_lease.pulse import Pulse


def test_loop_that_raises_is_logged_and_ends_the_main_threads_wait() -> None:
    def broken() -> None:
        raise ValueError("a defect")

    with capture_logs() as logs, Loops() as loops:
        loops.start("watcher", broken, lambda: None)
        with pytest.raises(LoopFailed, match="watcher"):
            loops.pause(30)
    assert [(entry["event"], entry["loop"]) for entry in logs] == [("loop_failed", "watcher")]


@pytest.mark.parametrize("number", sorted(END_SIGNALS), ids=lambda number: signal.Signals(number).name)
def test_signal_before_or_during_a_wait_ends_it(number: int) -> None:
    with Loops() as loops:
        os.kill(os.getpid(), number)
        with pytest.raises(Terminated):
            loops.pause(30)
        with pytest.raises(Terminated):
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            loops.pause(30)


def test_wake_ends_a_wait_and_is_no_reason_to_stop() -> None:
    with Loops() as loops:
        for _ in range(100_000):
            loops.wake()
        loops.pause(30)


def test_signal_to_look_again_ends_a_wait_and_is_told() -> None:
    with Loops() as loops:
        os.kill(os.getpid(), signal.SIGHUP)
        assert loops.pause(30) is True
        loops.wake()
        assert loops.pause(30) is False


def test_threads_are_stopped_last_first_and_then_the_rest_is_done() -> None:
    ended: list[str] = []
    stops = {name: threading.Event() for name in ("keeper", "reconciler")}

    def body(name: str) -> None:
        stops[name].wait()
        ended.append(name)

    with Loops() as loops:
        loops.at_end(lambda: ended.append("kernel"))
        loops.start("keeper", lambda: body("keeper"), stops["keeper"].set)
        loops.start("reconciler", lambda: body("reconciler"), stops["reconciler"].set)
    assert ended == ["reconciler", "keeper", "kernel"]


def test_handlers_of_the_process_are_given_back() -> None:
    before = [signal.getsignal(number) for number in END_SIGNALS]
    with Loops():
        pass
    assert [signal.getsignal(number) for number in END_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_each_loop_is_told_with_what_is_wrong_about_it() -> None:
    now = [0.0]
    stop = threading.Event()
    with Loops() as loops:
        assert loops.troubles() == {}
        for name, work_s in (("keeper", 100.0), ("cache", 10.0)):
            loops.start(name, lambda: stop.wait() and None, stop.set, Pulse(work_s, lambda: now[0]))
        loops.start("silent", lambda: stop.wait() and None, stop.set)
        ended = threading.Event()
        loops.start("over", ended.set, lambda: None)
        assert ended.wait(5)
        while threading.active_count() > 4:
            loops.pause(0.001)
        now[0] = 50.0
        assert loops.troubles() == {
            "keeper": "",
            "cache": "busy for 50 s, at most 10 s are usual",
            "silent": "",
            "over": "its thread has ended",
        }
