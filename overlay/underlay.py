"""The underlay edge: which interface and addresses of this host carry the overlay, and when that is to be asked anew.

Owns the choice, in flannel's order of precedence: interfaces named (`--iface`, each a name or an address), then those
that match (`--iface-regex`, against names and addresses), then the one the route to an address leaves by
(`--iface-can-reach`), then the one that has the public address, then the one of the default route. Only reads.
"""

import os
import re
import select
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from overlay import bpf, iproute, netlink, sockets
from overlay.device import Underlay
from subnet_lease.model import Prefix, format_address, pack_address

if TYPE_CHECKING:
    from pyroute2 import IPRoute

FAMILIES = {socket.AF_INET: 4, socket.AF_INET6: 16}
"""Lengths of packed addresses by address family."""

RT_SCOPE_LINK, RT_SCOPE_HOST = 253, 254
RT_TABLE_MAIN = 254

_UNFIT = 0x01 | 0x08 | 0x20 | 0x40
"""IFA_F_TEMPORARY, _DADFAILED, _DEPRECATED, _TENTATIVE: an IPv6 address that is not, or will not stay, the host's.
(IPv4 has the first bit too, for secondary addresses, which are as good as any.)"""

_OUR_DEVICES = ("flannel.", "flannel-v6.")

_GROUPS = (1, 5, 9, 7, 11)  # RTNLGRP_LINK, _IPV4_IFADDR, _IPV6_IFADDR, _IPV4_ROUTE, _IPV6_ROUTE
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_NEWROUTE = 24
_KIND_AND_INDEX = struct.Struct("=4xH14xi")  # nlmsg_type, and the interface of an ifinfomsg or ifaddrmsg


class NoUnderlay(Exception):
    """No interface fits the options; the text says which option and what there is to choose from."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How the operator wants the interface chosen: see the module. Addresses are packed."""

    ifaces: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    can_reach: str | None = None
    public_addresses: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class _Link:
    name: str
    index: int
    mtu: int
    addresses: tuple[Prefix, ...]
    """Each with its host bits: the address and the length of its link's block."""


def find_underlay(wish: Wish, present: Underlay | None = None) -> Underlay:
    """The interface that carries the overlay, and its addresses; NoUnderlay if there is none that fits.

    Of several addresses that would do, one that is in `present` is kept.
    """
    IPRoute, _ = iproute.load()
    with IPRoute() as route:
        links = _links(route)
        candidates = _candidates(route, links, wish)
        chosen = next(candidates, None)
        if chosen is None:
            raise NoUnderlay(_nothing(wish, links))
        link, named, why = chosen
        others = (f"{other.name} ({reason})" for other, _, reason in candidates if other.index != link.index)
        runner_up = next(others, "")
    wanted = [*named, *wish.public_addresses, *(present.addresses if present else ())]
    own = [address.base for address in link.addresses]
    addresses = []
    for family in FAMILIES.values():
        fitting = [address for address in (*wanted, *own) if address in own and len(address) == family]
        addresses += fitting[:1]
    return Underlay(
        name=link.name,
        index=link.index,
        mtu=link.mtu,
        addresses=tuple(addresses),
        on_link=_blocks([link]),
        links=_blocks(links),
        why=why,
        runner_up=runner_up,
    )


def _candidates(route: "IPRoute", links: list[_Link], wish: Wish) -> Iterator[tuple[_Link, tuple[bytes, ...], str]]:
    """(link, addresses that were asked for, why) in order of precedence; a link may come more than once."""
    for wanted in wish.ifaces:
        for link in links:
            named = tuple(block.base for block in link.addresses if format_address(block.base) == wanted)
            if link.name == wanted or named:
                yield link, named, f"--iface {wanted}"
    for pattern in wish.regexes:
        for link in links:
            if any(re.search(pattern, text) for text in (link.name, *_texts(link))):
                yield link, (), f"--iface-regex {pattern}"
    if wish.ifaces or wish.regexes:
        return
    by_index = {link.index: link for link in links}
    if wish.can_reach:
        index, source = _route_to(route, wish.can_reach)
        if index in by_index:
            yield by_index[index], source, f"--iface-can-reach {wish.can_reach}"
        return
    for address in wish.public_addresses:
        for link in links:
            if any(block.base == address for block in link.addresses):
                yield link, (), f"it has the public address {format_address(address)}"
    for index in _default_links(route):
        if index in by_index:
            yield by_index[index], (), "it has the default route"


def _nothing(wish: Wish, links: list[_Link]) -> str:
    """What to say where no interface fits."""
    there_is = ", ".join(f"{link.name} ({', '.join(_texts(link))})" for link in links) or "none"
    options = [f"--iface {name}" for name in wish.ifaces] + [f"--iface-regex {pattern}" for pattern in wish.regexes]
    if options:
        return f"no interface with an address fits {', '.join(options)}; there is {there_is}"
    if wish.can_reach:
        return (
            f"--iface-can-reach {wish.can_reach}: this host has no route there by an interface with an address; "
            f"there is {there_is}"
        )
    return f"this host has no default route to tell the underlay by: use --iface. There is {there_is}"


def _texts(link: _Link) -> list[str]:
    return [format_address(block.base) for block in link.addresses]


def _blocks(links: Iterable[_Link]) -> tuple[Prefix, ...]:
    """The blocks that these links connect to."""
    return tuple(sorted({p.network(p.length) for link in links for p in link.addresses if p.length < 8 * len(p.base)}))


def _links(route: "IPRoute") -> list[_Link]:
    """All interfaces but ours that have an address that others can reach, in the order of their indexes.

    Links are read one by one: a host has hundreds for its pods, and few with an address.
    """
    addresses: dict[int, list[Prefix]] = {}
    for entry in route.get_addr():
        text = entry.get_attr("IFA_LOCAL") or entry.get_attr("IFA_ADDRESS")
        flags = entry.get_attr("IFA_FLAGS") or entry["flags"]
        unfit = entry["family"] == socket.AF_INET6 and flags & _UNFIT
        if text and entry["scope"] not in (RT_SCOPE_HOST, RT_SCOPE_LINK) and not unfit:
            addresses.setdefault(entry["index"], []).append(Prefix(pack_address(text), entry["prefixlen"]))
    links = []
    _, NetlinkError = iproute.load()
    for index, own in sorted(addresses.items()):
        try:
            link = route.link("get", index=index)[0]
        except NetlinkError:
            continue  # It has gone since.
        name = link.get_attr("IFLA_IFNAME")
        if not name.startswith(_OUR_DEVICES):
            links.append(_Link(name, index, link.get_attr("IFLA_MTU"), tuple(own)))
    return links


def _route_to(route: "IPRoute", target: str) -> tuple[int, tuple[bytes, ...]]:
    """(interface, source address if there is one) by which the kernel sends to `target`; 0 if it has no route."""
    _, NetlinkError = iproute.load()
    try:
        found = route.route("get", dst=target)[0]
    except NetlinkError:
        return 0, ()
    source = found.get_attr("RTA_PREFSRC")
    return found.get_attr("RTA_OIF") or 0, (pack_address(source),) if source else ()


def _default_links(route: "IPRoute") -> list[int]:
    """Interfaces of the main table's default routes: IPv4 before IPv6, each by its metric."""
    found: list[tuple[int, int, int]] = []
    for family in FAMILIES:
        for entry in route.get_default_routes(family=family):
            # pyroute2 0.9.7 takes a table and ignores it; another table's default is for what some rule sends there.
            if entry.get_attr("RTA_TABLE") != RT_TABLE_MAIN:
                continue
            hops: list[Any] = entry.get_attr("RTA_MULTIPATH") or []
            index = entry.get_attr("RTA_OIF") or (hops[0]["oif"] if hops else None)
            if index is not None:
                found.append((family, entry.get_attr("RTA_PRIORITY") or 0, index))
    return [index for _, _, index in sorted(found)]


class Monitor:
    """Hears of changes to links, addresses and default routes. For one thread, but for `interrupt`."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        _without_other_routes(self._socket)
        self._socket.bind((0, 0))
        for group in _GROUPS:
            self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        self._socket.setblocking(False)
        self._interrupt = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def close(self) -> None:
        """Close its descriptors."""
        self._socket.close()
        os.close(self._interrupt)

    def interrupt(self) -> None:
        """End the present or next `wait`. From any thread."""
        os.eventfd_write(self._interrupt, 1)

    def wait(self, seconds: float | None) -> set[int]:
        """The interfaces that something happened to within `seconds`, as soon as it does.

        0 stands for what is no interface: a default route, an interruption, or notifications that were lost.
        """
        awaited: list[socket.socket | int] = [self._socket, self._interrupt]
        readable = select.select(awaited, [], [], seconds)[0]
        concerned: set[int] = set()
        if self._interrupt in readable:
            os.eventfd_read(self._interrupt)
            concerned.add(0)
        for buffer in netlink.queued(self._socket):
            kind, index = _KIND_AND_INDEX.unpack_from(buffer) if buffer else (0, 0)
            concerned.add(0 if kind >= _NEWROUTE else index)
        return concerned


def _without_other_routes(sock: socket.socket) -> None:
    """Have the kernel drop notifications of routes other than default ones: there are thousands of ours.

    By nlmsg_type, at 4, and rtm_dst_len, at 17. The header is in the host's byte order.
    """
    swapped = int.from_bytes(struct.pack("=H", _NEWROUTE), "big")
    other = int.from_bytes(struct.pack("=H", _NEWROUTE + 1), "big")
    program = bpf.program(
        ("", bpf.LD_HALF, 4, "", ""),
        ("", bpf.JEQ, swapped, "route", ""),
        ("", bpf.JEQ, other, "route", "take"),
        ("route", bpf.LD_BYTE, 17, "", ""),
        ("", bpf.JEQ, 0, "take", "drop"),
        bpf.TAKE,
        bpf.DROP,
    )
    sockets.attach(sock, program)
