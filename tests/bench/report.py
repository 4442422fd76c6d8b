"""docs/benchmarks.md out of the figures of one run. Every number comes from there, but for the two tables below."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median
from typing import Any

from tests.bench.run import JOINS, PYROUTE2_MOST, SMALL

BUDGET_SMALL_S = 0.5
BUDGET_OVER_KERNEL_S = 1.0
BUDGET_RATIO = {5000: 0.5, 15000: 0.1}
BUDGET_RESTART_S = 1.5
BUDGET_JOIN_MS = (2.5, 5.0)
BUDGET_IDLE_MB = 56.0
BUDGET_FULL_MB = 80.0
FULL = 15000

FLANNELD_START = {1000: (1.4, 0.6), 5000: (5.6, 3.4), 15000: (21.5, 14.4)}
"""flanneld v0.28.9 on this type of machine, earlier: peers -> (seconds, CPU seconds) from start to all entries."""
FLANNELD_SMALL_S = 0.36
"""From start to subnet.env with 3 hosts."""
FLANNELD_JOIN_MS = {1000: (2.6, 5.0), 15000: (4.2, 7.2)}
"""Peers -> median and 99th percentile from the start of the put to the route."""
FLANNELD_RESTART = (5000, 4.9)
"""Peers, and seconds until a restart among unchanged peers was steady; every entry was written again."""
FLANNELD_MB = (42, 66)
"""Resident when idle, and its peak at 15,000 peers."""

SLOPE_LINEAR = 1.15
"""Log-log slopes up to here count as linear: caches and the garbage collector take their share as tables grow."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some samples, with the least and the most."""

    median: float
    least: float
    most: float

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}-{self.most:.{digits}f})"


class Figures:
    """The samples of a run, asked by contender, size and field."""

    def __init__(self, result: dict[str, Any]) -> None:
        self.machine: dict[str, str] = result["machine"]
        self.sizes: list[int] = result["sizes"]
        self.repeat: int = result["repeat"]
        self._samples = result["samples"]

    def all(self, contender: str, size: int, field: str = "") -> list[Any]:
        """One value for each repetition; `field` of a start, or the seconds of any other contender."""
        samples = self._samples[contender][str(size)]
        return [sample[field] if field else sample for sample in samples]

    def spread(self, contender: str, size: int, field: str = "") -> Spread:
        values = self.all(contender, size, field)
        return Spread(median(values), min(values), max(values))

    def ready(self, size: int) -> float:
        """The agent's median time from process start to all entries."""
        return self.spread("agent", size, "ready_s").median

    def stage(self, size: int, event: str) -> float:
        """Median seconds from process start to an event of the agent's log."""
        return float(median(start["stages"][event] for start in self._samples["agent"][str(size)]))


def render(result: dict[str, Any], command: str) -> str:
    """The document. `command` is how to measure again."""
    figures = Figures(result)
    parts = [
        "# Benchmarks",
        f"Written by `{command}`. Medians of {figures.repeat} repetitions, the least and the most in brackets; seconds "
        "of wall-clock time unless said otherwise. The contenders take turns in one run, so ratios carry over to other "
        "machines; absolute times do not. In bold: what has a budget. After every measurement all entries in the "
        "kernel were read with `ip` and `bridge` and were exactly those of the leases in etcd.",
        "## Machine",
        _table(("what", "value"), figures.machine.items()),
        *_start(figures),
        *_iproute2(figures),
        *_growth(figures),
        *_changes(figures),
        *_stages(figures),
        *_restart(figures),
        *_memory(figures),
        *_codec(figures),
    ]
    return "\n\n".join(parts) + "\n"


def _start(figures: Figures) -> list[str]:
    rows = []
    small = figures.spread("agent", SMALL, "ready_s")
    flanneld = f"{FLANNELD_SMALL_S} (to subnet.env)"
    verdict = _verdict(small.median, BUDGET_SMALL_S, "s")
    rows.append((f"{SMALL:,}", small.text(), figures.spread("agent", SMALL, "cpu_s").text(), "", verdict, flanneld))
    for size in figures.sizes:
        kernel = figures.spread("kernel", size)
        over = figures.ready(size) - kernel.median
        verdict = (
            f"{_verdict(over, BUDGET_OVER_KERNEL_S, 's')} over the kernel" if size == FULL else f"{over:.2f} s over"
        )
        theirs = "{} ({} CPU)".format(*FLANNELD_START[size]) if size in FLANNELD_START else ""
        ready, cpu = figures.spread("agent", size, "ready_s"), figures.spread("agent", size, "cpu_s")
        rows.append((f"{size:,}", ready.text(), cpu.text(), kernel.text(3), verdict, theirs))
    return [
        "## From process start to all entries in the kernel",
        "A host joins: its kernel is empty, the leases of its peers are in etcd. Counted from the fork of the Python "
        "interpreter to `READY=1`, which the agent sends after its first full pass. Each peer takes four entries: FDB, "
        "neighbour, nexthop, route. *Kernel alone* sends the same messages, made beforehand, over a socket nobody "
        f"watches: what no agent can save. Budgets: at most {BUDGET_SMALL_S} s with {SMALL + 1} hosts; with {FULL:,} "
        f"peers at most {BUDGET_OVER_KERNEL_S:g} s more than the kernel alone. flanneld's figures were measured "
        "earlier on a machine of this type, not in this run.",
        _table(("peers", "agent", "agent's CPU seconds", "kernel alone", "budget", "flanneld v0.28.9"), rows),
    ]


def _iproute2(figures: Figures) -> list[str]:
    rows = []
    for size in figures.sizes:
        passes = figures.spread("agent", size, "pass_s")
        plain, hops = figures.spread("iproute2", size), figures.spread("iproute2_nexthops", size)
        ratios = passes.median / plain.median, figures.ready(size) / plain.median
        cells = [
            _verdict(each, BUDGET_RATIO[size], "x") if size in BUDGET_RATIO else f"{each:.2f} x" for each in ratios
        ]
        against = f"{passes.median / hops.median:.2f} x"
        rows.append((f"{size:,}", passes.text(), plain.text(), *cells, hops.text(), against))
    return [
        "## Against iproute2 fed from ready-made files",
        "iproute2 finds all commands in two files: `bridge -batch` for the FDB, then `ip -batch` for neighbours and "
        "routes; what both take on empty files, their start, is taken off. Its like is the agent's *pass*: the entries "
        "are in memory, and it compares, encodes, writes and books them. The *whole* has the interpreter's start, the "
        "lease, reading and checking the leases in it too. *Plain*: `ip route replace SUBNET via GATEWAY dev flannel.1 "
        "onlink`, as one would write it; the kernel's cost of that is quadratic in the number of peers. *Nexthop "
        "objects*: the routes as the agent makes them. Budgets against plain: "
        + ", ".join(f"at most {ratio:g} x at {size:,} peers" for size, ratio in BUDGET_RATIO.items())
        + ".",
        _table(
            (
                "peers",
                "agent's pass",
                "plain",
                "pass / plain",
                "whole / plain",
                "nexthop objects",
                "pass / nexthop objects",
            ),
            rows,
        ),
    ]


def _growth(figures: Figures) -> list[str]:
    if len(figures.sizes) < 2:
        return []
    fixed = figures.ready(SMALL)
    series: dict[str, Callable[[int], float]] = {
        "agent, whole": figures.ready,
        f"agent, less what it takes with {SMALL} peers": lambda size: figures.ready(size) - fixed,
        "agent, passes alone": lambda size: figures.spread("agent", size, "pass_s").median,
        "kernel alone": lambda size: figures.spread("kernel", size).median,
        "iproute2, plain": lambda size: figures.spread("iproute2", size).median,
        "iproute2, nexthop objects": lambda size: figures.spread("iproute2_nexthops", size).median,
    }
    rows = []
    for number, (name, seconds) in enumerate(series.items()):
        slope = _slope([(size, seconds(size)) for size in figures.sizes])
        met = "met" if slope <= SLOPE_LINEAR else "not met"
        rows.append((name, f"**{slope:.2f}** ({met})" if number < 2 else f"{slope:.2f}"))
    sizes = ", ".join(f"{size:,}" for size in figures.sizes)
    return [
        "## Growth",
        f"The slope of the logarithm of the time over that of the number of peers, fitted to {sizes}: 1 is linear, 2 "
        f"quadratic. Budget: linear, at most {SLOPE_LINEAR}.",
        _table(("time", "slope"), rows),
    ]


def _changes(figures: Figures) -> list[str]:
    rows = []
    for size in (SMALL, *figures.sizes):
        cells = []
        for kind in ("joins", "leaves", "writes"):
            ms = sorted(1000 * each for sample in figures.all("changes", size, kind) for each in sample)
            middle, late = median(ms), ms[math.ceil(0.99 * len(ms)) - 1]
            text = [f"{middle:.1f}", f"{late:.1f}", f"{ms[-1]:.1f}"]
            if kind == "joins":
                text = [
                    _verdict(middle, BUDGET_JOIN_MS[0], "ms", 1),
                    _verdict(late, BUDGET_JOIN_MS[1], "ms", 1),
                    text[2],
                ]
            cells.append(" / ".join(text))
        theirs = "{} / {}".format(*FLANNELD_JOIN_MS[size]) if size in FLANNELD_JOIN_MS else ""
        rows.append((f"{size:,}", *cells, theirs))
    return [
        "## One host joins, one host leaves",
        "Milliseconds from the start of the write to etcd to the kernel's announcement of the route: median / 99th "
        f"percentile / most of {JOINS * figures.repeat} joins and leaves, one after the other. *etcd alone*: until the "
        "write is answered, which is in the others too. Budget for a join, at every size: median "
        "{} ms, 99th percentile {} ms.".format(*BUDGET_JOIN_MS),
        _table(("peers", "join", "leave", "etcd alone", "flanneld v0.28.9, join"), rows),
    ]


STAGES = {
    "starting": "interpreter, imports, options",
    "underlay_chosen": "configuration read, underlay found",
    "lease_acquired": "leases read, own one taken",
    "device_set": "device made",
    "reconciled": "leases checked, entries worked out and written",
    "ready": "subnet file written",
}
"""Event of the agent's log -> what has been done since the one before."""


def _stages(figures: Figures) -> list[str]:
    sizes = [SMALL, *figures.sizes]
    rows = []
    before = dict.fromkeys(sizes, 0.0)
    for event, meaning in STAGES.items():
        at = {size: figures.stage(size, event) for size in sizes}
        rows.append((f"`{event}`", meaning, *(f"{at[size] - before[size]:.3f}" for size in sizes)))
        before = at
    passes = (f"{figures.spread('agent', size, 'pass_s').median:.3f}" for size in sizes)
    rows.append(("", "of `reconciled`: the pass itself, kernel included", *passes))
    return [
        "## Where the agent's time goes",
        "Seconds up to each event in its log, from the one before.",
        _table(("event", "work", *(f"{size:,} peers" for size in sizes)), rows),
    ]


def _restart(figures: Figures) -> list[str]:
    rows = []
    for size in (SMALL, *figures.sizes):
        ready, cpu = figures.spread("restart", size, "ready_s"), figures.spread("restart", size, "cpu_s")
        writes = max(figures.all("restart", size, "put")) + max(figures.all("restart", size, "dropped"))
        verdict = _verdict(ready.median, BUDGET_RESTART_S, "s") if size == FULL else ""
        count = f"**{writes:.0f}** ({'met' if not writes else 'not met'})" if size == FULL else f"{writes:.0f}"
        rows.append((f"{size:,}", ready.text(), cpu.text(), count, verdict))
    return [
        "## Restart among unchanged peers",
        "The agent is killed and started again; nothing has changed. Kernel writes are the most of any run, from its "
        f"log. Budgets with {FULL:,} peers: no write, ready within {BUDGET_RESTART_S} s. flanneld v0.28.9, earlier: "
        "steady after {1} s with {0:,} peers, every entry written again.".format(*FLANNELD_RESTART),
        _table(("peers", "ready", "CPU seconds", "kernel writes", "budget"), rows),
    ]


def _memory(figures: Figures) -> list[str]:
    rows = []
    budgets = {SMALL: BUDGET_IDLE_MB, FULL: BUDGET_FULL_MB}
    for size in (SMALL, *figures.sizes):
        cells = []
        for contender in ("agent", "restart"):
            peak = figures.spread(contender, size, "peak_mb")
            cells.append(_verdict(peak.median, budgets[size], "MB", 1) if size in budgets else f"{peak.median:.1f} MB")
        rows.append((f"{size:,}", *cells))
    return [
        "## Memory",
        "The largest resident set (VmHWM, libraries included) up to `READY=1`; 1 MB is 1,000,000 bytes. Budgets: "
        f"{BUDGET_IDLE_MB:g} MB among few peers, {BUDGET_FULL_MB:g} MB with {FULL:,}. flanneld v0.28.9, earlier: "
        "{} MB when idle, {} MB at its peak.".format(*FLANNELD_MB),
        _table(("peers", "first start", "restart"), rows),
    ]


def _codec(figures: Figures) -> list[str]:
    rows = []
    for size in figures.sizes:
        kernel, acks = figures.spread("kernel", size), figures.spread("kernel_acks", size)
        theirs = figures.spread("pyroute2", size) if size <= PYROUTE2_MOST else None
        rows.append(
            (
                f"{size:,}",
                kernel.text(3),
                acks.text(3),
                f"{acks.median / kernel.median:.1f} x",
                theirs.text() if theirs else "",
                f"{theirs.median / kernel.median:.0f} x" if theirs else "",
            )
        )
    return [
        "## Why there is a codec of our own, and what acknowledgements cost",
        "*Kernel alone* as above: refusals are answered one by one, success by one acknowledgement at the end of a "
        "batch. *Acknowledged each*: the same messages, each with an acknowledgement of its own. *pyroute2*: one call "
        "of `IPRoute` for each FDB, neighbour and route entry, import and socket not counted.",
        _table(
            ("peers", "kernel alone", "acknowledged each", "ratio", "pyroute2", "pyroute2 / kernel alone"),
            rows,
        ),
    ]


def _verdict(value: float, budget: float, unit: str, digits: int = 2) -> str:
    return f"**{value:.{digits}f} {unit}** ({'met' if value <= budget else 'not met'})"


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms."""
    fit = linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
    return float(fit.slope)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
