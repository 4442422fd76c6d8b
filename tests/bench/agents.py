"""A running agent, watched from outside: its readiness, log, CPU time, memory and threads."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from overlay.cluster import wait_until
from overlay.netns import Namespace
from tests.bench.contenders import DEADLINE_S, ROOT, Failed
from tests.bench.place import inside

AGENT = ("-m", "agent")
"""What Python is given to run the agent."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start of the agent.

    `ready_s` counts from just before fork to the arrival of READY=1, which the agent sends after the first pass that
    tried everything. CPU and memory are the process's own at that moment: the kernel's accounting of all its threads,
    the largest resident set so far. `stages` gives when each event of its log was written, counted as `ready_s` is.
    """

    ready_s: float
    cpu_s: float
    peak_mb: float
    resident_mb: float
    put: int
    dropped: int
    pass_s: float
    stages: dict[str, float]


class Agent:
    """An agent's process. `started` is just before its fork, on the steady clock; `start` is set once it is ready."""

    start: Start

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, started: float) -> None:
        self.process = process
        self.started = started
        self._log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def cpu_s(self) -> float:
        """User and system time of all threads, dead ones included, to the nanosecond (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.pid << 3) | 2)

    @property
    def memory(self) -> dict[str, float]:
        """VmHWM and VmRSS in MB of 1,000,000 bytes."""
        return {name: int(self._status()[name].split()[0]) * 1024 / 1e6 for name in ("VmHWM", "VmRSS")}

    @property
    def threads(self) -> int:
        return int(self._status()["Threads"])

    def _status(self) -> dict[str, str]:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return dict(line.split(":", 1) for line in lines)

    @property
    def children_cpu_s(self) -> float:
        """CPU time of children that have ended, in clock ticks (proc_pid_stat(5): cutime and cstime)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    def events(self) -> list[dict[str, Any]]:
        """All complete lines of its log."""
        return [json.loads(line) for line in self._log.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def passes(self, since: int, writes: int) -> list[dict[str, Any]]:
        """The passes that changed something, of the log from line `since` on, once they have made so many writes."""

        def found() -> list[dict[str, Any]]:
            each = [event for event in self.events()[since:] if event["event"] == "reconciled"]
            return each if sum(one["put"] + one["dropped"] for one in each) >= writes else []

        return wait_until(found, DEADLINE_S, f"{writes} writes in the agent's log")

    def kill(self) -> None:
        """As a power failure would; the dataplane stays."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def running(
    place: Namespace, endpoint: str, prefix: str, directory: Path, pycache: Path, argv: tuple[str, ...] = AGENT
) -> Iterator[Agent]:
    """An agent that has become ready in `place`; killed at the end.

    Python keeps what it compiles in `pycache`, so that only the first start compiles. `directory` is the host's.
    """
    log_path, notify_path = directory / "agent.log", directory / "notify"
    notify_path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, log_path.open("wb") as log:
        notify.bind(str(notify_path))
        command = [
            *(sys.executable, "-P", *argv, "run", "--config", os.devnull),
            *("--etcd-endpoints", endpoint, "--etcd-prefix", prefix),
            *("--iface", "eth0", "--subnet-file", str(directory / "subnet.env"), "--log-format", "json"),
            *("--control-socket", str(directory / "agent.sock")),
            *("--state-dir", str(directory / "state")),
            # The peers are leases without a host behind them; `tests.bench.probes` has some that answer.
            "--probes=false",
        ]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
            "PYTHONPATH": str(ROOT),
            "PYTHONPYCACHEPREFIX": str(pycache),
            "NOTIFY_SOCKET": str(notify_path),
        }
        epoch, started = time.time(), time.monotonic()
        process = inside(
            place,
            lambda: subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=directory
            ),
        )
        agent = Agent(process, log_path, started)
        try:
            ready = _await_ready(process, notify)
            agent.start = _start(agent, ready, epoch)
            yield agent
        except Failed as failure:
            raise Failed(f"{failure}; its log:\n{log_path.read_text()[-4000:]}") from None
        finally:
            agent.kill()


def _start(agent: Agent, ready: float, epoch: float) -> Start:
    cpu, memory, events = agent.cpu_s, agent.memory, agent.events()
    stages: dict[str, float] = {}
    for event in events:
        stages.setdefault(event["event"], datetime.fromisoformat(event["timestamp"]).timestamp() - epoch)
    ready_at = next(number for number, event in enumerate(events) if event["event"] == "ready")
    passes = [event for event in events[:ready_at] if event["event"] == "reconciled"]
    return Start(
        ready_s=ready - agent.started,
        cpu_s=cpu,
        peak_mb=memory["VmHWM"],
        resident_mb=memory["VmRSS"],
        put=sum(each["put"] for each in passes),
        dropped=sum(each["dropped"] for each in passes),
        pass_s=sum(each["ms"] for each in passes) / 1000,
        stages=stages,
    )


def _await_ready(process: "subprocess.Popen[bytes]", notify: socket.socket) -> float:
    """The time of READY=1 on the steady clock."""
    deadline = time.monotonic() + DEADLINE_S
    exit_handle = os.pidfd_open(process.pid)
    watched: list[socket.socket | int] = [notify, exit_handle]
    try:
        while (left := deadline - time.monotonic()) > 0:
            readable = select.select(watched, [], [], left)[0]
            now = time.monotonic()
            if notify in readable:
                if b"READY=1" in notify.recv(4096).split(b"\n"):
                    return now
            elif readable:
                raise Failed("the agent ended before it was ready")
    finally:
        os.close(exit_handle)
    raise Failed(f"the agent was not ready after {DEADLINE_S:g} s")
