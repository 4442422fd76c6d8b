"""The wire contract: real bytes decode and encode to themselves; hostile ones end in an error with a reason."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from subnet_lease.model import (
    LIVE_SETTINGS,
    MAX_NAME,
    MAX_NESTED,
    MAX_VALUE_BYTES,
    MTUS,
    ConfigInvalid,
    Lease,
    LeaseAttrs,
    LeaseInvalid,
    NetworkConfig,
    Prefix,
    Vtep,
    changed_settings,
    decode_attrs,
    encode_attrs,
    format_address,
    format_mac,
    pack_address,
    pack_mac,
    parse_subnet_key,
    subnet_key,
)

CONFIG = b'{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}'
LEASES = [
    (
        "10.0.6.0-24",
        b'{"PublicIP":"172.30.0.12","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"16:0a:e4:09:2d:56"}}',
    ),
    (
        "10.0.74.0-24",
        b'{"PublicIP":"172.30.0.13","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"22:80:28:fb:af:8e"}}',
    ),
    (
        "10.0.86.0-24",
        b'{"PublicIP":"172.30.0.11","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"ee:3e:c5:f4:42:4f"}}',
    ),
]
"""As flanneld 0.28.9 wrote them."""

# --- strategies ---

addresses = st.binary(min_size=4, max_size=4)
hosts = addresses.filter(any)
addresses6 = st.binary(min_size=16, max_size=16)
macs = st.binary(min_size=6, max_size=6)
vteps = st.builds(Vtep, st.integers(0, (1 << 24) - 1), macs)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FLANNELS = ("PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data")
KNOWN = (*FLANNELS, "MTU", "NodeName")
extras = st.dictionaries(st.text().filter(lambda key: key not in KNOWN), json_values, max_size=3)
attrs = st.builds(
    LeaseAttrs,
    public_ip=st.none() | hosts,
    backend_type=st.text(),
    vtep=st.none() | vteps,
    public_ip6=st.none() | addresses6,
    vtep6=st.none() | vteps,
    mtu=st.just(0) | st.sampled_from(MTUS),
    node_name=st.text(max_size=MAX_NAME),
    extra=extras,
)


@st.composite
def prefixes(draw: st.DrawFn, base: st.SearchStrategy[bytes]) -> Prefix:
    packed = draw(base)
    return Prefix(packed, 8 * len(packed)).network(draw(st.integers(0, 8 * len(packed))))


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with some bytes changed, dropped, doubled or put in."""
    value = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(value)))
        value[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3) | st.just(bytes(value[at : at + 20])))
    return bytes(value)


@st.composite
def objects_with(draw: st.DrawFn, names: tuple[str, ...]) -> bytes:
    """A JSON object whose keys are the known ones and whose values are anything."""
    strange = json_values | st.sampled_from(["1.2.3.4", "fd00::1", "10.0.0.0/8", "16:0a:e4:09:2d:56", 0, -1, 1 << 70])
    backend = st.fixed_dictionaries({}, optional={"VNI": strange, "VtepMAC": strange, "Port": strange, "MTU": strange})
    fields = draw(st.dictionaries(st.sampled_from(names), strange | backend))
    return json.dumps(fields).encode()


hostile = st.one_of(
    st.binary(),
    json_values.map(lambda value: json.dumps(value).encode()),
    mutated(LEASES[0][1]),
    mutated(CONFIG),
    objects_with(KNOWN),
    objects_with(("Network", "SubnetLen", "SubnetMin", "SubnetMax", "EnableIPv4", "EnableIPv6", "Backend")),
    objects_with(("IPv6Network", "IPv6SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", "EnableIPv6", "network")),
)

# --- round trips ---


@pytest.mark.parametrize(("key", "value"), LEASES)
def test_flannels_own_leases_survive_byte_for_byte(key: str, value: bytes) -> None:
    assert encode_attrs(decode_attrs(value)) == value
    assert subnet_key(*parse_subnet_key(key)) == key


def test_flannels_own_config_is_read() -> None:
    config = NetworkConfig.parse(CONFIG)
    assert str(config.blocks[0]) == "10.0.0.0/8"
    assert (config.subnet_len, config.subnet_min, config.subnet_max) == (24, bytes((10, 0, 1, 0)), b"\x0a\xff\xff\x00")
    assert (config.backend.type, config.backend.vni, config.backend.port) == ("vxlan", 1, 8472)


def test_changed_settings_are_named_as_the_operator_knows_them() -> None:
    old = NetworkConfig.parse(b'{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}')
    assert changed_settings(old, old) == {}
    new = NetworkConfig.parse(
        b'{"Network":"10.0.0.0/8","SubnetMax":"10.9.0.0","Backend":{"Type":"vxlan","VNI":7,"MTU":1400}}'
    )
    assert changed_settings(old, new) == {
        "SubnetMax": ("10.255.255.0", "10.9.0.0"),
        "Backend.VNI": ("1", "7"),
        "Backend.MTU": ("0", "1400"),
    }
    assert changed_settings(old, new).keys() - LIVE_SETTINGS == {"Backend.VNI"}


@given(attrs)
def test_attributes_survive(value: LeaseAttrs) -> None:
    assert decode_attrs(encode_attrs(value)) == value


@given(attrs)
def test_values_are_compact_utf8_in_flannels_order(value: LeaseAttrs) -> None:
    names = list(json.loads(encode_attrs(value).decode("ascii")))
    there = [name for name in KNOWN if name in names]
    assert names == [*there, *value.extra]
    assert names[:2] == ["PublicIP", "PublicIPv6"]
    assert b'": ' not in encode_attrs(LeaseAttrs(value.public_ip, "vxlan", value.vtep))


@given(prefixes(addresses) | st.none(), st.none() | prefixes(addresses6))
def test_subnet_keys_survive(subnet: Prefix | None, subnet6: Prefix | None) -> None:
    if subnet6 is None or (subnet is not None and not subnet.length):
        # Of IPv4 alone, or with all of it: 0.0.0.0-0 beside an IPv6 subnet stands for none.
        subnet = subnet or Prefix(bytes(4), 0)
        subnet6 = None
    assert parse_subnet_key(subnet_key(subnet, subnet6)) == (subnet, subnet6)


FLANNEL_READS = re.compile(r"(\d+\.\d+.\d+.\d+)-(\d+)(?:&([a-f\d:]+)-(\d+))?$")
"""Source: ParseSubnetKey in flannel's pkg/subnet."""


@given(prefixes(addresses), prefixes(addresses6))
def test_flannel_can_read_every_key_of_ours(subnet: Prefix, subnet6: Prefix) -> None:
    found = FLANNEL_READS.fullmatch(subnet_key(subnet, subnet6))
    assert found is not None
    assert [Prefix.of(found[1], found[2]), Prefix.of(found[3], found[4])] == [subnet, subnet6]


def test_dual_stack_keys_are_flannels() -> None:
    key = "10.5.34.0-24&fd00:5:0:34::-64"
    assert subnet_key(Prefix.parse("10.5.34.0/24"), Prefix.parse("fd00:5:0:34::/64")) == key
    assert subnet_key(None, Prefix.parse("fd00:5:0:34::/64")) == "0.0.0.0-0&fd00:5:0:34::-64"


@given(prefixes(addresses | addresses6))
def test_prefixes_survive(prefix: Prefix) -> None:
    assert Prefix.parse(str(prefix)) == prefix


@given(addresses | addresses6)
def test_addresses_survive(packed: bytes) -> None:
    assert pack_address(format_address(packed)) == packed


@given(macs)
def test_macs_survive(packed: bytes) -> None:
    assert pack_mac(format_mac(packed)) == packed == pack_mac(format_mac(packed).upper())


@given(prefixes(addresses), prefixes(addresses))
def test_prefixes_overlap_where_they_share_an_address(one: Prefix, other: Prefix) -> None:
    shares = max(one.first, other.first) < min(one.first + one.size, other.first + other.size)
    assert one.overlaps(other) == other.overlaps(one) == shares


# --- hostile input ---


@given(hostile)
@example(b"\xff\xfe{\x00}\x00")
@example(b'{"PublicIP":"1.2.3.4","BackendType":"vxlan","BackendData":{"VtepMAC":"' + b"0" * 60000 + b'"}}')
@example(b'{"PublicIP":' + b"9" * 5000 + b"}")
def test_hostile_values_are_leases_or_invalid(value: bytes) -> None:
    try:
        decoded = decode_attrs(value)
    except LeaseInvalid as error:
        assert str(error)
        assert len(str(error)) < 300
    else:
        assert decode_attrs(value) == decoded


@given(hostile)
@example(b'{"Network":"10.0.0.0/' + b"9" * 5000 + b'"}')
@example(b'{"Network":"10.0.0.0/8","SubnetLen":' + b"9" * 5000 + b"}")
@example(b'{"Network":"fe80::%1/64"}')
@example(b'{"Network":"\\ud800"}')
def test_hostile_configs_are_configs_or_name_the_key(value: bytes) -> None:
    try:
        config = NetworkConfig.parse(value)
    except ConfigInvalid as error:
        assert error.key
        assert error.reason
        assert len(str(error)) < 300
    else:
        assert config.subnet_min <= config.subnet_max
        if config.network is not None:
            assert config.network.holds(config.subnet_min)
            assert config.network.holds(config.subnet_max)


@given(
    st.text() | st.text("0123456789.-/&abcdef:%") | st.binary().map(lambda raw: raw.decode(errors="surrogateescape"))
)
@example("10.5.34.0-" + "9" * 5000)
@example("10.5.34.0-24&fd00::%1-64")
def test_a_key_is_a_subnet_in_its_one_notation_or_invalid(key: str) -> None:
    try:
        subnet, subnet6 = parse_subnet_key(key)
    except LeaseInvalid as error:
        assert len(str(error)) < 300
    else:
        assert subnet_key(subnet, subnet6) == key
        assert subnet is not None or subnet6 is not None
        assert (subnet6 is not None) == ("&" in key)


@pytest.mark.parametrize(
    "key",
    (
        *("", "config", "10.5.34.0", "10.5.34.0/24", "10.5.34.0-024", "10.5.34.1-24", "10.5.34.0-33", "10.5.34-24"),
        *("&", "10.5.34.0-24&", "10.5.34.0-24&10.6.0.0-24", "fd00---64", "010.5.34.0-24", "10.5.34.0-24 "),
        *("::-0", "10.5.34.0--24", "10.5.34.0-24&FD00::-64", "10.5.34.0-24&fd00:0::-64", "10.5.34.0-24&0fd00::-64"),
    ),
)
def test_what_is_no_subnet_is_no_key(key: str) -> None:
    with pytest.raises(LeaseInvalid):
        parse_subnet_key(key)


@given(st.integers(1, 1200) | st.sampled_from([MAX_NESTED - 1, MAX_NESTED, 5000, 200_000]), st.booleans())
@settings(max_examples=300)
def test_no_depth_of_nesting_exhausts_the_stack(depth: int, lists: bool) -> None:
    inner = b"[" * depth + b"]" * depth if lists else b'{"a":' * depth + b"1" + b"}" * depth
    with pytest.raises(ConfigInvalid):
        NetworkConfig.parse(b'{"Network":' + inner + b"}")
    value = b'{"PublicIP":"1.2.3.4","BackendType":"vxlan","x":' + inner + b"}"
    if depth < MAX_NESTED:
        # What is accepted can be compared and written by whoever gets it.
        assert encode_attrs(decode_attrs(value)) == encode_attrs(decode_attrs(value))
        assert decode_attrs(value) == decode_attrs(value)
    else:
        with pytest.raises(LeaseInvalid):
            decode_attrs(value)


def test_values_beyond_any_lease_are_refused_unread() -> None:
    value = LEASES[0][1][:-1] + b',"x":"' + b"x" * MAX_VALUE_BYTES + b'"}'
    with pytest.raises(LeaseInvalid, match=str(len(value))):
        decode_attrs(value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_json_in_encodings_that_flanneld_cannot_read_is_refused(encoding: str) -> None:
    with pytest.raises(LeaseInvalid, match="not JSON"):
        decode_attrs(LEASES[0][1].decode().encode(encoding))


def test_numbers_that_json_does_not_know_are_refused() -> None:
    with pytest.raises(LeaseInvalid, match="not JSON"):
        decode_attrs(LEASES[0][1][:-1] + b',"x":NaN}')


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "PublicIP is missing"),
        (b'{"BackendType":1}', "BackendType is not a string"),
        (b'{"BackendType":null}', "BackendType is not a string"),
        (b'{"BackendType":"vxlan"}', "PublicIP is missing"),
        (b'{"BackendType":"vxlan","PublicIP":7}', "PublicIP is not a string"),
        (b'{"BackendType":"vxlan","PublicIP":"1.2.3"}', "not an IP address"),
        (b'{"BackendType":"vxlan","PublicIP":"fd00::1"}', "wrong address family"),
        (b'{"BackendType":"vxlan","PublicIP":"1.2.3.4","BackendData":7}', "BackendData is not an object"),
        (b'{"BackendType":"vxlan","PublicIP":"1.2.3.4","BackendData":{"VtepMAC":7}}', "VtepMAC is not a string"),
        (b'{"BackendType":"vxlan","PublicIP":"1.2.3.4","BackendData":{"VtepMAC":"7"}}', "not a MAC address"),
        (b'{"BackendType":"vxlan","PublicIP":"1.2.3.4","BackendData":{"VNI":-1,"VtepMAC":""}}', "24 bits"),
        (b'{"BackendType":"vxlan","PublicIP":"1.2.3.4","BackendData":{"VNI":true,"VtepMAC":""}}', "24 bits"),
    ],
)
def test_the_reason_says_what_is_wrong(value: bytes, reason: str) -> None:
    with pytest.raises(LeaseInvalid, match=reason):
        decode_attrs(value)


@pytest.mark.parametrize("backend", [b"null", b'{"Type":"host-gw"}'])
def test_a_backend_without_a_tunnel_has_no_vtep(backend: bytes) -> None:
    value = b'{"PublicIP":"1.2.3.4","BackendType":"host-gw","BackendData":' + backend + b"}"
    assert decode_attrs(value).vtep is None


@pytest.mark.parametrize(
    ("value", "key"),
    [
        (b"", "config"),
        (b"[]", "config"),
        (b"{}", "Network"),
        (b'{"EnableIPv4":false}', "EnableIPv4"),
        (b'{"EnableIPv6":true,"Network":"10.0.0.0/8"}', "IPv6Network"),
        (b'{"Network":10}', "Network"),
        (b'{"Network":[10]}', "Network"),
        (b'{"Network":"fd00::/48"}', "Network"),
        (b'{"Network":"10.0.0.0/7"}', "Network"),
        (b'{"Network":"10.0.0.0/29"}', "Network"),
        (b'{"Network":"10.0.0.0/16","SubnetLen":17}', "SubnetLen"),
        (b'{"Network":"10.0.0.0/16","SubnetLen":31}', "SubnetLen"),
        (b'{"Network":"10.0.0.0/16","SubnetLen":"24"}', "SubnetLen"),
        (b'{"Network":"10.0.0.0/16","SubnetMin":"10.1.0.0"}', "SubnetMin"),
        (b'{"Network":"10.0.0.0/16","SubnetMin":"10.0.0.1"}', "SubnetMin"),
        (b'{"Network":"10.0.0.0/16","SubnetMin":"fd00::"}', "SubnetMin"),
        (b'{"Network":"10.0.0.0/16","SubnetMax":"x"}', "SubnetMax"),
        (b'{"Network":"10.0.0.0/16","SubnetMin":"10.0.9.0","SubnetMax":"10.0.8.0"}', "SubnetMin"),
        (b'{"Network":"10.0.0.0/16","Backend":7}', "Backend"),
        (b'{"Network":"10.0.0.0/16","Backend":{"VNI":16777216}}', "Backend.VNI"),
        (b'{"Network":"10.0.0.0/16","Backend":{"Port":true}}', "Backend.Port"),
        (b'{"Network":"10.0.0.0/16","Backend":{"GBP":1}}', "Backend.GBP"),
        (b'{"Network":"10.0.0.0/16","Backend":{"MTU":100}}', "Backend.MTU"),
    ],
)
def test_a_config_that_cannot_be_used_names_the_key_at_fault(value: bytes, key: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        NetworkConfig.parse(value)
    assert caught.value.key == key


def test_unknown_keys_are_reported_and_known_ones_match_in_any_case() -> None:
    config = NetworkConfig.parse(b'{"network":"10.5.0.0/16","Netwrok":"x","Backend":{"type":"vxlan","Vlan":1}}')
    assert str(config.blocks[0]) == "10.5.0.0/16"
    assert config.backend.type == "vxlan"
    assert config.unknown == ("Netwrok", "Backend.Vlan")


def test_an_overlay_has_the_networks_of_the_families_that_are_enabled() -> None:
    both = b'{"Network":"10.5.0.0/16","IPv6Network":"fd00:5::/48"'
    blocks = {
        b"}": ["10.5.0.0/16"],
        b',"EnableIPv6":true}': ["10.5.0.0/16", "fd00:5::/48"],
        b',"EnableIPv4":false,"EnableIPv6":true}': ["fd00:5::/48"],
    }
    for switches, expected in blocks.items():
        assert [str(block) for block in NetworkConfig.parse(both + switches).blocks] == expected
    (available,) = NetworkConfig.parse(both + b',"EnableIPv4":false,"EnableIPv6":true}').ranges
    assert available.length == 64
    assert (format_address(available.first), format_address(available.last)) == ("fd00:5:0:1::", "fd00:5:0:ffff::")


@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "alloc", "udp"])
def test_any_backend_can_be_named(backend: str) -> None:
    assert NetworkConfig.parse(b'{"Network":"10.5.0.0/16","Backend":{"Type":"%s"}}' % backend.encode()).backend.type


def test_key_without_an_etcd_lease_is_a_reservation() -> None:
    attrs = LeaseAttrs(b"\x0a\x00\x00\x01", "vxlan", None)
    subnet = Prefix.parse("10.5.34.0/24")
    assert Lease(subnet, None, attrs, etcd_lease=0, create_revision=1, mod_revision=1).reserved
    assert not Lease(subnet, None, attrs, etcd_lease=7, create_revision=1, mod_revision=1).reserved


def test_extra_keys_are_left_out_where_nobody_wants_them() -> None:
    value = b'{"PublicIP":"10.0.0.1","BackendType":"vxlan","Zone":"a"}'
    assert decode_attrs(value).extra == {"Zone": "a"}
    assert decode_attrs(value, extras=False).extra == {}


def test_values_of_a_host_without_ipv4_are_flannels() -> None:
    attrs = LeaseAttrs(None, "vxlan", None, pack_address("fd00::5"), Vtep(1, pack_mac("16:0a:e4:09:2d:56")))
    value = (
        b'{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::5","BackendType":"vxlan",'
        b'"BackendV6Data":{"VNI":1,"VtepMAC":"16:0a:e4:09:2d:56"}}'
    )
    assert encode_attrs(attrs) == value
    assert decode_attrs(value) == attrs
    assert attrs.underlay_ip == pack_address("fd00::5")


def test_values_of_backends_without_a_tunnel_are_flannels() -> None:
    """Empty raw JSON and an empty type are left out (source: flannel LeaseAttrs, omitempty)."""
    address = pack_address("192.168.0.5")
    values = {
        b'{"PublicIP":"192.168.0.5","PublicIPv6":null,"BackendType":"host-gw"}': LeaseAttrs(address, "host-gw", None),
        b'{"PublicIP":"192.168.0.5","PublicIPv6":null}': LeaseAttrs(address, "", None),
    }
    for value, attrs in values.items():
        assert (decode_attrs(value), encode_attrs(attrs)) == (attrs, value)


def test_mtu_stands_behind_flannels_keys_and_before_the_extras() -> None:
    attrs = LeaseAttrs(pack_address("1.2.3.4"), "vxlan", None, mtu=1450, node_name="a", extra={"Zone": "b"})
    names = ["PublicIP", "PublicIPv6", "BackendType", "MTU", "NodeName", "Zone"]
    assert list(json.loads(encode_attrs(attrs))) == names


@pytest.mark.parametrize("mtu", [b'"1450"', b"true", b"67", b"65536", b"-1", b"1450.0", b"null", b"[1450]"])
def test_an_mtu_that_is_none_is_unknown_and_no_reason_to_reject(mtu: bytes) -> None:
    found = decode_attrs(b'{"PublicIP":"1.2.3.4","BackendType":"vxlan","MTU":' + mtu + b"}")
    assert (found.mtu, found.extra) == (0, {})


@pytest.mark.parametrize(("name", "kept"), [('"a"', "a"), ('""', ""), ("7", ""), ("null", ""), ('"\\u0007"', "\a")])
def test_name_that_is_no_text_is_none_and_no_reason_to_reject(name: str, kept: str) -> None:
    found = decode_attrs(f'{{"PublicIP":"1.2.3.4","BackendType":"vxlan","NodeName":{name}}}'.encode(), extras=False)
    assert (found.node_name, found.extra) == (kept, {})


def test_names_are_kept_up_to_the_length_that_dns_allows() -> None:
    value = encode_attrs(LeaseAttrs(pack_address("1.2.3.4"), "vxlan", None, node_name="x" * 1000))
    assert decode_attrs(value).node_name == "x" * MAX_NAME


def test_equal_mtus_are_one_object() -> None:
    value = b'{"PublicIP":"1.2.3.4","BackendType":"vxlan","MTU":%d}'
    assert decode_attrs(value % 1450).mtu is decode_attrs(value % 1450).mtu


@pytest.mark.parametrize(
    ("key", "text", "count"),
    [
        ("10.5.34.0-24", "10.5.34.0/24", 1),
        ("10.5.34.0-24&fd00::-64", "10.5.34.0/24 and fd00::/64", 2),
        ("0.0.0.0-0&fd00::-64", "fd00::/64", 1),
    ],
)
def test_lease_knows_its_subnets_and_its_key(key: str, text: str, count: int) -> None:
    lease = Lease(*parse_subnet_key(key), LeaseAttrs(None, "alloc", None), 1, 1, 1)
    assert (lease.key, str(lease), f"{lease}", len(lease.subnets)) == (key, text, text, count)
    assert lease._replace(subnet=None, subnet6=None).subnets == ()
