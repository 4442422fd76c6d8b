"""The agent with stop-watches on its coarse steps: `python staged.py FILE run ...` is `python -m agent run ...`.

Writes the seconds of each stage to FILE, as JSON, when the agent says READY=1, and runs on. A stage's time is what its
functions take less what those of other stages take within them: wall-clock time and the CPU time of the thread that
runs them. Names are wrapped as soon as their module is imported; one that does not exist, or was never called, is an
error, for then the table below and the agent have grown apart.
"""

import builtins
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

TIMED = {
    "subnet_lease.etcd:EtcdStore.read_config": "etcd read",
    "subnet_lease.etcd:EtcdStore.snapshot": "etcd read",
    "subnet_lease.keeper:choose_subnet": "choose",
    "subnet_lease.table:LeaseTable.replace": "decode",
    "overlay.reconciler:Reconciler._want": "desired",
    "overlay.tracker:Tracker.pending": "encode",
    "overlay.kernel:Kernel.apply": "encode",
    "overlay.tracker:Tracker.saw": "bookkeeping",
    "overlay.tracker:Tracker.saw_all": "bookkeeping",
    "overlay.tracker:Tracker.settle": "bookkeeping",
}
"""Module and name -> stage."""

SOCKETS = "overlay.netlink:open_socket"
"""What makes the sockets whose send and recv are the stage KERNEL."""

READY = "overlay.notify:Notifier.ready"
"""What is called when the start is complete."""

IMPORTS, KERNEL, BESIDE = "imports", "kernel", "kernel, beside"
"""`BESIDE` is what the sockets take in a thread of their own, while another makes the next messages."""


class _Watch(threading.local):
    """One thread's stack of stages; time goes to the one on top."""

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.spent: dict[str, list[float]] = {}
        self._since = (0.0, 0.0)
        _spent.append(self.spent)

    def lap(self) -> None:
        now = time.monotonic(), time.thread_time()
        if self.stack:
            spent = self.spent.setdefault(self.stack[-1], [0.0, 0.0])
            for clock in (0, 1):
                spent[clock] += now[clock] - self._since[clock]
        self._since = now

    def run(self, stage: str, work: Callable[..., Any], *args: Any, **options: Any) -> Any:
        self.lap()
        self.stack.append(stage)
        try:
            return work(*args, **options)
        finally:
            self.lap()
            self.stack.pop()


_spent: list[dict[str, list[float]]] = []
"""Wall-clock and CPU seconds by stage, of each thread."""
_watch = _Watch()
_pending = {*TIMED, SOCKETS, READY}
_uncalled = set(TIMED)
_began = time.monotonic(), time.process_time()


class _TimedSocket(socket.socket):
    def send(self, *args: Any) -> int:
        return int(_watch.run(_at_kernel(), super().send, *args))

    def recv(self, *args: Any) -> bytes:
        return bytes(_watch.run(_at_kernel(), super().recv, *args))


def _at_kernel() -> str:
    return KERNEL if _watch.stack else BESIDE


def _wrapped(name: str, target: Callable[..., Any], file: Path) -> Callable[..., Any]:
    @wraps(target)
    def timed(*args: Any, **options: Any) -> Any:
        _uncalled.discard(name)
        return _watch.run(TIMED[name], target, *args, **options)

    @wraps(target)
    def timed_socket(*args: Any, **options: Any) -> socket.socket:
        return _TimedSocket(fileno=target(*args, **options).detach())

    @wraps(target)
    def ready(*args: Any, **options: Any) -> Any:
        _write(file)
        return target(*args, **options)

    if name == SOCKETS:
        return timed_socket
    return ready if name == READY else timed


def _wrap_new(file: Path) -> None:
    """Wrap what is in modules that have been imported since the last time."""
    for name in list(_pending):
        module, _, path = name.partition(":")
        *outer, last = path.split(".")
        if (owner := sys.modules.get(module)) is None or getattr(owner.__spec__, "_initializing", False):
            continue
        for each in outer:
            owner = getattr(owner, each)
        setattr(owner, last, _wrapped(name, getattr(owner, last), file))
        _pending.discard(name)


def _write(file: Path) -> None:
    if missing := _pending | _uncalled:
        raise LookupError(f"{__file__}: never imported or called: {sorted(missing)}")
    _watch.lap()
    ended = time.monotonic(), time.process_time()
    spent: dict[str, list[float]] = {}
    for thread in list(_spent):
        for stage, seconds in thread.items():
            sums = spent.setdefault(stage, [0.0, 0.0])
            sums[:] = map(sum, zip(sums, seconds, strict=True))
    file.write_text(json.dumps({"began": _began, "ended": ended, "stages": spent}))


def main() -> int:
    """Run the agent with the rest of the command line."""
    file, original = Path(sys.argv[1]), builtins.__import__

    def timed_import(*args: Any, **options: Any) -> Any:
        nested = IMPORTS in _watch.stack
        module = original(*args, **options) if nested else _watch.run(IMPORTS, partial(original, *args, **options))
        if _pending:
            _wrap_new(file)
        return module

    builtins.__import__ = timed_import
    import agent

    return agent.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
