"""The agent's threads, and the main thread's waits between them.

Owns starting and stopping the loops, and how signals and failures reach the main thread: through a pipe, which it reads
where it waits. A signal is never acted upon where it happens to arrive; an exception raised in a handler would surface
in the middle of anything, and a wait on a lock misses a signal that comes just before it.
"""

import os
import select
import signal
import threading
from collections.abc import Callable

import structlog

from subnet_lease.pulse import Pulse

END_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT))
RELOAD_SIGNAL = signal.SIGHUP


class Terminated(Exception):
    """A signal asked the process to end."""


class LoopFailed(Exception):
    """A loop ended by an exception, which is in the log: a defect. The text is the loop's name."""


class Loops:
    """Threads that run until the block ends; a context manager, for the main thread only."""

    def __init__(self) -> None:
        self._threads: list[tuple[threading.Thread, Callable[[], None]]] = []
        self._last: list[Callable[[], None]] = []
        self._awaited, self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.failed = ""
        self._pulses: dict[str, tuple[threading.Thread, Pulse | None]] = {}

    def __enter__(self) -> "Loops":
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        awaited = END_SIGNALS | {RELOAD_SIGNAL}
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in awaited}
        return self

    def __exit__(self, *_: object) -> None:
        """Stop all threads, the last one started first, wait a little for each, then do what `at_end` was told.

        Signals are let pass until it is done: the end is under way.
        """
        for thread, stop in reversed(self._threads):
            stop()
            thread.join(5)
        for work in self._last:
            work()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        if not any(thread.is_alive() for thread, _ in self._threads):
            os.close(self._wake)
            os.close(self._awaited)

    def at_end(self, work: Callable[[], None]) -> None:
        """Do `work` once the threads have ended."""
        self._last.append(work)

    def start(self, name: str, body: Callable[[], None], stop: Callable[[], None], pulse: Pulse | None = None) -> None:
        """Run `body` in a thread until `stop` makes it return. `pulse` is its sign of life."""

        def guarded() -> None:
            try:
                body()
            except Exception:
                structlog.get_logger("agent").exception("loop_failed", loop=name)
                self.failed = name
                self.wake()

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        self._threads.append((thread, stop))
        self._pulses[name] = thread, pulse

    def troubles(self) -> dict[str, str]:
        """Each loop by its name, with why it counts as dead; empty for one that is alive. From any thread."""
        return {
            name: "its thread has ended" if not thread.is_alive() else pulse.trouble() if pulse else ""
            for name, (thread, pulse) in list(self._pulses.items())
        }

    def wake(self) -> None:
        """End the main thread's present or next `pause`. From any thread."""
        try:
            os.write(self._wake, b"\0")
        except BlockingIOError:
            pass  # The pipe is full of reasons to wake up already.

    def pause(self, seconds: float | None) -> bool:
        """Wait, for a signal, for `wake` or for `seconds`; whether a signal asked to look at everything again.

        Terminated if one asked to end, LoopFailed if a loop has failed.
        """
        reasons = set(os.read(self._awaited, 4096)) if select.select([self._awaited], [], [], seconds)[0] else set()
        if reasons & END_SIGNALS:
            raise Terminated
        if self.failed:
            raise LoopFailed(self.failed)
        return RELOAD_SIGNAL in reasons
