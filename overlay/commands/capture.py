"""`overlay-agent capture`: the packets of the overlay as they pass this host."""

import argparse
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

from overlay.commands import Refusal
from overlay.commands.common import find_underlay, known_hosts, options_of, our_devices
from overlay.options import CaptureOptions, OptionError, add_arguments, argument, whole_number

if TYPE_CHECKING:
    from overlay.roster import Roster
    from overlay.selection import Wanted


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "target",
        metavar="PEER|POD-IP",
        nargs="?",
        help="only packets of this host (node name, underlay address or subnet), or of this pod's address",
    )
    parser.add_argument("--filter", metavar="WORDS", help='as "tcp port 80", "icmp host 10.244.7.2", "remarks"')
    number = argument(whole_number(1, 1 << 40))
    parser.add_argument("-c", "--count", metavar="N", type=number, help="end after this many packets")
    parser.add_argument("-v", "--verbose", action="store_true", help="a second line with the headers in between")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no packets; with --write, decode none")
    parser.add_argument("--json", action="store_true", help="print data, an object a line, for programs")
    parser.add_argument("--write", metavar="FILE", help="write them to a pcapng file, with the remarks as comments")
    parser.add_argument("--read", metavar="FILE", help="take packets from a pcap or pcapng file; - is standard input")
    port = argument(whole_number(1, 65535))
    parser.add_argument("--port", metavar="PORT", type=port, help="UDP port of the tunnels, if not the network's")
    add_arguments(parser, CaptureOptions)


def main(arguments: argparse.Namespace) -> int:
    """Show the overlay's packets until a signal, the end of the file or `--count`."""
    from overlay import logs, selection
    from overlay.capture import CaptureFailed
    from overlay.pcap import NotACapture
    from overlay.roster import UnknownTarget

    options = options_of(CaptureOptions, arguments)
    if arguments.quiet and arguments.json:
        raise OptionError("--quiet", "with --json there would be nothing to print", "Leave one of them out.")
    try:
        wanted = selection.parse(arguments.filter) if arguments.filter is not None else None
    except ValueError as error:
        raise OptionError("--filter", str(error)) from None
    logs.configure("error", options.log_format, os.environ)
    try:
        with ExitStack() as stack:
            _capture(options, arguments, wanted, stack)
    except (CaptureFailed, UnknownTarget) as error:
        raise Refusal(str(error)) from None
    except NotACapture as error:
        raise Refusal(f"{arguments.read}: {error}") from None
    return 0


def _capture(options: CaptureOptions, arguments: argparse.Namespace, wanted: "Wanted | None", stack: ExitStack) -> None:
    """Build the edges and run the loop. Raises CaptureFailed, NotACapture, UnknownTarget."""
    from overlay import capture as work
    from overlay import pcap
    from overlay.bpf import tunnel_filter

    def note(text: str) -> None:
        print(f"overlay-agent: {text}", file=sys.stderr, flush=True)

    def flush() -> None:
        sys.stdout.flush()
        if recorder is not None:
            recorder.flush()

    show: work.Sink | None = None
    if arguments.json:
        show = work.JsonLines(sys.stdout)
    elif not arguments.quiet:
        show = work.Screen(sys.stdout, headers=arguments.verbose, colour=work.colourful(sys.stdout))
    leases = work.Leases(known_hosts(options, arguments.port, stack), note)
    roster = leases.roster
    stop = work.Stop()
    recorder: pcap.Writer | None = None
    tap, where, underlay = None, arguments.read, False
    if arguments.read:
        frames = work.recorded(pcap.read(arguments.read), stop)
    else:
        where, underlay = _listened_to(options, roster)
        tap = stack.enter_context(work.open_tap(where, tunnel_filter(roster.port, roster.blocks)))
        frames = work.live(tap, stop, flush)
    if arguments.write:
        try:
            recorder = stack.enter_context(pcap.Writer(arguments.write))
        except OSError as error:
            raise OptionError("--write", f"{arguments.write}: {os.strerror(error.errno or 0).lower()}") from None
    job = work.Capture(
        leases,
        target=arguments.target,
        wanted=wanted,
        show=show,
        recorder=recorder,
        count=arguments.count,
        underlay=underlay,
        # Where nobody asks what a packet is, it is written as it comes.
        decode=bool(show or arguments.target is not None or wanted or not recorder),
    )
    vni = f", VNI {roster.vni}" if roster.vni is not None else ""
    note(f"{where}: VXLAN on UDP port {roster.port}{vni}; {leases.known.source}")
    with stop:
        try:
            job.run(frames)
        finally:
            flush()
            if stop.asked and sys.stderr.isatty():
                print(file=sys.stderr)  # Below the terminal's ^C.
            note(job.tally.line(tap.lost if tap else None, "shown" if show else "written" if recorder else "counted"))


def _listened_to(options: CaptureOptions, roster: "Roster") -> tuple[str, bool]:
    """The interface to capture on, and whether our tunnels leave by it: as asked for, else the one they leave by."""
    import socket

    from overlay.underlay import NoUnderlay

    present = [name for _, name in socket.if_nameindex()]
    links = {device.link for device in our_devices() if device.link and device.vni in (roster.vni, device.vni)}
    below = [name for index, name in socket.if_nameindex() if index in links]
    asked = [name for name in options.iface if name in present]
    if asked or (below and not options.iface):
        name = (asked or below)[0]
        return name, name in below
    try:
        name = find_underlay(options).name
    except NoUnderlay as error:
        raise Refusal(str(error)) from None
    return name, name in below
