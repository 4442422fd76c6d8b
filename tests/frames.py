"""Frames of an overlay, byte by byte, and the hosts they go between: for tests that send none of them."""

from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet as Layer
from scapy.packet import Raw

from overlay.roster import Roster
from subnet_lease.model import LeaseAttrs, NetworkConfig, Prefix, Vtep, pack_address, pack_mac

MACS = {1: "02:00:00:00:00:01", 2: "02:00:00:00:00:02"}
MACS6 = {1: "02:00:00:00:06:01", 2: "02:00:00:00:06:02"}


def roster(backend: str = '{"Type":"vxlan"}') -> Roster:
    config = NetworkConfig.parse(
        b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":%s}' % backend.encode()
    )
    leases = []
    for n in (1, 2):
        attrs = LeaseAttrs(
            pack_address(f"192.168.0.{n}"),
            "vxlan",
            Vtep(1, pack_mac(MACS[n])),
            pack_address(f"fd30::{n}"),
            Vtep(1, pack_mac(MACS6[n])),
            node_name=f"h{n}",
        )
        leases.append(((Prefix.parse(f"10.5.{n}.0/24"), Prefix.parse(f"fd00:5:0:{n}::/64")), attrs))
    return Roster.of(config, leases)


KNOWN = roster()


def inner4(**fields: object) -> Layer:
    return IP(**{"src": "10.5.1.2", "dst": "10.5.2.2", **fields})


def inner6(**fields: object) -> Layer:
    return IPv6(**{"src": "fd00:5:0:1::2", "dst": "fd00:5:0:2::2", **fields})


def tunnel(
    inner: Layer | bytes,
    *,
    header: str = "08 00 00 00 00 00 01 00",
    outer: Layer | None = None,
    port: int = 8472,
    sport: int = 40000,
    src: str = MACS[1],
    dst: str = MACS[2],
) -> Layer:
    """The frame from h1 to h2 that carries a packet, by a VXLAN header byte for byte."""
    inside = inner if isinstance(inner, Ether | bytes) else Ether(src=src, dst=dst) / inner
    data = bytes.fromhex(header) + bytes(inside)
    outer = outer or IP(src="192.168.0.1", dst="192.168.0.2")
    return Ether(src="02:00:00:00:0e:01", dst="02:00:00:00:0e:02") / outer / UDP(sport=sport, dport=port) / Raw(data)


PING = inner4(ttl=63) / ICMP(id=7, seq=3) / Raw(b"x" * 56)
