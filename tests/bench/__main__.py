"""How fast the agent is and what it costs, against the kernel alone, iproute2 and pyroute2.

`python -m tests.bench` needs root, etcd, iproute2 and iperf3. Everything happens in network namespaces of its own and
below one temporary directory; labs have theirs where all labs do. What is compared takes turns in one run, so that
ratios hold where absolute times do not; what each leaves in the kernel is compared with the leases, entry by entry, and
a difference is an error, not a result.

Exit code 1: the agent's time does not grow linearly; the figures are written all the same. 2: wrong usage.
"""

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from tests.bench import moves
from tests.bench.report import FULL, Figures, render
from tests.bench.run import SCENARIOS, Refused, measured, merge, refuse_other_machine, run
from tests.bench.testbed import Options

COMMAND = "sudo make bench"


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", default=list(SCENARIOS), type=_names, metavar="NAMES", help=f"some of {','.join(SCENARIOS)}"
    )
    parser.add_argument(
        "--sizes",
        default="1000,5000,15000,50000",
        type=_sizes,
        help="numbers of peers of start and restart (default: %(default)s)",
    )
    parser.add_argument("--full", default=FULL, type=int, help="peers of all other scenarios (default: %(default)s)")
    parser.add_argument("--repeat", default=3, type=int, help="repetitions of what is short (default: %(default)s)")
    parser.add_argument("--idle-seconds", default=300.0, type=float, help="how long to be idle (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures here; with --only, add them to those there"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the document here instead of to stdout")
    parser.add_argument(
        "--scale", type=Path, metavar="FILE", help="renew the tables of this document of the projection"
    )
    parser.add_argument("--network", type=Path, metavar="FILE", help="renew the tables of gaps of this document")
    parser.add_argument("--render", type=Path, metavar="FILE", help="make the document from the figures in this file")
    arguments = parser.parse_args()
    try:
        result = json.loads(arguments.render.read_text()) if arguments.render else _measured(parser, arguments)
        figures = Figures(result)
        scenarios = [(each.sections, each.plots) for each in measured(result)]
        text = render(figures, scenarios, COMMAND, _plots(result, arguments.markdown))
    except Refused as reason:
        parser.error(str(reason))
    if arguments.markdown:
        arguments.markdown.write_text(text)
    else:
        print(text)
    if arguments.scale and "cluster" in result["runs"]:
        from tests.bench.cluster import write_tables

        write_tables(arguments.scale, figures.whole("cluster"))
    if arguments.network and "moves" in result["runs"]:
        moves.write_tables(arguments.network, figures.whole("moves"))
    for line in figures.missed:
        print(f"not met: {line}", file=sys.stderr)
    for line in figures.failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if figures.failed else 0


def _measured(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> dict[str, Any]:
    if os.geteuid():
        parser.error("measuring makes network namespaces, which takes root")
    old = None
    if arguments.json and arguments.json.exists() and arguments.only != list(SCENARIOS):
        old = json.loads(arguments.json.read_text())
        # Before anything is measured, which takes long.
        refuse_other_machine(old)
    options = Options(tuple(arguments.sizes), arguments.full, arguments.repeat, arguments.idle_seconds)
    result: dict[str, Any] = {}
    # This process holds the clock: among thousands of leases its garbage collector would stop it for 40 ms at a time.
    gc.disable()
    for new in run(arguments.only, options, lambda line: print(line, file=sys.stderr, flush=True)):
        result = merge(old, new) if old else new
        if arguments.json:
            # After each scenario: what is measured is not lost if a later one fails.
            arguments.json.write_text(json.dumps(_rounded(result), separators=(",", ":")) + "\n")
    return result


def _rounded(value: Any) -> Any:
    """The same with six significant digits in each fraction, more than any of them deserves."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {name: _rounded(each) for name, each in value.items()}
        case list() | tuple():
            return [_rounded(each) for each in value]
    return value


def _plots(result: dict[str, Any], document: Path | None) -> list[tuple[str, str]]:
    """Draw them beside the document; titles, and paths as the document has them."""
    if document is None:
        return []
    from tests.bench import plots

    directory = document.parent / "plots"
    directory.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(result, directory)
    return [(title, f"{directory.name}/{name}") for title, name in drawn if (directory / name).exists()]


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SCENARIOS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(SCENARIOS)}")
    return [name for name in SCENARIOS if name in names]


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if any(size < 3 for size in sizes):
        raise argparse.ArgumentTypeError("each must be at least 3")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
