"""The lease table: which leases a host believes, whatever anybody writes, in whatever order it arrives."""

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subnet_lease.model import (
    Lease,
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    Vtep,
    decode_attrs,
    encode_attrs,
    pack_address,
    pack_mac,
    parse_subnet_key,
    subnet_key,
)
from subnet_lease.store import Changes, Deleted, Record, Snapshot
from subnet_lease.table import CLASHES, NOBODY, Host, LeaseTable, possible_host

CONFIG = NetworkConfig.parse(b'{"Network":"10.0.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}')
HOST = Host(
    "10.0.200.0-24",
    (Prefix.parse("10.0.200.0/24"),),
    (pack_address("172.30.0.200"),),
    (pack_mac("02:00:00:00:00:c8"),),
    links=(Prefix.parse("10.0.128.0/22"),),
)
BOTH = NetworkConfig.parse(
    b'{"Network":"10.0.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'
)
BOTH_HOST = Host(
    "10.0.200.0-24&fd00:5:0:c8::-64",
    (Prefix.parse("10.0.200.0/24"), Prefix.parse("fd00:5:0:c8::/64")),
    (pack_address("172.30.0.200"), pack_address("fd11::c8")),
    (pack_mac("02:00:00:00:00:c8"), pack_mac("02:06:00:00:00:c8")),
    links=(Prefix.parse("fd00:5:0:80::/60"),),
)
CLUSTER = 77


def value(host: int, **changes: object) -> bytes:
    """The lease value of host number `host`; `changes` to the JSON, None removes a key."""
    attrs = LeaseAttrs(pack_address(f"172.30.0.{host}"), "vxlan", Vtep(1, b"\x02\0\0\0\0" + bytes([host])))
    fields = {**json.loads(encode_attrs(attrs)), **changes}
    return json.dumps(fields).encode()


def record(key: str, host: int, created: int, modified: int = 0, **changes: object) -> Record:
    return Record(key, value(host, **changes), 1, created, modified or created)


def value6(host: int, **changes: object) -> bytes:
    """As `value`, of a host whose underlay has IPv6 alone unless `changes` give it a PublicIP and BackendData."""
    vtep = Vtep(1, b"\x02\6\0\0\0" + bytes([host]))
    attrs = LeaseAttrs(None, "vxlan", None, pack_address(f"fd11::{host:x}"), vtep)
    return json.dumps({**json.loads(encode_attrs(attrs)), **changes}).encode()


def record6(key: str, host: int, created: int, **changes: object) -> Record:
    return Record(key, value6(host, **changes), 1, created, created)


def key6(number: int, length: int = 64) -> str:
    """The key of IPv6 subnet fd00:5:0:number::/length alone."""
    return subnet_key(None, Prefix.parse(f"fd00:5:0:{number:x}::/{length}"))


def backend_data(mac: str, vni: int = 1) -> dict[str, object]:
    return {"VNI": vni, "VtepMAC": mac}


def snapshot(*records: Record, revision: int = 100, cluster: int = CLUSTER) -> Snapshot:
    return Snapshot(records, revision, cluster)


def changes(*events: Record | Deleted) -> Changes:
    return Changes(events, events[-1].mod_revision)


def table(*records: Record, config: NetworkConfig = CONFIG, host: Host = HOST) -> LeaseTable:
    made = LeaseTable(config, host)
    made.replace(snapshot(*records))
    return made


def accepted(made: LeaseTable) -> set[str]:
    return {key for key, _ in made.peers()}


# --- one lease by itself ---


def test_good_lease_is_accepted_as_it_was_written() -> None:
    made = table(record("10.0.1.0-24", 1, 5, 6))
    attrs = LeaseAttrs(pack_address("172.30.0.1"), "vxlan", Vtep(1, pack_mac("02:00:00:00:00:01")))
    assert made.accepted("10.0.1.0-24") == Lease(Prefix.parse("10.0.1.0/24"), None, attrs, 1, 5, 6)
    assert (dict(made.rejected), made.rejected_count, made.revision) == ({}, 0, 100)


def test_own_lease_is_neither_accepted_nor_rejected() -> None:
    made = table(record(HOST.key, 200, 1), record("10.0.1.0-24", 1, 2))
    assert accepted(made) == {"10.0.1.0-24"}
    assert made.rejected_count == 0
    assert made.apply(changes(record(HOST.key, 200, 1, 101), Deleted(HOST.key, 102))) == set()


def test_nobody_is_in_no_leases_way() -> None:
    made = LeaseTable(CONFIG, NOBODY)
    made.replace(snapshot(record(HOST.key, 200, 1), record("10.0.130.0-24", 1, 2), record("", 2, 3)))
    assert accepted(made) == {HOST.key, "10.0.130.0-24"}
    assert made.rejected.keys() == {""}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record("10.1.0.0-24", 1, 5), "the subnet lies outside 10.0.0.0/16"),
        (record("10.0.0.0-15", 1, 5), "the subnet lies outside 10.0.0.0/16"),
        (record("10.0.200.0-25", 1, 5), "the subnet overlaps this host's own, 10.0.200.0/24"),
        (record("10.0.192.0-20", 1, 5), "the subnet overlaps this host's own, 10.0.200.0/24"),
        (record("10.0.130.0-24", 1, 5), "the subnet overlaps 10.0.128.0/22, which a link of this host uses"),
        (record("10.0.1.0-24", 1, 5, BackendType="host-gw"), "the backend is 'host-gw', the network's is 'vxlan'"),
        (record("10.0.1.0-24", 1, 5, BackendData=None), "BackendData has no VtepMAC"),
        (
            record("10.0.1.0-24", 1, 5, BackendData={"VNI": 2, "VtepMAC": "02:00:00:00:00:01"}),
            "the VNI is 2, the network's is 1",
        ),
        (
            record("10.0.1.0-24", 1, 5, BackendData={"VNI": 1, "VtepMAC": "03:00:00:00:00:01"}),
            "VtepMAC 03:00:00:00:00:01 is not the address of one device",
        ),
        (
            record("10.0.1.0-24", 1, 5, BackendData={"VNI": 1, "VtepMAC": "00:00:00:00:00:00"}),
            "VtepMAC 00:00:00:00:00:00 is not the address of one device",
        ),
        (
            record("10.0.1.0-24", 1, 5, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:c8"}),
            "VtepMAC 02:00:00:00:00:c8 is this host's own",
        ),
        (record("10.0.1.0-24", 200, 5, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:01"}),
         "PublicIP 172.30.0.200 is this host's own"),
        (record("10.0.1.0-24", 1, 5, PublicIP="10.0.7.7"), "PublicIP 10.0.7.7 lies inside the overlay, 10.0.0.0/16"),
        (record("10.0.1.0-24", 1, 5, PublicIP="0.1.2.3"), "PublicIP 0.1.2.3 cannot be a host's address"),
        (record("10.0.1.0-24", 1, 5, PublicIP="127.0.0.1"), "PublicIP 127.0.0.1 cannot be a host's address"),
        (record("10.0.1.0-24", 1, 5, PublicIP="239.1.1.1"), "PublicIP 239.1.1.1 cannot be a host's address"),
        (record("10.0.1.0-24", 1, 5, PublicIP="255.255.255.255"), "PublicIP 255.255.255.255 cannot be a host's"),
        (record("10.0.1.0-24", 1, 5, PublicIP="nonsense"), "PublicIP: 'nonsense' is not an IP address"),
        (record("10.0.1.9-24", 1, 5), "the key names no subnet: "),
        (record("nonsense", 1, 5), "the key names no subnet: "),
        (Record("10.0.1.0-24", b"", 1, 5, 5), "the value is not JSON"),
    ],
)  # fmt: skip
def test_lease_that_no_host_may_believe_is_rejected_with_its_reason(bad: Record, reason: str) -> None:
    made = table(bad, record("10.0.9.0-24", 9, 6))
    assert accepted(made) == {"10.0.9.0-24"}
    assert made.rejected[bad.key].startswith(reason)
    assert made.rejected_count == 1


@pytest.mark.parametrize(
    ("bad", "clash"),
    [
        (record("10.0.200.0-25", 1, 5), "subnet"),
        (record("10.0.130.0-24", 1, 5), "link"),
        (record("10.0.1.0-24", 1, 5, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:c8"}), "mac"),
        (record("10.0.1.0-24", 200, 5, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:01"}), "address"),
        (record6(key6(1), 1, 5), ""),
        (record("10.0.1.0-24", 1, 5, BackendType="host-gw"), "network"),
        (record("10.0.1.0-24", 1, 5, BackendData={"VNI": 2, "VtepMAC": "02:00:00:00:00:01"}), "network"),
        (record("10.0.1.0-24", 1, 5, PublicIP="127.0.0.1"), ""),
        (Record("10.0.1.0-24", b"", 1, 5, 5), ""),
        (record("10.0.9.0-25", 10, 10), "subnet"),
        (record("10.0.10.0-24", 10, 10, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:09"}), "mac"),
        (record("10.0.10.0-24", 9, 10, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:0a"}), "address"),
    ],
)
def test_rejection_says_for_programs_what_it_clashes_with(bad: Record, clash: str) -> None:
    made = table(record("10.0.9.0-24", 9, 4), bad)
    ((key, reason),) = made.some_rejected(9)
    assert (key, reason.clash, made.rejected[key].clash) == (bad.key, clash, clash)
    assert clash in ("", *CLASHES)


def test_rejected_leases_are_counted_by_the_sort_of_the_reason() -> None:
    tunnel = {"VNI": 2, "VtepMAC": "02:00:00:00:00:01"}
    made = table(
        record("nonsense", 1, 5),
        Record("10.0.1.0-24", b"", 1, 5, 5),
        record("10.1.0.0-24", 2, 6),
        record("10.0.3.0-24", 3, 7, BackendData=tunnel),
        record("10.0.4.0-24", 4, 8, PublicIP="127.0.0.1"),
        record("10.0.9.0-24", 9, 9),
        record("10.0.9.0-25", 10, 10),
    )
    counts = {"malformed": 2, "subnet": 1, "network": 1, "endpoint": 1, "contested": 1}
    assert made.rejected_by_sort == counts
    assert sum(counts.values()) == made.rejected_count
    made.apply(changes(Deleted("nonsense", 11), record("10.0.3.0-24", 3, 7, 12), Deleted("10.0.9.0-24", 13)))
    assert made.rejected_by_sort == {"malformed": 1, "subnet": 1, "network": 0, "endpoint": 1, "contested": 0}
    made.replace(snapshot(record("10.0.9.0-25", 10, 10), revision=20))
    assert made.rejected_by_sort == dict.fromkeys(counts, 0)


def test_lease_may_not_span_more_blocks_than_any_agent_writes() -> None:
    config = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","SubnetLen":28,"Backend":{"Type":"vxlan"}}')
    made = LeaseTable(config, HOST)
    made.replace(snapshot(record("10.16.0.0-19", 1, 5), record("10.32.0.0-20", 2, 6)))
    assert made.rejected == {"10.16.0.0-19": "the subnet spans more than 256 subnets of /28"}
    assert accepted(made) == {"10.32.0.0-20"}


def test_rejected_lease_that_is_mended_is_accepted() -> None:
    made = table(Record("10.0.1.0-24", b"", 1, 5, 5))
    assert made.apply(changes(record("10.0.1.0-24", 1, 5, 101))) == {"10.0.1.0-24"}
    assert (accepted(made), made.rejected_count) == ({"10.0.1.0-24"}, 0)


def test_each_key_stands_as_a_lease_a_reason_or_nothing() -> None:
    made = table(record("10.0.1.0-24", 1, 5), record("10.0.1.128-25", 2, 6), Record("10.0.3.0-24", b"", 1, 7, 7))
    assert made.standing("10.0.1.0-24") == made.accepted("10.0.1.0-24") is not None
    for key in ("10.0.1.128-25", "10.0.3.0-24"):
        assert made.standing(key) == made.rejected[key]
    assert made.standing("10.0.4.0-24") is None


def test_accepted_lease_that_is_spoiled_is_withdrawn() -> None:
    made = table(record("10.0.1.0-24", 1, 5))
    assert made.apply(changes(Record("10.0.1.0-24", b"x", 1, 5, 101))) == {"10.0.1.0-24"}
    assert accepted(made) == set()
    assert made.apply(changes(Deleted("10.0.1.0-24", 102))) == set()
    assert made.rejected_count == 0


# --- address families and backends ---


def test_lease_of_both_families_is_accepted_with_both_subnets_and_vteps() -> None:
    vtep = {"PublicIP": "172.30.0.1", "BackendData": backend_data("02:00:00:00:00:01")}
    key = "10.0.1.0-24&fd00:5:0:1::-64"
    made = table(record6(key, 1, 5, **vtep), config=BOTH, host=BOTH_HOST)
    lease = made.accepted(key)
    assert lease is not None
    assert str(lease) == "10.0.1.0/24 and fd00:5:0:1::/64"
    assert lease.attrs == LeaseAttrs(
        pack_address("172.30.0.1"),
        "vxlan",
        Vtep(1, pack_mac("02:00:00:00:00:01")),
        pack_address("fd11::1"),
        Vtep(1, pack_mac("02:06:00:00:00:01")),
    )


@pytest.mark.parametrize(
    ("key", "cut"),
    [
        ("10.0.1.0-24", "10.0.1.0/24"),
        ("10.0.1.0-24&fd00:5:0:1::-64", "10.0.1.0/24"),
        ("10.0.1.0-24&fd99::-64", "10.0.1.0/24"),
    ],
)
def test_lease_counts_as_far_as_a_network_of_ipv4_goes(key: str, cut: str) -> None:
    made = table(record(key, 1, 5))
    assert str(made.accepted(key)) == cut
    assert made.apply(changes(Deleted(key, 101))) == {key}
    assert not made._claims._holders


def test_lease_counts_as_far_as_a_network_of_ipv6_goes() -> None:
    config = NetworkConfig.parse(
        b'{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'
    )
    dual, alone, none = "10.0.1.0-24&fd00:5:0:1::-64", key6(2), "10.0.3.0-24"
    made = table(record(dual, 1, 5), record6(alone, 2, 6), record(none, 3, 7), config=config, host=NOBODY)
    assert {key: str(lease) for key, lease in made.peers()} == {dual: "fd00:5:0:1::/64", alone: "fd00:5:0:2::/64"}
    assert made.rejected == {none: "it has no subnet in fd00:5::/48"}


def test_lease_of_ipv6_alone_is_rejected_in_a_network_of_ipv4() -> None:
    assert table(record(key6(1), 1, 5)).rejected == {key6(1): "it has no subnet in 10.0.0.0/16"}


def test_lease_of_one_family_is_accepted_in_a_network_of_both() -> None:
    made = table(record("10.0.1.0-24", 1, 5), record6(key6(2), 2, 6), config=BOTH, host=BOTH_HOST)
    assert accepted(made) == {"10.0.1.0-24", key6(2)}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record6("10.0.1.0-24&fd00:6::-64", 1, 5), "the subnet lies outside fd00:5::/48"),
        (record6("10.9.1.0-24&fd00:5:0:1::-64", 1, 5), "the subnet lies outside 10.0.0.0/16"),
        (record6(key6(0, 48), 1, 5), "the subnet spans more than 256 subnets of /64"),
        (record6("0.0.0.0-0&fd00:5:0:c8:8000::-65", 1, 5), "the subnet overlaps this host's own, fd00:5:0:c8::/64"),
        (record6(key6(0x81), 1, 5), "the subnet overlaps fd00:5:0:80::/60, which a link of this host uses"),
        (record6(key6(1), 1, 5, PublicIPv6="::"), "PublicIPv6 :: cannot be a host's address"),
        (record6(key6(1), 1, 5, PublicIPv6="::1"), "PublicIPv6 ::1 cannot be a host's address"),
        (record6(key6(1), 1, 5, PublicIPv6="ff02::1"), "PublicIPv6 ff02::1 cannot be a host's address"),
        (record6(key6(1), 1, 5, PublicIPv6="::ffff:172.30.0.1"), "PublicIPv6 ::ffff:"),
        (record6(key6(1), 1, 5, PublicIPv6="fe80::1"), "PublicIPv6 fe80::1 cannot be a host's address"),
        (record6(key6(1), 1, 5, PublicIPv6="fd00:5:0:9::1"), "PublicIPv6 fd00:5:0:9::1 lies inside the overlay, fd00:"),
        (record6(key6(1), 1, 5, PublicIPv6="fd11::c8"), "PublicIPv6 fd11::c8 is this host's own"),
        (record6(key6(1), 1, 5, PublicIPv6=None), "BackendV6Data has a VtepMAC, and there is no PublicIPv6"),
        (record6(key6(1), 1, 5, BackendV6Data=None), "BackendV6Data has no VtepMAC"),
        (record6(key6(1), 1, 5, BackendV6Data=backend_data("02:00:00:00:00:01", 2)), "the VNI is 2, the network's"),
        (record6(key6(1), 1, 5, BackendV6Data=backend_data("03:00:00:00:00:01")), "VtepMAC 03:00:00:00:00:01 is not"),
        (record6(key6(1), 1, 5, BackendV6Data=backend_data("02:00:00:00:00:c8")), "VtepMAC 02:00:00:00:00:c8 is this"),
        (
            record6(key6(1), 1, 5, PublicIP="172.30.0.1", BackendData=backend_data("02:06:00:00:00:01")),
            "VtepMAC 02:06:00:00:00:01 stands for two addresses",
        ),
        (
            record6(key6(1), 1, 5, PublicIPv6="ff02::1", PublicIP="172.30.0.1",
                    BackendData=backend_data("02:06:00:00:00:01")),
            "PublicIPv6 ff02::1 cannot be a host's address",
        ),
        (record6(key6(1), 1, 5, PublicIP="172.30.0.1"), "BackendData has no VtepMAC"),
        (record6(key6(1), 1, 5, BackendData=backend_data("02:00:00:00:00:01")), "BackendData has a VtepMAC, and"),
        (
            record6(key6(1), 1, 5, PublicIPv6=None, BackendV6Data=None),
            "its underlay has no address of a family that this host's has",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_either_family_is_said(bad: Record, reason: str) -> None:
    made = table(bad, record("10.0.9.0-24", 9, 6), config=BOTH, host=BOTH_HOST)
    assert accepted(made) == {"10.0.9.0-24"}
    assert made.rejected[bad.key].startswith(reason)


@pytest.mark.parametrize(("own", "reached"), [("172.30.0.200", "10.0.1.0-24"), ("fd11::c8", key6(2))])
def test_leases_on_an_underlay_of_another_family_alone_are_rejected(own: str, reached: str) -> None:
    host = Host("none", (), (pack_address(own),), ())
    made = table(record("10.0.1.0-24", 1, 5), record6(key6(2), 2, 6), config=BOTH, host=host)
    assert accepted(made) == {reached}
    assert set(made.rejected.values()) == {"its underlay has no address of a family that this host's has"}


def test_one_mac_for_addresses_of_two_families_is_a_contest() -> None:
    thief = record6(key6(2), 2, 6, BackendV6Data=backend_data("02:00:00:00:00:01"))
    made = table(thief, record("10.0.1.0-24", 1, 5), config=BOTH, host=BOTH_HOST)
    assert made.rejected == {key6(2): "VtepMAC 02:00:00:00:00:01 has longer been 172.30.0.1's"}


def test_two_macs_for_one_ipv6_address_are_a_contest() -> None:
    thief = record6(key6(2), 1, 6, BackendV6Data=backend_data("02:00:00:00:00:02"))
    made = table(thief, record6(key6(1), 1, 5), config=BOTH, host=BOTH_HOST)
    assert made.rejected == {
        key6(2): "PublicIPv6 fd11::1 has longer been that of fd00:5:0:1::/64 with VtepMAC 02:06:00:00:00:01"
    }


def test_overlap_in_either_family_is_a_contest() -> None:
    elder, younger = "10.0.1.0-24&fd00:5:0:1::-64", "10.0.2.0-24&fd00:5:0:1::-64"
    made = table(record6(elder, 1, 5), record6(younger, 2, 6), config=BOTH, host=BOTH_HOST)
    assert made.rejected == {younger: "the subnet overlaps fd00:5:0:1::/64, which fd11::1 has held for longer"}
    assert made.apply(changes(Deleted(elder, 101))) == {elder, younger}
    assert accepted(made) == {younger}


def test_odd_subnets_of_ipv6_are_contested_too() -> None:
    made = table(record6(key6(4, 62), 1, 5), record6(key6(5), 2, 6), config=BOTH, host=BOTH_HOST)
    assert made.rejected == {key6(5): "the subnet overlaps fd00:5:0:4::/62, which fd11::1 has held for longer"}
    made.apply(changes(Deleted(key6(4, 62), 101)))
    assert accepted(made) == {key6(5)}
    assert not made._odd


def without_tunnel(backend: str, address: str | None = "172.30.0.1", **more: object) -> bytes:
    fields = {"PublicIP": address or "0.0.0.0", "BackendType": backend, **more}
    return json.dumps({name: content for name, content in fields.items() if content is not None}).encode()


def network_of(backend: str) -> NetworkConfig:
    return NetworkConfig.parse(b'{"Network":"10.0.0.0/16","Backend":{"Type":"%s"}}' % backend.encode())


def test_host_of_a_backend_without_a_tunnel_may_have_several_subnets_and_no_mac() -> None:
    value = without_tunnel("host-gw", BackendData=backend_data("nonsense"))
    good = [Record(f"10.0.{n}.0-24", without_tunnel("host-gw"), 1, n, n) for n in (1, 2)]
    bad = [
        Record("10.0.3.0-24", value, 1, 3, 3),
        Record("10.0.4.0-24", without_tunnel("host-gw", "172.30.0.200"), 1, 4, 4),
        Record("10.0.5.0-24", without_tunnel("host-gw", None), 1, 5, 5),
        Record("10.0.6.0-24", without_tunnel("host-gw", None, BackendData=backend_data("02:00:00:00:00:01")), 1, 6, 6),
        Record("10.0.2.0-25", without_tunnel("host-gw", "172.30.0.9"), 1, 7, 7),
    ]
    made = table(*good, *bad, config=network_of("host-gw"))
    assert accepted(made) == {"10.0.1.0-24", "10.0.2.0-24"}
    assert dict(made.rejected) == {
        "10.0.3.0-24": "BackendData.VtepMAC: 'nonsense' is not a MAC address",
        "10.0.4.0-24": "PublicIP 172.30.0.200 is this host's own",
        "10.0.5.0-24": "its underlay has no address of a family that this host's has",
        "10.0.6.0-24": "its underlay has no address of a family that this host's has",
        "10.0.2.0-25": "the subnet overlaps 10.0.2.0/24, which 172.30.0.1 has held for longer",
    }


def test_addresses_do_not_matter_where_subnets_are_only_handed_out() -> None:
    records = [
        Record("10.0.1.0-24", without_tunnel("alloc", "172.30.0.200"), 1, 1, 1),
        Record("10.0.2.0-24", without_tunnel("alloc", None, BackendType=None), 1, 2, 2),
        Record("10.0.2.0-25", without_tunnel("alloc", "10.0.0.1"), 1, 3, 3),
        Record("10.0.3.0-24", without_tunnel("vxlan"), 1, 4, 4),
    ]
    made = table(*records, config=network_of("alloc"))
    assert accepted(made) == {"10.0.1.0-24", "10.0.2.0-24"}
    assert dict(made.rejected) == {
        "10.0.2.0-25": "the subnet overlaps 10.0.2.0/24, which another host has held for longer",
        "10.0.3.0-24": "the backend is 'vxlan', the network's is 'alloc'",
    }


@pytest.mark.parametrize("address", ["172.30.0.1", "10.0.0.1", "fd11::1", "2001:db8::1", "fc00::"])
def test_possible_hosts_are(address: str) -> None:
    assert possible_host(pack_address(address))


# --- leases against each other ---


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("10.0.4.0-22", "10.0.5.64-26"),
        ("10.0.4.0-22", "10.0.7.0-24"),
        ("10.0.5.0-24", "10.0.5.64-26"),
        ("10.0.5.128-25", "10.0.5.128-26"),
    ],
)
def test_of_overlapping_subnets_the_elder_is_accepted(one: str, other: str) -> None:
    for elder, younger in ((one, other), (other, one)):
        made = table(record(younger, 2, 9), record(elder, 1, 5))
        assert accepted(made) == {elder}
        held = elder.replace("-", "/")
        assert made.rejected == {younger: f"the subnet overlaps {held}, which 172.30.0.1 has held for longer"}


def test_subnets_that_share_a_block_without_overlapping_are_no_contest() -> None:
    assert len(accepted(table(record("10.0.5.0-25", 1, 5), record("10.0.5.128-25", 2, 6)))) == 2


def test_of_two_hosts_with_one_mac_the_elder_is_accepted() -> None:
    thief = record("10.0.2.0-24", 2, 6, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:01"})
    made = table(thief, record("10.0.1.0-24", 1, 5))
    assert made.rejected == {"10.0.2.0-24": "VtepMAC 02:00:00:00:00:01 has longer been 172.30.0.1's"}


def test_of_two_macs_for_one_address_the_elder_is_accepted() -> None:
    thief = record("10.0.2.0-24", 2, 6, PublicIP="172.30.0.1")
    made = table(thief, record("10.0.1.0-24", 1, 5))
    assert made.rejected == {
        "10.0.2.0-24": "PublicIP 172.30.0.1 has longer been that of 10.0.1.0/24 with VtepMAC 02:00:00:00:00:01"
    }


def test_of_two_leases_made_in_one_transaction_the_first_key_is_accepted() -> None:
    assert accepted(table(record("10.0.5.0-25", 1, 5), record("10.0.5.0-24", 2, 5))) == {"10.0.5.0-24"}


def test_host_with_several_subnets_and_one_vtep_is_no_contest() -> None:
    assert len(accepted(table(record("10.0.1.0-24", 1, 5), record("10.0.2.0-24", 1, 6)))) == 2


def test_renewing_a_lease_makes_it_no_younger() -> None:
    made = table(record("10.0.5.0-24", 1, 5), record("10.0.5.0-25", 2, 6))
    made.apply(changes(record("10.0.5.0-24", 1, 5, 101)))
    assert accepted(made) == {"10.0.5.0-24"}


def test_loser_is_accepted_when_the_elder_goes() -> None:
    made = table(record("10.0.5.0-24", 1, 5), record("10.0.5.0-25", 2, 6))
    assert made.apply(changes(Deleted("10.0.5.0-24", 101))) == {"10.0.5.0-24", "10.0.5.0-25"}
    assert (accepted(made), made.rejected_count) == ({"10.0.5.0-25"}, 0)


def test_loser_is_accepted_when_the_elder_gives_way() -> None:
    made = table(record("10.0.1.0-24", 1, 5), record("10.0.2.0-24", 2, 6, PublicIP="172.30.0.1"))
    moved = record("10.0.1.0-24", 1, 5, 101, PublicIP="172.30.0.11")
    assert made.apply(changes(moved)) == {"10.0.1.0-24", "10.0.2.0-24"}
    assert len(accepted(made)) == 2


def test_accepted_lease_is_withdrawn_when_an_elder_turns_on_it() -> None:
    made = table(record("10.0.1.0-24", 1, 5), record("10.0.2.0-24", 2, 6))
    turned = record("10.0.1.0-24", 1, 5, 101, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:02"})
    assert made.apply(changes(turned)) == {"10.0.1.0-24", "10.0.2.0-24"}
    assert accepted(made) == {"10.0.1.0-24"}


# --- snapshots and changes ---


def test_changed_keys_are_those_whose_accepted_lease_differs() -> None:
    made = LeaseTable(CONFIG, HOST)
    one, two = record("10.0.1.0-24", 1, 5), record("10.0.2.0-24", 2, 6)
    assert made.replace(snapshot(one, two)) == {"10.0.1.0-24", "10.0.2.0-24"}
    assert made.replace(snapshot(one, two, revision=101)) == set()
    assert made.apply(changes(one)) == set()
    assert made.apply(changes(record("10.0.3.0-24", 3, 102), Deleted("10.0.3.0-24", 103))) == set()
    assert made.replace(snapshot(two, revision=104)) == {"10.0.1.0-24"}
    assert made.revision == 104


def test_empty_changes_move_the_revision_alone() -> None:
    made = table(record("10.0.1.0-24", 1, 5))
    assert made.apply(Changes((), 150)) == set()
    assert made.revision == 150


@pytest.mark.parametrize(("revision", "cluster"), [(50, CLUSTER), (200, CLUSTER + 1)], ids=["restored", "another"])
def test_revisions_of_an_older_store_or_another_cluster_prove_nothing(revision: int, cluster: int) -> None:
    made = table(record("10.0.1.0-24", 1, 5))
    # The same modification revision, and another value.
    other = record("10.0.1.0-24", 9, 5)
    assert made.replace(snapshot(other, revision=revision, cluster=cluster)) == {"10.0.1.0-24"}
    lease = made.accepted("10.0.1.0-24")
    assert lease is not None and lease.attrs.public_ip == pack_address("172.30.0.9")


def test_same_revision_of_the_same_cluster_is_not_decoded_again() -> None:
    made = table(record("10.0.1.0-24", 1, 5))
    before = made.accepted("10.0.1.0-24")
    made.replace(snapshot(record("10.0.1.0-24", 1, 5), revision=101))
    assert made.accepted("10.0.1.0-24") is before


# --- stores that went back or were replaced ---


@pytest.mark.parametrize(("revision", "cluster"), [(50, CLUSTER), (200, CLUSTER + 1)])
def test_peers_missing_from_a_store_that_is_not_the_same_linger(revision: int, cluster: int) -> None:
    one, two = record("10.0.1.0-24", 1, 5), record("10.0.2.0-24", 2, 6)
    made = table(one, two, record("nonsense", 3, 7))
    assert made.replace(snapshot(two, revision=revision, cluster=cluster)) == {"10.0.1.0-24"}
    assert (accepted(made), made.lingering, made.rejected_count) == ({"10.0.1.0-24", "10.0.2.0-24"}, 1, 0)
    # And still do when all is read again.
    assert made.replace(snapshot(two, revision=revision + 1, cluster=cluster)) == set()
    assert (accepted(made), made.lingering) == ({"10.0.1.0-24", "10.0.2.0-24"}, 1)


def test_peer_that_returns_lingers_no_more() -> None:
    made = table(record("10.0.1.0-24", 1, 5))
    made.replace(snapshot(revision=1))
    made.apply(changes(record("10.0.1.0-24", 1, 2)))
    assert (accepted(made), made.lingering) == ({"10.0.1.0-24"}, 0)
    assert made.let_go() == set()


def test_peer_that_does_not_return_is_let_go() -> None:
    made = table(record("10.0.1.0-24", 1, 5), record("10.0.2.0-24", 2, 6))
    made.replace(snapshot(record("10.0.2.0-24", 2, 6), revision=50))
    assert made.let_go() == {"10.0.1.0-24"}
    assert (accepted(made), made.lingering) == ({"10.0.2.0-24"}, 0)


@pytest.mark.parametrize("rival", ["10.0.1.0-24", "10.0.1.128-25", "10.0.0.0-23"])
def test_whoever_claims_the_same_is_heard_before_one_that_lingers(rival: str) -> None:
    made = table(record("10.0.1.0-24", 1, 5))
    made.replace(snapshot(record(rival, 9, 1000), revision=50))
    assert accepted(made) == {rival}


def test_second_subnet_of_a_host_lingers_beside_its_first() -> None:
    first, second = record("10.0.1.0-24", 1, 5), record("10.0.3.0-24", 1, 6)
    made = table(first, second)
    assert made.replace(snapshot(first, revision=50)) == {"10.0.3.0-24"}
    assert (accepted(made), made.lingering) == ({"10.0.1.0-24", "10.0.3.0-24"}, 1)


def test_peer_that_was_rejected_does_not_linger() -> None:
    made = table(record("10.0.1.0-24", 1, 5), record("10.0.1.128-25", 2, 6))
    made.replace(snapshot(revision=50))
    assert (accepted(made), made.lingering) == ({"10.0.1.0-24"}, 1)


def test_same_revision_on_another_etcd_lease_is_another_put() -> None:
    made = table(record("10.0.1.0-24", 1, 5, 6))
    other = record("10.0.1.0-24", 2, 5, 6)._replace(etcd_lease=2)
    assert made.replace(snapshot(other)) == {"10.0.1.0-24"}
    assert made.accepted("10.0.1.0-24") == made._decode(other)


# --- whatever is written, in whatever order ---

KEYS = [
    "10.0.1.0-24", "10.0.1.0-25", "10.0.1.128-25", "10.0.0.0-22", "10.0.2.0-23", "10.0.4.0-24", "10.0.5.0-24",
    "10.0.200.0-25", "10.0.129.0-24", HOST.key, "10.9.0.0-24", "nonsense",
]  # fmt: skip
KEYS_OF_BOTH = [
    "10.0.1.0-24&fd00:5:0:1::-64", "10.0.2.0-24&fd00:5:0:1::-64", "10.0.1.0-24&fd00:5:0:2::-64", key6(1), key6(0, 62),
    "10.0.3.0-24&fd00:5:0:3::-64", "10.0.0.0-22&fd00:5:0:8::-64", "10.0.4.0-24&fd00:9::-64", key6(0xC8, 63),
    BOTH_HOST.key, "10.9.0.0-24&fd00:5:0:4::-64",
]  # fmt: skip
Content = tuple[int, int, int, int] | bytes | None
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(KEYS),
        st.one_of(
            st.none(),
            st.tuples(st.integers(1, 4), st.integers(1, 4), st.just(0), st.just(0)),
            *map(st.just, (b"", b'{"PublicIP":3}')),
        ),
    ),
    max_size=30,
)
EVENTS_OF_BOTH = st.lists(
    st.tuples(
        st.sampled_from([*KEYS, *KEYS_OF_BOTH]),
        st.one_of(
            st.none(),
            st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(3, 5), st.integers(0, 3)),
            st.just(b""),
        ),
    ),
    max_size=30,
)


def records_of(events: list[tuple[str, Content]]) -> list[Record | Deleted]:
    """The events as a store would tell them: revisions count up, a key keeps its create revision while it lives.

    Numbers are those of MAC and address on the IPv4 underlay, then on the IPv6 one; 0 for an address it lacks.
    """
    told: list[Record | Deleted] = []
    created: dict[str, int] = {}
    for revision, (key, content) in enumerate(events, start=1):
        if content is None:
            if created.pop(key, None):
                told.append(Deleted(key, revision))
            continue
        if isinstance(content, tuple):
            mac, address, mac6, address6 = content
            attrs = LeaseAttrs(None, "vxlan", None)
            if address:
                vtep = Vtep(1, b"\x02\0\0\0\0" + bytes([mac]))
                attrs = attrs._replace(public_ip=pack_address(f"172.30.0.{address}"), vtep=vtep)
            if address6:
                vtep = Vtep(1, b"\x02\0\0\0\0" + bytes([mac6]))
                attrs = attrs._replace(public_ip6=pack_address(f"fd11::{address6}"), vtep6=vtep)
            content = encode_attrs(attrs)
        told.append(Record(key, content, 1, created.setdefault(key, revision), revision))
    return told


def in_the_end(events: list[Record | Deleted]) -> list[Record]:
    last: dict[str, Record | Deleted] = {event.key: event for event in events}
    return [event for event in last.values() if isinstance(event, Record)]


def endpoints(lease: Lease) -> list[tuple[bytes, bytes]]:
    pairs = (lease.attrs.vtep, lease.attrs.public_ip), (lease.attrs.vtep6, lease.attrs.public_ip6)
    return [(vtep.mac, address) for vtep, address in pairs if vtep is not None and address is not None]


def believable(records: list[Record], config: NetworkConfig, host: Host) -> dict[str, Lease]:
    """What the rules say, worked out the long way: each lease compared with all its elders."""
    leases: dict[str, Lease] = {}
    sizes = {len(block.base) for block in config.blocks}
    for each in records:
        try:
            subnet, subnet6 = (
                found if found is not None and len(found.base) in sizes else None
                for found in parse_subnet_key(each.key)
            )
            attrs = decode_attrs(each.value)
        except LeaseInvalid:
            continue
        lease = Lease(subnet, subnet6, attrs, 1, each.create_revision, each.mod_revision)
        inside = all(any(block.covers(found) for block in config.blocks) for found in lease.subnets)
        free = not any(found.overlaps(kept) for found in lease.subnets for kept in (*host.subnets, *host.links))
        pairs = endpoints(lease)
        reached = {len(address) for _, address in pairs} & {len(address) for address in host.addresses}
        one_to_one = len({mac for mac, _ in pairs}) == len(pairs)
        if each.key != host.key and lease.subnets and inside and free and reached and one_to_one:
            leases[each.key] = lease
    by_age = sorted(leases.items(), key=lambda item: (item[1].create_revision, item[0]))
    accepted: dict[str, Lease] = {}
    for number, (key, lease) in enumerate(by_age):
        so_far = [other for _, other in by_age[: number + 1]]

        def first_says(pair: tuple[bytes, bytes], elders: list[Lease] = so_far) -> bool:
            """Whether the eldest with this MAC, and the eldest with this address, have the other of the two as well."""
            with_mac = next(other for other in elders if pair[0] in (mac for mac, _ in endpoints(other)))
            with_address = next(other for other in elders if pair[1] in (address for _, address in endpoints(other)))
            return pair in endpoints(with_mac) and pair in endpoints(with_address)

        rivals = (held.overlaps(found) for other in so_far[:-1] for held in other.subnets for found in lease.subnets)
        if all(map(first_says, endpoints(lease))) and not any(rivals):
            accepted[key] = lease
    return accepted


def test_nothing_is_forgotten_in_the_oracle() -> None:
    """It knows nothing of lengths: no subnet here may span more blocks than a lease may."""
    for key in (*KEYS, *KEYS_OF_BOTH):
        try:
            subnet, subnet6 = parse_subnet_key(key)
        except LeaseInvalid:
            continue
        assert subnet is None or subnet.length >= 16
        assert subnet6 is None or subnet6.length >= 56


def check_outcome(
    config: NetworkConfig, host: Host, events: list[tuple[str, Content]], sizes: list[int], shuffled: Random
) -> None:
    told = records_of(events)
    final = in_the_end(told)
    step_by_step = LeaseTable(config, host)
    step_by_step.replace(Snapshot((), 0, CLUSTER))
    left = list(told)
    for size in sizes:
        batch, left = left[:size], left[size:]
        if batch:
            before = dict(step_by_step.peers())
            changed = step_by_step.apply(changes(*batch))
            after = dict(step_by_step.peers())
            assert changed == {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    at_once = table(config=config, host=host)
    shuffled.shuffle(final)
    at_once.replace(snapshot(*final, cluster=CLUSTER + 1))
    expected = believable(final, config, host)
    assert dict(at_once.peers()) == dict(step_by_step.peers()) == expected
    assert at_once.rejected.keys() == step_by_step.rejected.keys()
    assert at_once.rejected.keys() == {each.key for each in final} - expected.keys() - {host.key}
    assert at_once.rejected_count == len(at_once.rejected)
    step_by_step.apply(changes(*(Deleted(each.key, 1000) for each in final), Deleted("none", 1000)))
    assert not step_by_step._claims._holders and not step_by_step._odd


SIZES = st.lists(st.integers(1, 5), min_size=30, max_size=30)


@settings(max_examples=500)
@given(events=EVENTS, sizes=SIZES, shuffled=st.randoms())
def test_outcome_depends_on_the_records_alone(
    events: list[tuple[str, Content]], sizes: list[int], shuffled: Random
) -> None:
    check_outcome(CONFIG, HOST, events, sizes, shuffled)


def test_accepted_lease_is_withdrawn_when_an_elder_key_comes_to_name_its_subnet() -> None:
    made = table(record6("10.0.1.0-24&fd00:5:0:1::-64", 1, 6), config=BOTH, host=BOTH_HOST)
    made.apply(changes(Record("10.0.1.0-24", value(2), 1, 5, 101)))
    assert accepted(made) == {"10.0.1.0-24"}


@settings(max_examples=500)
@given(events=EVENTS_OF_BOTH, sizes=SIZES, shuffled=st.randoms())
def test_outcome_depends_on_the_records_alone_with_both_families(
    events: list[tuple[str, Content]], sizes: list[int], shuffled: Random
) -> None:
    check_outcome(BOTH, BOTH_HOST, events, sizes, shuffled)


@settings(max_examples=300)
@given(events=EVENTS_OF_BOTH)
def test_accepted_leases_never_collide(events: list[tuple[str, Content]]) -> None:
    made = LeaseTable(BOTH, BOTH_HOST)
    for event in records_of(events):
        made.apply(changes(event))
        leases = [lease for _, lease in made.peers()]
        pairs = {pair for lease in leases for pair in endpoints(lease)}
        assert len({mac for mac, _ in pairs}) == len({address for _, address in pairs}) == len(pairs)
        protected = (*BOTH_HOST.subnets, *BOTH_HOST.links)
        for number, lease in enumerate(leases):
            others = [subnet for other in leases[:number] for subnet in other.subnets]
            for subnet in lease.subnets:
                assert not any(subnet.overlaps(other) for other in (*others, *protected))
                assert any(block.covers(subnet) for block in BOTH.blocks)


@settings(max_examples=500)
@given(
    st.lists(
        st.builds(
            Record,
            st.one_of(st.sampled_from(KEYS), st.text(max_size=30), st.from_regex(r"10\.0\.[0-9]{1,3}\.0-[0-9]{1,2}")),
            st.one_of(
                st.binary(max_size=60),
                st.recursive(
                    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text()),
                    lambda inner: st.one_of(
                        st.lists(inner, max_size=3),
                        st.dictionaries(
                            st.sampled_from(
                                ["PublicIP", "BackendType", "BackendData", "VNI", "VtepMAC", "PublicIPv6", "MTU"]
                            ),
                            st.one_of(inner, st.sampled_from(["vxlan", "172.30.0.1", "02:00:00:00:00:01", 1])),
                            max_size=6,
                        ),
                    ),
                    max_leaves=12,
                ).map(lambda decoded: json.dumps(decoded).encode()),
                st.integers(1, 9).map(value),
            ),
            st.integers(0, 5),
            st.integers(1, 9),
            st.integers(1, 9),
        ),
        max_size=12,
        unique_by=lambda each: each.key,
    )
)
def test_hostile_records_never_raise(records: list[Record]) -> None:
    made = table(*records)
    made.apply(
        changes(*(each._replace(mod_revision=each.mod_revision + 1) for each in records), Deleted(HOST.key, 200))
    )
    keys = {each.key for each in records} - {HOST.key}
    assert accepted(made) | made.rejected.keys() == keys
    assert not accepted(made) & made.rejected.keys()
    # 64 characters of it are shown at most, each ten long where it is escaped.
    assert all(reason.isprintable() and len(reason) < 1000 for reason in made.rejected.values())


def test_second_subnet_of_a_host_is_accepted_though_an_impostor_came_between() -> None:
    impostor = record("10.0.2.0-24", 1, 2, BackendData={"VNI": 1, "VtepMAC": "02:00:00:00:00:99"})
    made = table(record("10.0.1.0-24", 1, 1), impostor, record("10.0.3.0-24", 1, 3))
    assert accepted(made) == {"10.0.1.0-24", "10.0.3.0-24"}


def test_thousands_of_leases_of_one_vtep_are_not_judged_anew_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = [record(f"10.0.{number >> 4}.{(number & 15) << 4}-28", 1, number + 1) for number in range(2000)]
    made = table(*crowd)
    assert len(accepted(made)) == 2000
    judged: list[str] = []
    judge = LeaseTable._judge

    def counted(self: LeaseTable, key: str) -> None:
        judged.append(key)
        judge(self, key)

    monkeypatch.setattr(LeaseTable, "_judge", counted)
    made.apply(changes(record("10.0.201.0-24", 1, 5000)))
    made.apply(changes(Deleted(crowd[1000].key, 5001)))
    assert judged == ["10.0.201.0-24"]


def test_reasons_do_not_depend_on_the_order_in_which_leases_are_told() -> None:
    records = [
        record("10.0.5.0-24", 1, 10),
        record("10.0.6.0-24", 1, 11, PublicIP="172.30.0.9"),
        record("10.0.5.0-25", 3, 12),
        record("10.0.7.0-24", 3, 13, PublicIP="172.30.0.1"),
    ]
    forwards, backwards = table(*records), table(*reversed(records))
    assert forwards.rejected == backwards.rejected
    assert accepted(forwards) == accepted(backwards) == {"10.0.5.0-24"}


def test_leases_can_be_had_by_number() -> None:
    made = table(*(record(f"10.0.{number}.0-24", number, number) for number in (1, 2, 3, 4)))
    keys = [f"10.0.{number}.0-24" for number in (1, 2, 3, 4)]
    assert made.places == 4
    assert made.at(range(4)) == keys
    assert made.at((3, 0)) == [keys[0], keys[3]]
    assert made.at((2, 9)) == [keys[2]], "some are gone by the time that they are asked for"
    assert made.at(()) == []
    assert made.host is HOST
