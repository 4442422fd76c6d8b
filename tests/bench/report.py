"""What turns figures into docs/benchmarks.md: budgets, spreads, verdicts and tables.

Each scenario writes its own sections with these. Every number comes from the figures of a run, but for the budgets of
the design and for what was measured of flanneld earlier, both of which stand here.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from statistics import linear_regression, median
from typing import Any

BUDGET_SMALL_S = 0.5
BUDGET_OVER_KERNEL_S = 1.0
BUDGET_RATIO = {5000: 0.5, 15000: 0.1}
BUDGET_RESTART_S = 1.5
BUDGET_JOIN_MS = (2.5, 5.0)
BUDGET_BURST_S = 0.2
BUDGET_DRIFT_MS = 50.0
BUDGET_IDLE_MB = 56.0
BUDGET_FULL_MB = 90.0
BUDGET_IDLE_CPU = 0.1
"""Per cent of a core, without probes, which have a budget of their own."""
FULL = 15000

FLANNELD_START = {1000: (1.4, 0.6), 5000: (5.6, 3.4), 15000: (21.5, 14.4)}
"""flanneld v0.28.9 on this type of machine, earlier: peers -> (seconds, CPU seconds) from start to all entries."""
FLANNELD_SMALL_S = 0.36
"""From start to subnet.env with 3 hosts."""
FLANNELD_JOIN_MS = {1000: (2.6, 5.0), 15000: (4.2, 7.2)}
"""Peers -> median and 99th percentile from the start of the put to the route."""
FLANNELD_BURST_S = 0.52
"""From the last put of 1,000 joins to the last entry."""
FLANNELD_RESTART = (5000, 4.9)
"""Peers, and seconds until a restart among unchanged peers was steady; every entry was written again."""
FLANNELD_MB = (42, 66)
"""Resident when idle, and its peak at 15,000 peers."""
FLANNELD_IDLE_CPU = 1
"""Per cent of a core; it looks at its iptables rules every 5 s."""

SLOPE_LINEAR = 1.15
"""Log-log slopes up to here count as linear: caches and the garbage collector take their share as tables grow."""


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some samples, with the least and the most."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f}-{self.most:.{digits}f})"


class Figures:
    """What was measured, asked by name, size and field; and the verdicts passed upon it.

    `missed` names the budgets that are not met, `failed` what makes the benchmark itself fail.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        self.machine: dict[str, str] = result["machine"]
        self.missed: list[str] = []
        self.failed: list[str] = []
        self._samples = result["samples"]

    def sizes(self, what: str) -> list[int]:
        """The numbers of peers it was measured with, ascending."""
        return sorted(map(int, self._samples.get(what, {})))

    def all(self, what: str, size: int, field: str = "") -> list[Any]:
        """One value for each repetition: `field` of the sample, or the sample itself."""
        samples = self._samples[what][str(size)]
        return [sample[field] if field else sample for sample in samples]

    def spread(self, what: str, size: int, field: str = "") -> Spread:
        return Spread.of(self.all(what, size, field))

    def whole(self, what: str) -> Any:
        """All that is kept under this name."""
        return self._samples[what]

    def verdict(self, name: str, value: float, most: float, unit: str, digits: int = 2) -> str:
        """The value in bold, and whether it is within the budget of at most `most`; a miss is noted as `name`."""
        text, met = f"{value:.{digits}f} {unit}".rstrip(), value <= most
        if not met:
            self.missed.append(f"{name}: {text}, at most {most:g} {unit}".rstrip())
        return f"**{text}** ({'met' if met else 'not met'})"


def render(
    figures: Figures,
    scenarios: Iterable[tuple[Callable[[Figures], list[str]], Collection[str]]],
    command: str,
    plots: Sequence[tuple[str, str]],
) -> str:
    """The document. `scenarios`: what writes the sections of each, and the file names of the pictures to end with.

    `command` is how to measure again. `plots` are titles and paths; those no scenario asks for are shown last.
    """
    left = list(plots)
    parts = [
        "# Benchmarks",
        f"Written by `{command}`. Medians, with the least and the most in brackets; seconds of wall-clock time unless "
        "said otherwise. Everything runs in network namespaces of one machine: a real etcd, the agent's own process, "
        "the kernel. What is compared takes turns in one run, so ratios carry over to other machines; absolute times "
        "do not. In bold: what has a budget. After every measurement all entries in the kernel were read with `ip` "
        "and `bridge` and were exactly those of the leases in etcd. flanneld's figures were measured earlier on a "
        "machine of this type, not in these runs.",
        "## Machine",
        table(("what", "value"), figures.machine.items()),
    ]
    for sections, names in scenarios:
        parts += sections(figures)
        for plot in [each for each in left if each[1].rpartition("/")[2] in names]:
            left.remove(plot)
            parts.append(_image(*plot))
    if left:
        parts += ["## More pictures", *(_image(*plot) for plot in left)]
    return "\n\n".join(parts) + "\n"


def _image(title: str, path: str) -> str:
    return f"![{title}]({path})"


def percentiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, 99th percentile and the most."""
    ordered = sorted(values)
    return median(ordered), ordered[math.ceil(0.99 * len(ordered)) - 1], ordered[-1]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms."""
    fit = linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points])
    return float(fit.slope)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
