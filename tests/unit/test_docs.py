"""What the documents say of the software, where it can be held against the software."""

import json
import re
from pathlib import Path
from statistics import median

import overlay

ROOT = Path(__file__).parents[2]


def test_readme_quotes_the_benchmark() -> None:
    samples = json.loads((ROOT / "docs/benchmarks.json").read_text())["samples"]
    ready = median(start["ready_s"] for start in samples["agent"]["15000"])
    join = median(each for run in samples["changes"]["15000"] for each in run["joins"])
    readme = (ROOT / "README.md").read_text()
    assert f"| {ready:.1f} s, [benchmarks]" in readme
    assert f"| {1000 * join:.1f} ms, [benchmarks]" in readme


def test_documents_name_the_wheel_of_this_version() -> None:
    for page in ("README.md", "docs/getting-started.md"):
        wheels = set(re.findall(r"overlay_agent-([0-9.]+)-py3", (ROOT / page).read_text()))
        assert wheels == {overlay.__version__}, page


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
