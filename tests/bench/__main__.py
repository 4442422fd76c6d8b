"""How long a full table of peers takes, against the kernel alone, iproute2 and pyroute2.

`python -m tests.bench` needs root, etcd and iproute2. Everything happens in network namespaces of its own and below one
temporary directory. Contenders take turns in one run, so that their ratios hold where absolute times do not; what each
leaves in the kernel is compared with the leases, entry by entry, and a difference is an error, not a result.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from tests.bench.report import render
from tests.bench.run import run

COMMAND = "sudo .venv/bin/python -m tests.bench"


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--sizes", default="1000,5000,15000", type=_sizes, help="numbers of peers (default: %(default)s)"
    )
    parser.add_argument("--repeat", default=3, type=int, help="runs of everything (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the document here instead of to stdout")
    parser.add_argument("--render", type=Path, metavar="FILE", help="make the document from the figures in this file")
    options = parser.parse_args()
    if options.render:
        result = json.loads(options.render.read_text())
    elif os.geteuid():
        parser.error("measuring makes network namespaces, which takes root")
    else:
        result = run(options.sizes, options.repeat, lambda line: print(line, file=sys.stderr, flush=True))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    sizes = ",".join(map(str, result["sizes"]))
    text = render(result, f"{COMMAND} --sizes {sizes} --repeat {result['repeat']} --json FILE --markdown FILE")
    if options.markdown:
        options.markdown.write_text(text)
    else:
        print(text)
    return 0


def _sizes(text: str) -> list[int]:
    sizes = [int(part) for part in text.split(",")]
    if any(size < 3 for size in sizes):
        raise argparse.ArgumentTypeError("each must be at least 3")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
