"""Every fault of a path between two hosts is called by its cause by all who can see it, and by nothing else."""

import pytest

from tests.conftest import MakeLab
from tests.netns.faults_asked import Tally, check
from tests.netns.faults_seen import AGENT_OPTIONS, FAULTS, PATH, Fault, Scene

TALLY = Tally()


@pytest.fixture(scope="module")
def scene(make_module_lab: MakeLab) -> Scene:
    lab = make_module_lab(agent_options=AGENT_OPTIONS)
    lab.up()
    return Scene(lab)


@pytest.mark.parametrize("fault", [each for each in FAULTS if each.kind == PATH], ids=lambda fault: fault.name)
def test_fault_is_called_by_its_causes_and_by_no_other(fault: Fault, scene: Scene) -> None:
    check(fault, scene, TALLY)


def test_precision_and_recall_are_whole() -> None:
    TALLY.must_be_whole()
