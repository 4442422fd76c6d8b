"""The pictures in docs/page.md, of clusters that are made up: python -m tests.netns.screenshots DIRECTORY"""

import sys
from pathlib import Path

from tests.netns.browser import Browser
from tests.netns.pictures import facts, served

WIDTH = 1180
PARTS = {3: 1060, 1000: 880}
"""Hosts, and how many pixels downwards are shown."""


def main(directory: Path) -> None:
    """Write `page-<hosts>-<scheme>.png` for both sizes and schemes."""
    directory.mkdir(parents=True, exist_ok=True)
    with Browser() as browser:
        for hosts, height in PARTS.items():
            with served(facts(hosts)) as server:
                for scheme in ("light", "dark"):
                    page = browser.open(server.url, scheme=scheme, width=WIDTH)
                    page.wait("document.querySelectorAll('#rows tr').length")
                    page.picture(directory / f"page-{hosts}-{scheme}.png", height)
                    browser.close(page)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
