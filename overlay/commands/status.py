"""`overlay-agent status`: how this host and its peers fare, from its agent, or from the kernel where none answers."""

import argparse
import gc
import json
import os
import shutil
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

from overlay.commands.common import options_of, our_devices
from overlay.options import AskOptions, add_arguments, argument, whole_number

if TYPE_CHECKING:
    from overlay import status as view
    from overlay.causes import Finding
    from overlay.control import NoAnswer
    from overlay.device import FoundDevice
    from overlay.model import Entry

ANSWER_S = 10.0
"""Seconds that is waited for the agent."""

LISTED = 20
"""How many peers in order are listed on a terminal."""


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print data, for programs; see docs/status.md")
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        help=f"list all peers, or none; otherwise a terminal gets {LISTED} of those that are in order",
    )
    seconds = argument(whole_number(1, 86400))
    parser.add_argument(
        "--watch", metavar="SECONDS", nargs="?", type=seconds, const=2, help="again every so many seconds. [2]"
    )
    add_arguments(parser, AskOptions)


def main(arguments: argparse.Namespace) -> int:
    """Show how the host fares, once or until interrupted; the exit code says it too."""
    from overlay import status as view

    # Thousands of small objects, none of which is garbage before the end.
    gc.disable()
    options = options_of(AskOptions, arguments)
    terminal = sys.stdout.isatty() and not arguments.json
    peers = arguments.peers if arguments.peers is not None else LISTED if terminal else True
    while True:
        document, text = _asked(options.control_socket, peers)
        if not arguments.json:
            text = _laid_out(document, terminal=terminal, screen=bool(arguments.watch))
        print(text, end="" if arguments.watch and terminal else "\n", flush=True)
        if not arguments.watch:
            return view.EXIT_CODES.get(document["health"], view.EXIT_CODES[view.DOWN])
        time.sleep(arguments.watch)


def _laid_out(document: "view.Document", *, terminal: bool, screen: bool) -> str:
    """The document for people; with `screen`, as what a terminal shows instead of what it showed before."""
    from overlay.status_text import as_text

    if not terminal:
        return as_text(document)
    columns, rows = shutil.get_terminal_size()
    coloured = os.environ.get("TERM", "dumb") != "dumb" and not os.environ.get("NO_COLOR")
    text = as_text(document, columns, colour=coloured)
    if not screen:
        return text
    # Each line over the old one, and no more of them than there is room for: the screen does not flicker.
    lines = text.splitlines()
    cut = [*lines[: rows - 2], "..."] if len(lines) > rows - 1 else lines
    return "\033[H" + "".join(f"{line}\033[K\n" for line in cut) + "\033[J"


def _asked(path: str, peers: "int | bool") -> "tuple[view.Document, str]":
    """The agent's answer, decoded and as it came; from the kernel alone if there is none."""
    from overlay.control import NoAnswer, ask_text

    try:
        answer = ask_text(path, "status", ANSWER_S, peers=peers)
        document: view.Document = json.loads(answer)
        if not isinstance(document, dict) or not {"schema", "health", "problems"} <= document.keys():
            raise NoAnswer(f"what listens at {path} speaks of something else", refused=True)
        return document, answer.decode()
    except NoAnswer as silence:
        document = _from_kernel(_meaning(silence))
    if peers is False:
        document["peers"] = None
    elif not isinstance(peers, bool) and document["peers"]:
        amiss = sum(bool(peer["missing"]) for peer in document["peers"])
        document["peers"] = document["peers"][: amiss + peers]
    return document, json.dumps(document)


def _meaning(silence: "NoAnswer") -> "Finding":
    """Why no agent answers: it may run all the same."""
    from overlay.causes import Finding
    from overlay.claim import is_claimed

    if silence.denied:
        return Finding("no_privilege", "", (), {}, str(silence), "Run it with sudo, or see `control-socket-mode`.")
    if silence.listening or silence.refused:
        return Finding("agent_stalled", "", (str(silence),))
    if is_claimed():
        told = f"an agent runs on this host and {silence}: it hangs, or listens elsewhere (--control-socket)"
        return Finding("agent_stalled", "", (), {}, told)
    return Finding("agent_not_running", "", (str(silence),))


def _from_kernel(silence: "Finding") -> "view.Document":
    """What the kernel tells of devices and entries of ours."""
    from dataclasses import replace

    from overlay import logs
    from overlay import status as view
    from overlay.kernel import Kernel, KernelRefused

    logs.configure("error", "auto", os.environ)
    devices: list[FoundDevice] = []
    entries: list[Entry] = []
    try:
        devices = our_devices()
        with closing(Kernel()) as kernel:
            nexthops = kernel.has_nexthops()
            kernel.tunnels = {len(found.local): found.index for found in devices}
            entries = [*kernel.dump(nexthops), *kernel.marked(nexthops)]
    except KernelRefused as error:
        silence = replace(silence, evidence=(*silence.evidence, f"nor does the kernel tell all: {error}"))
    return view.from_kernel(silence, devices, entries)
