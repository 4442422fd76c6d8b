"""Every fault of a certificate is called by its cause by all who can see it, and by nothing else."""

from collections.abc import Iterator

import pytest

from tests.conftest import MakeLab
from tests.faults.world import World
from tests.netns.faults_asked import Tally, check
from tests.netns.faults_seen import AGENT_OPTIONS, FAULTS, TLS, Fault, Scene

TALLY = Tally()


@pytest.fixture(scope="module")
def scene(make_module_lab: MakeLab) -> Iterator[Scene]:
    with World(make_module_lab, agent_options=AGENT_OPTIONS, tls=True) as world:
        yield Scene(world.lab, world)


@pytest.mark.parametrize("fault", [each for each in FAULTS if each.kind == TLS], ids=lambda fault: fault.name)
def test_fault_is_called_by_its_causes_and_by_no_other(fault: Fault, scene: Scene) -> None:
    check(fault, scene, TALLY)


def test_precision_and_recall_are_whole() -> None:
    TALLY.must_be_whole()
