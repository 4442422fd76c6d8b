"""Which devices a backend needs, which entries a lease calls for, and which entries are ours."""

from dataclasses import replace
from itertools import product

import pytest

from overlay.backends import V4, V6, Here, backend_of, ours
from overlay.device import Underlay, overlay_mtu
from overlay.model import (
    BUILD_ORDER,
    NEXTHOP_BASE,
    NEXTHOP_SPAN,
    PROTOCOL_BOOT,
    Entry,
    Fdb,
    Guard,
    Neighbour,
    NextHop,
    Route,
)
from subnet_lease.model import ConfigInvalid, Lease, LeaseAttrs, NetworkConfig, Prefix, Vtep, pack_address, pack_mac

MAC, MAC6 = pack_mac("02:00:00:00:00:01"), pack_mac("02:00:00:00:00:06")
BLOCK, BLOCK6 = Prefix.parse("10.0.0.0/8"), Prefix.parse("fd00::/48")
TUNNELS = {V4: 7, V6: 8}
LINK = 2
HOSTS = {"4": (V4,), "6": (V6,), "46": (V4, V6)}
"""Address families by the digits that tests name them by."""


def config(pods: str = "4", backend: str = '"Type":"vxlan"') -> NetworkConfig:
    text = '{"Network":"10.0.0.0/8","IPv6Network":"fd00::/48","EnableIPv4":%s,"EnableIPv6":%s,"Backend":{%s}}'
    return NetworkConfig.parse((text % (str("4" in pods).lower(), str("6" in pods).lower(), backend)).encode())


def underlay(families: str = "4") -> Underlay:
    addresses = {V4: pack_address("192.168.0.9"), V6: pack_address("2001:db8::9")}
    links = (Prefix.parse("192.168.0.0/24"), Prefix.parse("2001:db8::/64"))
    mine = tuple(addresses[family] for family in HOSTS[families])
    return Underlay("eth0", LINK, 1500, mine, links, links, "test")


def lease(
    pods: str = "4", hosts: str = "4", *, mtu: int = 0, vtep: bool = True, number: int = 34, octet: int = 5
) -> Lease:
    """A peer with pods of these families, and an underlay of these."""
    attrs = LeaseAttrs(
        pack_address(f"192.168.0.{octet}") if "4" in hosts else None,
        "vxlan",
        Vtep(1, MAC) if vtep and "4" in hosts else None,
        pack_address(f"2001:db8::{octet}") if "6" in hosts else None,
        Vtep(1, MAC6) if vtep and "6" in hosts else None,
        mtu,
    )
    subnet = Prefix.parse(f"10.5.{number}.0/24") if "4" in pods else None
    subnet6 = Prefix.parse(f"fd00:0:0:{number}::/64") if "6" in pods else None
    return Lease(subnet, subnet6, attrs, 1, 1, 1)


def here(
    pods: str = "4", hosts: str = "4", backend: str = '"Type":"vxlan"', *, nexthops: bool = True, listed: bool = False
) -> Here:
    """This host with the devices that the backend needs."""
    settings = config(pods, backend)
    chosen = backend_of(settings)
    mine = underlay(hosts)
    mtu = overlay_mtu(settings, mine, tunnels=chosen.tunnels)
    made = Here.of(settings, mine, mtu, nexthops=nexthops, listed=listed)
    assert made.tunnels == {}
    return replace(made, tunnels={family: TUNNELS[family] for family in HOSTS[hosts]} if chosen.tunnels else {})


def entries(peer: Lease, place: Here, backend: str = '"Type":"vxlan"') -> tuple[Entry, ...]:
    chosen = backend_of(config(backend=backend))
    found = chosen.entries(peer, place)
    assert len({entry[0] for entry in found}) == len(found), "keys differ"
    assert all(ours(entry, place) for entry in found)
    return found


DIRECT = '"Type":"vxlan","DirectRouting":true'
HOST_GW = '"Type":"host-gw"'
ALLOC = '"Type":"alloc"'


# --- the choice ---


def test_backends_are_known_by_flannels_names() -> None:
    found = {name: backend_of(config(backend=name)) for name in ('"Type":"vxlan"', DIRECT, HOST_GW, ALLOC)}
    facts = {name: (each.tunnels, each.direct, each.routes) for name, each in found.items()}
    assert facts == {
        '"Type":"vxlan"': (True, False, True),
        DIRECT: (True, True, True),
        HOST_GW: (False, True, True),
        ALLOC: (False, False, False),
    }
    with pytest.raises(ConfigInvalid, match=r"^Backend\.Type: 'udp' is not supported; vxlan, host-gw, alloc are$"):
        backend_of(config(backend='"Type":"udp"'))


# --- devices ---


@pytest.mark.parametrize(("pods", "hosts"), list(product(HOSTS, HOSTS)))
def test_there_is_a_device_for_each_family_of_the_underlay_and_pods_travel_over_their_own(
    pods: str, hosts: str
) -> None:
    backend = backend_of(config(pods))
    specs = backend.devices(config(pods), lease(pods, hosts), underlay(hosts))
    assert [(spec.name, spec.mtu, spec.mac, len(spec.local)) for spec in specs] == [
        {V4: ("flannel.1", 1450, MAC, 4), V6: ("flannel-v6.1", 1430, MAC6, 16)}[family] for family in HOSTS[hosts]
    ]
    carried = {len(spec.local): [str(address) for address in spec.addresses] for spec in specs}
    expected: dict[int, list[str]] = {family: [] for family in HOSTS[hosts]}
    for family, address in ((V4, "10.5.34.0/32"), (V6, "fd00:0:0:34::/128")):
        if str({V4: 4, V6: 6}[family]) in pods:
            expected[family if family in expected else next(iter(expected))].append(address)
    assert carried == expected


def test_device_follows_the_configuration() -> None:
    settings = config(backend='"Type":"vxlan","VNI":7,"Port":4789,"MTU":1300,"GBP":true,"Learning":true')
    backend = backend_of(settings)
    (spec,) = backend.devices(settings, lease(), underlay())
    assert (spec.name, spec.vni, spec.port, spec.link, spec.mtu) == ("flannel.7", 7, 4789, LINK, 1300)
    assert spec.learning and spec.gbp


def test_underlay_address_that_the_lease_does_not_tell_of_yet_gets_no_device() -> None:
    backend = backend_of(config())
    assert [spec.name for spec in backend.devices(config(), lease(hosts="4"), underlay("46"))] == ["flannel.1"]


@pytest.mark.parametrize("backend", [HOST_GW, ALLOC])
def test_backends_without_tunnels_need_no_device(backend: str) -> None:
    chosen = backend_of(config(backend=backend))
    assert chosen.devices(config(backend=backend), lease(), underlay()) == ()


# --- vxlan ---


def test_peer_is_reached_by_an_fdb_entry_a_neighbour_a_nexthop_and_a_route_once_it_is_let_in() -> None:
    found = entries(lease(), here(listed=True))
    assert [str(entry) for entry in found] == [
        "guard 192.168.0.5",
        "fdb 02:00:00:00:00:01 dst 192.168.0.5",
        "neighbour 10.5.34.0 lladdr 02:00:00:00:00:01",
        "nexthop 1862607360 via 10.5.34.0",
        "route 10.5.34.0/24 nhid 1862607360",
    ]
    assert tuple(type(entry) for entry in found) == BUILD_ORDER
    assert entries(lease(), here()) == found[1:], "where nobody wants to know the hosts, nobody is told"


@pytest.mark.parametrize("pods", ["4", "6"])
@pytest.mark.parametrize(("mine", "theirs"), list(product(HOSTS, HOSTS)))
def test_pods_travel_over_their_own_family_if_both_hosts_have_it_and_over_the_other_otherwise(
    pods: str, mine: str, theirs: str
) -> None:
    found = entries(lease(pods, theirs), here(pods, mine))
    common = [digit for digit in (pods, "4", "6") if digit in mine and digit in theirs]
    if not common:
        assert found == ()
        return
    device, mac, remote = {
        "4": (TUNNELS[V4], MAC, pack_address("192.168.0.5")),
        "6": (TUNNELS[V6], MAC6, pack_address("2001:db8::5")),
    }[common[0]]
    subnet = lease(pods, theirs).subnets[0]
    expected: list[Entry] = [Fdb((device, mac), remote), Neighbour((device, subnet.base), mac)]
    if pods == "4":
        hop = NextHop(NEXTHOP_BASE + 5 * 65536 + 34 * 256, subnet.base, device)
        expected += [hop, Route(subnet, nexthop=hop.id)]
    else:
        expected.append(Route(subnet, gateway=subnet.base, device=device))
    assert list(found) == expected


@pytest.mark.parametrize(
    ("hosts", "kinds"),
    [
        ("4", "guard fdb neighbour nexthop route neighbour route"),
        ("6", "guard fdb neighbour nexthop route neighbour route"),
        ("46", "guard fdb neighbour nexthop route guard fdb neighbour route"),
    ],
)
def test_families_that_travel_the_same_way_share_its_fdb_entry(hosts: str, kinds: str) -> None:
    found = entries(lease("46", hosts), here("46", hosts, listed=True))
    assert " ".join(str(entry).split()[0] for entry in found) == kinds


def test_subnets_of_one_host_share_its_fdb_entry() -> None:
    first, second = entries(lease(), here()), entries(lease(number=35), here())
    assert set(first) & set(second) == {first[0]}


def test_kernel_without_nexthop_objects_gets_the_gateway_in_the_route() -> None:
    found = entries(lease(), here(nexthops=False))
    assert len(found) == 3
    assert found[-1] == Route(Prefix.parse("10.5.34.0/24"), gateway=pack_address("10.5.34.0"), device=7)


@pytest.mark.parametrize("backend", ['"Type":"vxlan"', DIRECT])
def test_peer_without_a_vtep_is_not_reached_through_a_tunnel(backend: str) -> None:
    far = replace(here(backend=backend), on_link=())
    assert entries(lease(vtep=False), far, backend) == ()


@pytest.mark.parametrize(("theirs", "carried"), [(0, 0), (1400, 1400), (1450, 0), (9000, 0)])
@pytest.mark.parametrize("pods", ["4", "6"])
def test_route_carries_the_peers_mtu_if_that_is_smaller(pods: str, theirs: int, carried: int) -> None:
    route = entries(lease(pods, mtu=theirs), here(pods))[-1]
    assert isinstance(route, Route) and route.mtu == carried


def test_nexthop_ids_differ_by_subnet_and_stay_in_our_range() -> None:
    place = here()
    ids = []
    for text in ("10.0.0.0/24", "10.0.1.0/24", "10.255.255.252/30"):
        hop = entries(lease()._replace(subnet=Prefix.parse(text)), place)[2]
        assert isinstance(hop, NextHop)
        ids.append(hop.id)
    assert ids == [NEXTHOP_BASE, NEXTHOP_BASE + 256, NEXTHOP_BASE + NEXTHOP_SPAN - 4]


# --- routes by hosts' own addresses ---


@pytest.mark.parametrize(
    ("pods", "mine", "theirs", "gateway"),
    [
        ("4", "4", "4", "192.168.0.5"),
        ("4", "46", "46", "192.168.0.5"),
        ("4", "6", "6", "2001:db8::5"),
        ("4", "6", "46", "192.168.0.5"),
        ("6", "6", "6", "2001:db8::5"),
        ("6", "4", "46", "2001:db8::5"),
        ("6", "4", "4", ""),
    ],
)
def test_route_goes_by_the_peers_own_address_of_the_pods_family_or_ipv4_by_ipv6(
    pods: str, mine: str, theirs: str, gateway: str
) -> None:
    found = entries(lease(pods, theirs, vtep=False, mtu=1400), here(pods, mine, HOST_GW, listed=True), HOST_GW)
    subnet, via = lease(pods).subnets[0], pack_address(gateway) if gateway else b""
    hop = NextHop(NEXTHOP_BASE + 5 * 65536 + 34 * 256, via, LINK)
    routes = {
        "4": (hop, Route(subnet, nexthop=hop.id, mtu=1400)),
        "6": (Route(subnet, gateway=via, device=LINK, mtu=1400),),
    }
    assert found == ((Guard(via), *routes[pods]) if gateway else ())
    assert entries(lease(pods, theirs, vtep=False, mtu=1400), here(pods, mine, HOST_GW), HOST_GW) == found[1:]


def test_ipv4_goes_by_an_ipv6_gateway_in_a_nexthop_object_alone() -> None:
    assert entries(lease("4", "6"), here("4", "6", HOST_GW, nexthops=False), HOST_GW) == ()
    (route,) = entries(lease("4", "4"), here("4", "4", HOST_GW, nexthops=False), HOST_GW)
    assert route == Route(Prefix.parse("10.5.34.0/24"), gateway=pack_address("192.168.0.5"), device=LINK)


def test_peer_behind_a_router_is_not_routed_to() -> None:
    assert entries(lease(), replace(here(backend=HOST_GW), on_link=()), HOST_GW) == ()


def test_allocation_alone_programs_nothing() -> None:
    assert entries(lease(), here(backend=ALLOC), ALLOC) == ()


@pytest.mark.parametrize("pods", ["4", "6", "46"])
def test_direct_routing_routes_on_the_link_and_tunnels_beyond(pods: str) -> None:
    place = here(pods, "46", DIRECT, listed=True)
    peer = lease(pods, "46")
    near = entries(peer, place, DIRECT)
    let_in = [Guard, Fdb]
    assert [type(entry) for entry in near] == [
        *([*let_in, NextHop, Route] if "4" in pods else []),
        *([*let_in, Route] if "6" in pods else []),
    ], "the peer may tunnel what we route"
    assert {
        entry.device for entry in near if isinstance(entry, NextHop) or (isinstance(entry, Route) and entry.device)
    } == {LINK}
    far = entries(peer, replace(place, on_link=()), DIRECT)
    assert far == entries(peer, here(pods, "46", listed=True))
    # Without tunnels of a common family it is routed all the same.
    assert entries(peer, replace(place, tunnels={}), DIRECT) == tuple(
        entry for entry in near if isinstance(entry, NextHop | Route)
    )


# --- the mark ---

OURS: list[tuple[Entry, bool]] = [
    (Guard(pack_address("192.168.0.5")), True),
    (Fdb((7, MAC), pack_address("192.168.0.5")), True),
    (Fdb((7, MAC), b"", 0xC0), True),
    (Fdb((7, MAC), pack_address("192.168.0.5"), 2), False),
    (Neighbour((7, pack_address("10.5.34.0")), MAC), True),
    (Neighbour((7, pack_address("ff02::16")), MAC, 0x40), False),
    (NextHop(NEXTHOP_BASE, b"", 7), True),
    (NextHop(NEXTHOP_BASE, b"", 7, protocol=0), False),
    (NextHop(NEXTHOP_BASE - 1, b"", 7), False),
    (NextHop(NEXTHOP_BASE + NEXTHOP_SPAN, b"", 7), False),
    (Route(Prefix.parse("10.5.34.0/24"), nexthop=5), True),
    (Route(Prefix.parse("fd00:0:0:34::/64"), device=7), True),
    (Route(Prefix.parse("192.0.2.0/24"), nexthop=NEXTHOP_BASE + 256), True),
    (Route(Prefix.parse("192.0.2.0/24"), nexthop=5), False),
    (Route(Prefix.parse("fd00:0:0:34::/64"), device=8, protocol=PROTOCOL_BOOT), True),
    (Route(Prefix.parse("10.5.34.0/24"), device=7, protocol=PROTOCOL_BOOT), True),
    (Route(Prefix.parse("10.5.34.0/24"), device=9, protocol=PROTOCOL_BOOT), False),
    (Route(Prefix.parse("10.5.34.0/24"), device=0, protocol=PROTOCOL_BOOT), False),
    (Route(Prefix.parse("192.0.2.0/24"), device=7, protocol=PROTOCOL_BOOT), False),
    (Route(Prefix.parse("10.0.0.0/7"), device=7, protocol=PROTOCOL_BOOT), False),
    (Route(Prefix.parse("10.5.34.0/24"), device=7, protocol=4), False),
]


@pytest.mark.parametrize(("entry", "expected"), OURS)
def test_mark_of_our_own_entries(entry: Entry, expected: bool) -> None:
    assert ours(entry, here("46", "46")) is expected


@pytest.mark.parametrize(
    ("backend", "expected"), [('"Type":"vxlan"', False), (DIRECT, True), (HOST_GW, True), (ALLOC, False)]
)
def test_routes_that_others_left_on_the_underlays_link_are_ours_where_we_would_make_such(
    backend: str, expected: bool
) -> None:
    place = here("4", "4", backend)
    left = Route(Prefix.parse("10.5.34.0/24"), gateway=pack_address("192.168.0.5"), device=LINK, protocol=PROTOCOL_BOOT)
    assert ours(left, place) is expected
    assert ours(left._replace(protocol=111), place), "what bears our number is ours wherever it is"


def test_entries_that_are_not_plain_have_words_too() -> None:
    assert str(Fdb((7, MAC), b"")) == "fdb 02:00:00:00:00:01 dst several"
    assert str(NextHop(5, b"", 7)) == "nexthop 5 via nothing"
    assert str(Route(Prefix.parse("10.5.34.0/24"), protocol=3)) == "route 10.5.34.0/24 protocol 3"
    assert str(Route(Prefix.parse("10.5.34.0/24"), 5, mtu=1400)) == "route 10.5.34.0/24 nhid 5 mtu 1400"
    via = Route(Prefix.parse("fd00::/64"), gateway=pack_address("fd00::"), device=7)
    assert str(via) == "route fd00::/64 via fd00:: protocol 111"
