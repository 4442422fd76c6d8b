"""The VXLAN device as a value: what we want of it, what was found, and whether one can become the other.

Owns the rules of adoption (a device that fits is kept, with its entries and flows; one that does not is made anew) and
the MTU arithmetic. No netlink here: `kernel` reads and makes devices.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, replace

from subnet_lease.model import NetworkConfig, Prefix, format_address

OWNER = "overlay-agent"
"""ifalias of devices we made or adopted: the mark by which `cleanup` knows them, and by which people do."""

OVERHEAD = {4: 50, 16: 70}
"""Bytes that VXLAN adds, by the length of an underlay address: outer IP, UDP, VXLAN and inner Ethernet, which is 20 or
40, 8, 8 and 14 (RFC 7348 section 5)."""

MIN_MTU = {4: 576, 16: 1280}
"""What every host must take whole, by the length of a pod's address (RFC 791, RFC 8200)."""


@dataclass(frozen=True, slots=True)
class Underlay:
    """The interface that carries the overlay: name, index, MTU in bytes, and how it was chosen.

    `addresses` are this host's packed addresses on it, one for each family in use, IPv4 first; `on_link` the blocks of
    that interface that are reached without a router, `links` those of all interfaces of this host, or what of them is
    in the overlay's way. `runner_up` names what would have been chosen otherwise, empty if there was nothing else.
    """

    name: str
    index: int
    mtu: int
    addresses: tuple[bytes, ...]
    on_link: tuple[Prefix, ...]
    links: tuple[Prefix, ...]
    why: str
    runner_up: str = ""

    def address(self, family: int) -> bytes | None:
        """Its address of the family (length of a packed address), None if there is none."""
        return next((address for address in self.addresses if len(address) == family), None)

    def carrying(self, families: Collection[int]) -> "Underlay":
        """With the addresses that an overlay of these `families` uses: of those families if there are, else all."""
        used = tuple(address for address in self.addresses if len(address) in families)
        return replace(self, addresses=used or self.addresses)


def occupied_links(
    underlay: Underlay, networks: Collection[Prefix], own: Collection[Prefix] = ()
) -> tuple[Prefix, ...]:
    """The blocks inside the overlay's `networks` that a link of this host uses, but for those of its pods, inside its
    `own` subnets.

    No lease may take them: its route would replace the link's.
    """
    return tuple(
        link
        for link in underlay.links
        if any(network.covers(link) for network in networks) and not any(subnet.covers(link) for subnet in own)
    )


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """The device wanted. `link` is the underlay's interface index, `local` its packed address, `mtu` in bytes."""

    name: str
    vni: int
    port: int
    link: int
    local: bytes
    mac: bytes
    mtu: int
    addresses: tuple[Prefix, ...]
    learning: bool = False
    gbp: bool = False


@dataclass(frozen=True, slots=True)
class FoundDevice:
    """An interface as the kernel has it. The VXLAN attributes are zero for other kinds."""

    index: int
    name: str
    kind: str
    mac: bytes
    mtu: int
    up: bool
    alias: str = ""
    vni: int = 0
    port: int = 0
    link: int = 0
    local: bytes = b""
    learning: bool = False
    gbp: bool = False
    addresses: tuple[Prefix, ...] = ()


MAX_DEVICE_NAME = 15
"""IFNAMSIZ less the final zero (linux/if.h)."""


def device_name(vni: int, family: int = 4) -> str:
    """flannel's names, so that its devices can be taken over and its users find ours. `family` is the underlay's."""
    return f"flannel.{vni}" if family == 4 else f"flannel-v6.{vni}"


def incompatibility(spec: DeviceSpec, found: FoundDevice) -> str | None:
    """Why `found` cannot become `spec` in place, None if it can.

    The kernel changes MAC, MTU, state, underlay interface and local address of a device in place (vxlan_changelink),
    and with them no entry on it.
    """
    if found.kind != "vxlan":
        return f"its kind is {found.kind or 'unknown'}, not vxlan"
    for what, want, have in (
        ("VNI", spec.vni, found.vni),
        ("UDP port", spec.port, found.port),
        ("learning", spec.learning, found.learning),
        ("group policy", spec.gbp, found.gbp),
    ):
        if want != have:
            return f"its {what} is {have}, not {want}"
    if len(spec.local) != len(found.local):
        # The kernel keeps the family that a device was made with.
        local = format_address(found.local) if found.local else "any"
        return f"its local address is {local}, not {format_address(spec.local)}"
    return None


def adjustments(spec: DeviceSpec, found: FoundDevice) -> tuple[str, ...]:
    """What is to be changed in place, as words for the log; empty if `found` is as wanted."""
    wanted = (
        ("mac", spec.mac == found.mac),
        ("mtu", spec.mtu == found.mtu),
        ("alias", found.alias == OWNER),
        ("link", spec.link == found.link),
        ("local", spec.local == found.local),
        ("address", set(found.addresses) == set(spec.addresses)),
        ("up", found.up),
    )
    return tuple(what for what, right in wanted if not right)


def tunnel_mtu(underlay_mtu: int, configured: int, family: int) -> int:
    """The MTU of a tunnel's device over an underlay of `family`: as configured, up to what the underlay carries."""
    most = underlay_mtu - OVERHEAD[family]
    return min(configured, most) if configured else most


def overlay_mtu(config: NetworkConfig, underlay: Underlay, *, tunnels: bool) -> int:
    """The MTU of this host's pods, in bytes: what all ways out of it carry. ValueError if that is too little."""
    configured = config.backend.mtu
    if tunnels:
        mtu = min(tunnel_mtu(underlay.mtu, configured, len(address)) for address in underlay.addresses)
    else:
        mtu = min(configured, underlay.mtu) if configured else underlay.mtu
    least = max(MIN_MTU[len(network.base)] for network in config.blocks)
    if mtu < least:
        raise ValueError(f"an underlay MTU of {underlay.mtu} leaves {mtu} bytes for the overlay, under {least}")
    return mtu


def derived_mac(*identity: str) -> bytes:
    """A MAC that is the same on every start of the same host: locally administered, unicast, from `identity`."""
    digest = hashlib.sha256("\0".join(("overlay-agent VTEP", *identity)).encode()).digest()
    return bytes((digest[0] & 0xFC | 0x02,)) + digest[1:6]
