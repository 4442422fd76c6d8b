"""Asks `doctor`, `status` and /readyz about a fault of the table, and counts what they name."""

import contextlib
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from overlay.causes import CAUSES
from overlay.cluster import LabError, wait_until
from tests.netns.faults_seen import AGENT, PATH, Fault, Scene

SETTLED_S = 40.0
"""Seconds within which a verdict on a path rests on nothing from before the fault."""

Named = dict[str, list[str]]
"""Causes with their evidence."""


class Tally(Counter[str]):
    """How many causes were named rightly, wrongly, or missed, over all faults and tools."""

    def count(self, expected: frozenset[str], named: frozenset[str]) -> None:
        self["right"] += len(expected & named)
        self["wrong"] += len(named - expected)
        self["missed"] += len(expected - named)

    @property
    def precision(self) -> float:
        return self["right"] / max(1, self["right"] + self["wrong"])

    @property
    def recall(self) -> float:
        return self["right"] / max(1, self["right"] + self["missed"])

    def must_be_whole(self) -> None:
        """Nothing was named that is not so, and nothing missed."""
        print(f"{dict(self)}: precision {self.precision:.3f}, recall {self.recall:.3f}")
        assert (self.precision, self.recall) == (1.0, 1.0), self


def check(fault: Fault, scene: Scene, tally: Tally) -> None:
    """Set the fault up, ask all three, and undo it: each names the causes of the table and no other."""
    try:
        with fault.arrange(scene) as options, ThreadPoolExecutor(2) as pool:
            if fault.kind == PATH:
                # The first verdict may rest on packets from before the fault; docs/probes.md says how long that lasts.
                with contextlib.suppress(LabError):
                    wait_until(lambda: problems_of(scene.asked()).keys() == fault.status, SETTLED_S)
            doctor = pool.submit(doctor_names, scene, options)
            status = pool.submit(status_names, scene)
            code, text = scene.readyz()
            unready = [name for name in CAUSES if name in text.replace(":", " ").split()]
            assert code == (0 if fault.readyz is None else 503 if fault.readyz else 200), text
            said = {"doctor": doctor.result(), "status": status.result(), "/readyz": {each: [text] for each in unready}}
        expected = {"doctor": fault.doctor, "status": fault.status, "/readyz": fault.readyz or frozenset()}
        for tool, named in said.items():
            tally.count(expected[tool], frozenset(named))
        assert {tool: frozenset(named) for tool, named in said.items()} == expected, said
    finally:
        scene.settle()


def doctor_names(scene: Scene, options: tuple[str, ...]) -> Named:
    """The causes that doctor names, with their evidence."""
    if options[:1] == ("setpriv",):
        document = json.loads(scene.here.run(*options, *AGENT, "doctor", "--json").stdout)
    elif options[:1] == ("clock",):
        # The time of this one process is off by so many seconds.
        begin = f"import time, agent; true = time.time; time.time = lambda: true() + {options[1]}"
        code = f"{begin}; raise SystemExit(agent.main(['doctor', '--json']))"
        document = json.loads(scene.here.run(sys.executable, "-P", "-c", code).stdout)
    else:
        document = scene.doctor(*options)
    return {finding["cause"]: finding["evidence"] for finding in document["findings"]}


def status_names(scene: Scene) -> Named:
    """The causes that status names, with their evidence."""
    return problems_of(scene.status())


def problems_of(document: dict[str, Any]) -> Named:
    """The causes in a document of status, with their evidence."""
    return {problem["cause"]: problem["evidence"] for problem in document["problems"]}
