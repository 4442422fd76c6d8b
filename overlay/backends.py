"""The backends: the devices each needs, and the entries that a peer's lease calls for. Pure functions of values.

`vxlan`, as flannel lays it out (its third design: one route, one neighbour and one FDB entry for each host, no misses
to answer at run time): the route to the subnet goes via the subnet's base address, "on link"; the neighbour entry gives
that address the peer's VTEP MAC; the FDB entry gives that MAC the peer's underlay address. Before all that, the
firewall is told that address. There is a device for each address family of the underlay. Pods' packets go over the
underlay of their own family if both hosts have it, as flannel's do, otherwise over the other.

With DirectRouting, peers on the same link get a route via their underlay address instead; `host-gw` has nothing else.
`alloc` leases subnets and leaves the rest to others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from overlay.device import DeviceSpec, Underlay, device_name, tunnel_mtu
from overlay.model import (
    NEXTHOP_BASE,
    NEXTHOP_SPAN,
    PERMANENT,
    PROTOCOL,
    PROTOCOL_BOOT,
    Entry,
    Fdb,
    Guard,
    Neighbour,
    NextHop,
    Route,
)
from subnet_lease.model import ConfigInvalid, Lease, LeaseAttrs, NetworkConfig, Prefix

V4, V6 = 4, 16
"""Address families, by the length of a packed address."""

OTHER = {V4: V6, V6: V4}


@dataclass(frozen=True, slots=True)
class Here:
    """What this host contributes to the entries of its peers.

    `blocks` are the overlay's networks. `tunnels` are the interface indexes of our devices by the underlay's family,
    `link` is that of the underlay, 0 if the backend routes nothing by it; on it the blocks `on_link` are reached
    without a router. `mtu` is what this host's pods use. A subnet's nexthop id is its first address as a number plus
    `nexthops`; None where routes get plain gateways, which cost the kernel quadratic time in the number of peers.
    `listed`: whether the firewall is to be told the addresses of hosts, for its guard of the tunnels and to masquerade
    nothing that goes to them.
    """

    blocks: tuple[Prefix, ...]
    tunnels: Mapping[int, int]
    link: int
    on_link: tuple[Prefix, ...]
    mtu: int
    nexthops: int | None
    listed: bool

    @classmethod
    def of(cls, config: NetworkConfig, underlay: Underlay, mtu: int, *, nexthops: bool, listed: bool) -> "Here":
        """Before there is any device. `nexthops`: whether to use nexthop objects."""
        network = config.network
        # Network is a /8 at most, so that the ids stay in our range.
        offset = NEXTHOP_BASE - network.first if nexthops and network else None
        backend = backend_of(config)
        link = underlay.index if backend.direct else 0
        return cls(config.blocks, {}, link, underlay.on_link, mtu, offset, listed)


@dataclass(frozen=True, slots=True)
class Backend:
    """A way to carry pods' packets to peers.

    `devices(config, own lease, underlay)` are the tunnels it needs, one for each family of the underlay at most;
    `entries(peer's lease, here)` what reaches the peer, as far as it can be reached. `tunnels`: whether hosts have
    VTEPs; `direct`: whether routes may leave by the underlay's link; `routes`: whether anything is to be programmed at
    all.
    """

    devices: Callable[[NetworkConfig, Lease, Underlay], tuple[DeviceSpec, ...]]
    entries: Callable[[Lease, Here], tuple[Entry, ...]]
    tunnels: bool = False
    direct: bool = False
    routes: bool = True


def backend_of(config: NetworkConfig) -> Backend:
    """The backend that the configuration names; ConfigInvalid if there is no such."""
    name = config.backend.type
    if name == "vxlan":
        return _DIRECT if config.backend.direct_routing else _VXLAN
    if name not in _OTHERS:
        raise ConfigInvalid("Backend.Type", f"{name!r} is not supported; {', '.join(('vxlan', *_OTHERS))} are")
    return _OTHERS[name]


def ours(entry: Entry, here: Here) -> bool:
    """Whether the entry bears the mark by which an agent with no memory knows its own, and may remove it.

    Only entries that concern our devices and the underlay's, or carry our protocol number, reach this. Routes of
    protocol boot by the devices that the backend routes by, inside the overlay's networks, were left by flanneld: they
    are taken over, and removed with the peer they stood for.
    """
    match entry:
        case Guard():
            return True
        case Fdb() | Neighbour():
            return bool(entry.state & PERMANENT)
        case NextHop():
            return entry.protocol == PROTOCOL and _is_our_id(entry.id)
        case Route():
            inside = any(block.covers(entry.destination) for block in here.blocks)
            if entry.protocol == PROTOCOL:
                return inside or _is_our_id(entry.nexthop)
            if entry.protocol != PROTOCOL_BOOT or not entry.device:
                return False
            return inside and entry.device in (here.link, *here.tunnels.values())


def _is_our_id(nexthop: int) -> bool:
    return NEXTHOP_BASE <= nexthop < NEXTHOP_BASE + NEXTHOP_SPAN


# --- vxlan -------------------------------------------------------------------------------------------------------


def _tunnels(config: NetworkConfig, lease: Lease, underlay: Underlay) -> tuple[DeviceSpec, ...]:
    families = {len(address) for address in underlay.addresses}
    specs = []
    for local in underlay.addresses:
        family = len(local)
        vtep = lease.attrs.vtep if family == V4 else lease.attrs.vtep6
        if vtep is None:
            continue  # The address is new; the lease is about to follow.
        carried = (
            Prefix(subnet.base, 8 * len(subnet.base))
            for subnet in lease.subnets
            if family == (len(subnet.base) if len(subnet.base) in families else OTHER[len(subnet.base)])
        )
        specs.append(
            DeviceSpec(
                name=device_name(config.backend.vni, family),
                vni=config.backend.vni,
                port=config.backend.port,
                link=underlay.index,
                local=local,
                mac=vtep.mac,
                mtu=tunnel_mtu(underlay.mtu, config.backend.mtu, family),
                addresses=tuple(carried),
                learning=config.backend.learning,
                gbp=config.backend.gbp,
            )
        )
    return tuple(specs)


def _tunnelled(peer: Lease, here: Here) -> tuple[Entry, ...]:
    entries: tuple[Entry, ...] = ()
    for subnet in peer.subnets:
        way = _way(subnet, peer.attrs, here)
        if way is not None:
            entries += _by_tunnel(subnet, way, entries, peer, here)
    return entries


def _tunnelled_or_direct(peer: Lease, here: Here) -> tuple[Entry, ...]:
    entries: tuple[Entry, ...] = ()
    for subnet in peer.subnets:
        way = _way(subnet, peer.attrs, here)
        gateway = _neighbouring(subnet, peer.attrs, here)
        if gateway is None:
            if way is not None:
                entries += _by_tunnel(subnet, way, entries, peer, here)
            continue
        if way is not None:
            # The peer may see it the other way round, and send through the tunnel what we do not.
            entries += _vtep(way, entries, here)
        entries += _route(subnet, gateway, here.link, peer, here)
    return entries


_Way = tuple[int, bytes, bytes]
"""Our device's interface index, the peer's VTEP MAC, its underlay address."""


def _way(subnet: Prefix, peer: LeaseAttrs, here: Here) -> _Way | None:
    """The tunnel for pods in `subnet`; None if there is none."""
    family = len(subnet.base)
    for size in (family, OTHER[family]):
        device = here.tunnels.get(size)
        vtep, remote = (peer.vtep, peer.public_ip) if size == V4 else (peer.vtep6, peer.public_ip6)
        if device is not None and vtep is not None and remote is not None:
            return device, vtep.mac, remote
    return None


def _by_tunnel(subnet: Prefix, way: _Way, others: tuple[Entry, ...], peer: Lease, here: Here) -> tuple[Entry, ...]:
    device, mac, _ = way
    neighbour = Neighbour((device, subnet.base), mac)
    return (*_vtep(way, others, here), neighbour, *_route(subnet, subnet.base, device, peer, here))


def _vtep(way: _Way, others: tuple[Entry, ...], here: Here) -> tuple[Entry, ...]:
    """What it takes to exchange frames with a VTEP, unless it is among `others`: both families may travel one way."""
    device, mac, remote = way
    fdb = Fdb((device, mac), remote)
    if others and fdb in others:
        return ()
    return (Guard(remote), fdb) if here.listed else (fdb,)


# --- routes ------------------------------------------------------------------------------------------------------


def _routed(peer: Lease, here: Here) -> tuple[Entry, ...]:
    entries: tuple[Entry, ...] = ()
    for subnet in peer.subnets:
        gateway = _neighbouring(subnet, peer.attrs, here)
        if gateway is not None:
            if here.listed and Guard(gateway) not in entries:
                entries += (Guard(gateway),)
            entries += _route(subnet, gateway, here.link, peer, here)
    return entries


def _neighbouring(subnet: Prefix, peer: LeaseAttrs, here: Here) -> bytes | None:
    """The peer's underlay address if that is on our link, to route `subnet` by; None if it cannot be routed so.

    IPv4 may go by an IPv6 gateway, in a nexthop object (RFC 8950 calls it so); not the other way round.
    """
    own, other = peer.public_ip, peer.public_ip6 if here.nexthops is not None else None
    if len(subnet.base) == V6:
        own, other = peer.public_ip6, None
    for gateway in (own, other):
        if gateway is not None and any(block.holds(gateway) for block in here.on_link):
            return gateway
    return None


def _route(subnet: Prefix, gateway: bytes, device: int, peer: Lease, here: Here) -> tuple[Entry, ...]:
    """The route to `subnet`; it carries the peer's MTU if that is smaller than ours."""
    theirs = peer.attrs.mtu
    mtu = theirs if 0 < theirs < here.mtu else 0
    if here.nexthops is None or len(subnet.base) == V6:
        return (Route(subnet, 0, gateway, device, mtu=mtu),)
    number = here.nexthops + subnet.first
    return NextHop(number, gateway, device), Route(subnet, number, mtu=mtu)


_VXLAN = Backend(_tunnels, _tunnelled, tunnels=True)
_DIRECT = Backend(_tunnels, _tunnelled_or_direct, tunnels=True, direct=True)
_OTHERS = {
    "host-gw": Backend(lambda config, lease, underlay: (), _routed, direct=True),
    "alloc": Backend(lambda config, lease, underlay: (), lambda peer, here: (), routes=False),
}
