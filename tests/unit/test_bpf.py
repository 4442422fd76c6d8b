"""What the kernel lets through: its own interpreter runs the program on frames that scapy made."""

import ctypes
import socket
import struct

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from overlay.bpf import INSTRUCTION, tunnel_filter
from subnet_lease.model import Prefix

SO_ATTACH_FILTER = 26
BLOCKS = (Prefix.parse("10.5.0.0/16"), Prefix.parse("fd00:5::/44"))


def passes(program: bytes, frame: Packet | bytes) -> bool:
    """A filter on a Unix datagram socket sees the datagram as one on a packet socket sees the frame."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        code = ctypes.create_string_buffer(program, len(program))
        attached = struct.pack("HP", len(program) // INSTRUCTION.size, ctypes.addressof(code))
        theirs.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, attached)
        ours.send(bytes(frame))
        theirs.setblocking(False)
        try:
            return theirs.recv(65536) == bytes(frame)
        except BlockingIOError:
            return False


TUNNELLED = [
    Ether() / IP() / UDP(dport=8472),
    Ether() / IP(options=b"\1\1\1\1") / UDP(dport=8472),
    Ether() / IP(flags="MF") / UDP(dport=8472) / bytes(64),
    Ether() / IP(frag=100) / UDP(),
    Ether() / IPv6() / UDP(dport=8472),
    Ether() / IPv6() / IPv6ExtHdrFragment(m=1) / UDP(dport=8472),
]
OTHERS = [
    Ether() / ARP(),
    Ether() / IP() / UDP(dport=53, sport=8472),
    Ether() / IP() / TCP(dport=8472),
    Ether() / IP(proto=6, frag=100) / bytes(20),
    Ether() / IPv6() / UDP(dport=53),
    Ether() / IPv6() / TCP(dport=8472),
    Ether() / IPv6() / IPv6ExtHdrFragment() / TCP(dport=8472),
    b"",
    bytes(13),
]
PLAIN = [
    Ether() / IP(src="10.5.1.2", dst="10.5.255.255") / TCP(),
    Ether() / IP(src="10.5.1.2", dst="10.5.2.2") / UDP(),
    Ether() / IPv6(src="fd00:5::1", dst="fd00:5:f:1::2") / TCP(),
    Ether() / IPv6(src="fd00:5::1", dst="fd00:5::2") / UDP(),
    Ether() / IPv6(src="fd00:5::1", dst="fd00:5::2") / IPv6ExtHdrFragment() / TCP(),
]
OUTSIDE = [
    Ether() / IP(src="10.5.1.2", dst="10.6.0.1") / TCP(),
    Ether() / IP(src="10.4.1.2", dst="10.5.0.1") / TCP(),
    Ether() / IPv6(src="fd00:5::1", dst="fd00:15::2") / TCP(),
    Ether() / IPv6(src="fd00:4::1", dst="fd00:5::2") / TCP(),
]


def told(frame: Packet | bytes) -> str:
    return frame.summary() if isinstance(frame, Packet) else f"{len(frame)} bytes"


@pytest.mark.parametrize("frame", TUNNELLED, ids=told)
def test_tunnels_pass(frame: Packet) -> None:
    assert passes(tunnel_filter(8472), frame)
    assert passes(tunnel_filter(8472, BLOCKS), frame)


@pytest.mark.parametrize("frame", [*OTHERS, *OUTSIDE], ids=told)
def test_a_hosts_other_traffic_does_not(frame: Packet | bytes) -> None:
    assert not passes(tunnel_filter(8472), frame)
    assert not passes(tunnel_filter(8472, BLOCKS), frame)


@pytest.mark.parametrize("frame", PLAIN, ids=told)
def test_what_goes_between_pods_passes_where_the_network_is_known(frame: Packet) -> None:
    assert passes(tunnel_filter(8472, BLOCKS), frame)
    assert not passes(tunnel_filter(8472), frame)


def test_port_is_the_one_asked_for() -> None:
    assert passes(tunnel_filter(4789), Ether() / IP() / UDP(dport=4789))
    assert not passes(tunnel_filter(4789), Ether() / IP() / UDP(dport=8472))
