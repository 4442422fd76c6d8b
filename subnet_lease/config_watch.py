"""Notices that the operator has changed the network configuration.

It changes once in a year or so: it is read once a minute, which costs etcd less than a watch for each host would, and
at once when somebody asks.
"""

import random
import threading
import time
from collections.abc import Callable

from subnet_lease.pulse import STORE_WORK_S, Pulse
from subnet_lease.store import Store, StoreDenied, StoreError

EVERY_S = 60.0


class ConfigWatch:
    """A thread's body: `run` calls `changed` with each new value of the config key, None where it is gone.

    `known` is the value in use. `denied` is called with the reason when etcd begins to refuse the key. `check` and
    `stop` from any thread. `jitter()` gives a number from 0 up to 1.
    """

    def __init__(
        self,
        store: Store,
        known: bytes | None,
        changed: Callable[[bytes | None], None],
        denied: Callable[[str], None],
        *,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._known = known
        self._changed = changed
        self._denied = denied
        self._jitter = jitter
        self._wake = threading.Event()
        self._stopped = False
        self.failure: StoreDenied | None = None
        """Why the store refuses the key, None if it does not as far as is known."""
        self.pulse = Pulse(STORE_WORK_S, time.monotonic)

    def run(self) -> None:
        """Look until `stop`. A store that cannot be reached is others' to report."""
        while not self._stopped:
            self.pulse.wait(self._wake, EVERY_S * (0.5 + self._jitter()))
            self._wake.clear()
            if self._stopped:
                return
            try:
                value = self._store.read_config()
            except StoreDenied as error:
                # Others may not ask for a long time: a watch that stands goes on without the permission.
                if str(error) != str(self.failure or ""):
                    self._denied(str(error))
                self.failure = error
                continue
            except StoreError:
                continue
            self.failure = None
            if value != self._known:
                self._known = value
                self._changed(value)

    def check(self) -> None:
        """Look at once."""
        self._wake.set()

    def stop(self) -> None:
        """End `run`; within a call's deadline."""
        self._stopped = True
        self._wake.set()
