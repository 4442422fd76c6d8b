"""The benchmark's plots: what was measured is in them, inside its axes and readable, and nothing else is."""

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.plots import GLYPH, LINE, _apart, _linear, _logarithmic, draw
from tests.bench.report import BUDGET_FULL_MB, BUDGET_IDLE_MB

SVG = "{http://www.w3.org/2000/svg}"
SIZES = (2, 10, 1000, 5000, 15000, 30000)
STAGES = ("imports", "etcd read", "decode", "desired", "encode & check", "kernel")
PUBLISHED = Path(__file__).parents[2] / "docs/benchmarks.json"


def figures(repeat: int = 3) -> dict[str, Any]:
    """A run as it could have been, always the same."""
    dice = random.Random(1)

    def start(size: int) -> dict[str, Any]:
        ready = (0.3 + size * 4e-5) * dice.uniform(0.95, 1.1)
        memory = {"peak_mb": 55 + size * 0.002, "resident_mb": 54 + size * 0.0015}
        return {"ready_s": ready, "stages": {"starting": 0.2, "reconciled": ready - 0.01, "ready": ready}, **memory}

    def stages(size: int) -> dict[str, Any]:
        return {"wall": {name: 0.02 + size * 4e-6 * number for number, name in enumerate(STAGES)}, "cpu": {}}

    def changes(_: int) -> dict[str, Any]:
        kinds = ("joins", "mac_changes", "leaves", "writes")
        return {kind: [0.001 * dice.lognormvariate(0, 0.4) for _ in range(200)] for kind in kinds}

    samples = {
        "agent": start,
        "restart": start,
        "kernel": lambda size: 1e-4 + size * 6e-6,
        "iproute2": lambda size: size * 3e-5 + size**2 * 1.5e-8 - 1e-4,
        "iproute2_nexthops": lambda size: size * 3e-5,
        "pyroute2": lambda size: size * 1.4e-3,
        "stages": stages,
        "changes": changes,
    }
    return {
        "samples": {
            name: {str(size): [sample(size) for _ in range(repeat)] for size in SIZES}
            for name, sample in samples.items()
        }
    }


def without(*contenders: str) -> dict[str, Any]:
    return {"samples": {name: values for name, values in figures()["samples"].items() if name not in contenders}}


def names(result: dict[str, Any], directory: Path) -> list[str]:
    return [name for _, name in draw(result, directory)]


def words(directory: Path, name: str) -> list[str]:
    return [text.text or "" for text in ElementTree.parse(directory / name).iter(f"{SVG}text")]


@pytest.fixture(params=["made up", "of one repetition", "published"])
def pictures(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, ElementTree.Element]:
    if request.param == "published":
        result = json.loads(PUBLISHED.read_text())
    else:
        result = figures(3 if request.param == "made up" else 1)
    return {name: ElementTree.parse(tmp_path / name).getroot() for name in names(result, tmp_path)}


def test_every_plot_is_well_formed_and_says_what_it_shows(pictures: dict[str, ElementTree.Element]) -> None:
    assert list(pictures) == ["start.svg", "stages.svg", "changes.svg", "memory.svg"]
    for root in pictures.values():
        assert root.tag == f"{SVG}svg"
        assert root.findtext(f"{SVG}title") in [text.text for text in root.iter(f"{SVG}text")]
        assert root.findtext(f"{SVG}desc")


def test_plots_refer_to_nothing_and_run_nothing(tmp_path: Path) -> None:
    for name in names(figures(), tmp_path):
        text = (tmp_path / name).read_text()
        assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
        assert not re.search(r"<script|<style|<image|<use|href|url\(|\bon\w+=", text)


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    first = {name: (tmp_path / name).read_bytes() for name in names(figures(), tmp_path)}
    # As read back from a file, where the order of the sizes is another.
    again = json.loads(json.dumps(figures(), sort_keys=False))
    again["samples"]["agent"] = dict(reversed(again["samples"]["agent"].items()))
    assert {name: (tmp_path / name).read_bytes() for name in names(again, tmp_path)} == first


@pytest.mark.parametrize(
    ("absent", "left_out"),
    [
        (("agent",), {"start.svg"}),
        (("agent", "stages"), {"start.svg", "stages.svg"}),
        (("changes",), {"changes.svg"}),
        (("agent", "restart"), {"start.svg", "memory.svg"}),
        (("kernel", "iproute2", "iproute2_nexthops", "pyroute2"), set()),
    ],
)
def test_a_plot_without_data_is_left_out(absent: tuple[str, ...], left_out: set[str], tmp_path: Path) -> None:
    drawn = names(without(*absent), tmp_path)
    assert set(drawn) == {"start.svg", "stages.svg", "changes.svg", "memory.svg"} - left_out
    assert {path.name for path in tmp_path.iterdir()} == set(drawn)


def test_a_run_without_samples_draws_nothing(tmp_path: Path) -> None:
    assert draw({"samples": {}}, tmp_path) == []


def test_every_series_is_named(tmp_path: Path) -> None:
    draw(figures(), tmp_path)
    rivals = {"iproute2, plain", "iproute2, nexthop objects", "pyroute2", "flanneld v0.28.9, earlier"}
    assert {"overlay-agent", "kernel alone", "slope 1: linear", *rivals} <= set(words(tmp_path, "start.svg"))
    peers = {f"{size:,} peers" for size in SIZES}
    assert {*STAGES, *peers} <= set(words(tmp_path, "stages.svg"))
    assert {"a host joins", "its MAC changes", "it leaves", *peers} <= set(words(tmp_path, "changes.svg"))
    memory = {f"{start}, {what}" for start in ("first start", "restart") for what in ("peak", "resident")}
    assert {f"{BUDGET_IDLE_MB:g} MB", f"{BUDGET_FULL_MB:g} MB", *memory} <= set(words(tmp_path, "memory.svg"))


def test_what_has_not_been_measured_is_not_named(tmp_path: Path) -> None:
    result = without("pyroute2")
    for sample in itertools.chain.from_iterable(result["samples"]["changes"].values()):
        del sample["mac_changes"]
    draw(result, tmp_path)
    assert "pyroute2" not in words(tmp_path, "start.svg")
    assert "its MAC changes" not in words(tmp_path, "changes.svg")


def test_stages_keep_their_order(tmp_path: Path) -> None:
    draw(figures(), tmp_path)
    assert [word for word in words(tmp_path, "stages.svg") if word in STAGES] == list(STAGES)


def test_without_measured_stages_the_log_of_the_agent_tells_them(tmp_path: Path) -> None:
    draw(without("stages"), tmp_path)
    said = words(tmp_path, "stages.svg")
    assert [word for word in said if word.startswith("until")] == ["until starting", "until reconciled", "until ready"]


def test_lines_stay_inside_the_plot_area(pictures: dict[str, ElementTree.Element]) -> None:
    for name, root in pictures.items():
        for panel in root.iter(f"{SVG}g"):
            area = panel.find(f"{SVG}rect[@class='area']")
            assert area is not None
            x, y, width, height = (float(area.attrib[key]) for key in ("x", "y", "width", "height"))
            for line in [*panel.iter(f"{SVG}polyline"), *panel.iter(f"{SVG}polygon")]:
                for point in line.attrib["points"].split():
                    across, down = map(float, point.split(","))
                    assert x - 0.1 <= across <= x + width + 0.1, f"{name}: {point}"
                    assert y - 0.1 <= down <= y + height + 0.1, f"{name}: {point}"


def test_bars_add_up_and_stay_inside_the_plot_area(pictures: dict[str, ElementTree.Element]) -> None:
    ground, area, *bars = pictures["stages.svg"].iter(f"{SVG}rect")
    right = float(area.attrib["x"]) + float(area.attrib["width"])
    assert right < float(ground.attrib["width"])
    for _, row in itertools.groupby(bars, key=lambda bar: bar.attrib["y"]):
        end = float(area.attrib["x"])
        for bar in row:
            assert float(bar.attrib["x"]) == pytest.approx(end, abs=0.3)
            end = float(bar.attrib["x"]) + float(bar.attrib["width"])
        assert end < right


def test_no_words_lie_on_others_or_are_cut_off(pictures: dict[str, ElementTree.Element]) -> None:
    for name, root in pictures.items():
        boxes = []
        for text in root.iter(f"{SVG}text"):
            if "transform" in text.attrib:
                continue
            size, said = float(text.get("font-size", 12)), text.text or ""
            # Digits and capitals of common fonts; GLYPH has some room for others.
            width = 0.9 * GLYPH * len(said) * size / 12
            left = float(text.attrib["x"]) - width * {"start": 0, "middle": 0.5, "end": 1}[text.attrib["text-anchor"]]
            bottom = float(text.attrib["y"])
            boxes.append((left, left + width, bottom - size * 0.75, bottom, said))
        across, down = float(root.attrib["width"]), float(root.attrib["height"])
        for left, right, top, bottom, said in boxes:
            assert left >= 0 and right <= across and top >= 0 and bottom <= down, f"{name}: {said}"
        for one, other in itertools.combinations(boxes, 2):
            beside = one[1] <= other[0] or other[1] <= one[0]
            assert beside or one[3] <= other[2] or other[3] <= one[2], f"{name}: {one[4]!r} and {other[4]!r}"


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_axes_hold_their_values_and_have_ticks(values: list[float]) -> None:
    for axis in (_linear("", 100, 500, max(values)), _logarithmic("", 100, 500, values)):
        assert all(100 <= axis.at(value) <= 500.001 for value in values)
        named = [value for value, text in axis.ticks if text]
        assert 2 <= len(named) <= 14
        assert all(99.9 <= axis.at(value) <= 500.1 for value in named)


@given(st.lists(st.floats(50, 380), max_size=16))
def test_names_move_apart_and_stay_in_order(heights: list[float]) -> None:
    moved = _apart(sorted(heights), 50, 380)
    assert all(50 <= height <= 380 for height in moved)
    assert all(below - above > LINE - 1e-6 for above, below in itertools.pairwise(moved))
