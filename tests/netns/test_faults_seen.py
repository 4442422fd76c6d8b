"""Every fault of a host, its agent or its etcd is called by its causes by all who can see it, and by nothing else."""

from pathlib import Path

import pytest

from overlay.causes import CAUSES
from tests.conftest import MakeLab
from tests.netns.faults_asked import Tally, check
from tests.netns.faults_seen import AGENT_OPTIONS, FAULTS, HOST, Fault, Scene, troubleshooting

TALLY = Tally()


@pytest.fixture(scope="module")
def scene(make_module_lab: MakeLab) -> Scene:
    lab = make_module_lab(agent_options=AGENT_OPTIONS)
    lab.up()
    return Scene(lab)


@pytest.mark.parametrize("fault", [each for each in FAULTS if each.kind == HOST], ids=lambda fault: fault.name)
def test_fault_is_called_by_its_causes_and_by_no_other(fault: Fault, scene: Scene) -> None:
    check(fault, scene, TALLY)


def test_a_cluster_in_order_has_no_finding(scene: Scene) -> None:
    document = scene.doctor()
    assert (document["findings"], document["unknown"]) == ([], [])
    assert scene.status()["problems"] == []
    code, text = scene.readyz()
    assert code == 200
    assert not [name for name in CAUSES if name in text]


def test_precision_and_recall_are_whole() -> None:
    TALLY.must_be_whole()


def test_table_has_the_faults_that_happen_and_only_causes_that_there_are() -> None:
    assert len(FAULTS) >= 25
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    named = {name for fault in FAULTS for name in (*fault.doctor, *fault.status, *(fault.readyz or ()))}
    assert named <= CAUSES.keys()


def test_manual_says_what_the_tables_say() -> None:
    manual = Path(__file__).parents[2] / "docs/troubleshooting.md"
    assert manual.read_text() == troubleshooting(), "run: python -m tests.netns.faults_seen > docs/troubleshooting.md"
