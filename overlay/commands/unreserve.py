"""`overlay-agent unreserve`: take a reservation back."""

import argparse

from overlay.commands.common import operators_store, options_of
from overlay.options import EtcdOptions, add_arguments


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    from overlay.reservations import subnets_argument

    parser.add_argument("subnet", metavar="SUBNET", type=subnets_argument, help="as 10.5.34.0/24")
    add_arguments(parser, EtcdOptions)


def main(arguments: argparse.Namespace) -> int:
    """Make the reservation a lease again, or free it."""
    from overlay import reservations
    from subnet_lease.model import format_subnets

    options, subnets = options_of(EtcdOptions, arguments), arguments.subnet
    with operators_store(options, f"the reservation of {format_subnets(subnets)} stays as it was") as store:
        print(reservations.unreserve(store, subnets))
    return 0
