"""The entries this agent programs, as values, and what can be done to them.

Each entry is keyed as the kernel keys it: FDB by MAC, neighbour by address, nexthop by id, route by destination. The
key is the first field, so that `entry[0]` is it for all of them.
Keys of different kinds never compare equal (6 bytes; 4 or 16 bytes; a number; a `Prefix`), so one mapping holds all.

Named tuples, because they are made by the ten thousand: a frozen dataclass takes four times as long to make.
An entry read from the kernel that carries something we never set decodes to a value unequal to any we want: that is
how alterations are seen. Nothing here knows of netlink's encoding or of leases.
"""

from typing import NamedTuple

from subnet_lease.model import Prefix, format_address, format_mac

PROTOCOL = 111
"""rtm_protocol of our routes and nexthop objects: the mark by which a restarted agent knows its own."""

PROTOCOL_BOOT = 3
"""What flanneld, and `ip route add` by hand, leave in rtm_protocol."""

NEXTHOP_BASE = 0x6F000000
"""Nexthop ids of ours are this plus the offset of the subnet's base address in Network."""

NEXTHOP_SPAN = 1 << 24
"""How many ids we claim: one for each address of a /8."""

PERMANENT = 0x80
"""NUD_PERMANENT, the state of all FDB and neighbour entries we make."""

UNICAST = 1
"""RTN_UNICAST, the type of all routes we make."""


class Fdb(NamedTuple):
    """Frames for `mac` leave the tunnel towards `remote` (packed underlay address).

    `remote` is empty where the kernel's entry is not one plain remote: several, or one with a port or VNI of its own.
    """

    mac: bytes
    remote: bytes
    state: int = PERMANENT

    def __str__(self) -> str:
        return f"fdb {format_mac(self.mac)} dst {format_address(self.remote) if self.remote else 'several'}"


class Neighbour(NamedTuple):
    """`address` (packed, in the overlay) is at `mac` on our device. `state` is the kernel's NUD_* bits."""

    address: bytes
    mac: bytes
    state: int = PERMANENT

    def __str__(self) -> str:
        return f"neighbour {format_address(self.address)} lladdr {format_mac(self.mac)}"


class NextHop(NamedTuple):
    """A nexthop object: `gateway` (packed), taken to be on the link of `device` (interface index)."""

    id: int
    gateway: bytes
    device: int
    protocol: int = PROTOCOL

    def __str__(self) -> str:
        return f"nexthop {self.id} via {format_address(self.gateway) if self.gateway else 'nothing'}"


class Route(NamedTuple):
    """A route of the main table with metric 0: through a nexthop object, or a `gateway` on the link of `device`.

    `nexthop` 0 and an empty `gateway` stand for absent; both are where the kernel's route has several gateways, or a
    source address, metrics or an encapsulation. `kind` is the kernel's RTN_*.
    """

    destination: Prefix
    nexthop: int = 0
    gateway: bytes = b""
    device: int = 0
    protocol: int = PROTOCOL
    kind: int = UNICAST

    def __str__(self) -> str:
        if self.nexthop:
            return f"route {self.destination} nhid {self.nexthop}"
        via = f" via {format_address(self.gateway)}" if self.gateway else ""
        return f"route {self.destination}{via} protocol {self.protocol}"


Entry = Fdb | Neighbour | NextHop | Route
Key = bytes | int | Prefix

BUILD_ORDER: tuple[type[Entry], ...] = (Fdb, Neighbour, NextHop, Route)
"""How entries build on one another: a route stands on all before it."""


class Put(NamedTuple):
    """Create `entry` or make the one under its key equal to it. With `afresh`, what stands there is removed first."""

    entry: Entry
    afresh: bool = False


class Drop(NamedTuple):
    """Remove `entry`; its absence is success."""

    entry: Entry


Op = Put | Drop


class Refusal(NamedTuple):
    """The kernel refused the operation with `errno`."""

    op: Op
    errno: int


class Gone(NamedTuple):
    """The kernel says that the entry under the key of `entry` was removed."""

    entry: Entry


Sight = Entry | Gone
"""One thing seen in the kernel: an entry as it now is, or its removal."""
