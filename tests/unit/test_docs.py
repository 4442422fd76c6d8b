"""What the documents say of the software, where it can be held against the software."""

import json
import re
from pathlib import Path
from statistics import median

import overlay

ROOT = Path(__file__).parents[2]


def test_readme_quotes_the_benchmark() -> None:
    starts = json.loads((ROOT / "docs/benchmarks.json").read_text())["samples"]["agent"]["15000"]
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if "15,000 peers" in line)
    assert f"| {median(start['ready_s'] for start in starts):.1f} s, [benchmarks]" in row


def test_documents_name_the_wheel_of_this_version() -> None:
    for page in ("README.md", "docs/getting-started.md"):
        wheels = set(re.findall(r"overlay_agent-([0-9.]+)-py3", (ROOT / page).read_text()))
        assert wheels == {overlay.__version__}, page


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
