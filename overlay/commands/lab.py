"""`overlay-agent lab`: a cluster in network namespaces on this machine."""

import argparse
import os
from typing import TYPE_CHECKING

from overlay import lab, logs
from overlay.options import EtcdOptions

if TYPE_CHECKING:
    from subnet_lease.etcd import EtcdStore


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's own commands and their options."""
    lab.add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    """Do what the lab's command says."""
    logs.configure("error", "auto", os.environ)
    return lab.command(arguments, _lab_store)


def _lab_store(endpoint: str) -> "EtcdStore":
    """The store of a lab's own etcd."""
    from subnet_lease.etcd import EtcdStore

    return EtcdStore([endpoint], EtcdOptions().etcd_prefix)
