"""A packet of the overlay as a value: its headers, whose it is, and what is off about it; as a line, and as JSON.

`dissect` makes these out of frames. Nothing here knows bytes, sockets or files.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from overlay.roster import Member
from subnet_lease.model import format_address, format_mac

REMARKS: Mapping[str, str] = {
    "unknown-vtep": "an outer address that no lease has",
    "wrong-vni": "a VNI that is not the network's",
    "no-vni-flag": "the flag that says that the VNI is valid is missing: receivers drop it",
    "reserved-bits": "bits that must be zero are not",
    "wrong-mac": "an inner MAC that is not the one in the lease of that host",
    "foreign-source": "an inner source outside the subnets of the host that sends it",
    "foreign-destination": "an inner destination outside the subnets of the host it is sent to",
    "fragment": "the outer or the inner packet is a fragment",
    "checksum": "a checksum is wrong",
    "truncated": "a header promises more bytes than there are",
    "nested": "a VXLAN packet inside of the VXLAN packet",
    "vlan": "a VLAN tag inside",
    "arp": "ARP inside: there is nobody to ask, the neighbours are written by the agents",
    "nd": "neighbour discovery inside: as ARP",
    "multicast": "multicast inside: no peer is told of groups",
    "broadcast": "a broadcast inside",
    "untunnelled": "a packet between pods on the underlay that ought to be in a tunnel",
}
"""What can be off: kind -> what it means."""

DOUBTS = frozenset(("unknown-vtep", "wrong-vni", "wrong-mac", "foreign-source", "foreign-destination"))
"""Kinds that newer leases may explain."""


class Remark(NamedTuple):
    """One thing that is off: a key of `REMARKS`, and the particulars."""

    kind: str
    text: str


class Ethernet(NamedTuple):
    """Source and destination MAC, as text."""

    src: str
    dst: str


class Fragment(NamedTuple):
    """The packet's number, the offset of this part in bytes, and whether more follow."""

    ident: int
    offset: int
    more: bool


class Ip(NamedTuple):
    """An IP header and the ports behind it; addresses are packed, `length` is the packet's in bytes.

    `protocol` is `tcp`, `udp`, `icmp` (over either family), `nd`, or the number as text. No ports: not TCP or UDP, or a
    later fragment. `flags` are TCP's, in the usual letters; `what` says the rest for people.
    """

    src: bytes
    dst: bytes
    ttl: int
    length: int
    protocol: str
    src_port: int | None = None
    dst_port: int | None = None
    flags: str | None = None
    fragment: Fragment | None = None
    what: str = ""

    def __str__(self) -> str:
        return f"{format_address(self.src)} > {format_address(self.dst)}  {self.what}"


class Packet(NamedTuple):
    """A frame, decoded. `outer` is None if it is not in a tunnel; then `inner` and `inner_ethernet` are all it has.

    `inner` is None where there is no IP header; `protocol` is the inner one, `what` the innermost in words. `vni` is
    None where there is none, in a fragment for one. `sender` and `receiver` are the hosts that it goes between.
    """

    length: int
    ethernet: Ethernet | None
    outer: Ip | None
    vni: int | None
    inner_ethernet: Ethernet | None
    inner: Ip | None
    protocol: str
    what: str
    sender: Member | None
    receiver: Member | None
    remarks: tuple[Remark, ...]

    @property
    def doubtful(self) -> bool:
        """Whether newer leases may explain what is off."""
        return any(remark.kind in DOUBTS for remark in self.remarks)

    @property
    def ways(self) -> str:
        """From which host to which, with their outer addresses; empty if neither is known."""
        if self.outer is not None:
            src, dst = format_address(self.outer.src), format_address(self.outer.dst)
            return f"{_called(self.sender, src)} > {_called(self.receiver, dst)}"
        if self.sender is None and self.receiver is None:
            return ""
        return f"{self.sender or '?'} > {self.receiver or '?'}"

    def __str__(self) -> str:
        """One line, without the time."""
        number = f"vni {self.vni}" if self.vni is not None else ""
        parts = [part for part in (self.ways, number, self.what) if part]
        return "  ".join(parts + [f"! {remark.text}" for remark in self.remarks])

    @property
    def headers(self) -> str:
        """What the line leaves out: Ethernet addresses, outer ports, TTLs, and the leases of both hosts."""
        parts = []
        if self.outer is not None:
            ports = f"{self.outer.src_port} > {self.outer.dst_port}"
            below = f", {_ethernet(self.ethernet)}" if self.ethernet else ""
            parts.append(f"outer UDP {ports}, TTL {self.outer.ttl}{below}")
        if self.inner_ethernet is not None:
            ttl = f", TTL {self.inner.ttl}" if self.inner is not None else ""
            parts.append(f"{'inner ' if self.outer is not None else ''}{_ethernet(self.inner_ethernet)}{ttl}")
        for member in (self.sender, self.receiver):
            if member is not None:
                parts.append(f"{member} has {' and '.join(map(str, member.subnets))}")
        return "; ".join(dict.fromkeys(parts))

    @property
    def fields(self) -> dict[str, Any]:
        """For JSON: the schema of docs/packet-harness.md, but for what only the capture knows."""
        return {
            "length": self.length,
            "ethernet": self.ethernet._asdict() if self.ethernet else None,
            "outer": _ip_fields(self.outer),
            "vni": self.vni,
            "from": _member_fields(self.sender),
            "to": _member_fields(self.receiver),
            "inner_ethernet": self.inner_ethernet._asdict() if self.inner_ethernet else None,
            "inner": _ip_fields(self.inner),
            "protocol": self.protocol,
            "what": self.what,
            "remarks": [remark._asdict() for remark in self.remarks],
        }


def _called(member: Member | None, address: str) -> str:
    return f"{member.name and member} {address}".strip() if member is not None else address


def _ethernet(macs: Ethernet) -> str:
    return f"Ethernet {macs.src} > {macs.dst}"


def _ip_fields(header: Ip | None) -> dict[str, Any] | None:
    if header is None:
        return None
    return {
        "src": format_address(header.src),
        "dst": format_address(header.dst),
        "ttl": header.ttl,
        "length": header.length,
        "protocol": header.protocol,
        "src_port": header.src_port,
        "dst_port": header.dst_port,
        "flags": header.flags,
        "fragment": header.fragment._asdict() if header.fragment else None,
    }


def _member_fields(member: Member | None) -> dict[str, Any] | None:
    if member is None:
        return None
    return {
        "node_name": member.name or None,
        "underlay_ips": list(map(format_address, member.addresses)),
        "vtep_macs": list(map(format_mac, member.macs.values())),
        "subnets": list(map(str, member.subnets)),
    }
