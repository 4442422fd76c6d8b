"""`overlay-agent leases`: all leases and reservations of the cluster."""

import argparse
import shutil
import sys

from overlay.commands.common import operators_store, options_of, present_config
from overlay.options import EtcdOptions, add_arguments


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print data, for programs")
    parser.add_argument("--no-ttl", action="store_true", help="do not ask etcd how long each lease still lasts")
    add_arguments(parser, EtcdOptions)


def main(arguments: argparse.Namespace) -> int:
    """List the leases, and unless asked not to, how long each still lasts."""
    from overlay import listing

    options = options_of(EtcdOptions, arguments)
    with operators_store(options, "the leases cannot be listed") as store:
        network = present_config(options, store)
        snapshot = store.snapshot()
        rows = listing.rows_of(network, snapshot)
        ttls = listing.times_left(store, rows) if not arguments.no_ttl else None
    if arguments.json:
        print(listing.as_json(network.blocks, snapshot.revision, rows, ttls or {}))
    else:
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(listing.as_text(network.blocks, rows, ttls, columns))
    return 0
