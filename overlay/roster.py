"""Who is who in the overlay, as far as leases tell: hosts by their underlay addresses, by their names, and by the
addresses of their pods.

A value made from a network configuration and its leases. What it knows nothing of is None, never an error.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

from subnet_lease.model import LeaseAttrs, NetworkConfig, Prefix, format_address, format_subnets, pack_address

DEFAULT_PORT = 8472
"""Linux's, and flannel's, for VXLAN; RFC 7348 has 4789."""

MAX_NAME = 24
"""Columns that a host's name may take."""

_TOLD = 8
"""How many hosts an error lists."""


class Member(NamedTuple):
    """A host: its name, empty if it has given none that can be printed; its packed underlay addresses, IPv4 first; the
    MACs of its tunnel ends by the length of the underlay address; its pods' subnets.
    """

    name: str
    addresses: tuple[bytes, ...]
    macs: Mapping[int, bytes]
    subnets: tuple[Prefix, ...]

    def __str__(self) -> str:
        if self.name:
            return self.name if len(self.name) <= MAX_NAME else self.name[: MAX_NAME - 2] + ".."
        return format_address(self.addresses[0]) if self.addresses else format_subnets(self.subnets)

    @property
    def about(self) -> str:
        """Name, address and subnets, for a message."""
        known = (*([self.name] if self.name else []), *map(format_address, self.addresses), *map(str, self.subnets))
        return f"{known[0]} ({', '.join(known[1:])})" if known[1:] else known[0]


class Target(NamedTuple):
    """What somebody wants to see the packets of: a host, or an address. `underlay` holds packed addresses of hosts;
    `pods` blocks of pods' addresses, which for one address has all bits.
    """

    underlay: frozenset[bytes]
    pods: tuple[Prefix, ...]


class UnknownTarget(LookupError):
    """There is no such host or pod; the text says what there is."""


@dataclass(frozen=True)
class Roster:
    """The hosts, and what the network's configuration says of a packet. All defaults: nothing is known.

    `vni` is None where it is not known, or where there are no tunnels. `blocks` are the overlay's networks; `direct`:
    whether packets between pods may pass the underlay without a tunnel.
    """

    members: tuple[Member, ...] = ()
    port: int = DEFAULT_PORT
    vni: int | None = None
    gbp: bool = False
    blocks: tuple[Prefix, ...] = ()
    direct: bool = False

    @classmethod
    def of(cls, config: NetworkConfig, leases: Iterable[tuple[tuple[Prefix, ...], LeaseAttrs]]) -> Self:
        """From the leases that agents accept: subnets and what the lease says. A host may have several."""
        members: dict[object, Member] = {}
        for subnets, attrs in leases:
            identity = attrs.underlay_ip or subnets
            if known := members.get(identity):
                members[identity] = known._replace(subnets=known.subnets + subnets)
                continue
            addresses = tuple(address for address in (attrs.public_ip, attrs.public_ip6) if address is not None)
            ends = ((4, attrs.vtep), (16, attrs.vtep6))
            macs = {family: vtep.mac for family, vtep in ends if vtep is not None}
            members[identity] = Member(_name(attrs), addresses, macs, subnets)
        backend = config.backend
        tunnels = backend.type == "vxlan"
        return cls(
            members=tuple(members.values()),
            port=backend.port,
            vni=backend.vni if tunnels else None,
            gbp=backend.gbp,
            blocks=config.blocks,
            direct=not tunnels or backend.direct_routing,
        )

    def host(self, address: bytes) -> Member | None:
        """Whose this underlay address is."""
        return self._hosts.get(address)

    def owner(self, address: bytes) -> Member | None:
        """In whose subnet this address lies."""
        number, bits = int.from_bytes(address, "big"), 8 * len(address)
        for length in self._lengths.get(len(address), ()):
            base = (number >> bits - length << bits - length).to_bytes(len(address), "big")
            if found := self._owners.get((base, length)):
                return found
        return None

    def inside(self, address: bytes) -> bool:
        """Whether the address is one of the overlay's."""
        return any(block.holds(address) for block in self.blocks)

    def target(self, text: str) -> Target:
        """What is meant by a node name, an underlay address, a subnet or a pod's address; UnknownTarget if nothing.

        Where no host is known, any address is taken for what it may be.
        """
        named = [member for member in self.members if text and text in (member.name, *map(str, member.subnets))]
        if len(named) > 1:
            raise UnknownTarget(f"{len(named)} hosts are called {text}: " + ", ".join(each.about for each in named))
        if named:
            return Target(frozenset(named[0].addresses), named[0].subnets)
        try:
            address = pack_address(text)
        except ValueError:
            raise UnknownTarget(f"there is no host {text[:64]!r}; {self._there_is}") from None
        one = Prefix(address, 8 * len(address))
        if not self.members:
            return Target(frozenset((address,)), (one,))
        if found := self.host(address):
            return Target(frozenset(found.addresses), found.subnets)
        if self.owner(address) is None:
            raise UnknownTarget(f"{text} is no host's address, and in no host's subnet; {self._there_is}")
        return Target(frozenset(), (one,))

    @property
    def _there_is(self) -> str:
        if not self.members:
            return "no lease is known to tell it by, so give an address"
        told = [member.about for member in self.members[:_TOLD]]
        more = len(self.members) - len(told)
        return "there is " + ", ".join(told) + (f", and {more} more: see overlay-agent leases" if more else "")

    @cached_property
    def _hosts(self) -> dict[bytes, Member]:
        return {address: member for member in self.members for address in member.addresses}

    @cached_property
    def _owners(self) -> dict[tuple[bytes, int], Member]:
        return {(subnet.base, subnet.length): member for member in self.members for subnet in member.subnets}

    @cached_property
    def _lengths(self) -> dict[int, set[int]]:
        lengths: dict[int, set[int]] = {}
        for base, length in self._owners:
            lengths.setdefault(len(base), set()).add(length)
        return lengths


def _name(attrs: LeaseAttrs) -> str:
    """Nothing from etcd reaches a terminal but printable ASCII: whoever can write a key could have it do things."""
    name = attrs.node_name
    return name if name.isascii() and name.isprintable() else ""
