"""From a frame to what it is: headers by frames that scapy made, every remark by one that deserves it, and no other."""

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RS,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet as Layer
from scapy.packet import Raw
from scapy.utils import checksum

from overlay.dissect import dissect
from overlay.packets import DOUBTS, REMARKS, Ethernet, Fragment, Packet
from overlay.roster import Roster
from subnet_lease.model import pack_address
from tests.frames import KNOWN, MACS, MACS6, PING, inner4, inner6, roster, tunnel


def seen(frame: Layer | bytes, known: Roster = KNOWN, **options: bool | int) -> Packet:
    return dissect(bytes(frame), known, **options)


def kinds(packet: Packet) -> list[str]:
    assert {remark.kind for remark in packet.remarks} <= REMARKS.keys()
    return [remark.kind for remark in packet.remarks]


# --- headers -----------------------------------------------------------------------------------------------------


def test_tunnelled_ping_is_told_header_by_header() -> None:
    packet = seen(tunnel(PING))
    assert packet.remarks == ()
    assert packet.ethernet == Ethernet("02:00:00:00:0e:01", "02:00:00:00:0e:02")
    assert packet.inner_ethernet == Ethernet(MACS[1], MACS[2])
    assert packet.outer is not None and packet.inner is not None
    assert (packet.outer.src, packet.outer.dst) == (pack_address("192.168.0.1"), pack_address("192.168.0.2"))
    assert (packet.outer.src_port, packet.outer.dst_port, packet.outer.ttl) == (40000, 8472, 64)
    assert (packet.inner.src, packet.inner.dst) == (pack_address("10.5.1.2"), pack_address("10.5.2.2"))
    assert (packet.inner.ttl, packet.inner.length, packet.protocol, packet.vni) == (63, 84, "icmp", 1)
    assert (packet.sender, packet.receiver) == KNOWN.members
    assert str(packet) == (
        "h1 192.168.0.1 > h2 192.168.0.2  vni 1  10.5.1.2 > 10.5.2.2  ICMP echo request 7/3, 56 bytes"
    )
    assert packet.headers == (
        "outer UDP 40000 > 8472, TTL 64, Ethernet 02:00:00:00:0e:01 > 02:00:00:00:0e:02; "
        "inner Ethernet 02:00:00:00:00:01 > 02:00:00:00:00:02, TTL 63; "
        "h1 has 10.5.1.0/24 and fd00:5:0:1::/64; h2 has 10.5.2.0/24 and fd00:5:0:2::/64"
    )


def test_underlay_may_be_ipv6_with_other_macs() -> None:
    outer = IPv6(src="fd30::1", dst="fd30::2")
    packet = seen(tunnel(inner6() / TCP(sport=5, dport=80, flags="SA"), outer=outer, src=MACS6[1], dst=MACS6[2]))
    assert packet.remarks == ()
    assert packet.ways == "h1 fd30::1 > h2 fd30::2"
    assert packet.what == "fd00:5:0:1::2 > fd00:5:0:2::2  TCP 5 > 80 [SA], 0 bytes"
    assert packet.inner is not None and packet.inner.flags == "SA"


@pytest.mark.parametrize(
    ("inner", "what"),
    [
        (
            inner4() / TCP(sport=1, dport=2, flags="FPA", options=[("NOP", None)] * 4) / Raw(b"abc"),
            "TCP 1 > 2 [FPA], 3 b",
        ),
        (inner4(options=b"\1\1\1\1") / UDP(sport=1, dport=53) / Raw(b"abc"), "UDP 1 > 53, 3 bytes"),
        (inner4() / UDP(sport=1, dport=53, chksum=0) / Raw(b"abc"), "UDP 1 > 53, 3 bytes"),
        (inner4() / ICMP(type=3, code=4, nexthopmtu=1400), "ICMP dest unreach fragmentation needed, MTU 1400"),
        (inner4() / ICMP(type=3, code=3), "ICMP dest unreach port unreachable"),
        (inner4() / ICMP(type=11, code=9), "ICMP time exceeded code 9"),
        (inner4() / ICMP(type=5), "ICMP redirect"),
        (inner4() / ICMP(type=99), "ICMP type 99"),
        (inner4(proto=132) / Raw(bytes(12)), "IP protocol 132, 12 bytes"),
        (inner6() / ICMPv6EchoRequest(id=1, seq=2), "ICMPv6 echo request 1/2, 0 bytes"),
        (inner6() / ICMPv6PacketTooBig(mtu=1400), "ICMPv6 packet too big, MTU 1400"),
        (inner6() / ICMPv6DestUnreach(code=4), "ICMPv6 destination unreachable, code 4"),
        (inner6() / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP(sport=1, dport=2), "UDP 1 > 2, 0 bytes"),
        (inner6() / IPv6ExtHdrFragment() / UDP(sport=1, dport=2), "UDP 1 > 2, 0 bytes"),
    ],
)
def test_inner_packet_in_words(inner: Layer, what: str) -> None:
    packet = seen(tunnel(inner))
    assert packet.what.replace("unreach,", "unreach").replace("exceeded,", "exceeded").find(what) > 0, packet.what
    assert packet.remarks == ()


@pytest.mark.parametrize(
    ("inner", "kind", "what"),
    [
        (ARP(psrc="10.5.1.2", pdst="10.5.2.2"), "arp", "ARP who has 10.5.2.2, tell 10.5.1.2"),
        (ARP(op=2, psrc="10.5.1.2", hwsrc=MACS[1]), "arp", f"ARP reply 10.5.1.2 is at {MACS[1]}"),
        (ARP(op=9), "arp", "ARP operation 9"),
        (inner6() / ICMPv6ND_NS(tgt="fd00:5:0:2::2"), "nd", "neighbour solicitation for fd00:5:0:2::2"),
        (inner6() / ICMPv6ND_NA(tgt="fd00:5:0:2::2"), "nd", "neighbour advertisement of fd00:5:0:2::2"),
        (inner6() / ICMPv6ND_RS(), "nd", "router solicitation"),
    ],
)
def test_questions_about_neighbours_are_remarked_on(inner: Layer, kind: str, what: str) -> None:
    packet = seen(tunnel(inner))
    assert (kinds(packet), packet.protocol) == ([kind], kind)
    assert what in packet.what


def test_packet_that_is_in_no_tunnel_is_told_as_it_is() -> None:
    packet = seen(Ether(src=MACS[1], dst=MACS[2]) / inner4() / UDP(sport=1, dport=2))
    assert (packet.outer, packet.vni, packet.remarks) == (None, None, ())
    assert str(packet) == "h1 > h2  10.5.1.2 > 10.5.2.2  UDP 1 > 2, 0 bytes"
    assert packet.headers.startswith("Ethernet 02:00:00:00:00:01 > 02:00:00:00:00:02, TTL 64; h1 has")
    assert seen(Ether() / inner4(dst="1.1.1.1") / UDP()).ways == "h1 > ?"
    assert str(seen(Ether(src=MACS[1], dst=MACS[2], type=0x88CC) / Raw(b"abc"))) == (
        f"{MACS[1]} > {MACS[2]}  Ethernet type 0x88cc, 3 bytes"
    )
    assert str(seen(bytes(Ether(src=MACS[1], dst=MACS[2]))[:12] + bytes(48))).endswith("IEEE 802.3, 46 bytes")
    assert seen(Ether() / Dot1Q(vlan=5) / inner4() / UDP()).remarks == ()


def test_without_leases_nothing_is_said_of_hosts() -> None:
    packet = seen(tunnel(inner4(src="1.2.3.4") / UDP(), header="08 00 00 00 00 00 63 00"), Roster())
    assert (packet.remarks, packet.sender, packet.vni) == ((), None, 99)
    assert str(packet).startswith("192.168.0.1 > 192.168.0.2  vni 99  1.2.3.4 >")


def test_port_is_the_networks() -> None:
    other = roster('{"Type":"vxlan","Port":4789}')
    assert seen(tunnel(PING, port=4789), other).vni == 1
    assert seen(tunnel(PING), other).vni is None


def test_json_has_every_field() -> None:
    fields = seen(tunnel(inner4(id=9, flags="MF") / UDP(sport=1, dport=2))).fields
    assert fields["from"] == {
        "node_name": "h1",
        "underlay_ips": ["192.168.0.1", "fd30::1"],
        "vtep_macs": [MACS[1], MACS6[1]],
        "subnets": ["10.5.1.0/24", "fd00:5:0:1::/64"],
    }
    assert fields["inner"]["fragment"] == {"ident": 9, "offset": 0, "more": True}
    assert fields["remarks"] == [{"kind": "fragment", "text": "inner fragment, 0x9 at 0"}]
    nothing = seen(b"").fields
    assert [nothing[key] for key in ("ethernet", "outer", "inner", "from")] == [None] * 4


# --- what is off -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame", "kind", "text"),
    [
        (tunnel(PING, outer=IP(src="192.168.0.9", dst="192.168.0.2")), "unknown-vtep", "source 192.168.0.9 is in no"),
        (tunnel(PING, outer=IP(src="192.168.0.1", dst="192.168.0.9")), "unknown-vtep", "destination 192.168.0.9"),
        (tunnel(PING, header="08 00 00 00 00 00 02 00"), "wrong-vni", "VNI 2, the network's is 1"),
        (tunnel(PING, header="00 00 00 00 00 00 01 00"), "no-vni-flag", "0x00: the I flag is missing"),
        (tunnel(PING, header="0c 00 00 00 00 00 01 00"), "reserved-bits", "0c 00"),
        (tunnel(PING, header="08 00 00 00 00 00 01 01"), "reserved-bits", "01 01"),
        (tunnel(PING, header="08 01 00 00 00 00 01 00"), "reserved-bits", "08 01"),
        (tunnel(PING, header="88 00 00 05 00 00 01 00"), "reserved-bits", "88 00 00 05"),
        (tunnel(PING, src=MACS[2]), "wrong-mac", f"inner source MAC {MACS[2]}, h1's is {MACS[1]}"),
        (tunnel(PING, dst=MACS[1]), "wrong-mac", "inner destination MAC"),
        (tunnel(inner4(src="10.5.2.9") / UDP()), "foreign-source", "inner source 10.5.2.9 is not in h1's 10.5.1.0/24"),
        (tunnel(inner4(dst="10.9.9.9") / UDP()), "foreign-destination", "10.9.9.9 is not in h2's 10.5.2.0/24 and fd"),
        (tunnel(inner4(flags="MF", id=5) / UDP()), "fragment", "inner fragment, 0x5 at 0"),
        (tunnel(inner4(frag=10, id=5) / UDP()), "fragment", "inner fragment, 0x5 at 80, the last"),
        (tunnel(inner6() / IPv6ExtHdrFragment(m=1, id=5) / UDP()), "fragment", "inner fragment, 0x5 at 0"),
        (tunnel(inner4(chksum=1) / UDP()), "checksum", "inner IPv4 header checksum is 0x0001, right were 0x"),
        (tunnel(inner4() / TCP(chksum=1)), "checksum", "inner TCP checksum is 0x0001"),
        (tunnel(inner4() / UDP(chksum=1)), "checksum", "inner UDP checksum"),
        (tunnel(inner4() / ICMP(chksum=1)), "checksum", "inner ICMP checksum"),
        (tunnel(inner6() / TCP(chksum=1)), "checksum", "inner TCP checksum"),
        (tunnel(inner6() / UDP(chksum=0)), "checksum", "inner UDP checksum is 0x0000"),
        (tunnel(inner6() / ICMPv6EchoRequest(cksum=1)), "checksum", "inner ICMPv6 checksum"),
        (tunnel(inner4(len=200) / UDP()), "truncated", "inner IP packet cut off: 28 of 200 bytes"),
        (tunnel(inner6(plen=200) / UDP()), "truncated", "inner IP packet cut off: 48 of 240 bytes"),
        (tunnel(inner4(ihl=3) / UDP()), "truncated", "inner IPv4 header cut off"),
        (tunnel(inner4(proto=6) / Raw(bytes(5))), "truncated", "inner TCP header cut off: 5 of 20 bytes"),
        (tunnel(inner4() / TCP(dataofs=15, chksum=0)), "truncated", "inner TCP header of 60 bytes in 20"),
        (tunnel(inner4() / UDP(len=99)), "truncated", "inner UDP length is 99, in 8 bytes"),
        (tunnel(inner4() / UDP(len=4)), "truncated", "inner UDP length is 4, in 8 bytes"),
        (tunnel(b""), "truncated", "inner Ethernet header cut off: 0 of 14 bytes"),
        (tunnel(Ether(src=MACS[1], dst=MACS[2], type=0x86DD) / Raw(b"abc")), "truncated", "inner IPv6 header cut"),
        (tunnel(Ether(src=MACS[1], dst=MACS[2], type=0x0806) / Raw(b"abc")), "arp", "ARP inside"),
        (tunnel(inner4() / UDP(dport=8472)), "nested", "VXLAN inside, to UDP port 8472"),
        (tunnel(inner4() / UDP(dport=4789)), "nested", "4789"),
        (tunnel(Ether(src=MACS[1], dst=MACS[2]) / Dot1Q(vlan=5) / PING), "vlan", "inner VLAN tag 5"),
        (tunnel(PING, dst="ff:ff:ff:ff:ff:ff"), "broadcast", "inner broadcast"),
        (tunnel(inner4(dst="224.0.0.5") / UDP(), dst="01:00:5e:00:00:05"), "multicast", "to 01:00:5e:00:00:05"),
        (tunnel(inner6(dst="ff02::16") / UDP(), dst="33:33:00:00:00:16"), "multicast", "to 33:33:00:00:00:16"),
    ],
)
def test_what_is_off_is_remarked_on(frame: Layer, kind: str, text: str) -> None:
    packet = seen(frame)
    assert kind in kinds(packet)
    assert any(text in remark.text for remark in packet.remarks), packet.remarks
    # Nothing else is off, but for what goes with it: a length that lies spoils the checksum.
    assert set(kinds(packet)) - {kind} <= {"checksum", "truncated"}
    assert packet.doubtful == (kind in DOUBTS)


def test_group_policies_are_no_reserved_bits_where_the_network_has_them() -> None:
    known = roster('{"Type":"vxlan","GBP":true}')
    assert seen(tunnel(PING, header="88 00 00 05 00 00 01 00"), known).remarks == ()
    assert kinds(seen(tunnel(PING, header="88 00 00 05 00 00 01 09"), known)) == ["reserved-bits"]


def test_outer_checksums_are_checked() -> None:
    frame = tunnel(PING)
    frame[UDP].chksum = 1
    assert kinds(seen(frame)) == ["checksum"] and "outer UDP checksum" in str(seen(frame))
    frame[UDP].chksum = 0
    assert seen(frame).remarks == ()
    frame[IP].chksum = 1
    assert "outer IPv4 header checksum" in str(seen(frame))
    over6 = tunnel(inner6() / UDP(), outer=IPv6(src="fd30::1", dst="fd30::2"), src=MACS6[1], dst=MACS6[2])
    over6[UDP].chksum = 0
    assert seen(over6).remarks == (), "tunnels may do without (RFC 6935)"


@pytest.mark.parametrize("cut", range(0, 42 + 8 + 84 + 14, 3))
def test_frame_may_end_anywhere(cut: int) -> None:
    packet = seen(bytes(tunnel(PING))[:cut])
    assert set(kinds(packet)) == {"truncated"}, packet


def test_what_the_capture_cut_off_is_nobodys_fault() -> None:
    whole = bytes(tunnel(inner4() / TCP() / Raw(bytes(500))))
    packet = seen(whole[:96], length=len(whole))
    assert [remark.text for remark in packet.remarks] == [f"the capture has 96 of its {len(whole)} bytes"]
    assert packet.length == len(whole) and "TCP" in packet.what


def test_outer_fragments_are_told_apart() -> None:
    whole = tunnel(inner4() / UDP(sport=1, dport=2) / Raw(bytes(1400)))
    whole[IP].id = 77
    first, last = (Ether() / part for part in fragment(whole[IP], fragsize=800))
    packet = seen(first)
    assert [remark.text for remark in packet.remarks] == ["outer fragment, 0x4d at 0"]
    assert packet.inner is not None and packet.inner.dst_port == 2
    packet = seen(last)
    assert packet.outer is None and packet.inner is not None
    assert packet.inner.fragment == Fragment(77, 800, False)
    assert "UDP 0x4d at 800, the last" in packet.what and packet.ways == "h1 > h2"


# --- checksums that are left to hardware -------------------------------------------------------------------------


def unfinished(inner: Layer) -> Layer:
    """The inner checksum is the sum of its pseudo header, and the outer one that of the finished frame."""
    frame = tunnel(inner)
    finished = bytes(frame)
    ip = inner.__class__(bytes(inner))
    layer = ip[TCP] if TCP in ip else ip[UDP]
    body = bytes(layer)
    pseudo = pack_address(ip.src) + pack_address(ip.dst) + len(body).to_bytes(4, "big") + bytes((0, 0, 0, ip.proto))
    partial = 0xFFFF ^ checksum(pseudo)
    at = finished.rindex(body) + (16 if TCP in ip else 6)
    return Ether(finished[:at] + partial.to_bytes(2, "big") + finished[at + 2 :])


@pytest.mark.parametrize("inner", [inner4() / TCP() / Raw(b"abc"), inner4() / UDP(sport=1, dport=2) / Raw(b"abcd")])
def test_checksum_that_is_left_to_hardware_is_no_wrong_one(inner: Layer) -> None:
    assert seen(unfinished(inner)).remarks == ()


def test_kernel_tells_that_checksums_are_not_finished() -> None:
    frame = tunnel(inner4() / TCP(chksum=1))
    frame[UDP].chksum = 2
    assert kinds(seen(frame)) == ["checksum", "checksum"]
    assert seen(frame, unfinished=True).remarks == ()
    frame = tunnel(inner4(chksum=3) / ICMP(chksum=1))
    assert kinds(seen(frame, unfinished=True)) == ["checksum", "checksum"], "these are never left unfinished"


def test_packet_longer_than_its_length_field_can_say_is_whole() -> None:
    frame = tunnel(inner4(len=0) / TCP() / Raw(bytes(100)), outer=IP(src="192.168.0.1", dst="192.168.0.2", len=0))
    packet = seen(frame, unfinished=True)
    assert packet.remarks == () and packet.what.endswith("100 bytes")


# --- whatever comes ----------------------------------------------------------------------------------------------


@given(st.binary(max_size=200), st.integers(0, 200))
def test_any_bytes_are_told(noise: bytes, at: int) -> None:
    whole = bytes(tunnel(inner6() / IPv6ExtHdrDestOpt() / TCP()))
    for data in (noise, whole[:at] + noise, whole[:at] + noise + whole[at + len(noise) :]):
        packet = seen(data)
        assert str(packet).isprintable() and packet.headers.isprintable()
        kinds(packet)


def test_right_packets_of_all_sizes_are_without_remarks() -> None:
    generator = random.Random(7)
    for size in (0, 1, 2, 3, 255, 1399, 1400, 60000):
        load = Raw(generator.randbytes(size))
        for inner in (
            inner4() / UDP(sport=1, dport=2),
            inner4() / TCP(),
            inner6() / TCP(),
            inner6() / ICMPv6EchoRequest(),
        ):
            assert seen(tunnel(inner / load)).remarks == ()


def test_scapy_comes_with_the_first_packet() -> None:
    program = (
        "import sys, agent, overlay.capture, overlay.pcap, overlay.dissect\n"
        "agent._parser(['run', '--help'])\n"
        "assert not any(name.startswith('scapy') for name in sys.modules)\n"
        "overlay.dissect.dissect(bytes(12) + bytes((8, 0, 0x45, 0, 0, 20)) + bytes(40))\n"
        "assert 'scapy.layers.inet' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
