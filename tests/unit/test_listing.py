"""The list of leases: its rows, what agents make of them, and how it looks to people and to programs."""

import json
import re
from pathlib import Path

import pytest

from overlay.listing import Row, as_json, as_text, rows_of
from subnet_lease.model import LeaseAttrs, NetworkConfig, Prefix, Vtep, encode_attrs, pack_address
from subnet_lease.store import Record, Snapshot

NETWORK = (Prefix.parse("10.5.0.0/16"),)
CONFIG = NetworkConfig.parse(b'{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}')
BOTH = NetworkConfig.parse(
    b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","Backend":{"Type":"vxlan"}}'
)
PAGE = Path(__file__).parents[2] / "docs/reservations.md"


def record(number: int, created: int, *, etcd_lease: int = 1, key: str = "", name: object = None) -> Record:
    attrs = LeaseAttrs(
        pack_address(f"192.168.0.{number}"), "vxlan", Vtep(1, bytes((2, 0, 0, 0, 0, number))), node_name=name or ""
    )
    return Record(key or f"10.5.{number}.0-24", encode_attrs(attrs), etcd_lease, created, created + 1)


def rows(*records: Record) -> list[Row]:
    return rows_of(CONFIG, Snapshot(records, 100, 1))


CLUSTER = (
    record(11, 7, etcd_lease=5, name="h11"),
    record(2, 9, etcd_lease=6, name="h2"),
    record(9, 3, etcd_lease=0),
    record(12, 12, etcd_lease=8, key="10.5.8.0-21"),
    Record("10.5.3.0-24", b"{", 0, 4, 4),
    Record("nonsense\udc80\x1b[2J", b"", 0, 5, 5),
)
TTLS = {5: 86_390, 6: 3_599, 8: 59}


def test_leases_come_by_address_and_keys_without_one_last() -> None:
    assert [row.key for row in rows(*CLUSTER)] == [
        "10.5.2.0-24", "10.5.3.0-24", "10.5.8.0-21", "10.5.9.0-24", "10.5.11.0-24", "nonsense\udc80\x1b[2J"
    ]  # fmt: skip


def test_table_looks_like_this() -> None:
    assert as_text(NETWORK, rows(*CLUSTER), TTLS) == (
        "!  SUBNET        HOST  PUBLIC IP     VTEP MAC           TTL LEFT     REVISION\n"
        "   10.5.2.0/24   h2    192.168.0.2   02:00:00:00:00:02  59 min 59 s  9\n"
        "!  10.5.3.0/24   -     -             -                  reserved     4\n"
        "!  10.5.8.0/21   -     192.168.0.12  02:00:00:00:00:0c  59 s         12\n"
        "   10.5.9.0/24   -     192.168.0.9   02:00:00:00:00:09  reserved     3\n"
        "   10.5.11.0/24  h11   192.168.0.11  02:00:00:00:00:0b  23 h 59 min  7\n"
        "\n"
        "6 in 10.5.0.0/16, 3 reserved, 3 rejected by agents, marked with !\n"
        "  10.5.3.0/24: the value is not JSON\n"
        "  10.5.8.0/21: the subnet overlaps 10.5.9.0/24, which 192.168.0.9 has held for longer\n"
        "  key 'nonsense\\udc80\\x1b[2J': the key names no subnet: 'nonsense\\udc80\\x1b[2J' is not an IP address"
    )


def test_table_of_a_cluster_in_order_has_no_marks_and_no_reasons() -> None:
    assert as_text(NETWORK, rows(*CLUSTER[:2]), None) == (
        "SUBNET        HOST  PUBLIC IP     VTEP MAC           KIND    REVISION\n"
        "10.5.2.0/24   h2    192.168.0.2   02:00:00:00:00:02  leased  9\n"
        "10.5.11.0/24  h11   192.168.0.11  02:00:00:00:00:0b  leased  7\n"
        "\n"
        "2 in 10.5.0.0/16, 0 reserved, 0 rejected by agents"
    )


def test_table_of_both_families_has_columns_for_what_there_is() -> None:
    networks = BOTH.blocks
    six = LeaseAttrs(None, "vxlan", None, pack_address("fd11::3"), Vtep(1, b"\2\6\0\0\0\3"), 1430, "h3")
    records = (
        record(2, 9, etcd_lease=6, key="10.5.2.0-24&fd00:5:0:2::-64", name="h2"),
        Record("0.0.0.0-0&fd00:5:0:3::-64", encode_attrs(six), 0, 4, 4),
    )
    listed = rows_of(BOTH, Snapshot(records, 100, 1))
    assert as_text(networks, listed, TTLS) == (
        "SUBNET       IPV6 SUBNET      HOST  PUBLIC IP    PUBLIC IPV6  VTEP MAC           IPV6 VTEP MAC      "
        "TTL LEFT     REVISION\n"
        "10.5.2.0/24  fd00:5:0:2::/64  h2    192.168.0.2  -            02:00:00:00:00:02  -                  "
        "59 min 59 s  9\n"
        "-            fd00:5:0:3::/64  h3    -            fd11::3      -                  02:06:00:00:00:03  "
        "reserved     4\n"
        "\n"
        "2 in 10.5.0.0/16 and fd00:5::/48, 1 reserved, 0 rejected by agents"
    )
    assert as_text(networks, listed, TTLS, 90).splitlines()[0] == (
        "SUBNET       IPV6 SUBNET      HOST  PUBLIC IP    VTEP MAC           TTL LEFT"
    )
    alone = as_text(networks[1:], listed[1:], TTLS).splitlines()
    assert alone[0] == "IPV6 SUBNET      HOST  PUBLIC IPV6  IPV6 VTEP MAC      TTL LEFT  REVISION"
    data = json.loads(as_json(networks, 100, listed, TTLS))
    assert (data["network"], data["ipv6_network"]) == ("10.5.0.0/16", "fd00:5::/48")
    found = data["leases"][1]
    assert (found["subnet"], found["ipv6_subnet"], found["public_ip"]) == (None, "fd00:5:0:3::/64", None)
    assert (found["public_ipv6"], found["vtep_mac_ipv6"], found["mtu"]) == ("fd11::3", "02:06:00:00:00:03", 1430)


def test_empty_network_says_so() -> None:
    assert as_text(NETWORK, [], {}) == "No leases in 10.5.0.0/16."


def test_keys_that_name_no_subnet_make_no_row() -> None:
    lines = as_text(NETWORK, rows(CLUSTER[-1]), None).splitlines()
    assert lines[1:3] == ["", "1 in 10.5.0.0/16, 1 reserved, 1 rejected by agents, marked with !"]


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_table_fits_the_terminal(columns: int) -> None:
    named = record(200, 1_234_567, etcd_lease=5, name="worker-17.rack-4.example.internal", key="10.5.200.0-24")
    wide = record(201, 2_000_000, etcd_lease=5, key="10.5.200.0-23")
    text = as_text(NETWORK, rows(named, wide), {5: 86_390}, columns)
    assert max(map(len, text.splitlines())) <= columns
    assert "worker-1" in text
    assert ("REVISION" in text) == (columns > 100)
    assert ("worker-17.rack-4.example.internal" in text) == (columns > 80)


def test_names_from_etcd_do_nothing_to_a_terminal_and_take_little_room() -> None:
    names = ["\x1b[2J", "\u202egnp.exe", "x" * 60_000, "näme", 7, ""]
    text = as_text(NETWORK, rows(*(record(n + 1, n + 1, name=name) for n, name in enumerate(names))), None)
    assert text.isascii()
    assert all(line.isprintable() for line in text.splitlines())
    assert max(map(len, text.splitlines())) < 130
    assert "'\\x1b[2J'" in text


def test_reasons_with_foreign_letters_are_escaped() -> None:
    bad = Record("10.5.3.0-24", '{"PublicIP":"ä","BackendType":"vxlan"}'.encode(), 1, 4, 4)
    assert "  10.5.3.0/24: PublicIP: '\\xe4' is not an IP address" in as_text(NETWORK, rows(bad), None)


def test_fifteen_thousand_leases_are_listed() -> None:
    config = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}')
    records = []
    for n in range(1, 15_001):
        attrs = LeaseAttrs(bytes((172, 16, n >> 8, n & 255)), "vxlan", Vtep(1, bytes((2, 0, 0, 0, n >> 8, n & 255))))
        records.append(Record(f"10.{n >> 8}.{n & 255}.0-24", encode_attrs(attrs), n, n, n))
    listed = rows_of(config, Snapshot(tuple(records), 20_000, 1))
    assert len(as_text(config.blocks, listed, None).splitlines()) == 15_003
    assert len(json.loads(as_json(config.blocks, 20_000, listed, {}))["leases"]) == 15_000


# --- for programs ---


def test_json_has_this_schema() -> None:
    data = json.loads(as_json(NETWORK, 100, rows(*CLUSTER), TTLS))
    assert {key: value for key, value in data.items() if key != "leases"} == {
        "network": "10.5.0.0/16",
        "ipv6_network": None,
        "revision": 100,
    }
    assert data["leases"][0] == {
        "key": "10.5.2.0-24",
        "subnet": "10.5.2.0/24",
        "ipv6_subnet": None,
        "node_name": "h2",
        "public_ip": "192.168.0.2",
        "public_ipv6": None,
        "backend_type": "vxlan",
        "vtep_mac": "02:00:00:00:00:02",
        "vtep_mac_ipv6": None,
        "mtu": None,
        "reserved": False,
        "ttl_s": 3599,
        "create_revision": 9,
        "mod_revision": 10,
        "rejected": None,
    }
    assert data["leases"][1] | {"rejected": ""} == {
        **dict.fromkeys(data["leases"][0]),
        "key": "10.5.3.0-24",
        "subnet": "10.5.3.0/24",
        "reserved": True,
        "create_revision": 4,
        "mod_revision": 4,
        "rejected": "",
    }
    assert data["leases"][5]["key"] == "nonsense\udc80\x1b[2J"


def test_json_without_times_and_with_ipv6_subnets() -> None:
    (lease,) = json.loads(as_json(NETWORK, 1, rows(record(2, 9, key="10.5.2.0-24&fd00:2::-64")), {}))["leases"]
    assert (lease["ttl_s"], lease["ipv6_subnet"]) == (None, "fd00:2::/64")


def test_page_describes_every_key_of_the_json() -> None:
    data = json.loads(as_json(NETWORK, 100, rows(*CLUSTER), TTLS))
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)) == {*data, *data["leases"][0]}
