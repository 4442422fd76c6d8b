"""The VXLAN device as a value: what we want of it, what was found, and whether one can become the other.

Owns the rules of adoption (a device that fits is kept, with its entries and flows; one that does not is made anew) and
the MTU arithmetic. No netlink here: `kernel` reads and makes devices.
"""

import hashlib
from dataclasses import dataclass

from subnet_lease.model import Lease, NetworkConfig, Prefix, format_address

OWNER = "overlay-agent"
"""ifalias of devices we made or adopted: the mark by which `cleanup` knows them, and by which people do."""

OVERHEAD_V4 = 50
"""Bytes that VXLAN over IPv4 adds: outer Ethernet is not counted, inner is: 20 + 8 + 8 + 14 (RFC 7348 section 5)."""

MIN_MTU = 576
"""Below this no IPv4 host need accept a datagram whole (RFC 791)."""


@dataclass(frozen=True, slots=True)
class Underlay:
    """The interface that carries the tunnel: name, index, packed address of this host on it, MTU in bytes.

    `links` are the blocks that are directly connected to this host. `why` tells how the interface was chosen.
    """

    name: str
    index: int
    address: bytes
    mtu: int
    links: tuple[Prefix, ...]
    why: str


def occupied_links(underlay: Underlay, network: Prefix, own: Prefix | None) -> tuple[Prefix, ...]:
    """The blocks inside Network that a link of this host uses, but for those of its pods, inside its `own` subnet.

    No lease may take them: its route would replace the link's.
    """
    return tuple(link for link in underlay.links if network.covers(link) and not (own and own.covers(link)))


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
    address: Prefix
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


def device_name(vni: int) -> str:
    """flannel's name, so that its device can be taken over and its users find ours."""
    return f"flannel.{vni}"


def device_spec(config: NetworkConfig, lease: Lease, underlay: Underlay) -> DeviceSpec:
    """The device that carries `lease`; ValueError if the underlay's MTU is too small for an overlay."""
    vtep = lease.attrs.vtep
    assert vtep is not None, "our own lease has a VTEP"
    return DeviceSpec(
        name=device_name(config.backend.vni),
        vni=config.backend.vni,
        port=config.backend.port,
        link=underlay.index,
        local=underlay.address,
        mac=vtep.mac,
        mtu=overlay_mtu(underlay.mtu, config.backend.mtu),
        address=Prefix(lease.subnet.base, 32),
        learning=config.backend.learning,
        gbp=config.backend.gbp,
    )


def incompatibility(spec: DeviceSpec, found: FoundDevice) -> str | None:
    """Why `found` cannot become `spec` in place, None if it can. MAC, MTU, addresses and state can change."""
    if found.kind != "vxlan":
        return f"its kind is {found.kind or 'unknown'}, not vxlan"
    for what, want, have in (
        ("VNI", spec.vni, found.vni),
        ("UDP port", spec.port, found.port),
        ("underlay interface", spec.link, found.link),
        ("learning", spec.learning, found.learning),
        ("group policy", spec.gbp, found.gbp),
    ):
        if want != have:
            return f"its {what} is {have}, not {want}"
    if spec.local != found.local:
        local = format_address(found.local) if found.local else "any"
        return f"its local address is {local}, not {format_address(spec.local)}"
    return None


def adjustments(spec: DeviceSpec, found: FoundDevice) -> tuple[str, ...]:
    """What is to be changed in place, as words for the log; empty if `found` is as wanted."""
    wanted = (
        ("mac", spec.mac == found.mac),
        ("mtu", spec.mtu == found.mtu),
        ("alias", found.alias == OWNER),
        ("address", found.addresses == (spec.address,)),
        ("up", found.up),
    )
    return tuple(what for what, right in wanted if not right)


def overlay_mtu(underlay_mtu: int, configured: int) -> int:
    """The device's MTU: the configured one, up to what the underlay can carry; ValueError if that is too little."""
    most = underlay_mtu - OVERHEAD_V4
    mtu = min(configured, most) if configured else most
    if mtu < MIN_MTU:
        raise ValueError(f"an underlay MTU of {underlay_mtu} leaves {most} bytes for the overlay, under {MIN_MTU}")
    return mtu


def derived_mac(*identity: str) -> bytes:
    """A MAC that is the same on every start of the same host: locally administered, unicast, from `identity`."""
    digest = hashlib.sha256("\0".join(("overlay-agent VTEP", *identity)).encode()).digest()
    return bytes((digest[0] & 0xFC | 0x02,)) + digest[1:6]
