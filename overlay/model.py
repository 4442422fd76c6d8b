"""The entries this agent programs, as values, and what can be done to them.

Each entry is keyed as the kernel keys it: a host the guard knows by its address, FDB by device and MAC, neighbour by
device and address, nexthop by id, route by destination. The key is the first field, so that `entry[0]` is it for all of
them. Keys of different kinds never compare equal (bytes; a `Place` with 6 bytes; one with 4 or 16; a number; a
`Prefix`), so one mapping holds all.

Named tuples, because they are made by the ten thousand: a frozen dataclass takes four times as long to make.
An entry read from the kernel that carries something we never set decodes to a value unequal to any we want: that is
how alterations are seen. Nothing here knows of netlink's encoding or of leases.
"""

from collections.abc import Mapping
from types import MappingProxyType
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


Place = tuple[int, bytes]
"""An interface index, and a MAC or packed address on that device."""


class Guard(NamedTuple):
    """The packed underlay `address` is a host's: tunnel packets from there are let in."""

    address: bytes

    def __str__(self) -> str:
        return f"guard {format_address(self.address)}"


class Fdb(NamedTuple):
    """Frames for the MAC in `at` leave the tunnel towards `remote` (packed underlay address).

    `remote` is empty where the kernel's entry is not one plain remote: several, or one with a port or VNI of its own.
    """

    at: Place
    remote: bytes
    state: int = PERMANENT

    def __str__(self) -> str:
        return f"fdb {format_mac(self.at[1])} dst {format_address(self.remote) if self.remote else 'several'}"


class Neighbour(NamedTuple):
    """The address in `at` (in the overlay) is at `mac`. `state` is the kernel's NUD_* bits."""

    at: Place
    mac: bytes
    state: int = PERMANENT

    def __str__(self) -> str:
        return f"neighbour {format_address(self.at[1])} lladdr {format_mac(self.mac)}"


class NextHop(NamedTuple):
    """A nexthop object: `gateway` (packed), taken to be on the link of `device` (interface index)."""

    id: int
    gateway: bytes
    device: int
    protocol: int = PROTOCOL

    def __str__(self) -> str:
        return f"nexthop {self.id} via {format_address(self.gateway) if self.gateway else 'nothing'}"


class Route(NamedTuple):
    """A route of the main table with the usual metric: through a nexthop object, or a `gateway` on `device`'s link.

    `nexthop` 0 and an empty `gateway` stand for absent; both are where the kernel's route has several gateways, or a
    source address, other metrics or an encapsulation. `kind` is the kernel's RTN_*. `mtu` is the largest packet that
    the far end takes, in bytes, 0 where that is what the device takes.
    """

    destination: Prefix
    nexthop: int = 0
    gateway: bytes = b""
    device: int = 0
    protocol: int = PROTOCOL
    kind: int = UNICAST
    mtu: int = 0

    def __str__(self) -> str:
        mtu = f" mtu {self.mtu}" if self.mtu else ""
        if self.nexthop:
            return f"route {self.destination} nhid {self.nexthop}{mtu}"
        via = f" via {format_address(self.gateway)}" if self.gateway else ""
        return f"route {self.destination}{via} protocol {self.protocol}{mtu}"


Entry = Guard | Fdb | Neighbour | NextHop | Route
Key = bytes | Place | int | Prefix

BUILD_ORDER: tuple[type[Entry], ...] = (Guard, Fdb, Neighbour, NextHop, Route)
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


class Seen(NamedTuple):
    """What the monitors brought since they were last read. `lost`: some of it, so that only a dump tells the truth.

    `device_changed`: a device of ours, its addresses or state, or the underlay's link is not as it was; entries may
    have gone without notice. `firewall_changed`: the same of our rules; `altered_by` names the programs that have
    changed them. `by` says of keys who caused the last sight of them, where the kernel does: a netlink port id, or the
    names of programs.
    """

    sights: tuple[Sight, ...] = ()
    lost: bool = False
    device_changed: bool = False
    firewall_changed: bool = False
    altered_by: tuple[str, ...] = ()
    by: Mapping[Key, int | str] = MappingProxyType({})
