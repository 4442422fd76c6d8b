"""The scenarios, and one run of some of them: what `--json` writes and `report.render` reads."""

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from tests.bench import bursts, changes, churn, drift, idle, machine, moves, restart, start, throughput
from tests.bench.peers import SMALL
from tests.bench.place import hub
from tests.bench.report import Figures
from tests.bench.testbed import Options, Samples, Testbed, etcd_in

__all__ = ["SCENARIOS", "SMALL", "Refused", "measured", "merge", "refuse_other_machine", "run"]


class Refused(Exception):
    """What was asked for cannot be measured, or not be put together; the text says why."""


class Scenario(NamedTuple):
    """`measure` gives samples by name, no two scenarios the same names; `sections` is what to say of them.

    `plots` are the names of the pictures to show with that, as far as they are drawn.
    """

    measure: Callable[[Testbed], dict[str, Any]]
    sections: Callable[[Figures], list[str]]
    plots: tuple[str, ...] = ()


def _cluster() -> Any:
    """The benchmark of whole clusters, which has its own etcd and namespaces. Imported by those who want it."""
    try:
        from tests.bench import cluster
    except ModuleNotFoundError as error:
        raise Refused(f"the scenario cluster cannot be run or shown: there is no module {error.name}") from None
    return cluster


def _measure_cluster(bed: Testbed) -> dict[str, Any]:
    directory = bed.directory / "cluster"
    directory.mkdir()
    return {"cluster": _cluster().measure(directory, bed.say)}


def _cluster_sections(figures: Figures) -> list[str]:
    found: list[str] = _cluster().sections(figures.whole("cluster"))
    return found


SCENARIOS = {
    "start": Scenario(start.measure, start.sections, ("start.svg", "stages.svg", "memory.svg")),
    "changes": Scenario(changes.measure, changes.sections, ("changes.svg",)),
    "bursts": Scenario(bursts.measure, bursts.sections),
    "churn": Scenario(churn.measure, churn.sections),
    "restart": Scenario(restart.measure, restart.sections),
    "drift": Scenario(drift.measure, drift.sections),
    "moves": Scenario(moves.measure, moves.sections),
    "idle": Scenario(idle.measure, idle.sections),
    "throughput": Scenario(throughput.measure, throughput.sections),
    "cluster": Scenario(_measure_cluster, _cluster_sections),
}
"""In the order of the document."""


def run(names: Iterable[str], options: Options, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Measure these scenarios: after each, all figures so far. `runs` says what each measured, `samples` holds it."""
    if "cluster" in names:
        _cluster()
    if "throughput" in names and not shutil.which("iperf3"):
        raise Refused("the scenario throughput cannot be run: there is no iperf3")
    # Until etcd answers there are refused connections, which is no news here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    samples: Samples = {}
    runs: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="overlay-agent-bench-")))
        home = stack.enter_context(hub())
        bed = Testbed(home, stack.enter_context(etcd_in(home, directory / "etcd")), directory, options, say)
        say("starts that are not counted: Python compiles, files come into memory")
        with bed.host(SMALL) as host, host.agent():
            pass
        start.stages(bed, SMALL)
        for name in names:
            found = SCENARIOS[name].measure(bed)
            samples.update(found)
            runs[name] = {"options": dataclasses.asdict(options), "samples": sorted(found)}
            yield {"machine": machine.facts(), "runs": runs, "samples": samples}


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The scenarios of both, those of `new` in place of the same in `old`. Refused unless the machine is the same."""
    refuse_other_machine(old)
    again = {what for name in new["runs"] if name in old["runs"] for what in old["runs"][name]["samples"]}
    kept = {what: found for what, found in old["samples"].items() if what not in again}
    return {**new, "runs": {**old["runs"], **new["runs"]}, "samples": {**kept, **new["samples"]}}


def refuse_other_machine(result: dict[str, Any]) -> None:
    """Refused if the figures are from a machine that differs from this one in any fact."""
    here = machine.facts()
    different = [name for name in here if result["machine"].get(name) != here[name]]
    if different:
        raise Refused(f"the figures to add to are of another machine: {', '.join(different)} differ")


def measured(result: dict[str, Any]) -> list[Scenario]:
    """The scenarios that there are figures of."""
    return [scenario for name, scenario in SCENARIOS.items() if name in result["runs"]]
