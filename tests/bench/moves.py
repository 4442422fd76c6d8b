"""How long flows stop while the network of one host changes, and while a cluster is switched to another backend.

In labs of three hosts, with a pod on each: between the pods of the first two a packet every INTERVAL_MS each way. What
happens, and when every host has followed, is in `tests.netns.moves`. The tables are also those of docs/network.md.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from overlay.cluster import Lab
from overlay.topology import FAMILIES, Topology, network_config
from subnet_lease.etcd import EtcdStore
from tests.bench.cluster_report import MARKED
from tests.bench.report import Figures, Spread, table
from tests.bench.testbed import Testbed
from tests.netns.moves import SWITCHES, moves_of, switch, topology_of, wait_settled
from tests.netns.traffic import Meter

INTERVAL_MS = 2

CLUSTERS = (("4", "vxlan"), ("6", "vxlan"), ("46", "vxlan"), ("4", "direct"), ("46", "direct"), ("4", "host-gw"))
"""Families of pods and hosts, and the backend, in which hosts' networks change."""

SWITCHED = ("4", "46")
"""Families of the clusters that are switched."""

Measured = dict[str, dict[str, list[dict[str, float]]]]
"""Cluster -> what happened -> a sample for each repetition: milliseconds in which packets were lost, all gaps together,
`out` of the first host and `in`; of the family that lost more. `late`: the longest pause between two packets sent."""


def measure(bed: Testbed) -> dict[str, Any]:
    """All moves, then all switches, each time in a fresh lab."""
    moved: Measured = {}
    switched: Measured = {}
    for number in range(1, bed.options.repeat + 1):
        for families, backend in CLUSTERS:
            name = _name(families, backend)
            bed.say(f"moves, run {number} of {bed.options.repeat}: {name}")
            with _lab(families, backend, topology_of(families, backend)) as lab:
                for move in moves_of(FAMILIES[families], backend):
                    _note(moved, name, move.name, lab, partial(move.act, lab.hosts[0]), backend)
        for families in SWITCHED:
            name = _name(families)
            bed.say(f"switches, run {number} of {bed.options.repeat}: {name}")
            with _lab(families, "vxlan", Topology(families)) as lab:
                for title, kind, backend in SWITCHES:
                    if kind == "alloc":
                        # It routes nothing: there is no gap to measure, neither to it nor from it.
                        switch(lab, families, backend)
                    elif title.startswith("alloc"):
                        switch(lab, families, backend)
                        wait_settled(lab, kind)
                    else:
                        _note(switched, name, title, lab, partial(switch, lab, families, backend), kind)
    return {"moves": {"moves": moved, "switches": switched}}


def _name(families: str, backend: str = "") -> str:
    return " ".join(filter(None, ({"4": "IPv4", "6": "IPv6", "46": "both"}[families], backend)))


@contextlib.contextmanager
def _lab(families: str, backend: str, topology: Topology) -> Iterator[Lab]:
    """Up: three hosts whose agents choose the interface of the default route."""
    with Lab(
        f"b{os.getpid()}",
        connect=lambda endpoint: EtcdStore([endpoint], "/coreos.com/network"),
        tied=True,
        hosts=3,
        pods=1,
        config=network_config(families, backend),
        topology=topology,
        underlay_options=(),
    ) as lab:
        yield lab


def _note(samples: Measured, cluster: str, what: str, lab: Lab, act: Callable[[], None], kind: str) -> None:
    """Do it among packets, wait until all have followed, and keep what was lost."""
    here, there = lab.hosts[0].pods[0], lab.hosts[1].pods[0]
    with contextlib.ExitStack() as stack:
        meters = {
            way: [stack.enter_context(Meter(*pods, family=f, interval_ms=INTERVAL_MS)) for f in here.addresses]
            for way, pods in (("out", (here, there)), ("in", (there, here)))
        }
        act()
        wait_settled(lab, kind)
    sample = {way: max(sum(gap.ms for gap in meter.gaps()) for meter in each) for way, each in meters.items()}
    sample["late"] = max(meter.longest_pause_ms for each in meters.values() for meter in each)
    samples.setdefault(cluster, {}).setdefault(what, []).append(sample)


# --- what to say of it -------------------------------------------------------------------------------------------


def sections(figures: Figures) -> list[str]:
    found = figures.whole("moves")
    tables = _tables(found)
    late = Spread.of([s["late"] for part in found.values() for c in part.values() for each in c.values() for s in each])
    precision = (
        f"A packet goes each way every {INTERVAL_MS} ms; the sender was late by {late.median:.0f} ms in the median of "
        f"all cases and by {late.most:.0f} ms at most, by which a gap may seem longer."
    )
    return [
        "## Changes of a host's network",
        "Milliseconds in which packets between a pod of the host and one of its neighbour were lost, out / in, all "
        "gaps together; of clusters with both families the one that lost more. 0: none. `ip` itself takes a few of "
        f"them. {precision}",
        tables["moves"],
        "## Another backend, VNI or port",
        "The same while the configuration is written anew and all agents are restarted at once, in two directions "
        "between two of three hosts.",
        tables["switches"],
    ]


def write_tables(document: Path, found: dict[str, Measured]) -> None:
    """Replace what stands between `<!-- table: NAME -->` and `<!-- end -->` in a document."""
    tables = _tables(found)
    text = MARKED.sub(lambda each: f"{each[1]}\n{tables[each[2]]}\n\n{each[3]}", document.read_text())
    document.write_text(text)


def _tables(found: dict[str, Measured]) -> dict[str, str]:
    return {name: _table(head, found[name]) for name, head in (("moves", "what happens"), ("switches", "switch"))}


def _table(head: str, measured: Measured) -> str:
    whats = list(dict.fromkeys(what for cluster in measured.values() for what in cluster))
    rows = [[what, *(_cell(cluster.get(what, [])) for cluster in measured.values())] for what in whats]
    return table((head, *measured), rows)


def _cell(samples: list[dict[str, float]]) -> str:
    if not samples:
        return ""
    return " / ".join(_spread([sample[way] for sample in samples]) for way in ("out", "in"))


def _spread(values: list[float]) -> str:
    return Spread.of(values).text(0) if any(values) else "0"
