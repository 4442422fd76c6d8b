"""`--filter`: what its words select, what is refused and how."""

import re

import pytest

from overlay.packets import Fragment, Ip, Packet, Remark
from overlay.roster import Roster
from overlay.selection import PAIRS, WORDS, Seen, concerns, parse
from subnet_lease.model import pack_address


def ip(src: str, dst: str, protocol: str, *ports: int, fragment: Fragment | None = None) -> Ip:
    return Ip(pack_address(src), pack_address(dst), 64, 100, protocol, *ports, fragment=fragment)


def packet(inner: Ip | None, *remarks: str, protocol: str = "", vni: int | None = 1) -> Packet:
    outer = ip("192.168.0.1", "192.168.0.2", "udp", 40000, 8472) if vni is not None else None
    protocol = inner.protocol if inner else protocol
    odd = tuple(Remark(kind, "") for kind in remarks)
    return Packet(150, None, outer, vni, None, inner, protocol, "", None, None, odd)


WEB = packet(ip("10.5.1.2", "10.5.2.2", "tcp", 40000, 80))
DNS = packet(ip("10.5.1.2", "10.5.2.3", "udp", 40000, 53), "checksum")
PING = packet(ip("fd00::1", "fd00::2", "icmp"), vni=9)
ASK = packet(ip("fd00::1", "fd00::2", "nd"), "nd")
ARP = packet(None, "arp", protocol="arp", vni=None)
PART = packet(ip("10.5.1.2", "10.5.2.2", "udp", fragment=Fragment(1, 1480, False)), "fragment")
ALL = {"web": WEB, "dns": DNS, "ping": PING, "ask": ASK, "arp": ARP, "part": PART}


@pytest.mark.parametrize(
    ("text", "selected"),
    [
        ("tcp", "web"),
        ("udp", "dns part"),
        ("icmp", "ping ask"),
        ("nd", "ask"),
        ("arp", "arp"),
        ("ip", "web dns part"),
        ("ip6", "ping ask"),
        ("fragment", "part"),
        ("remarks", "dns ask arp part"),
        ("port 80", "web"),
        ("port 40000", "web dns"),
        ("tcp port 80", "web"),
        ("TCP and port 80", "web"),
        ("tcp and port 53", ""),
        ("host 10.5.2.2", "web part"),
        ("host 192.168.0.2", "web dns ping ask part"),
        ("net 10.5.2.2/24 not port 80", "dns part"),
        ("not tcp and not remarks", "ping"),
        ("not not tcp", "web"),
        ("vni 9", "ping"),
        ("in", "web dns ping ask arp part"),
        ("out", ""),
    ],
)
def test_words_select(text: str, selected: str) -> None:
    wanted = parse(text)
    assert " ".join(name for name, each in ALL.items() if wanted(Seen(each, False))) == selected


def test_unknown_way_is_neither_in_nor_out() -> None:
    assert not parse("in")(Seen(WEB, None)) and not parse("out")(Seen(WEB, None))
    assert parse("out")(Seen(WEB, True))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty; use tcp, udp"),
        ("tcp or udp", "no 'or'"),
        ("http", "'http' is not understood; use tcp,"),
        ("and tcp", "'and' is not understood"),
        ("tcp and", "something is missing at the end"),
        ("tcp and and udp", "'and' is not understood"),
        ("not", "something is missing"),
        ("port", "'port' needs a value: port NUMBER"),
        ("port http", "'http' is no port: a number from 0 to 65535"),
        ("port 65536", "65536"),
        ("vni -1", "no vni"),
        ("host h2", "'h2' is not an IP address"),
        ("net 10.5.0.0", "form address/length"),
    ],
)
def test_what_is_not_understood_is_told(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_error_names_all_words() -> None:
    with pytest.raises(ValueError) as caught:
        parse("?")
    assert set(re.findall(r"\w+", str(caught.value))) >= WORDS.keys() | PAIRS.keys()


def test_packet_concerns_a_host_by_either_address_and_a_pod_by_its_own() -> None:
    nobody = Roster()
    assert concerns(nobody.target("192.168.0.2"), ARP) is False
    assert concerns(nobody.target("192.168.0.2"), WEB)
    assert concerns(nobody.target("10.5.2.3"), DNS)
    assert not concerns(nobody.target("10.5.2.3"), WEB)
    assert not concerns(nobody.target("10.5.2.3"), ARP)
