"""An etcd to be measured; what a process costs, asked of the kernel from outside; many samples in a few numbers."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from tests.faults.etcd_process import SOCKET, EtcdProcess, free_ports

ROOT = Path(__file__).parents[2]

DEADLINE_S = 180.0
"""How long anything may take before it counts as failed."""


class Failed(Exception):
    """What was to be measured did not do its work; the text says what it said."""


class Meter:
    """The process `pid` and all its threads."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    @property
    def cpu_s(self) -> float:
        """User and system time of all threads, dead ones included, to the nanosecond (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.pid << 3) | 2)

    @property
    def rss_mb(self) -> float:
        """The resident set, in MB of 1,000,000 bytes."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise ProcessLookupError(self.pid)

    @property
    def files(self) -> int:
        """Open file descriptors."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/fd").iterdir())


class Cost:
    """What a stretch of time cost a process: CPU and wall-clock seconds, filled in when it ends."""

    cpu_s: float = 0.0
    wall_s: float = 0.0


@contextmanager
def cost_of(meter: Meter) -> Iterator[Cost]:
    """The cost of what happens inside the block."""
    cost, cpu, started = Cost(), meter.cpu_s, time.monotonic()
    yield cost
    cost.cpu_s, cost.wall_s = meter.cpu_s - cpu, time.monotonic() - started


def loopback(scheme: str = "http") -> str:
    """An endpoint that is free."""
    return f"{scheme}://127.0.0.1:{free_ports(1)[0]}"


def etcd_at(url: str, directory: Path, *arguments: str) -> EtcdProcess:
    """An etcd that listens at `url` for those that are measured, and on a unix socket, its `endpoint`, for us."""
    return EtcdProcess(directory, unix=True, arguments=[f"--listen-client-urls=unix://{SOCKET},{url}", *arguments])


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile, least and most."""
    ordered = sorted(samples)
    return {
        "p50": median(ordered),
        "p99": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "min": ordered[0],
        "max": ordered[-1],
    }
