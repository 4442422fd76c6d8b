"""Reservations: what may be reserved for whom, and what a reservation says before its host has come."""

import argparse

import pytest

from overlay.reservations import (
    ReservationRefused,
    address_argument,
    check,
    own_record,
    reserved_value,
    subnets_argument,
)
from subnet_lease.model import LeaseAttrs, NetworkConfig, Prefix, Vtep, decode_attrs, encode_attrs, pack_address
from subnet_lease.store import Record

CONFIG = NetworkConfig.parse(b'{"Network":"10.5.0.0/16","SubnetMax":"10.5.200.0","Backend":{"Type":"vxlan","VNI":7}}')
SUBNET = (Prefix.parse("10.5.34.0/24"),)
HOST = pack_address("192.168.0.5")


def record(key: str, host: str = "192.168.0.5", *, etcd_lease: int = 1, name: str = "") -> Record:
    value = encode_attrs(LeaseAttrs(pack_address(host), "vxlan", Vtep(7, b"\x02\0\0\0\0\x01"), node_name=name))
    return Record(key, value, etcd_lease, 1, 1)


# --- the value ---


def test_reservation_is_a_lease_value_that_flanneld_can_read() -> None:
    attrs = decode_attrs(reserved_value(CONFIG, SUBNET, HOST))
    assert attrs.vtep is not None
    assert attrs == LeaseAttrs(HOST, "vxlan", Vtep(7, attrs.vtep.mac))
    assert attrs.vtep.mac[0] & 0b11 == 0b10, "locally administered, of one device"


def test_reservation_has_the_same_bytes_each_time_and_others_for_other_hosts_and_subnets() -> None:
    values = [
        reserved_value(CONFIG, subnet, host)
        for subnet in (SUBNET, (Prefix.parse("10.5.35.0/24"),))
        for host in (HOST, pack_address("192.168.0.6"))
    ]
    assert len({decode_attrs(value).vtep for value in values}) == 4
    assert reserved_value(CONFIG, SUBNET, HOST) == values[0]


def test_reservation_takes_no_mac_that_a_lease_has() -> None:
    value = reserved_value(CONFIG, SUBNET, HOST)
    # As a host that adopted the MAC and was given another address and subnet.
    moved = Record("10.5.9.0-24", value.replace(b"192.168.0.5", b"192.168.0.9").upper(), 1, 1, 1)
    assert decode_attrs(reserved_value(CONFIG, SUBNET, HOST, [moved])).vtep != decode_attrs(value).vtep


def test_reservation_is_refused_when_all_its_macs_are_taken() -> None:
    records: list[Record] = []
    with pytest.raises(ReservationRefused, match="all the MACs"):
        for number in range(100):
            value = reserved_value(CONFIG, SUBNET, HOST, records)
            records.append(Record(f"10.5.{number}.0-24", value, 1, 1, 1))
    assert len(records) == 8


def test_backend_without_a_tunnel_has_no_backend_data() -> None:
    config = NetworkConfig.parse(b'{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}')
    value = reserved_value(config, SUBNET, HOST)
    assert value == b'{"PublicIP":"192.168.0.5","PublicIPv6":null,"BackendType":"host-gw"}'


# --- what may be reserved ---


@pytest.mark.parametrize("subnet", ["10.5.1.0/24", "10.5.200.0/24"])
def test_every_subnet_that_could_be_handed_out_can_be_reserved(subnet: str) -> None:
    check(CONFIG, [Prefix.parse(subnet)], HOST)


@pytest.mark.parametrize(
    ("subnet", "host", "reason"),
    [
        ("10.5.34.0/25", "192.168.0.5", "hosts of this network have a /24 each; give one of that length"),
        ("10.5.0.0/24", "192.168.0.5", "10.5.0.0/24 does not lie between SubnetMin 10.5.1.0 and "),
        ("10.5.201.0/24", "192.168.0.5", "10.5.201.0/24 does not lie between SubnetMin 10.5.1.0 and "),
        ("10.6.1.0/24", "192.168.0.5", "10.6.1.0/24 does not lie between SubnetMin 10.5.1.0 and "),
        ("fd00:5:0:34::/64", "192.168.0.5", "hosts of this network have subnets as 10.5.1.0/24; give such a one"),
        ("10.5.34.0/24", "ff02::1", "--public-ip ff02::1 cannot be a host's address"),
        ("10.5.34.0/24", "10.5.1.1", "--public-ip 10.5.1.1 lies inside the overlay, 10.5.0.0/16; give the host's"),
        ("10.5.34.0/24", "127.0.0.1", "--public-ip 127.0.0.1 cannot be a host's address"),
        ("10.5.34.0/24", "224.0.0.1", "--public-ip 224.0.0.1 cannot be a host's address"),
        ("10.5.34.0/24", "255.255.255.255", "--public-ip 255.255.255.255 cannot be a host's address"),
    ],
)  # fmt: skip
def test_what_no_agent_would_use_is_refused(subnet: str, host: str, reason: str) -> None:
    with pytest.raises(ReservationRefused) as refused:
        check(CONFIG, [Prefix.parse(subnet)], pack_address(host))
    assert str(refused.value).startswith(reason)


BOTH = NetworkConfig.parse(
    b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'
)
SUBNETS = subnets_argument("fd00:5:0:34::/64,10.5.34.0/24")


@pytest.mark.parametrize(
    ("subnets", "host", "reason"),
    [
        (
            "10.5.34.0/24",
            "fd11::5",
            "hosts of this network have subnets as 10.5.1.0/24,fd00:5:0:1::/64; give such a one",
        ),
        ("10.5.34.0/24,fd00:5:0:34::/80", "fd11::5", "hosts of this network have a /64 each; give one of that length"),
        ("10.5.34.0/24,fd00:5::/64", "fd11::5", "fd00:5::/64 does not lie between IPv6SubnetMin fd00:5:0:1:: and IPv6"),
        ("10.5.34.0/24,fd00:5:0:34::/64", "fd00:5::1", "--public-ip fd00:5::1 lies inside the overlay, fd00:5::/48; "),
    ],
)
def test_what_no_agent_of_a_dual_stack_network_would_use_is_refused(subnets: str, host: str, reason: str) -> None:
    check(BOTH, SUBNETS, pack_address("fd11::5"))
    with pytest.raises(ReservationRefused) as refused:
        check(BOTH, subnets_argument(subnets), pack_address(host))
    assert str(refused.value).startswith(reason)


def test_host_without_ipv4_is_named_by_its_ipv6_address() -> None:
    attrs = decode_attrs(reserved_value(BOTH, SUBNETS, pack_address("fd11::5")))
    assert (attrs.public_ip, attrs.vtep, attrs.public_ip6) == (None, None, pack_address("fd11::5"))
    assert attrs.vtep6 is not None and attrs.vtep6.vni == 1


def test_overlap_in_either_family_is_in_the_way() -> None:
    for key in ("10.5.9.0-24&fd00:5:0:34::-64", "10.5.34.0-24&fd00:5:0:9::-64"):
        with pytest.raises(ReservationRefused) as refused:
            own_record([record(key, "192.168.0.6", etcd_lease=0)], SUBNETS, HOST)
        taken = key.replace("-24&", "/24,").replace("-64", "/64")
        assert str(refused.value) == (
            f"{taken.replace(',', ' and ')} are reserved for 192.168.0.6; take that back first: "
            f"overlay-agent unreserve {taken}"
        )
    own = record("10.5.34.0-24&fd00:5:0:34::-64")
    assert own_record([own], SUBNETS, HOST) == own


def test_subnet_that_nobody_has_is_free_whatever_else_there_is() -> None:
    others = [
        record("10.5.35.0-24", "192.168.0.55"),  # of which 192.168.0.5 is a part, as text
        Record("10.5.36.0-24", b"", 0, 1, 1),
        record("nonsense"),
    ]
    assert own_record(others, SUBNET, HOST) is None


@pytest.mark.parametrize("etcd_lease", [0, 1])
def test_own_record_is_found(etcd_lease: int) -> None:
    own = record("10.5.34.0-24", etcd_lease=etcd_lease)
    assert own_record([record("10.5.33.0-24", "192.168.0.4"), own], SUBNET, HOST) == own


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (
            record("10.5.34.0-24", "192.168.0.6", name="node-6"),
            "10.5.34.0/24 is leased by 192.168.0.6 (node-6); choose another, or stop that host's agent and give it "
            "back there: overlay-agent cleanup --release",
        ),
        (
            record("10.5.34.0-24", "192.168.0.6", etcd_lease=0),
            "10.5.34.0/24 is reserved for 192.168.0.6; take that back first: overlay-agent unreserve 10.5.34.0/24",
        ),
        (
            record("10.5.32.0-20", "192.168.0.6", etcd_lease=0),
            "10.5.32.0/20 is reserved for 192.168.0.6; take that back first: overlay-agent unreserve 10.5.32.0/20",
        ),
        (
            Record("10.5.34.0-24", b"", 0, 1, 1),
            "10.5.34.0/24 is reserved, with a value that cannot be read; take that back first: "
            "overlay-agent unreserve 10.5.34.0/24",
        ),
        (
            record("10.5.9.0-24"),
            "192.168.0.5 has 10.5.9.0/24 leased already; reserve that one, or stop its agent and give it back there: "
            "overlay-agent cleanup --release",
        ),
        (
            record("10.5.9.0-24", etcd_lease=0),
            "192.168.0.5 has 10.5.9.0/24 reserved already; take that back first: overlay-agent unreserve 10.5.9.0/24",
        ),
    ],
)
def test_what_is_in_the_way_is_named_with_the_way_out(other: Record, reason: str) -> None:
    for records in ([other], [record("10.5.34.0-24"), other]):
        with pytest.raises(ReservationRefused) as refused:
            own_record(records, SUBNET, HOST)
        assert str(refused.value) == reason


def test_name_of_a_host_does_nothing_to_a_terminal() -> None:
    with pytest.raises(ReservationRefused) as refused:
        own_record([record("10.5.34.0-24", "192.168.0.6", name="\x1b[2J" + "x" * 60_000)], SUBNET, HOST)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 250


# --- the command line ---


def test_arguments_are_read() -> None:
    assert subnets_argument("10.5.34.0/24") == SUBNET
    assert list(map(str, SUBNETS)) == ["10.5.34.0/24", "fd00:5:0:34::/64"]
    assert address_argument("192.168.0.5") == HOST
    assert address_argument("fd11::5") == pack_address("fd11::5")


@pytest.mark.parametrize("text", ["10.5.34.0", "10.5.34.1/24", "x", "", "10.5.34.0/24,", "10.5.34.0/24,10.5.35.0/24"])
def test_what_is_no_subnet_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        subnets_argument(text)


@pytest.mark.parametrize("text", ["fd00::1%eth0", "192.168.0.5/24", "192.168.0.05", ""])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        address_argument(text)
