"""`overlay-agent reserve`: a subnet for one host, which it keeps whatever the time."""

import argparse

from overlay.commands import unreserve
from overlay.commands.common import operators_store, options_of, present_config
from overlay.options import EtcdOptions


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from overlay.reservations import address_argument

    unreserve.fill(parser)
    parser.add_argument(
        "--public-ip", metavar="ADDRESS", type=address_argument, required=True, help="the host's, on the underlay"
    )


def main(arguments: argparse.Namespace) -> int:
    """Reserve the subnet for the host of that address."""
    from overlay import reservations
    from subnet_lease.model import format_subnets

    options, subnets = options_of(EtcdOptions, arguments), arguments.subnet
    with operators_store(options, f"{format_subnets(subnets)} is not reserved") as store:
        print(reservations.reserve(store, present_config(options, store), subnets, arguments.public_ip))
    return 0
