"""The VXLAN device as a value: adoption, adjustment and MTU arithmetic."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay.device import (
    MIN_MTU,
    OVERHEAD_V4,
    OWNER,
    DeviceSpec,
    FoundDevice,
    Underlay,
    adjustments,
    derived_mac,
    device_name,
    device_spec,
    incompatibility,
    overlay_mtu,
)
from subnet_lease.model import Lease, LeaseAttrs, NetworkConfig, Prefix, Vtep, pack_address

LOCAL = pack_address("192.168.0.5")
MAC = derived_mac("host")
SPEC = DeviceSpec("flannel.1", 1, 8472, 2, LOCAL, MAC, 1450, Prefix.parse("10.0.1.0/32"))
FOUND = FoundDevice(9, "flannel.1", "vxlan", MAC, 1450, True, OWNER, 1, 8472, 2, LOCAL, addresses=(SPEC.address,))


def test_spec_follows_configuration_lease_and_underlay() -> None:
    config = NetworkConfig.parse(
        b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan","VNI":7,"Port":4789,"MTU":1300,"GBP":true,"Learning":true}}'
    )
    lease = Lease(Prefix.parse("10.0.1.0/24"), None, LeaseAttrs(LOCAL, "vxlan", Vtep(7, MAC)), 1, 1, 1)
    underlay = Underlay("eth0", 2, LOCAL, 1500, (), "test")
    assert device_spec(config, lease, underlay) == DeviceSpec(
        "flannel.7", 7, 4789, 2, LOCAL, MAC, 1300, Prefix.parse("10.0.1.0/32"), learning=True, gbp=True
    )


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
        ({"link": 3}, "its underlay interface is 3, not 2"),
        ({"learning": True}, "its learning is True, not False"),
        ({"gbp": True}, "its group policy is True, not False"),
        ({"local": b""}, "its local address is any, not 192.168.0.5"),
        ({"local": pack_address("192.168.0.6")}, "its local address is 192.168.0.6, not 192.168.0.5"),
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
        ({"addresses": (SPEC.address, Prefix.parse("10.0.2.0/32"))}, ("address",)),
        ({"up": False}, ("up",)),
        ({"up": False, "mtu": 1400}, ("mtu", "up")),
    ],
)
def test_device_that_can_be_adopted_is_adjusted(change: dict[str, object], todo: tuple[str, ...]) -> None:
    found = replace(FOUND, **change)  # type: ignore[arg-type]
    assert incompatibility(SPEC, found) is None
    assert adjustments(SPEC, found) == todo


@pytest.mark.parametrize(
    ("underlay", "configured", "expected"),
    [(1500, 0, 1450), (9000, 0, 8950), (1500, 1400, 1400), (1500, 1500, 1450), (626, 0, 576), (1500, 576, 576)],
)
def test_mtu_is_what_the_underlay_carries_or_less_if_asked_for(underlay: int, configured: int, expected: int) -> None:
    assert overlay_mtu(underlay, configured) == expected


@given(st.integers(0, 70_000), st.integers(0, 70_000))
def test_mtu_never_exceeds_what_the_underlay_carries(underlay: int, configured: int) -> None:
    try:
        mtu = overlay_mtu(underlay, configured)
    except ValueError:
        assert underlay - OVERHEAD_V4 < MIN_MTU or 0 < configured < MIN_MTU
    else:
        assert MIN_MTU <= mtu <= underlay - OVERHEAD_V4


def test_underlay_too_narrow_for_an_overlay_is_named() -> None:
    with pytest.raises(ValueError, match="an underlay MTU of 600 leaves 550 bytes for the overlay, under 576"):
        overlay_mtu(600, 0)


def test_name_is_flannels() -> None:
    assert device_name(1) == "flannel.1"


@given(st.lists(st.text(max_size=20), max_size=4))
def test_derived_mac_is_local_unicast_and_the_same_every_time(identity: list[str]) -> None:
    mac = derived_mac(*identity)
    assert len(mac) == 6
    assert mac[0] & 0b11 == 0b10, "locally administered, unicast"
    assert mac == derived_mac(*identity)


def test_derived_macs_of_different_hosts_differ() -> None:
    assert len({derived_mac("a", "b"), derived_mac("ab"), derived_mac("b", "a"), derived_mac()}) == 4
