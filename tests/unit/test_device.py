"""The VXLAN device as a value: adoption, adjustment and MTU arithmetic."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.device import (
    MIN_MTU,
    OVERHEAD,
    OWNER,
    DeviceSpec,
    FoundDevice,
    Underlay,
    adjustments,
    derived_mac,
    device_name,
    incompatibility,
    occupied_links,
    overlay_mtu,
    tunnel_mtu,
)
from subnet_lease.model import NetworkConfig, Prefix, pack_address

LOCAL, LOCAL6 = pack_address("192.168.0.5"), pack_address("2001:db8::5")
MAC = derived_mac("host")
ADDRESSES = (Prefix.parse("10.0.1.0/32"), Prefix.parse("fd00:0:0:1::/128"))
SPEC = DeviceSpec("flannel.1", 1, 8472, 2, LOCAL, MAC, 1450, ADDRESSES)
FOUND = FoundDevice(9, "flannel.1", "vxlan", MAC, 1450, True, OWNER, 1, 8472, 2, LOCAL, addresses=ADDRESSES[::-1])


def test_device_as_wanted_is_compatible_and_needs_nothing() -> None:
    assert incompatibility(SPEC, FOUND) is None
    assert adjustments(SPEC, FOUND) == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "bridge"}, "its kind is bridge, not vxlan"),
        ({"kind": ""}, "its kind is unknown, not vxlan"),
        ({"vni": 2}, "its VNI is 2, not 1"),
        ({"port": 4789}, "its UDP port is 4789, not 8472"),
        ({"learning": True}, "its learning is True, not False"),
        ({"gbp": True}, "its group policy is True, not False"),
        ({"local": b""}, "its local address is any, not 192.168.0.5"),
        ({"local": LOCAL6}, "its local address is 2001:db8::5, not 192.168.0.5"),
    ],
)
def test_device_that_cannot_be_adopted_says_why(change: dict[str, object], reason: str) -> None:
    assert incompatibility(SPEC, replace(FOUND, **change)) == reason  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "todo"),
    [
        ({"mac": derived_mac("other")}, ("mac",)),
        ({"mtu": 1400}, ("mtu",)),
        ({"alias": ""}, ("alias",)),
        ({"addresses": ()}, ("address",)),
        ({"addresses": ADDRESSES[:1]}, ("address",)),
        ({"addresses": (*ADDRESSES, Prefix.parse("10.0.2.0/32"))}, ("address",)),
        ({"link": 3}, ("link",)),
        ({"local": pack_address("192.168.0.6")}, ("local",)),
        ({"link": 3, "local": pack_address("192.168.0.6"), "mtu": 1400}, ("mtu", "link", "local")),
        ({"up": False}, ("up",)),
        ({"up": False, "mtu": 1400}, ("mtu", "up")),
    ],
)
def test_device_that_can_be_adopted_is_adjusted(change: dict[str, object], todo: tuple[str, ...]) -> None:
    found = replace(FOUND, **change)  # type: ignore[arg-type]
    assert incompatibility(SPEC, found) is None
    assert adjustments(SPEC, found) == todo


def underlay(mtu: int = 1500, *addresses: bytes, links: tuple[str, ...] = ()) -> Underlay:
    return Underlay("eth0", 2, mtu, addresses or (LOCAL,), (), tuple(map(Prefix.parse, links)), "test")


def config(mtu: int = 0, *, ipv6: bool = False) -> NetworkConfig:
    more = b',"EnableIPv6":true,"IPv6Network":"fd00::/48"' if ipv6 else b""
    return NetworkConfig.parse(b'{"Network":"10.0.0.0/8"%s,"Backend":{"Type":"vxlan","MTU":%d}}' % (more, mtu))


@pytest.mark.parametrize(
    ("addresses", "mtu", "configured", "tunnels", "expected"),
    [
        ((LOCAL,), 1500, 0, True, 1450),
        ((LOCAL6,), 1500, 0, True, 1430),
        ((LOCAL, LOCAL6), 1500, 0, True, 1430),
        ((LOCAL,), 9000, 0, True, 8950),
        ((LOCAL,), 1500, 1400, True, 1400),
        ((LOCAL,), 1500, 1500, True, 1450),
        ((LOCAL,), 626, 0, True, 576),
        ((LOCAL,), 1500, 576, True, 576),
        ((LOCAL,), 1500, 0, False, 1500),
        ((LOCAL, LOCAL6), 1500, 1400, False, 1400),
        ((LOCAL,), 1500, 9000, False, 1500),
    ],
)
def test_mtu_is_what_all_ways_carry_or_less_if_asked_for(
    addresses: tuple[bytes, ...], mtu: int, configured: int, tunnels: bool, expected: int
) -> None:
    assert overlay_mtu(config(configured), underlay(mtu, *addresses), tunnels=tunnels) == expected


@given(st.integers(0, 70_000), st.integers(576, 65_535), st.sampled_from([4, 16]))
def test_mtu_of_a_tunnel_never_exceeds_what_the_underlay_carries(mtu: int, configured: int, family: int) -> None:
    assert tunnel_mtu(mtu, configured, family) == min(configured, tunnel_mtu(mtu, 0, family))
    assert tunnel_mtu(mtu, 0, family) == mtu - OVERHEAD[family]


@pytest.mark.parametrize("ipv6", [False, True])
def test_underlay_too_narrow_for_an_overlay_is_named(ipv6: bool) -> None:
    least = MIN_MTU[16 if ipv6 else 4]
    narrow = least + OVERHEAD[4] - 1
    assert overlay_mtu(config(ipv6=ipv6), underlay(narrow + 1), tunnels=True) == least
    text = f"an underlay MTU of {narrow} leaves {least - 1} bytes for the overlay, under {least}"
    with pytest.raises(ValueError, match=text):
        overlay_mtu(config(ipv6=ipv6), underlay(narrow), tunnels=True)


def test_names_are_flannels() -> None:
    assert (device_name(1), device_name(7, 16)) == ("flannel.1", "flannel-v6.7")


def test_underlay_has_at_most_one_address_of_a_family_and_carries_what_it_can() -> None:
    both, ipv4 = underlay(1500, LOCAL, LOCAL6), underlay(1500, LOCAL)
    assert (both.address(4), both.address(16), ipv4.address(16)) == (LOCAL, LOCAL6, None)
    assert both.carrying([4, 16]) == both
    assert both.carrying([4]) == ipv4
    assert ipv4.carrying([16]) == ipv4, "one family's packets go in the other's"


def test_links_inside_the_overlay_are_in_its_way_but_for_our_own_pods() -> None:
    found = underlay(1500, links=("10.0.0.0/7", "10.0.1.0/24", "10.0.2.0/26", "fd00::/64", "192.168.0.0/24"))
    networks = (Prefix.parse("10.0.0.0/8"), Prefix.parse("fd00::/48"))
    texts = [str(link) for link in occupied_links(found, networks, [Prefix.parse("10.0.2.0/24")])]
    assert texts == ["10.0.1.0/24", "fd00::/64"]
    assert Prefix.parse("10.0.2.0/26") in occupied_links(found, networks)


@given(st.lists(st.text(max_size=20), max_size=4))
def test_derived_mac_is_local_unicast_and_the_same_every_time(identity: list[str]) -> None:
    mac = derived_mac(*identity)
    assert len(mac) == 6
    assert mac[0] & 0b11 == 0b10, "locally administered, unicast"
    assert mac == derived_mac(*identity)


def test_derived_macs_of_different_hosts_differ() -> None:
    assert len({derived_mac("a", "b"), derived_mac("ab"), derived_mac("b", "a"), derived_mac()}) == 4
