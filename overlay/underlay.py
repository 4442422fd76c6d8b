"""The underlay edge: which interface and address of this host carry the tunnel.

Owns the choice, in flannel's order of precedence: interfaces named (`--iface`, each a name or an address), then those
that match (`--iface-regex`, against names and addresses), then the one the route to an address leaves by
(`--iface-can-reach`), then the one that has the public address, then the one of the default route. Only reads.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from overlay import iproute
from overlay.device import Underlay
from subnet_lease.model import Prefix, format_address, pack_address

if TYPE_CHECKING:
    from pyroute2 import IPRoute

AF_INET = 2
RT_SCOPE_HOST = 254
RT_TABLE_MAIN = 254


class NoUnderlay(Exception):
    """No interface fits the options; the text says which option and what there is to choose from."""


@dataclass(frozen=True, slots=True)
class _Link:
    name: str
    index: int
    mtu: int
    up: bool
    addresses: tuple[Prefix, ...]
    """Each with its host bits: the address and the length of its link's block."""


def find_underlay(
    ifaces: Sequence[str] = (),
    regexes: Sequence[str] = (),
    can_reach: str | None = None,
    public_ip: bytes | None = None,
    *,
    vni_device: str,
) -> Underlay:
    """The interface that carries the tunnel. NoUnderlay if there is none that fits. `vni_device` is never it."""
    IPRoute, _ = iproute.load()
    with IPRoute() as route:
        links = [link for link in _links(route) if link.name != vni_device]
        link, address, why = _choose(route, links, ifaces, regexes, can_reach, public_ip)
    blocks = tuple(sorted({p.network(p.length) for each in links for p in each.addresses if p.length < 32}))
    return Underlay(link.name, link.index, address, link.mtu, blocks, why)


def _choose(
    route: "IPRoute",
    links: list[_Link],
    ifaces: Sequence[str],
    regexes: Sequence[str],
    can_reach: str | None,
    public_ip: bytes | None,
) -> tuple[_Link, bytes, str]:
    for wanted in ifaces:
        for link in links:
            for block in link.addresses:
                if wanted in (link.name, format_address(block.base)):
                    return link, _preferred(link, public_ip, wanted), f"--iface {wanted}"
    for pattern in regexes:
        for link in links:
            for block in link.addresses:
                if re.search(pattern, link.name) or re.search(pattern, format_address(block.base)):
                    return link, _preferred(link, public_ip), f"--iface-regex {pattern}"
    options = [f"--iface {name}" for name in ifaces] + [f"--iface-regex {pattern}" for pattern in regexes]
    if options:
        raise NoUnderlay(f"no interface with an IPv4 address fits {', '.join(options)}; there is {_listed(links)}")
    if can_reach:
        return _by_route(route, links, can_reach, f"--iface-can-reach {can_reach}")
    if public_ip:
        for link in links:
            if any(block.base == public_ip for block in link.addresses):
                return link, public_ip, f"it has --public-ip {format_address(public_ip)}"
    default = _default_link(route, links)
    if default is None:
        raise NoUnderlay(
            f"this host has no IPv4 default route to tell the underlay by: use --iface. There is {_listed(links)}"
        )
    return default, _preferred(default, public_ip), "it has the default route"


def _preferred(link: _Link, public_ip: bytes | None, wanted: str = "") -> bytes:
    """The address named, else the public one if it is on the link, else the link's first."""
    own = [block.base for block in link.addresses]
    for address in own:
        if format_address(address) == wanted:
            return address
    return public_ip if public_ip is not None and public_ip in own else own[0]


def _links(route: "IPRoute") -> Iterator[_Link]:
    """All interfaces that have an IPv4 address other than loopback's."""
    addresses: dict[int, list[Prefix]] = {}
    for entry in route.get_addr(family=AF_INET):
        local = entry.get_attr("IFA_LOCAL")
        if entry["scope"] != RT_SCOPE_HOST and local:
            addresses.setdefault(entry["index"], []).append(Prefix(pack_address(local), entry["prefixlen"]))
    for link in route.get_links():
        if link["index"] in addresses:
            yield _Link(
                link.get_attr("IFLA_IFNAME"),
                link["index"],
                link.get_attr("IFLA_MTU"),
                bool(link["flags"] & 1),
                tuple(addresses[link["index"]]),
            )


def _by_route(route: "IPRoute", links: list[_Link], target: str, why: str) -> tuple[_Link, bytes, str]:
    _, NetlinkError = iproute.load()
    try:
        found = route.route("get", dst=target)[0]
    except NetlinkError:
        raise NoUnderlay(f"{why}: this host has no route to {target}") from None
    index, source = found.get_attr("RTA_OIF"), found.get_attr("RTA_PREFSRC")
    for link in links:
        if link.index == index and source:
            return link, pack_address(source), why
    raise NoUnderlay(
        f"{why}: the route to {target} leaves by no interface that has an address; there is {_listed(links)}"
    )


def _default_link(route: "IPRoute", links: list[_Link]) -> _Link | None:
    """The link of the main table's default route with the lowest metric."""
    best: tuple[int, int] | None = None
    for entry in route.get_default_routes(family=AF_INET):
        # pyroute2 0.9.7 takes a table and ignores it; another table's default is for what some rule sends there.
        if entry.get_attr("RTA_TABLE") != RT_TABLE_MAIN:
            continue
        hops: list[Any] = entry.get_attr("RTA_MULTIPATH") or []
        index = entry.get_attr("RTA_OIF") or (hops[0]["oif"] if hops else None)
        metric = entry.get_attr("RTA_PRIORITY") or 0
        if index is not None and (best is None or metric < best[0]):
            best = metric, index
    return next((link for link in links if best is not None and link.index == best[1]), None)


def _listed(links: list[_Link]) -> str:
    names = [f"{link.name} ({', '.join(format_address(b.base) for b in link.addresses)})" for link in links]
    return ", ".join(names) or "none"
