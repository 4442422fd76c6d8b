"""The agent, killed at a point of our choice: `python killed_at.py NAME run ...`, else as `python -m agent run ...`.

One function of the agent is wrapped from outside; before or after one of its calls the process sends itself SIGKILL, as
the out-of-memory killer or a power failure would. A name in the table below that the agent does not have is an error,
for then table and agent have grown apart.
"""

import functools
import importlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True)
class Point:
    """Right before or right after a call of `target` (`module:name`), the `call`-th of all, or of those since READY=1.

    `batch`: how many messages one send to the kernel may have, None for as many as ever.
    """

    target: str
    after: bool = True
    call: int = 1
    once_ready: bool = False
    batch: int | None = None


LAST_WORDS = "killed where it was to be killed\n"

READY = "overlay.notify:Notifier.ready"

_BATCH = "overlay.kernel:Kernel._exchange"

POINTS = {
    "config read": Point("subnet_lease.etcd:EtcdStore.read_config"),
    "leases read": Point("subnet_lease.etcd:EtcdStore.snapshot"),
    "etcd lease granted, key not created": Point("subnet_lease.etcd:EtcdStore.grant"),
    "key created": Point("subnet_lease.etcd:EtcdStore.create"),
    "etcd lease renewed": Point("subnet_lease.etcd:EtcdStore.keep_alive"),
    "before the device": Point("overlay.kernel:Kernel.ensure_devices", after=False),
    "device created, not up": Point("overlay.kernel:_create"),
    "device made": Point("overlay.kernel:Kernel.ensure_devices"),
    "before the guard's sets": Point("overlay.nft:Nftables.apply", after=False),
    "guard's sets made": Point("overlay.nft:Nftables.apply"),
    "kernel read": Point("overlay.tracker:Tracker.saw_all"),
    "guard told, nothing routed": Point("overlay.nft:Nftables.put"),
    "before the first batch": Point(_BATCH, after=False),
    "after the first batch of several": Point(_BATCH, batch=3),
    "after the third batch of several": Point(_BATCH, call=3, batch=3),
    "after all batches, before settling": Point("overlay.tracker:Tracker.settle", after=False),
    "before the firewall's rules": Point("overlay.nft:Nftables.apply", after=False, call=2),
    "firewall loaded": Point("overlay.nft:Nftables.apply", call=2),
    "subnet file written, not in place": Point("pathlib:Path.rename", after=False),
    "subnet file in place, not ready": Point("overlay.subnet_file:write"),
    "ready": Point(READY),
    "drift seen, nothing repaired": Point(_BATCH, after=False, once_ready=True),
    "drift repaired in part": Point(_BATCH, once_ready=True, batch=1),
    "leave seen, nothing dropped": Point(_BATCH, after=False, once_ready=True),
    "leave: route dropped": Point(_BATCH, once_ready=True, batch=1),
    "leave: all but the fdb entry dropped": Point(_BATCH, call=3, once_ready=True, batch=1),
    "join: fdb entry put": Point(_BATCH, once_ready=True, batch=1),
}


def _wrap(target: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a wrapper in the place of a function or method."""
    module, _, path = target.partition(":")
    *outer, last = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    setattr(owner, last, wrapper(getattr(owner, last)))


def _die() -> NoReturn:
    os.write(sys.stderr.fileno(), LAST_WORDS.encode())
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


class _Trap:
    """Counts the calls that matter, and kills the process at the one it waits for."""

    def __init__(self, point: Point) -> None:
        self._point = point
        self._left = point.call
        self._armed = not point.once_ready

    def arm(self, ready: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(ready)
        def armed(*args: Any, **options: Any) -> Any:
            self._armed = True
            return ready(*args, **options)

        return armed

    def set_on(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def trapped(*args: Any, **options: Any) -> Any:
            self._left -= self._armed
            if self._left == 0 and not self._point.after:
                _die()
            result = function(*args, **options)
            if self._left == 0:
                _die()
            return result

        return trapped


def main() -> int:
    """Run the agent with the rest of the command line."""
    point = POINTS[sys.argv[1]]
    trap = _Trap(point)
    _wrap(point.target, trap.set_on)
    if point.once_ready:
        _wrap(READY, trap.arm)
    if point.batch is not None:
        importlib.import_module("overlay.kernel").BATCH = point.batch  # type: ignore[attr-defined]
    import agent

    return agent.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
