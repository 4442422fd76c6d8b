"""What packet tests share: the wire, whose capture is kept when a test fails."""

import contextlib
import re
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

# Its assertions show their values, as those in tests do. Before its first import.
pytest.register_assert_rewrite("tests.packet.wire", "tests.packet.checks")
from tests.packet.wire import Wire  # noqa: E402

CAPTURES = Path(__file__).parents[2] / "build/captures"
"""Where the captures of failed tests are kept, as pcapng."""

_SHOWN = 60
"""How many frames of a failed test are shown, from the last back."""

_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    """Links to watch and to send on."""
    with Wire() as made:
        yield made
        if request.node.stash.get(_failed, False):
            for link in made.links:
                # If the lab is gone already, the kernel says so once, and then hands out what was seen until then.
                with contextlib.suppress(OSError):
                    link.all(lambda frame: False)
                link.all(lambda frame: False)
            if not (seen := made.seen):
                return
            CAPTURES.mkdir(parents=True, exist_ok=True)
            path = CAPTURES / (re.sub(r"[^A-Za-z0-9.-]+", "-", request.node.name).strip("-") + ".pcapng")
            made.write(path)
            print(f"\nThe wire, {len(seen)} frames, kept in {path}:")
            print("\n".join(map(str, seen[-_SHOWN:])))
