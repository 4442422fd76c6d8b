"""How long `overlay-agent status` takes, and what it costs the agent that answers: sudo python -m tests.bench.status

With root, in namespaces of its own. From process start to process end of the command as an operator runs it, and in
parentheses its processor time; that of the agent for one answer; its memory before the first and after the last.
"""

import argparse
import contextlib
import os
import pty
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import IO, NamedTuple

import structlog

from overlay import control
from overlay.text import table
from tests.bench.contenders import ROOT
from tests.bench.peers import SMALL
from tests.bench.place import hub
from tests.bench.report import FULL
from tests.bench.testbed import Host, Options, Testbed, etcd_in


class Run(NamedTuple):
    """Seconds from start to end of the command, and of its processor time."""

    wall: float
    cpu: float


def on_pipe(command: list[str]) -> Run:
    """With its output going to a pipe."""
    return _run(command, subprocess.PIPE)


def on_terminal(command: list[str]) -> Run:
    """With its output going to a terminal."""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", 0) as terminal:
        return _run(command, theirs, terminal)


def _run(command: list[str], output: int, terminal: IO[bytes] | None = None) -> Run:
    started, before = time.perf_counter(), os.times()
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output) as process:
        if terminal is not None:
            os.close(output)
        reader = terminal or process.stdout
        assert reader is not None
        # EIO: the terminal's other end is closed.
        with contextlib.suppress(OSError):
            while reader.read(1 << 16):
                pass
    after = os.times()
    children = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(time.perf_counter() - started, children)


def _middle(runs: Iterable[Run]) -> str:
    walls, cpus = zip(*runs, strict=True)
    return f"{median(walls):.2f} s ({median(cpus):.2f} s)"


def measured(host: Host, repeat: int) -> list[tuple[str, str]]:
    """What was measured, and the median of it as text."""
    path = str(host.directory / "agent.sock")
    base = [sys.executable, "-P", "-m", "agent", "status", "--config", os.devnull, "--control-socket", path]
    ways: dict[str, Callable[[], Run]] = {
        "status, on a terminal": lambda: on_terminal(base),
        "status --no-peers": lambda: on_pipe([*base, "--no-peers"]),
        "status --peers, on a terminal": lambda: on_terminal([*base, "--peers"]),
        "status --json": lambda: on_pipe([*base, "--json"]),
    }
    with host.agent() as agent:
        before = agent.memory["VmRSS"]
        found = [(name, _middle(run() for _ in range(repeat))) for name, run in ways.items()]
        cpu = agent.cpu_s
        for _ in range(repeat):
            control.ask_text(path, "status", 10.0)
        found.append(("processor time of the agent for one answer", f"{(agent.cpu_s - cpu) / repeat:.2f} s"))
        after = agent.memory
        found.append(
            ("memory of the agent: before, after, most", f"{before:.1f}, {after['VmRSS']:.1f}, {after['VmHWM']:.1f} MB")
        )
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.status", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--sizes", default=[SMALL, FULL], type=lambda text: [int(size) for size in text.split(",")])
    parser.add_argument("--repeat", default=5, type=int)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    options = Options((), FULL, arguments.repeat, 0.0)
    columns: dict[int, list[tuple[str, str]]] = {}
    with tempfile.TemporaryDirectory() as name, hub() as place, etcd_in(place, Path(name) / "etcd") as etcd:
        bed = Testbed(place, etcd, Path(name), options, print)
        for size in arguments.sizes:
            with bed.host(size) as host:
                columns[size] = measured(host, arguments.repeat)
    rows = [(each[0][0], *(cell for _, cell in each)) for each in zip(*columns.values(), strict=True)]
    print(table(("WHAT", *(f"{size} PEERS" for size in columns)), rows))


if __name__ == "__main__":
    main()
