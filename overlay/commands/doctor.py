"""`overlay-agent doctor`: what is wrong with this host's overlay, by what it shows, and what mends it."""

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import ExitStack

import overlay
from overlay.options import Options, add_arguments

_COLOURS = {"down": "\x1b[1;31m", "degraded": "\x1b[1;33m", "passed": "\x1b[32m", "unknown": "\x1b[2m"}


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print data, for programs")
    parser.add_argument("-v", "--verbose", action="store_true", help="list the checks that passed as well")
    parser.add_argument(
        "--bundle", metavar="FILE", help="also write all that a maintainer needs, a tar.gz without secrets"
    )
    add_arguments(parser, Options)


def main(arguments: argparse.Namespace) -> int:
    """Look, and say what was found: 0 nothing, 1 something."""
    from overlay import doctor, logs
    from overlay.commands.bundle import Place, archive
    from overlay.commands.examination import gather

    own = {name: vars(arguments).pop(name, None) for name in ("json", "verbose", "bundle", "command")}
    logs.configure("error", "auto", os.environ)
    begun = time.monotonic()
    with ExitStack() as stack:
        place = Place(own["bundle"]) if own["bundle"] else None
        if place is not None:
            stack.callback(place.give_up)
        facts, seen = gather(arguments)
        report = doctor.examine(facts)
        seconds = time.monotonic() - begun
        document = doctor.as_json(report, os.uname().nodename, overlay.__version__, seconds)
        if place is not None:
            place.fill(archive(document, seen))
    if own["json"]:
        print(json.dumps(document))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for sort, line in doctor.as_text(report, seconds, columns, verbose=bool(own["verbose"])):
            print(f"{_COLOURS[sort]}{line}\x1b[0m" if colour and sort in _COLOURS else line)
        if own["bundle"]:
            print(f"Written: {own['bundle']}. It holds no secret that is known here; look into it before you send it.")
    return int(bool(report.findings))
