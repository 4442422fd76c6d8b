"""Which entries a lease calls for, and which entries are ours."""

import pytest

from overlay.desired import Local, entries_for, nexthop_id, ours
from overlay.model import BUILD_ORDER, NEXTHOP_BASE, NEXTHOP_SPAN, Entry, Fdb, Neighbour, NextHop, Route
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, pack_address, pack_mac

NETWORK = Prefix.parse("10.0.0.0/8")
WITH, WITHOUT = Local(NETWORK, 7, True), Local(NETWORK, 7, False)
MAC = pack_mac("02:00:00:00:00:01")


def lease(subnet: str = "10.5.34.0/24", vtep: Vtep | None = Vtep(1, MAC)) -> Lease:  # noqa: B008 - immutable
    return Lease(Prefix.parse(subnet), None, LeaseAttrs(pack_address("192.168.0.5"), "vxlan", vtep), 1, 1, 1)


def test_peer_is_reached_by_an_fdb_entry_a_neighbour_a_nexthop_and_a_route() -> None:
    entries = entries_for(lease(), WITH)
    assert [str(entry) for entry in entries] == [
        "fdb 02:00:00:00:00:01 dst 192.168.0.5",
        "neighbour 10.5.34.0 lladdr 02:00:00:00:00:01",
        "nexthop 1862607360 via 10.5.34.0",
        "route 10.5.34.0/24 nhid 1862607360",
    ]
    assert tuple(type(entry) for entry in entries) == BUILD_ORDER
    assert all(ours(entry, WITH) for entry in entries)


def test_kernel_without_nexthop_objects_gets_the_gateway_in_the_route() -> None:
    *_, route = entries = entries_for(lease(), WITHOUT)
    assert len(entries) == 3
    assert str(route) == "route 10.5.34.0/24 via 10.5.34.0 protocol 111"
    assert route == Route(Prefix.parse("10.5.34.0/24"), gateway=pack_address("10.5.34.0"), device=7)


def test_peer_without_a_tunnel_calls_for_nothing() -> None:
    assert entries_for(lease(vtep=None), WITH) == ()


def test_keys_of_the_entries_of_one_peer_differ() -> None:
    entries = entries_for(lease(), WITH)
    assert len({entry[0] for entry in entries}) == 4


def test_nexthop_ids_differ_by_subnet_and_stay_in_our_range() -> None:
    subnets = [Prefix.parse("10.0.0.0/24"), Prefix.parse("10.0.1.0/24"), Prefix.parse("10.255.255.252/30")]
    ids = [nexthop_id(subnet, NETWORK) for subnet in subnets]
    assert ids == [NEXTHOP_BASE, NEXTHOP_BASE + 256, NEXTHOP_BASE + NEXTHOP_SPAN - 4]


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (Fdb(MAC, pack_address("192.168.0.5")), True),
        (Fdb(MAC, b"", 0xC0), True),
        (Fdb(MAC, pack_address("192.168.0.5"), 2), False),
        (Neighbour(pack_address("10.5.34.0"), MAC), True),
        (Neighbour(pack_address("10.5.34.0"), MAC, 0x40), False),
        (NextHop(NEXTHOP_BASE, b"", 7), True),
        (NextHop(NEXTHOP_BASE, b"", 7, protocol=0), False),
        (NextHop(NEXTHOP_BASE - 1, b"", 7), False),
        (NextHop(NEXTHOP_BASE + NEXTHOP_SPAN, b"", 7), False),
        (Route(Prefix.parse("10.5.34.0/24"), nexthop=5), True),
        (Route(Prefix.parse("10.5.34.0/24"), device=7, protocol=3), True),
        (Route(Prefix.parse("10.5.34.0/24"), device=8, protocol=3), False),
        (Route(Prefix.parse("192.0.2.0/24"), device=7, protocol=3), False),
        (Route(Prefix.parse("10.0.0.0/7"), device=7, protocol=3), False),
        (Route(Prefix.parse("10.5.34.0/24"), device=7, protocol=4), False),
    ],
)
def test_mark_of_our_own_entries(entry: Entry, expected: bool) -> None:
    assert ours(entry, WITH) is expected


def test_entries_that_are_not_plain_have_words_too() -> None:
    assert str(Fdb(MAC, b"")) == "fdb 02:00:00:00:00:01 dst several"
    assert str(NextHop(5, b"", 7)) == "nexthop 5 via nothing"
    assert str(Route(Prefix.parse("10.5.34.0/24"), protocol=3)) == "route 10.5.34.0/24 protocol 3"
