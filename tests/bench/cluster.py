"""How one etcd bears very many agents: as many as this machine carries, and what each kind of request costs etcd.

`python -m tests.bench.cluster` needs root and etcd. Three parts: real agents in network namespaces (`cluster_real`),
agents whose kernel is its twin (`cluster_simulated`), bare clients (`cluster_load`). `sections` are for
docs/benchmarks.md; the tables of docs/scale.md are projected from the same figures.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from tests.bench import cluster_load, cluster_real, cluster_simulated, machine
from tests.bench.cluster_report import projection, sections, write_tables

__all__ = ["Counts", "measure", "projection", "sections", "write_tables"]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many of what."""

    hosts: int = 64
    agents: int = 300
    agents_leases: int = 1000
    spread_s: float = 30.0
    joins: int = 50
    leases: int = 15_000
    watches: tuple[int, ...] = (1000, 4000, 15_000)
    idle_s: float = 20.0


def measure(directory: Path, progress: Callable[[str], None], counts: Counts | None = None) -> dict[str, Any]:
    """All three parts, each in a directory of its own below `directory`; plain data for JSON."""
    counts = counts or Counts()
    # Until an etcd answers there are refused connections, which is no news here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    # A file for each watch, here as in etcd, which inherits the limit.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    places = [directory / name for name in ("real", "simulated", "load")]
    for place in places:
        place.mkdir()
    return {
        "machine": machine.facts(),
        "real": cluster_real.measure(places[0], counts.hosts, counts.spread_s, counts.joins, progress),
        "simulated": cluster_simulated.measure(
            places[1], counts.agents, counts.agents_leases, counts.spread_s, counts.joins, progress
        ),
        "load": cluster_load.measure(places[2], counts.leases, counts.watches, counts.idle_s, progress),
    }


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cluster", description=(__doc__ or "").partition("\n")[0]
    )
    usual = Counts()
    for name, kind, what in (
        ("--hosts", int, "real agents"),
        ("--agents", int, "simulated agents"),
        ("--agents-leases", int, "other leases among the simulated agents"),
        ("--spread-s", float, "seconds over which starts are spread"),
        ("--joins", int, "hosts that join and leave, in both parts"),
        ("--leases", int, "leases in etcd for bare clients"),
        ("--watches", _ascending, "numbers of watches of bare clients"),
        ("--idle-s", float, "seconds of silence, twice"),
    ):
        default = getattr(usual, name.removeprefix("--").replace("-", "_"))
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        parser.add_argument(name, default=default, type=kind, metavar="N", help=f"{what} (default: {shown})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--scale", type=Path, metavar="FILE", help="renew the tables of this document")
    parser.add_argument("--render", type=Path, metavar="FILE", help="take the figures from this file")
    options = vars(parser.parse_args())
    json_file, scale_file, figures_file = (options.pop(name) for name in ("json", "scale", "render"))
    if figures_file:
        figures = json.loads(figures_file.read_text())
    elif os.geteuid():
        parser.error("measuring makes network namespaces, which takes root")
    else:
        with tempfile.TemporaryDirectory(prefix="overlay-agent-cluster-") as directory:
            figures = measure(Path(directory), lambda line: print(line, file=sys.stderr, flush=True), Counts(**options))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    if scale_file:
        write_tables(scale_file, figures)
    print("\n\n".join(sections(figures)))
    return 0


def _ascending(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if len(counts) < 2 or counts[0] < 100 or list(counts) != sorted(set(counts)):
        raise argparse.ArgumentTypeError("two or more numbers, the first at least 100, each larger than the last")
    return counts


if __name__ == "__main__":
    sys.exit(main())
