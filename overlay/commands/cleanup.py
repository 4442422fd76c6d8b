"""`overlay-agent cleanup`: remove what the agent made on this host, and on demand give its lease back."""

import argparse
import os
from contextlib import ExitStack
from pathlib import Path

from overlay.commands import Refusal
from overlay.commands.common import claim, find_underlay, ledger_of, open_nftables, open_store, options_of
from overlay.options import Options, add_arguments


def fill(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--release", action="store_true", help="also give the lease back, so that others can have it")
    add_arguments(parser, Options)


def main(arguments: argparse.Namespace) -> int:
    """Remove all of it; with `--release` the lease as well."""
    return _cleanup(options_of(Options, arguments), release=arguments.release)


def _cleanup(options: Options, *, release: bool) -> int:
    from overlay import cleanup as work
    from overlay import journal, logs, nft, preflight
    from overlay.kernel import Kernel, KernelRefused
    from overlay.underlay import NoUnderlay
    from subnet_lease import cache
    from subnet_lease.keeper import Identity, release_lease
    from subnet_lease.store import StoreError

    logs.configure("warning", options.log_format, os.environ)
    problem = preflight.capability_problem(
        preflight.missing_capabilities(Path("/proc/self/status").read_text(encoding="ascii"))
    )
    if problem:
        raise Refusal(preflight.report([problem]))
    with ExitStack() as stack:
        stack.enter_context(claim())
        kernel = Kernel()
        stack.callback(kernel.close)
        nftables = open_nftables()
        stack.callback(nftables.close)
        addresses, macs = list(options.public_addresses), []
        nothing = True
        try:
            table = Path(options.state_dir) / cache.FILE if options.state_dir else None
            for removed in work.cleanup(kernel, nftables, options.subnet_file, table, ledger_of(options)):
                nothing = False
                print(f"removed {removed.what}")
                if removed.device is not None:
                    addresses.append(removed.device.local)
                    macs.append(removed.device.mac)
            history = Path(options.state_dir) / journal.DIRECTORY
            if options.state_dir and journal.remove(history):
                nothing = False
                print(f"removed {history}")
        except (KernelRefused, nft.NftFailed, OSError) as error:
            raise Refusal(f"cleanup is not complete: {error}") from None
        if nothing:
            print("nothing of the agent's is left on this host")
        if not release:
            return 0
        if not addresses:
            try:
                addresses += find_underlay(options).addresses
            except NoUnderlay as error:
                raise Refusal(str(error)) from None
        by_family = {len(address): address for address in reversed(addresses)}
        identity = Identity(by_family.get(4), by_family.get(16), tuple(macs))
        store = open_store(options)
        stack.callback(store.close)
        try:
            lease = release_lease(store, identity)
        except StoreError as error:
            raise Refusal(f"the lease of {identity} is not released: {error}") from None
    if lease is None:
        print(f"{identity} holds no lease")
    elif lease.reserved:
        print(f"{lease} is reserved for {identity} and stays so")
    else:
        print(f"released {lease}")
    return 0
