"""What packet tests share: the wire, whose capture is kept when a test fails."""

import contextlib
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

from overlay.cluster import Lab
from tests.conftest import MakeLab

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


def _quiet(make: MakeLab) -> MakeLab:
    def quiet(*, agent_options: Sequence[str] = (), **options: object) -> Lab:
        return make(agent_options=("--probes=false", *agent_options), **options)

    return quiet


@pytest.fixture
def make_lab(make_lab: MakeLab) -> MakeLab:
    """As everywhere, but nothing is on the wire that nobody has sent."""
    return _quiet(make_lab)


@pytest.fixture(scope="module")
def make_module_lab(make_module_lab: MakeLab) -> MakeLab:
    """As `make_lab`; the labs last as long as the module's tests."""
    return _quiet(make_module_lab)


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
