"""The network configuration on a host: what fits it, what has no effect there, what a running agent can take over."""

from dataclasses import replace

import pytest

from overlay import netconf
from overlay.device import Underlay
from subnet_lease.model import ConfigInvalid, NetworkConfig, Prefix, pack_address


def config(backend: str = '"Type":"vxlan"', more: str = "") -> NetworkConfig:
    return netconf.usable(f'{{"Network":"10.0.0.0/8"{more},"Backend":{{{backend}}}}}'.encode())


DUAL = ',"EnableIPv6":true,"IPv6Network":"fd00::/48"'
ONLY_6 = DUAL + ',"EnableIPv4":false'
HOST_GW, ALLOC = '"Type":"host-gw"', '"Type":"alloc"'


def underlay(*addresses: str, mtu: int = 1500, links: tuple[str, ...] = ()) -> Underlay:
    packed = tuple(map(pack_address, addresses))
    return Underlay("eth0", 2, mtu, packed, (), tuple(map(Prefix.parse, links)), "test")


V4, V6 = "192.168.0.5", "2001:db8::5"


# --- whether it can be used ---


def test_backend_that_nobody_has_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigInvalid, match=r"Backend\.Type: 'udp' is not supported; vxlan, host-gw, alloc are"):
        netconf.usable(b'{"Network":"10.0.0.0/8"}')
    with pytest.raises(ConfigInvalid, match="the value is not JSON"):
        netconf.usable(b"{")


@pytest.mark.parametrize(
    ("more", "addresses", "used"),
    [
        ("", (V4,), (V4,)),
        ("", (V4, V6), (V4,)),
        ("", (V6,), (V6,)),
        (DUAL, (V4, V6), (V4, V6)),
        (DUAL, (V6,), (V6,)),
        (ONLY_6, (V4, V6), (V6,)),
        (ONLY_6, (V4,), (V4,)),
    ],
)
def test_addresses_of_the_pods_families_are_used_if_there_are_any(
    more: str, addresses: tuple[str, ...], used: tuple[str, ...]
) -> None:
    assert netconf.fit(config(more=more), underlay(*addresses)).addresses == tuple(map(pack_address, used))


def test_links_in_the_overlays_way_are_kept_but_for_those_of_our_own_pods() -> None:
    found = underlay(V4, links=("10.0.1.0/24", "10.0.2.0/24", "10.0.0.0/7", "192.168.0.0/24"))
    assert netconf.fit(config(), found).links == (Prefix.parse("10.0.1.0/24"), Prefix.parse("10.0.2.0/24"))
    assert netconf.fit(config(), found, (), [Prefix.parse("10.0.2.0/24")]).links == (Prefix.parse("10.0.1.0/24"),)


@pytest.mark.parametrize(
    ("settings", "found", "public", "reason"),
    [
        (config(), underlay("10.1.2.3"), (), "Network: 10.0.0.0/8 contains this host's own address 10.1.2.3; choose"),
        (config(), underlay(V4), ("10.9.9.9",), "Network: 10.0.0.0/8 contains this host's own address 10.9.9.9;"),
        (config(more=DUAL), underlay(V4, "fd00::7"), (), "Network: fd00::/48 contains this host's own address fd00::7"),
        (
            config('"Type":"vxlan","VNI":1000000', DUAL), underlay(V4, V6), (),
            "Backend.VNI: flannel-v6.1000000 is longer than the 15 characters Linux allows",
        ),
        (
            config(HOST_GW, DUAL), underlay(V4), (),
            "Backend.Type: host-gw routes IPv6 pods by IPv6 addresses of hosts, and eth0 has none; give it one, or use",
        ),
        (
            config(), underlay(V4, mtu=600), (),
            "interface eth0 cannot carry an overlay: an underlay MTU of 600 leaves 550 bytes for the overlay, under",
        ),
        (
            config(more=DUAL), underlay(V4, mtu=1300), (),
            "interface eth0 cannot carry an overlay: an underlay MTU of 1300 leaves 1250 bytes for the overlay",
        ),
    ],
    ids=["own address", "public address", "IPv6 address", "VNI", "host-gw", "MTU", "MTU for IPv6"],
)  # fmt: skip
def test_network_that_this_host_cannot_carry_is_refused_with_the_reason(
    settings: NetworkConfig, found: Underlay, public: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(netconf.Unfit) as refused:
        netconf.fit(settings, found, tuple(map(pack_address, public)))
    assert str(refused.value).startswith(reason)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        (config('"Type":"vxlan","VNI":1000000'), underlay(V4)),
        (config(HOST_GW), underlay(V4)),
        (config(HOST_GW, DUAL), underlay(V4, V6)),
        (config(ALLOC, DUAL), underlay(V4)),
        (config(ALLOC, more=ONLY_6), underlay(V6, mtu=1280)),
    ],
)
def test_what_only_others_could_not_carry_is_no_reason_to_refuse(settings: NetworkConfig, found: Underlay) -> None:
    netconf.fit(settings, found)


# --- what has no effect ---


def test_keys_that_nobody_reads_are_remarked_upon() -> None:
    assert netconf.remarks(config(more=',"Networks":1'), underlay(V4)) == [
        ("config_keys_unknown", {"keys": ["Networks"]})
    ]


@pytest.mark.parametrize(
    ("backend", "addresses", "most"),
    [('"Type":"vxlan"', (V4,), 1450), ('"Type":"vxlan"', (V4, V6), 1430), (HOST_GW, (V4,), 1500)],
)
def test_mtu_that_the_underlay_does_not_carry_is_remarked_upon(
    backend: str, addresses: tuple[str, ...], most: int
) -> None:
    found = underlay(*addresses)
    assert netconf.remarks(config(f'{backend},"MTU":{most}'), found) == []
    ((event, facts),) = netconf.remarks(config(f'{backend},"MTU":{most + 7}'), found)
    assert (event, facts["configured"], facts["mtu"]) == ("mtu_lowered", most + 7, most)
    assert facts["reason"] == "eth0 carries no more; raise its MTU by 7, or lower Backend.MTU"


# --- changes ---


def test_change_that_a_running_agent_takes_over_is_told_apart_from_others() -> None:
    old = config()
    new = config('"Type":"vxlan","MTU":1400,"VNI":7')
    assert netconf.all_changes(old, new) == ["Backend.VNI: 1 -> 7", "Backend.MTU: 0 -> 1400"]
    assert netconf.fixed_changes(old, new) == ["Backend.VNI: 1 -> 7"]
    assert netconf.fixed_changes(old, replace(new, backend=replace(new.backend, vni=1))) == []
    assert netconf.all_changes(old, old) == []
