"""Who is who: hosts by name, by underlay address, by subnet and by the address of a pod."""

import pytest

from overlay.roster import Roster, UnknownTarget
from subnet_lease.model import LeaseAttrs, NetworkConfig, Prefix, Vtep, pack_address

CONFIG = NetworkConfig.parse(
    b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan","VNI":7}}'
)


def host(number: int, *subnets: str, name: object = None, v6: bool = False) -> tuple[tuple[Prefix, ...], LeaseAttrs]:
    address6, vtep6 = (pack_address(f"fd30::{number}"), Vtep(7, bytes((2, 0, 0, 0, 6, number)))) if v6 else (None, None)
    vtep = Vtep(7, bytes((2, 0, 0, 0, 4, number)))
    attrs = LeaseAttrs(pack_address(f"192.168.0.{number}"), "vxlan", vtep, address6, vtep6, node_name=name or "")
    return tuple(map(Prefix.parse, subnets)), attrs


ROSTER = Roster.of(
    CONFIG,
    [
        host(1, "10.5.1.0/24", "fd00:5:0:1::/64", name="node-1", v6=True),
        host(2, "10.5.2.0/24", name="node-\x1b[2J"),
        host(3, "10.5.3.0/26", name="twin"),
        host(4, "10.5.4.0/24", name="twin"),
        host(1, "10.5.9.0/24"),
    ],
)


def test_network_says_port_vni_and_blocks() -> None:
    assert (ROSTER.port, ROSTER.vni, ROSTER.direct, ROSTER.gbp) == (8472, 7, False, False)
    assert ROSTER.inside(pack_address("10.5.77.1")) and ROSTER.inside(pack_address("fd00:5::1"))
    assert not ROSTER.inside(pack_address("10.6.0.1"))


@pytest.mark.parametrize(
    ("backend", "vni", "direct"),
    [('{"Type":"vxlan","DirectRouting":true}', 1, True), ('{"Type":"host-gw"}', None, True)],
)
def test_direct_routes_need_no_tunnel(backend: str, vni: int | None, direct: bool) -> None:
    config = NetworkConfig.parse(b'{"Network":"10.5.0.0/16","Backend":%s}' % backend.encode())
    roster = Roster.of(config, [])
    assert (roster.vni, roster.direct) == (vni, direct)


def test_hosts_are_known_by_each_address_and_pods_by_their_subnet() -> None:
    one, two = ROSTER.members[:2]
    assert ROSTER.host(pack_address("192.168.0.1")) is one
    assert ROSTER.host(pack_address("fd30::1")) is one
    assert ROSTER.host(pack_address("192.168.0.9")) is None
    assert ROSTER.owner(pack_address("10.5.1.255")) is one
    assert ROSTER.owner(pack_address("fd00:5:0:1::17")) is one
    assert ROSTER.owner(pack_address("10.5.2.1")) is two
    assert ROSTER.owner(pack_address("10.5.3.64")) is None
    assert ROSTER.owner(pack_address("10.5.3.63")) is ROSTER.members[2]
    assert one.macs == {4: bytes((2, 0, 0, 0, 4, 1)), 16: bytes((2, 0, 0, 0, 6, 1))}


def test_host_with_two_leases_is_one_host() -> None:
    assert list(map(str, ROSTER.members[0].subnets)) == ["10.5.1.0/24", "fd00:5:0:1::/64", "10.5.9.0/24"]
    assert ROSTER.owner(pack_address("10.5.9.9")) is ROSTER.members[0]


def test_name_that_is_no_printable_ascii_is_none() -> None:
    assert [str(member) for member in ROSTER.members] == ["node-1", "192.168.0.2", "twin", "twin"]
    long = Roster.of(CONFIG, [host(5, "10.5.5.0/24", name="n" * 80)])
    assert str(long.members[0]) == "n" * 22 + ".."
    assert long.target("n" * 80).pods == long.members[0].subnets


def test_lease_without_an_address_goes_by_its_subnet() -> None:
    subnets = (Prefix.parse("10.5.6.0/24"),)
    roster = Roster.of(CONFIG, [(subnets, LeaseAttrs(None, "", None))])
    assert str(roster.members[0]) == "10.5.6.0/24" == roster.members[0].about


@pytest.mark.parametrize("text", ["node-1", "192.168.0.1", "fd30::1", "10.5.1.0/24", "fd00:5:0:1::/64"])
def test_host_is_meant_by_name_address_and_subnet(text: str) -> None:
    target = ROSTER.target(text)
    assert target.underlay == {pack_address("192.168.0.1"), pack_address("fd30::1")}
    assert target.pods == ROSTER.members[0].subnets


def test_pod_is_meant_by_its_address() -> None:
    assert ROSTER.target("10.5.2.7") == (frozenset(), (Prefix.parse("10.5.2.7/32"),))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node-9", r"no host 'node-9'; there is node-1 \(192.168.0.1, fd30::1, 10.5.1.0/24, .*192.168.0.2 \(10.5.2"),
        ("", "no host ''"),
        ("10.5.200.1", "10.5.200.1 is no host's address, and in no host's subnet; there is"),
        ("twin", r"2 hosts are called twin: twin \(192.168.0.3, 10.5.3.0/26\), twin \(192.168.0.4"),
    ],
)
def test_what_there_is_not_is_told_with_what_there_is(text: str, says: str) -> None:
    with pytest.raises(UnknownTarget, match=says):
        ROSTER.target(text)


def test_many_hosts_are_not_all_told() -> None:
    roster = Roster.of(CONFIG, [host(n, f"10.5.{n}.0/24") for n in range(1, 31)])
    with pytest.raises(UnknownTarget, match="and 22 more: see overlay-agent leases"):
        roster.target("x")


def test_without_leases_any_address_may_be_a_hosts_or_a_pods() -> None:
    address = pack_address("10.5.2.7")
    assert Roster().target("10.5.2.7") == (frozenset((address,)), (Prefix(address, 32),))
    assert Roster().owner(address) is None
    with pytest.raises(UnknownTarget, match="give an address"):
        Roster().target("node-1")
