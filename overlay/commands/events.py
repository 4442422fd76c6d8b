"""`overlay-agent events`: what happened, from this host's journal."""

import argparse
import sys
import time
from collections import deque
from pathlib import Path

from overlay.commands import Refusal
from overlay.commands.common import TIMES_HELP, options_of, time_of
from overlay.options import CaptureOptions, OptionError, add_arguments, argument, whole_number

FOLLOW_S = 0.2
"""Seconds between two looks of `--follow`."""


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from overlay.records import KINDS

    parser.add_argument(
        "--kind",
        metavar="KIND",
        action="append",
        default=[],
        help=f"only these kinds or groups of them, comma-separated: {', '.join(KINDS)}. Repeatable",
    )
    parser.add_argument("--address", metavar="ADDRESS", help="only what names this address, or its subnet, or this MAC")
    parser.add_argument("--peer", metavar="ADDRESS|SUBNET", help="only what concerns this host: all its leases name")
    parser.add_argument("--since", metavar="TIME", help=f"only what happened then or later: {TIMES_HELP}")
    parser.add_argument("--until", metavar="TIME", help="only what happened before")
    parser.add_argument("-n", "--last", metavar="N", type=argument(whole_number(1, 1 << 40)), help="only the last N")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as more happens, until interrupted")
    parser.add_argument("--json", action="store_true", help="print data, an object a line, for programs")
    add_arguments(parser, CaptureOptions)


def main(arguments: argparse.Namespace) -> int:
    """Print the journal, filtered, the newest last; with `--follow` what comes too."""
    from overlay import history, records
    from overlay.journal import DIRECTORY, Reading

    options = options_of(CaptureOptions, arguments)
    try:
        kinds = history.kinds_of(word for words in arguments.kind for word in words.split(",") if word)
    except ValueError as error:
        raise OptionError("--kind", str(error)) from None
    about = []
    for option, text, learning in (("--address", arguments.address, False), ("--peer", arguments.peer, True)):
        try:
            about += [history.About(text, learning=learning)] if text is not None else []
        except ValueError as error:
            raise OptionError(option, str(error)) from None
    since, until = time_of("--since", arguments.since), time_of("--until", arguments.until)
    wanted = history.Filter(kinds, since, until, tuple(about))
    show = records.json_of if arguments.json else history.line_of
    directory = Path(options.state_dir) / DIRECTORY
    reading = Reading(directory)
    try:
        found = filter(wanted.passes, reading.records())
        for record in deque(found, maxlen=arguments.last) if arguments.last else found:
            print(show(record))
        while arguments.follow:
            sys.stdout.flush()
            time.sleep(FOLLOW_S)
            for record in filter(wanted.passes, reading.records()):
                print(show(record))
    except FileNotFoundError:
        raise Refusal(f"there is no journal in {directory}; an agent keeps one while it runs") from None
    except PermissionError:
        raise Refusal(f"{directory} cannot be read; it is root's") from None
    if reading.damaged:
        print(f"overlay-agent: {reading.damaged} damaged lines were passed over", file=sys.stderr)
    return 0
