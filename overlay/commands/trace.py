"""`overlay-agent trace`: the way of one packet through this host."""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from typing import TYPE_CHECKING, Any

from overlay.commands import Refusal
from overlay.commands.common import known_hosts, options_of
from overlay.options import CaptureOptions, OptionError, add_arguments, argument, whole_number

if TYPE_CHECKING:
    from overlay.roster import Roster
    from overlay.rules import Filters
    from overlay.trace import Packet, Trace
    from overlay.trace_send import Sent

LEAST, MOST = 84, 65535
"""Bytes that the IP packet may have; the least is what `ping` sends, and holds the mark of one that is sent."""


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from overlay.reservations import address_argument

    parser.add_argument("source", metavar="SRC", type=address_argument, help="address that the packet comes from")
    parser.add_argument("destination", metavar="DST", type=address_argument, help="address that it goes to")
    parser.add_argument("--protocol", choices=("icmp", "udp", "tcp"), default="icmp", help="[icmp]")
    port = argument(whole_number(1, 65535))
    parser.add_argument("--port", metavar="PORT", type=port, help="destination port [udp: 9, tcp: 80]")
    size = argument(whole_number(LEAST, MOST))
    parser.add_argument("--size", metavar="BYTES", type=size, default=LEAST, help=f"of the IP packet [{LEAST}]")
    parser.add_argument("--df", action="store_true", help="it may not be cut into fragments")
    parser.add_argument("--send", action="store_true", help="send one such packet, and say how far it comes")
    parser.add_argument("--json", action="store_true", help="print data, for programs")
    add_arguments(parser, CaptureOptions)


def main(arguments: argparse.Namespace) -> int:
    """Follow the packet: 0 if its way through this host is open, 1 if something is wrong."""
    from overlay import logs
    from overlay import trace as work
    from overlay.queries import Queries
    from overlay.trace_send import SendFailed

    options = options_of(CaptureOptions, arguments)
    packet = _packet(arguments)
    logs.configure("error", options.log_format, os.environ)

    def show(text: str) -> None:
        if not arguments.json:
            print(text, flush=True)

    sent = None
    with ExitStack() as stack:
        known = known_hosts(options, None, stack)()
        try:
            kernel = stack.enter_context(Queries())
        except OSError as error:
            raise Refusal(f"the kernel cannot be asked: {os.strerror(error.errno or 0).lower()}") from None
        followed = work.Trace(kernel, packet_filters(), known.roster, packet)
        if arguments.send and followed.origin == work.AWAY:
            reason = "what comes from elsewhere cannot be sent from here"
            raise OptionError("--send", reason, "Run it on the host of SRC.")
        show(work.headline(followed, packet))
        show(f"  {known.source}")
        steps = []
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
        for step in followed.steps():
            steps.append(step)
            show(work.line(step, width))
        if arguments.send:
            try:
                sent = _send(followed, packet, known.roster)
            except SendFailed as failed:
                raise Refusal(str(failed)) from None
            for line in sent.lines(width):
                show(line)
    found = work.as_json(followed, packet, steps, sent.fields() if sent is not None else None)
    if arguments.json:
        print(json.dumps(found))
    elif found["open"]:
        print("The way through this host is open.")
    return int(not found["open"])


def _packet(arguments: argparse.Namespace) -> "Packet":
    """What is to be followed. OptionError if there is no such packet."""
    from overlay.trace import Packet
    from overlay.trace_send import DISCARD
    from subnet_lease.model import format_address
    from subnet_lease.table import possible_host

    source, destination = arguments.source, arguments.destination
    if len(source) != len(destination):
        raise OptionError("DST", "it is not of SRC's address family", "Give two IPv4 addresses, or two IPv6 ones.")
    for name, address in (("SRC", source), ("DST", destination)):
        if not possible_host(address):
            raise OptionError(name, f"{format_address(address)} is no host's or pod's address", "Give one that is.")
    if arguments.port is not None and arguments.protocol == "icmp":
        raise OptionError("--port", "ICMP has no ports", "Give --protocol udp or tcp as well.")
    if arguments.send and arguments.protocol == "tcp":
        raise OptionError("--send", "a connection is nothing to begin for a test", "Use --protocol icmp or udp.")
    port = arguments.port or {"icmp": 0, "udp": DISCARD, "tcp": 80}[arguments.protocol]
    return Packet(source, destination, arguments.protocol, port, arguments.size, arguments.df)


def packet_filters() -> "Filters":
    """All that filters packets on this host, as far as it can be read."""
    from overlay import firewall, iptables, nft
    from overlay.rules import Filters

    listing: Mapping[str, Any] = {}
    known: set[bytes] = set()
    versions: frozenset[int] = frozenset()
    with suppress(nft.NftFailed):
        listing = nft.ruleset()
    with suppress(nft.NftFailed), closing(nft.Nftables()) as nftables:
        versions = nftables.forward_versions()
        known = nftables.dump()
    sets = {
        ("inet", firewall.NAME, name): frozenset(each for each in known if len(each) == length)
        for length, name in firewall.SETS.items()
    }
    return Filters(listing, sets, iptables.listed(versions))


def _send(followed: "Trace", packet: "Packet", roster: "Roster") -> "Sent":
    """Send the packet by the way that the kernel chooses for it. SendFailed."""
    from overlay import nft
    from overlay.capture import Stop
    from overlay.trace_send import SendFailed, send

    entrance, path = followed.path()
    with Stop() as stop:
        try:
            return send(
                packet,
                entrance=entrance,
                path=path,
                roster=roster,
                load=nft.apply,
                rule_text=nft.rule_text,
                stop=lambda: stop.asked,
            )
        except nft.NftFailed as error:
            raise SendFailed(str(error)) from None
