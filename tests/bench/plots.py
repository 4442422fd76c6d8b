"""The figures of one run as pictures: SVG without scripts, references or fonts of its own, for docs/benchmarks.md.

What was not measured is not drawn. The same figures give the same bytes. Colours are those of Okabe and Ito, which
colour-blind readers can tell apart; lines differ in dash, width or mark as well. The ground is white wherever it is
shown.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import NormalDist, median
from typing import Any
from xml.sax.saxutils import escape

from tests.bench.report import BUDGET_FULL_MB, BUDGET_IDLE_MB, BUDGET_JOIN_MS, FLANNELD_START, FULL
from tests.bench.run import SMALL

Samples = dict[str, dict[str, list[Any]]]
Point = tuple[float, float]

WIDTH, LEFT, TOP, FLOOR = 860, 76, 52, 384
"""Pixels: the picture, and where plot areas begin and end. On their right is the legend, as wide as it must be."""
BELOW = 56
"""Pixels for the words under a plot area."""
LINE = 20
"""Pixels from one line of text to the next."""
GLYPH = 6.8
"""Pixels that a character takes at most on average; the reader's font is not known here."""

INK, GREY, BLACK = "#222222", "#767676", "#000000"
BLUE, ORANGE, GREEN, SKY = "#0072b2", "#e69f00", "#009e73", "#56b4e9"
PURPLE, YELLOW, VERMILLION = "#cc79a7", "#f0e442", "#d55e00"
FULL_TONES = (BLUE, ORANGE, GREEN, SKY, PURPLE, YELLOW, VERMILLION, "#999999")
PALE_TONES = ("#f5d899", "#99c7e0", "#eebf99", "#99d8c7", "#ebc9db", "#d6d6d6")
"""The same with white, in another order, so that likes are far apart where both follow one another."""

MARKS = {
    "": "",
    "circle": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "ring": "m-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0zm1.5 0a4.5 4.5 0 1 1 9 0a4.5 4.5 0 1 1-9 0z",
    "square": "m-3.5-3.5h7v7h-7z",
    "triangle": "m0-5l4.5 8h-9z",
    "diamond": "m0-5l5 5l-5 5l-5-5z",
    "box": "m-9-6h18v12h-18z",
    "left": "m-5 0l9-6v12z",
    "down": "m0 5l-6-9h12z",
}
"""Shapes around a point, as relative path data. `left` and `down` point to where a budget wants the line."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line with its name; `band` is the least and the most at each x."""

    name: str
    points: Sequence[Point]
    colour: str
    mark: str = ""
    dash: str = ""
    width: float = 2
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` on pixels from `start` to `end`. A tick without text is a minor one."""

    label: str
    start: float
    end: float
    low: float
    high: float
    ticks: Sequence[tuple[float, str]] = ()
    scale: Callable[[float], float] = float

    def at(self, value: float) -> float:
        low, high = self.scale(self.low), self.scale(self.high)
        return self.start + (self.scale(value) - low) / (high - low) * (self.end - self.start)


def draw(result: dict[str, Any], directory: Path) -> list[tuple[str, str]]:
    """Write the plots that `result` has figures for into `directory`, which exists; the title and file name of each.

    `result` is what `run.run` returns and `--json` keeps.
    """
    drawn = []
    for name, title, plot in (
        ("start.svg", "From process start to all entries in the kernel", _start),
        ("stages.svg", "Where the time of a first start goes", _stages),
        ("changes.svg", "One change among many peers", _changes),
        ("memory.svg", "Memory of the agent", _memory),
    ):
        if picture := plot(title, result["samples"]):
            (directory / name).write_text(picture, encoding="utf-8")
            drawn.append((title, name))
    return drawn


# --- the plots ---------------------------------------------------------------------------------------------------


def _start(title: str, samples: Samples) -> str | None:
    if not samples.get("agent"):
        return None
    lines = []
    for contender, name, colour, mark, dash in (
        ("iproute2", "iproute2, plain", ORANGE, "triangle", "9 3"),
        ("iproute2_nexthops", "iproute2, nexthop objects", GREEN, "diamond", "2 3"),
        ("pyroute2", "pyroute2", PURPLE, "square", "9 3 2 3"),
        ("kernel", "kernel alone", BLACK, "square", ""),
    ):
        of_size = _by_size(samples, contender)
        # What iproute2 takes on empty files is taken off: among few peers nothing may be left.
        points: list[Point] = [(size, median(values)) for size, values in of_size if median(values) > 0]
        if points:
            lines.append(Series(name, points, colour, mark, dash))
    flanneld = [(size, start) for size, (start, _) in FLANNELD_START.items()]
    lines.append(Series("flanneld v0.28.9, earlier", flanneld, VERMILLION, "ring", "5 5"))
    ready = [(size, [each["ready_s"] for each in starts]) for size, starts in _by_size(samples, "agent")]
    band = [(size, min(values), max(values)) for size, values in ready]
    lines.append(Series("overlay-agent", [(x, median(y)) for x, y in ready], BLUE, "circle", width=3, band=band))
    every = [point for line in lines for point in line.points]
    # Below all others, where it hides nothing.
    slope = 0.6 * min(y / x for x, y in every)
    guide = "slope 1: linear"
    picture = _Picture(
        title,
        "Seconds to all entries against the number of peers, both axes logarithmic. Medians; the band of the agent "
        "is from its least to its most. flanneld was measured earlier, not in this run.",
        [guide, *(line.name for line in lines)],
    )
    x = _logarithmic("peers", LEFT, picture.right, [x for x, _ in every])
    y = _logarithmic("seconds", FLOOR, TOP, [*(y for _, y in every), *(end for _, *ends in band for end in ends)])
    most = min(x.high, y.high / slope)
    least = max(x.low, y.low / slope)
    lines.insert(0, Series(guide, [(least, least * slope), (most, most * slope)], GREY, width=1))
    picture.panel(x, y, lines)
    lines.sort(key=lambda line: -line.points[-1][1])
    picture.legend(lines, _apart([y.at(line.points[-1][1]) for line in lines], TOP, FLOOR))
    return picture.text()


def _stages(title: str, samples: Samples) -> str | None:
    of_size: dict[int, list[dict[str, float]]] = {
        size: [each["wall"] for each in values] for size, values in _by_size(samples, "stages")
    } or {size: [_durations(each["stages"]) for each in values] for size, values in _by_size(samples, "agent")}
    names = list(dict.fromkeys(name for values in of_size.values() for each in values for name in each))
    if not names:
        return None
    bars = {size: [median(each.get(name, 0) for each in of) for name in names] for size, of in of_size.items()}
    floor = TOP + max(40 * len(bars), LINE * len(names))
    about = "Seconds of wall-clock time in each stage, one bar for each number of peers. Medians of each stage."
    picture = _Picture(title, about, names, floor)
    # Room for the sum behind the longest bar.
    x = _linear("seconds of wall-clock time", LEFT + 34, picture.right, 1.12 * max(map(sum, bars.values())))
    y = Axis("", floor, TOP, len(bars), 0)
    picture.panel(x, y, [])
    tones = cycle((*FULL_TONES, *PALE_TONES))
    legend = [Series(name, [], tone, "box", width=0) for name, tone in zip(names, tones, strict=False)]
    for row, (size, seconds) in enumerate(bars.items()):
        middle, done = y.at(row + 0.5), 0.0
        picture.words(x.start - 8, middle + 4, f"{size:,} peers", "end")
        for stage, part in zip(legend, seconds, strict=True):
            left, done = x.at(done), done + part
            width = x.at(done) - left
            picture.add(
                f'<rect x="{left:.1f}" y="{middle - 13:.1f}" width="{width:.1f}" height="26" fill="{stage.colour}" '
                'stroke="#ffffff"/>'
            )
            if width > 32:
                colour = "#ffffff" if stage.colour in (BLUE, GREEN, VERMILLION) else BLACK
                picture.words(left + width / 2, middle + 4, f"{part:.2f}", "middle", colour)
        picture.words(x.at(done) + 6, middle + 4, f"{done:.2f} s")
    picture.legend(legend)
    return picture.text()


def _durations(events: dict[str, float]) -> dict[str, float]:
    """What passed before each event of the agent's log since the one before it."""
    ordered = sorted(events.items(), key=lambda item: item[1])
    return {f"until {name}": at - since for (name, at), (_, since) in zip(ordered, [("", 0.0), *ordered], strict=False)}


def _changes(title: str, samples: Samples) -> str | None:
    kinds = {"joins": "a host joins", "mac_changes": "its MAC changes", "leaves": "it leaves"}
    # Each is narrower than the one it may lie on.
    looks = ((BLUE, "", 5), (ORANGE, "", 2.5), (BLACK, "5 4", 1.5), (GREEN, "2 3", 2.5), (PURPLE, "9 3 2 3", 2))
    panels: dict[str, list[Series]] = {}
    for kind in kinds:
        for number, (size, values) in enumerate(_by_size(samples, "changes")):
            colour, dash, width = looks[number % len(looks)]
            if ms := sorted(1000 * each for sample in values for each in sample.get(kind, [])):
                # As percentiles are reckoned in the report; the last is not at 1, which that scale does not have.
                points = [(each, min(done, len(ms) - 0.5) / len(ms)) for done, each in enumerate(ms, 1)]
                panels.setdefault(kind, []).append(Series(f"{size:,} peers", points, colour, "", dash, width))
    if not panels:
        return None
    every = [point for lines in panels.values() for line in lines for point in line.points]
    edge = 0.8 * min(1 - share for _, share in every)
    shares = [(each, f"{100 * each:g} %") for each in (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)]
    shares = [(each, text) for each, text in shares if edge < each < 1 - edge]
    y = Axis("share of changes done", FLOOR, TOP + LINE, edge, 1 - edge, shares, NormalDist().inv_cdf)
    legend = list({line.name: line for lines in panels.values() for line in lines}.values())
    legend.append(Series("budget: not right of it", [], VERMILLION, "left", width=0))
    picture = _Picture(
        title,
        "The share of changes that the kernel has announced against milliseconds from the start of the write to etcd, "
        "one line for each number of peers: time logarithmic, shares on the scale of the normal distribution.",
        [line.name for line in legend],
    )
    gap = 2 * LINE
    wide = (picture.right - LEFT + gap) / len(panels)
    for number, (kind, lines) in enumerate(panels.items()):
        start = LEFT + number * wide
        times = [*(ms for ms, _ in every), *BUDGET_JOIN_MS]
        x = _logarithmic("ms from the write", start, start + wide - gap, times)
        picture.panel(x, y, [_thinned(line, y) for line in lines], first=not number)
        picture.words((x.start + x.end) / 2, y.end - 8, kinds[kind], "middle", extra='font-weight="bold"')
        if kind == "joins":
            for limit, share, text in zip(BUDGET_JOIN_MS, (0.5, 0.99), ("p50", "p99"), strict=True):
                picture.mark("left", x.at(limit), y.at(share), VERMILLION)
                # To the right of it and below: above are the slowest changes, to the left nearly all.
                picture.words(x.at(limit) + 8, y.at(share) + LINE, f"{text} {limit:g} ms", "start", VERMILLION)
    picture.legend(legend)
    return picture.text()


def _thinned(line: Series, y: Axis) -> Series:
    """The line with at most one point for every two pixels of height, and its last."""
    points = {round(y.at(share) / 2): (ms, share) for ms, share in reversed(line.points)}
    return Series(line.name, [*reversed(points.values()), line.points[-1]], line.colour, "", line.dash, line.width)


def _memory(title: str, samples: Samples) -> str | None:
    lines = []
    # Each is narrower than the one it may lie on.
    for contender, field, name, colour, mark, dash, width in (
        ("agent", "peak_mb", "first start, peak", BLUE, "diamond", "", 6),
        ("agent", "resident_mb", "first start, resident", SKY, "", "", 3),
        ("restart", "peak_mb", "restart, peak", ORANGE, "", "9 4", 2),
        ("restart", "resident_mb", "restart, resident", BLACK, "", "2 3", 1.2),
    ):
        of_size = _by_size(samples, contender)
        points: list[Point] = [(size, median(each[field] for each in starts)) for size, starts in of_size]
        if points:
            lines.append(Series(name, points, colour, mark, dash, width))
    if not lines:
        return None
    every = [point for line in lines for point in line.points]
    legend = [*lines, Series("budget: not above it", [], VERMILLION, "down", width=0)]
    about = "Medians of the largest and of the present resident set at READY=1, against the number of peers."
    picture = _Picture(title, about, [line.name for line in legend])
    x = _linear("peers", LEFT, picture.right, 1.1 * max(FULL, *(x for x, _ in every)))
    y = _linear("MB of 1,000,000 bytes", FLOOR, TOP, 1.1 * max(BUDGET_FULL_MB, *(y for _, y in every)))
    picture.panel(x, y, lines)
    for size, limit in ((SMALL, BUDGET_IDLE_MB), (FULL, BUDGET_FULL_MB)):
        # On the side of the mark where the lines are not.
        above = all(value <= limit for at, value in every if at == size)
        picture.mark("down", x.at(size), y.at(limit), VERMILLION)
        picture.words(x.at(size) + 10, y.at(limit) + (-6 if above else 14), f"{limit:g} MB", colour=VERMILLION)
    picture.legend(legend)
    return picture.text()


def _by_size(samples: Samples, contender: str) -> list[tuple[int, list[Any]]]:
    """What was measured of a contender, from the smallest cluster to the largest."""
    return sorted((int(size), values) for size, values in samples.get(contender, {}).items() if values)


# --- axes --------------------------------------------------------------------------------------------------------


def _linear(label: str, start: float, end: float, most: float) -> Axis:
    """From 0 to `most` or a little more, in steps of 1, 2 or 5 times a power of ten."""
    step = _round(most / 9)
    count = math.ceil(most / step)
    return Axis(label, start, end, 0, count * step, [(n * step, f"{n * step:,.10g}") for n in range(count + 1)])


def _logarithmic(label: str, start: float, end: float, values: Sequence[float]) -> Axis:
    """Around the values, which are positive. With less than two decades 1, 2 and 5 have text, with more 1 alone."""
    low, high = 1 / _round(1.15 / min(values)), _round(1.15 * max(values))
    named = (1, 2, 5) if high / low < 100 else (1,)
    ticks = [
        (digit * 10.0**power, f"{digit * 10.0**power:,.10g}" if digit in named else "")
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digit in range(1, 10)
    ]
    ticks = [(value, text) for value, text in ticks if 0.999 * low < value < 1.001 * high]
    return Axis(label, start, end, low, high, ticks, math.log10)


def _round(value: float) -> float:
    """The least of 1, 2, 5, 10 times a power of ten that is not below; a last bit more does not count."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power > value * (1 - 1e-9))


def _apart(heights: Iterable[float], top: float, bottom: float) -> list[float]:
    """The rising `heights` moved apart to lines of text: downwards, and up again from the bottom."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + LINE if moved else top))
    return [min(height, bottom - LINE * left) for left, height in zip(range(len(moved))[::-1], moved, strict=True)]


# --- SVG ---------------------------------------------------------------------------------------------------------


class _Picture:
    """An SVG document while it is written. `right` is where plot areas end, so that the names fit into the legend."""

    def __init__(self, title: str, about: str, names: Iterable[str], floor: float = FLOOR) -> None:
        self.right = WIDTH - 56 - GLYPH * max(map(len, names))
        height = floor + BELOW
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" '
            f'height="{height:g}" role="img" aria-labelledby="title desc" font-family="sans-serif" font-size="12">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(about)}</desc>',
            f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="#ffffff"/>',
        ]
        self.words(20, 29, title, extra='font-size="16" font-weight="bold"')

    def text(self) -> str:
        return "\n".join([*self._parts, "</svg>"]) + "\n"

    def add(self, part: str) -> None:
        """`part` is finished SVG; what comes from the figures has been escaped, or is a number."""
        self._parts.append(part)

    def panel(self, x: Axis, y: Axis, lines: Iterable[Series], *, first: bool = True) -> None:
        """Grid, axes and lines. Of panels side by side only the first has the words of the y axis."""
        self.add('<g class="panel">')
        for value, text in x.ticks:
            self.add(f'<path d="M{x.at(value):.1f} {y.start:.1f}V{y.end:.1f}" stroke="{_grid(text)}"/>')
            self.words(x.at(value), y.start + 18, text, "middle")
        for value, text in y.ticks:
            self.add(f'<path d="M{x.start:.1f} {y.at(value):.1f}H{x.end:.1f}" stroke="{_grid(text)}"/>')
            self.words(x.start - 8, y.at(value) + 4, text if first else "", "end")
        self.add(
            f'<rect class="area" x="{x.start:.1f}" y="{y.end:.1f}" width="{x.end - x.start:.1f}" '
            f'height="{y.start - y.end:.1f}" fill="none" stroke="{GREY}"/>'
        )
        self.words((x.start + x.end) / 2, y.start + 40, x.label, "middle")
        if first:
            middle = (y.start + y.end) / 2
            self.words(20, middle, y.label, "middle", extra=f'transform="rotate(-90 20 {middle:.1f})"')
        for line in lines:
            if line.band:
                edge = [(at, low) for at, low, _ in line.band] + [(at, high) for at, _, high in reversed(line.band)]
                self.add(f'<polygon points="{_pairs(x, y, edge)}" fill="{line.colour}" fill-opacity="0.3"/>')
            self.add(f'<polyline points="{_pairs(x, y, line.points)}" {_stroke(line)}/>')
            for at, value in line.points:
                self.mark(line.mark, x.at(at), y.at(value), line.colour)
        self.add("</g>")

    def legend(self, lines: Sequence[Series], heights: Sequence[float] = ()) -> None:
        """The name of each line beside a piece of it; without heights from the top down."""
        for line, y in zip(lines, heights or [TOP + LINE * (n + 0.5) for n in range(len(lines))], strict=True):
            if line.width:
                self.add(f'<path d="M{self.right + 10:.1f} {y:.1f}h30" {_stroke(line)}/>')
            self.mark(line.mark, self.right + 25, y, line.colour)
            self.words(self.right + 46, y + 4, line.name)

    def mark(self, shape: str, x: float, y: float, colour: str) -> None:
        if shape:
            self.add(f'<path d="M{x:.1f} {y:.1f}{MARKS[shape]}" fill="{colour}"/>')

    def words(
        self, x: float, y: float, text: str, anchor: str = "start", colour: str = INK, *, extra: str = ""
    ) -> None:
        if text:
            place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
            self.add(f"<text {place}{' ' * bool(extra)}{extra}>{escape(text)}</text>")


def _pairs(x: Axis, y: Axis, points: Iterable[Point]) -> str:
    return " ".join(f"{x.at(at):.1f},{y.at(value):.1f}" for at, value in points)


def _stroke(line: Series) -> str:
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    return f'fill="none" stroke="{line.colour}" stroke-width="{line.width:g}"{dash} stroke-linejoin="round"'


def _grid(text: str) -> str:
    return "#d4d4d4" if text else "#efefef"
