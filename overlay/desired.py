"""Which entries a peer's lease calls for, and which entries in the kernel are ours: pure functions of values.

A peer on VXLAN, as flannel lays it out (its third design: one route, one neighbour and one FDB entry for each host, no
misses to answer at run time): the route to the subnet goes via the subnet's base address, "on link"; the neighbour
entry gives that address the peer's VTEP MAC; the FDB entry gives that MAC the peer's underlay address.
"""

from dataclasses import dataclass

from overlay.model import (
    NEXTHOP_BASE,
    NEXTHOP_SPAN,
    PERMANENT,
    PROTOCOL,
    PROTOCOL_BOOT,
    Entry,
    Fdb,
    Neighbour,
    NextHop,
    Route,
)
from subnet_lease.model import Lease, Prefix


@dataclass(frozen=True, slots=True)
class Local:
    """What this host contributes: the overlay's `network`, our device's interface index, and the kernel's abilities.

    `nexthops`: routes go through nexthop objects. Plain gateways cost the kernel quadratic time in the number of peers.
    """

    network: Prefix
    device: int
    nexthops: bool


def entries_for(lease: Lease, local: Local) -> tuple[Entry, ...]:
    """The entries that make `lease.subnet` reachable, in build order. The lease has been accepted by the table."""
    vtep = lease.attrs.vtep
    if vtep is None:
        return ()
    gateway = lease.subnet.base
    fdb = Fdb(vtep.mac, lease.attrs.public_ip)
    neighbour = Neighbour(gateway, vtep.mac)
    if not local.nexthops:
        return fdb, neighbour, Route(lease.subnet, gateway=gateway, device=local.device)
    hop = NextHop(nexthop_id(lease.subnet, local.network), gateway, local.device)
    return fdb, neighbour, hop, Route(lease.subnet, nexthop=hop.id)


def nexthop_id(subnet: Prefix, network: Prefix) -> int:
    """The same id for the same subnet on every start; Network is a /8 at most, so the ids stay in our range."""
    return NEXTHOP_BASE + subnet.first - network.first


def ours(entry: Entry, local: Local) -> bool:
    """Whether the entry bears the mark by which an agent with no memory knows its own, and may remove it.

    Only entries that concern `local.device` or carry our protocol number reach this. Routes of protocol boot on our
    device inside Network were left by flanneld: they are taken over, and removed with the peer they stood for.
    """
    match entry:
        case Fdb() | Neighbour():
            return bool(entry.state & PERMANENT)
        case NextHop():
            return entry.protocol == PROTOCOL and _is_our_id(entry.id)
        case Route():
            inside = local.network.covers(entry.destination)
            if entry.protocol == PROTOCOL:
                return inside or _is_our_id(entry.nexthop)
            return inside and entry.protocol == PROTOCOL_BOOT and entry.device == local.device


def _is_our_id(nexthop: int) -> bool:
    return NEXTHOP_BASE <= nexthop < NEXTHOP_BASE + NEXTHOP_SPAN
