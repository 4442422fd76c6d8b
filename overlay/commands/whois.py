"""`overlay-agent whois`: which host holds an address, or held it."""

import argparse
import os
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from overlay.commands import Refusal
from overlay.commands.common import TIMES_HELP, open_store, options_of, present_config, time_of
from overlay.options import CaptureOptions, OptionError, add_arguments

if TYPE_CHECKING:
    from overlay.history import Current, Whois


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("address", metavar="IP", help="of a pod, or of a host on the underlay")
    parser.add_argument("--at", metavar="TIME", help=f"who held it then: {TIMES_HELP}")
    parser.add_argument("--json", action="store_true", help="print data, for programs")
    add_arguments(parser, CaptureOptions)


def main(arguments: argparse.Namespace) -> int:
    """Say who holds an address, or held it; 1 if nobody is known."""
    from overlay import logs
    from overlay.history import Answer, Whois
    from subnet_lease.model import pack_address

    options = options_of(CaptureOptions, arguments)
    try:
        address = pack_address(arguments.address)
    except ValueError as error:
        raise OptionError("IP", str(error)) from None
    at = time_of("--at", arguments.at)
    logs.configure("error", options.log_format, os.environ)
    search = Whois(address)
    _search_journal(options, search)
    current, reason = _current(options, address)
    holdings = [each for each in search.holdings if at is None or each.held_at(at) is not False]
    answer = Answer(arguments.address, at, current, reason, holdings, search.coverage)
    print(answer.as_json() if arguments.json else answer.as_text())
    return 0 if answer.known else 1


def _search_journal(options: CaptureOptions, search: "Whois") -> None:
    from overlay.journal import DIRECTORY, SIGN_S, Reading, last_written

    directory, coverage = Path(options.state_dir) / DIRECTORY, search.coverage
    reading = Reading(directory)
    try:
        for record in reading.records():
            search.saw(record)
        seen = last_written(directory)
    except OSError as error:
        coverage.unreadable = f"{directory} cannot be read: {os.strerror(error.errno or 0).lower()}"
        return
    coverage.damaged = reading.damaged
    if seen is not None and time.time() - seen > 2 * SIGN_S:
        coverage.silent_since = seen


def _current(options: CaptureOptions, address: bytes) -> "tuple[list[Current] | None, str]":
    """The leases in etcd that stand for an address; None and why if etcd does not say."""
    from overlay import listing
    from overlay.history import Current, stands_for
    from subnet_lease.model import format_address, format_mac
    from subnet_lease.store import StoreError

    found = []
    try:
        with closing(open_store(options)) as store:
            rows = listing.rows_of(present_config(options, store), store.snapshot())
    except (StoreError, Refusal) as error:
        return None, str(error)
    for row in rows:
        attrs = row.attrs
        hosts = tuple(format_address(each) for each in (attrs.public_ip, attrs.public_ip6) if each) if attrs else ()
        macs = tuple(format_mac(vtep.mac) for vtep in (attrs.vtep, attrs.vtep6) if vtep) if attrs else ()
        subnets = tuple(map(str, row.subnets))
        if stands_for(address, subnets, hosts):
            name = attrs.node_name if attrs else ""
            found.append(Current(row.key, name or None, subnets, hosts, macs, row.rejected))
    return found, ""
