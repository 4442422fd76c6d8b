"""The network of a lab as a value: the overlay's configuration, the underlay's links, who sits where, at which MTU.

Owns the addresses and the `ip` lines that wire hub and hosts. Makes nothing itself: see `cluster`.
"""

import dataclasses
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

FAMILIES: Mapping[str, tuple[int, ...]] = {"4": (4,), "6": (6,), "46": (4, 6)}
"""How people name address families -> the families."""

BACKENDS: Mapping[str, Mapping[str, Any]] = {
    "vxlan": {"Type": "vxlan"},
    "direct": {"Type": "vxlan", "DirectRouting": True},
    "host-gw": {"Type": "host-gw"},
}
"""How people name the ways to a peer -> the `Backend` of the network configuration."""


def network_config(overlay: str = "4", backend: str = "vxlan") -> dict[str, Any]:
    """The network configuration of an overlay of these families (a key of `FAMILIES`)."""
    config: dict[str, Any] = {}
    if 4 in FAMILIES[overlay]:
        config |= {"Network": "10.244.0.0/16"}
    else:
        config |= {"EnableIPv4": False}
    if 6 in FAMILIES[overlay]:
        config |= {"EnableIPv6": True, "IPv6Network": "fd00:244::/48"}
    return {**config, "Backend": dict(BACKENDS[backend])}


class Link(NamedTuple):
    """One link of the underlay: a bridge in the hub, its MAC, and the hub's address in each family."""

    bridge: str
    mac: str
    hub: Mapping[int, Interface]

    def address(self, number: int, family: int) -> Interface:
        """That of host `number` on it: 172.30.0.11 or fd30::11 for the first."""
        hub = self.hub[family]
        if family == 4:
            return ipaddress.ip_interface(f"{hub.ip + 9 + number}/{hub.network.prefixlen}")
        # The same digits to the eye.
        return ipaddress.ip_interface(f"{hub.network.network_address}{10 + number}/{hub.network.prefixlen}")


# Bridges have MACs of their own: one takes its ports' least, and a new port would make all ARP entries wrong.
LINKS = tuple(
    Link(bridge, mac, {family: ipaddress.ip_interface(text) for family, text in ((4, text4), (6, text6))})
    for bridge, mac, text4, text6 in (
        ("underlay0", "02:00:ac:1e:00:01", "172.30.0.1/16", "fd30::1/64"),
        ("underlay1", "02:00:ac:1f:00:01", "172.31.0.1/16", "fd31::1/64"),
    )
)
"""The first is every lab's; the second is for hosts beyond the router."""


@dataclass(frozen=True, slots=True)
class Topology:
    """What the hosts' underlay is like. Hosts go by their names, `h1` and so on.

    `underlay` names the address families that all hosts have, `underlays` those of hosts that differ. The hosts share
    one link but for those `beyond` a router, which the hub then is; they share a second. `bridged` hosts have their
    addresses on a bridge `br0` over their `eth0`, as hosts of virtual machines do.

    MTUs are in bytes: `mtu` for all hosts but those in `mtus`; `router_mtu` for the hub's own interfaces, between which
    packets from link to link pass. What exceeds the MTU of a bridge's port is lost without a word, as on a switch.
    """

    underlay: str = "4"
    underlays: Mapping[str, str] = field(default_factory=dict)
    beyond: tuple[str, ...] = ()
    bridged: tuple[str, ...] = ()
    mtu: int = 1500
    mtus: Mapping[str, int] = field(default_factory=dict)
    router_mtu: int = 1500

    @classmethod
    def decode(cls, saved: Mapping[str, Any]) -> Self:
        """The inverse of `encode`."""
        values: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in saved.items()}
        return cls(**values)

    def encode(self) -> dict[str, Any]:
        """What JSON can hold of it, which is all."""
        return dataclasses.asdict(self)

    @property
    def families(self) -> tuple[int, ...]:
        """Those that any host has."""
        return tuple(sorted({each for name in (self.underlay, *self.underlays.values()) for each in FAMILIES[name]}))

    @property
    def links(self) -> tuple[Link, ...]:
        """Those that there are."""
        return LINKS if self.beyond else LINKS[:1]

    def seat(self, name: str, number: int) -> "Seat":
        """Where the host of this name and number sits."""
        link = LINKS[name in self.beyond]
        families = FAMILIES[self.underlays.get(name, self.underlay)]
        return Seat(
            name=name,
            link=link,
            addresses={family: link.address(number, family) for family in families},
            # By it, a frame tells whose it is.
            mac=f"02:00:{ipaddress.IPv4Address(link.address(number, 4).ip).packed.hex(':')}",
            mtu=self.mtus.get(name, self.mtu),
            device="br0" if name in self.bridged else "eth0",
            even=self.router_mtu == self.mtu and not self.mtus,
        )

    def hub_lines(self) -> list[str]:
        """What makes the links, in the hub."""
        lines = ["link set lo up"]
        for link in self.links:
            lines.append(f"link add {link.bridge} address {link.mac} type bridge")
            lines += address_lines(link.bridge, {family: link.hub[family] for family in self.families})
            # Set by hand, it does not follow the ports' least.
            lines.append(f"link set {link.bridge} mtu {self.router_mtu} up")
        return lines

    def router_script(self) -> str:
        """What makes a router of the hub, for a shell in there."""
        return "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"


@dataclass(frozen=True, slots=True)
class Seat:
    """A host's place on the underlay: addresses by family, on `device`; `even` if all MTUs on the underlay are one."""

    name: str
    link: Link
    addresses: Mapping[int, Interface]
    mac: str
    mtu: int
    device: str
    even: bool

    def hub_lines(self, netns: str) -> list[str]:
        """What plugs the namespace `netns` in, in the hub."""
        return [
            f"link add {self.name} mtu {self.mtu} type veth "
            f"peer name eth0 mtu {self.mtu} address {self.mac} netns {netns}",
            f"link set {self.name} master {self.link.bridge} up",
        ]

    def host_lines(self, too_many: Iterable["Seat"]) -> list[str]:
        """What makes it reachable, in the host; the MACs of the seats that are `too_many` to ask are told it."""
        lines = ["link set lo up"]
        if not self.even:
            # Segments that are yet to be cut pass a veth whatever its MTU (is_skb_forwardable in net/core/dev.c), and
            # no real wire: they are cut here.
            lines.append("link set eth0 gso_max_segs 1")
        if self.device != "eth0":
            lines += [
                f"link add {self.device} address {self.mac} type bridge",
                f"link set eth0 master {self.device} up",
                f"link set {self.device} mtu {self.mtu}",
            ]
        lines += address_lines(self.device, self.addresses)
        lines += [f"link set {self.device} up", *self._default_routes()]
        for other in too_many:
            if other.link is self.link:
                common = self.addresses.keys() & other.addresses.keys()
                lines += [f"neigh add {other.addresses[f].ip} lladdr {other.mac} dev {self.device}" for f in common]
        return lines

    def renumbered(self, addresses: Mapping[int, Interface]) -> Self:
        """The same place with other addresses."""
        return dataclasses.replace(self, addresses=addresses)

    def renumber_lines(self) -> list[str]:
        """What gives a host that is up these addresses in place of those it has, and the routes that went with them."""
        flush = f"addr flush dev {self.device} scope global"
        return [flush, *address_lines(self.device, self.addresses), *self._default_routes()]

    def _default_routes(self) -> list[str]:
        return [f"route replace default via {self.link.hub[family].ip}" for family in self.addresses]


def address_lines(device: str, addresses: Mapping[int, Interface]) -> list[str]:
    """What gives a device addresses, by family, to be used at once; if it is down, as soon as it is up.

    For a second or two IPv6 would look whether somebody has them already. So it would for its own link-local address,
    without which it asks for no neighbour (ndisc_send_ns in net/ipv6/ndisc.c): that is made by hand, of the same last
    digits.
    """
    lines = [f"addr replace {address} dev {device}" for family, address in addresses.items() if family == 4]
    if (address := addresses.get(6)) is not None:
        digits = str(address.ip).rpartition(":")[2]
        lines += [
            f"link set {device} addrgenmode none",
            f"addr replace fe80::{digits}/64 dev {device} nodad",
            f"addr replace {address} dev {device} nodad",
        ]
    return lines
