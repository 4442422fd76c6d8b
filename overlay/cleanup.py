"""Removing from this host all that the agent made on it, and nothing else.

What is the agent's is told by marks in the kernel and not by memory: devices that bear its alias, with which all
entries on them go; routes and nexthop objects of its protocol number on other links; its nftables table and its chain
in those of iptables; and the subnet file, if it names a subnet that such a device carries, or there is none and routes
were. Only for kernel settings there is a record of what they were; one that somebody has changed since stays as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from overlay import firewall, iptables, subnet_file
from overlay.device import FoundDevice
from overlay.kernel import Kernel
from overlay.model import Drop, Route
from overlay.nft import Nftables, NftFailed
from overlay.sysctl import Ledger, Refused


@dataclass(frozen=True, slots=True)
class Removed:
    """One thing that is no longer there, as words for people. `device`: what it was, if it was one."""

    what: str
    device: FoundDevice | None = None


def cleanup(
    kernel: Kernel,
    nftables: Nftables,
    subnet_path: str,
    cache_path: Path | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Removed]:
    """Remove it all, yielding each thing once it is gone. Raises KernelRefused or NftFailed where that fails."""
    previous = subnet_file.read(subnet_path)
    nexthops = kernel.has_nexthops()
    devices = kernel.own_devices()
    stale = False
    for device in devices:
        kernel.tunnels = {len(device.local): device.index}
        entries = list(kernel.dump(nexthops))
        if kernel.remove_device(device.name):
            what = f"device {device.name} with {len(entries)} FDB, neighbour, nexthop and route entries"
            yield Removed(what, device)
        carried = [address.base for address in device.addresses]
        stale = stale or any(subnet.base in carried for subnet in previous)
    marked = kernel.marked(nexthops)
    if marked:
        # Routes before the nexthop objects they go through.
        marked.sort(key=lambda entry: not isinstance(entry, Route))
        kernel.apply([Drop(entry) for entry in marked])
        stale = stale or not devices
        yield Removed(f"{len(marked)} routes and nexthop objects by hosts' own addresses")
    if previous and stale:
        Path(subnet_path).unlink(missing_ok=True)
        yield Removed(f"{subnet_path} (subnet {' and '.join(map(str, previous))})")
    if nftables.has_table():
        nftables.apply(firewall.removal())
        yield Removed(f"nftables table {firewall.TABLE}")
    for outcome in iptables.ensure((), nftables.forward_versions()):
        if outcome.error:
            raise NftFailed(outcome.error)
        yield Removed(f"{outcome.program}: chain {firewall.FORWARD_CHAIN}")
    for change in ledger.restore() if ledger else ():
        if isinstance(change, Refused):
            yield Removed(f"nothing of {change.name}: {change.reason}. Run: {change.remedy}")
        else:
            yield Removed(f"the change of {change.name}: it is {change.after} again")
    if cache_path is not None and cache_path.exists():
        cache_path.unlink()
        yield Removed(str(cache_path))
