"""What all tests share: labs that are always taken down, markers by directory, and no silent skips."""

import contextlib
import itertools
import os
import shlex
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import settings

from overlay.cluster import NETWORK_CONFIG, Lab, labs, orphans
from overlay.lab import require_root_and_programs
from overlay.netns import NamespaceError
from overlay.options import Options
from subnet_lease.etcd import EtcdStore
from subnet_lease.store import Store

# No test fails for being slow: the machine may be busy.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")

_MARKS = {"netns": "netns", "packet": "packet", "faults": "fault", "bench": "bench", "kernels": "netns"}
"""Directory below tests/ -> the marker of all tests in it."""

_AGENT_OPTIONS = tuple(shlex.split(os.environ.get("LAB_AGENT_OPTIONS", "")))
"""For all agents of all labs, before a test's own, so that whole runs can be made with one option changed."""

_OWN_LABS = f"t{os.getpid()}x"
_numbers = itertools.count()

MakeLab = Callable[..., Lab]

_CONFIG = {**NETWORK_CONFIG, "SubnetMax": "10.244.199.0"}
"""Hosts choose at random; what lies above is the tests' own to hand out."""


def connect(endpoint: str) -> Store:
    """The lease store of a lab's etcd, as `Lab.connect` wants it."""
    return EtcdStore([endpoint], "/coreos.com/network")


@contextlib.contextmanager
def _lab_factory() -> Iterator[MakeLab]:
    with contextlib.ExitStack() as stack:

        def make(*, agent_options: Sequence[str] = (), **options: object) -> Lab:
            options = {"connect": connect, "config": _CONFIG, **options}
            every = (*_AGENT_OPTIONS, *agent_options)
            lab = Lab(f"{_OWN_LABS}{next(_numbers)}", tied=True, agent_options=every, **options)
            stack.callback(lab.down)
            return lab

        yield make


@pytest.fixture
def make_lab() -> Iterator[MakeLab]:
    """Makes labs with the options of `overlay.cluster.Lab`, not yet up; they are down after the test."""
    with _lab_factory() as make:
        yield make


@pytest.fixture(scope="module")
def make_module_lab() -> Iterator[MakeLab]:
    """As `make_lab`; the labs last as long as the module's tests."""
    with _lab_factory() as make:
        yield make


@pytest.fixture(scope="module")
def shared_lab(make_module_lab: MakeLab) -> Lab:
    """Three hosts with two pods each, up and converged, for tests that leave it as they found it."""
    lab = make_module_lab()
    lab.up()
    return lab


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    place = Path(Options().state_dir)
    machines_own = place.exists()
    yield
    left = [name for name in labs() if name.startswith(_OWN_LABS)]
    assert not left, f"labs of this test run remain: {left}"
    assert Path(Options().state_dir).exists() == machines_own, (
        "a test has kept its files where the machine's agent does"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-link", action="store_true", help="fail, not pass by, where the kernel lacks a kind of link"
    )


def pytest_configure() -> None:
    # A run in the background of a shell ignores SIGINT and would hand that on to the processes under test.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionstart(session: pytest.Session) -> None:
    # A run that was killed could not clean up.
    if os.geteuid() == 0 and not hasattr(session.config, "workerinput"):
        for name in orphans():
            # Another run may be sweeping at the same moment.
            with contextlib.suppress(NamespaceError):
                Lab(name, connect=connect).down()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    root = Path(__file__).parent
    for item in items:
        if mark := _MARKS.get(item.path.relative_to(root).parts[0]):
            item.add_marker(mark)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if any(item.get_closest_marker(mark) for mark in _MARKS.values()):
        try:
            require_root_and_programs()
        except NamespaceError as error:
            raise pytest.fail.Exception(str(error), pytrace=False) from None


Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _unskipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _unskipped((yield))


def _unskipped(report: Report) -> Report:
    # What cannot run here has not passed.
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped tests count as failed: {report.longrepr}"
    return report
