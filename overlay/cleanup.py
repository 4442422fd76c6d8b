"""Removing from this host all that the agent made on it, and nothing else.

What is the agent's is told by marks in the kernel and not by memory: devices that bear its alias, with which all
entries on them go; its nftables table; and the subnet file, if it
names the subnet that such a device carries. Sysctls stay: others may have come to rely on them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overlay import firewall, nft, subnet_file
from overlay.kernel import Kernel
from subnet_lease.model import format_address


@dataclass(frozen=True, slots=True)
class Removed:
    """One thing that is no longer there, as words for people. `local`: the underlay address of a removed device."""

    what: str
    local: bytes = b""


def cleanup(kernel: Kernel, subnet_path: str, cache_path: Path | None = None) -> Iterator[Removed]:
    """Remove it all, yielding each thing once it is gone. Raises KernelRefused or NftFailed where that fails."""
    previous = subnet_file.read(subnet_path)
    for device in kernel.own_devices():
        kernel.device = device.index
        entries = list(kernel.dump(kernel.has_nexthops()))
        if kernel.remove_device(device.name):
            what = f"device {device.name} with {len(entries)} FDB, neighbour, nexthop and route entries"
            yield Removed(what, device.local)
        carried = [address.base for address in device.addresses]
        if previous is not None and previous.base in carried:
            Path(subnet_path).unlink(missing_ok=True)
            yield Removed(f"{subnet_path} (subnet {format_address(previous.base)}/{previous.length})")
    if nft.has_table(firewall.TABLE):
        nft.apply(firewall.removal())
        yield Removed(f"nftables table {firewall.TABLE}")
    if cache_path is not None and cache_path.exists():
        cache_path.unlink()
        yield Removed(str(cache_path))
