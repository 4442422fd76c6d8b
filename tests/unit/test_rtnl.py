"""The codec by itself: what is built reads back, and no bytes whatever make the reader fail.

That the bytes are those the kernel means is shown in tests/netns/test_rtnl_oracle.py.
"""

import errno
import struct
from collections.abc import Callable, Iterable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from overlay import rtnl
from overlay.model import PROTOCOL, Entry, Fdb, Gone, Guard, Neighbour, NextHop, Route
from subnet_lease.model import Prefix, pack_address

DEVICE, OTHER = 7, 8
TUNNELS = (DEVICE, OTHER)
DEVICES = st.sampled_from(TUNNELS)
SIZES = (4, 16)
MACS = st.binary(min_size=6, max_size=6)
ADDRESSES = st.one_of(*(st.binary(min_size=size, max_size=size) for size in SIZES))
STATES = st.integers(0, 0xFF)
BYTES = st.integers(0, 0xFF)
NUMBERS = st.integers(1, 2**31 - 1)
MTUS = st.one_of(st.just(0), st.integers(576, 65535))


def prefixes(base: bytes) -> st.SearchStrategy[Prefix]:
    bits = 8 * len(base)
    return st.integers(0, bits).map(lambda length: Prefix(base, bits).network(length))


def plain_route(size: int) -> st.SearchStrategy[Route]:
    packed = st.binary(min_size=size, max_size=size)
    return st.builds(Route, packed.flatmap(prefixes), st.just(0), packed, NUMBERS, BYTES, BYTES, MTUS)


ENTRIES: st.SearchStrategy[Entry] = st.one_of(
    st.builds(Fdb, st.tuples(DEVICES, MACS), ADDRESSES, STATES),
    st.builds(Neighbour, st.tuples(DEVICES, ADDRESSES), MACS, STATES),
    st.builds(NextHop, NUMBERS, ADDRESSES, NUMBERS, BYTES),
    st.builds(Route, ADDRESSES.flatmap(prefixes), NUMBERS, st.just(b""), st.just(0), BYTES, BYTES, MTUS),
    *map(plain_route, SIZES),
)


def only(buffer: bytes) -> rtnl.Message:
    (message,) = rtnl.messages(buffer)
    return message


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def message(kind: int, body: bytes) -> bytes:
    return rtnl.HEADER.pack(16 + len(body), kind, 0, 0, 0) + body


def route_message(*attributes: bytes, base: str = "10.0.1.0", **header: int) -> bytes:
    fields = {
        "family": 2, "length": 24, "source": 0, "tos": 0, "table": 254, "protocol": PROTOCOL, "scope": 0, "kind": 1,
        **header,
    }  # fmt: skip
    flags = fields.pop("flags", 0)
    body = struct.pack("=BBBBBBBBI", *fields.values(), flags)
    return message(rtnl.NEWROUTE, body + attribute(1, pack_address(base)) + b"".join(attributes))


def with_metric(buffer: bytes, entry: Entry) -> bytes:
    """The message of `entry` as the kernel lists it: it gives IPv6 routes a metric."""
    if not isinstance(entry, Route) or len(entry.destination.base) == 4:
        return buffer
    size = struct.pack("=I", len(buffer) + 8)
    return size + buffer[4:] + attribute(rtnl.RTA_PRIORITY, struct.pack("=I", rtnl.IP6_RT_PRIO_USER))


def seen(buffer: bytes) -> object:
    return rtnl.sight(buffer, only(buffer), TUNNELS)


# --- round trips ---


@given(ENTRIES, st.integers(0, 2**32 - 1), st.booleans())
def test_what_is_put_reads_back_as_it_was(entry: Entry, sequence: int, ack: bool) -> None:
    buffer = rtnl.put(entry, sequence, ack=ack)
    built = only(buffer)
    assert (built.sequence, built.port, built.end) == (sequence, 0, len(buffer))
    assert built.flags == rtnl.REQUEST | rtnl.CREATE | rtnl.REPLACE | (rtnl.ACK if ack else 0)
    assert seen(with_metric(buffer, entry)) == entry


@given(ENTRIES, st.integers(0, 2**32 - 1), st.booleans())
def test_what_is_dropped_reads_back_as_gone_under_the_same_key(entry: Entry, sequence: int, ack: bool) -> None:
    buffer = rtnl.drop(entry, sequence, ack=ack)
    built = only(buffer)
    assert (built.sequence, built.flags) == (sequence, rtnl.REQUEST | (rtnl.ACK if ack else 0))
    found = rtnl.sight(buffer, built, TUNNELS)
    assert isinstance(found, Gone)
    assert found.entry[0] == entry[0]


@given(st.lists(ENTRIES, max_size=10))
def test_messages_of_one_datagram_are_told_apart(entries: list[Entry]) -> None:
    buffer = b"".join(with_metric(rtnl.put(entry, number), entry) for number, entry in enumerate(entries))
    found = list(rtnl.messages(buffer))
    assert [each.sequence for each in found] == list(range(len(entries)))
    assert [rtnl.sight(buffer, each, TUNNELS) for each in found] == entries


@given(ENTRIES, st.integers(0, 2**32 - 1))
def test_what_is_in_the_way_is_cleared_whoevers_route_it_is_where_that_is_called_for(entry: Entry, number: int) -> None:
    anybodys = isinstance(entry, Route) and len(entry.destination.base) == 16
    removed = entry._replace(protocol=rtnl.RTPROT_UNSPEC) if anybodys and isinstance(entry, Route) else entry
    assert rtnl.clear(entry, number) == rtnl.drop(removed, number, ack=False)


@given(ENTRIES, st.integers(0, 2**32 - 1))
def test_only_routes_are_covered_while_they_are_away_and_under_no_key_of_ours(entry: Entry, number: int) -> None:
    covers = rtnl.cover(entry, number)
    if not isinstance(entry, Route):
        assert covers == (b"", b"")
        return
    for buffer, kind, flags in zip(covers, (rtnl.NEWROUTE, rtnl.DELROUTE), (rtnl.CREATE, 0), strict=True):
        built = only(buffer)
        assert (built.kind, built.flags, built.sequence) == (kind, rtnl.REQUEST | flags, number)
        assert rtnl.sight(buffer, built, TUNNELS) is None


@pytest.mark.parametrize("build", [rtnl.put, rtnl.drop])
def test_the_guard_has_no_place_in_routing_messages(build: Callable[[Entry, int], bytes]) -> None:
    with pytest.raises(ValueError, match="no matter of routing"):
        build(Guard(pack_address("192.168.0.5")), 0)


@given(ENTRIES)
def test_messages_are_whole_words(entry: Entry) -> None:
    assert len(rtnl.put(entry, 0)) % 4 == 0
    assert len(rtnl.drop(entry, 0)) % 4 == 0


# --- reading whatever comes ---


def read_all(buffer: bytes) -> None:
    for each in rtnl.messages(buffer):
        assert each.body <= each.end <= len(buffer)
        rtnl.error_of(buffer, each)
        rtnl.device_of(buffer, each)
        found = rtnl.sight(buffer, each, TUNNELS)
        if found is not None:
            entry = found.entry if isinstance(found, Gone) else found
            hash(entry[0])


@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail(buffer: bytes) -> None:
    read_all(buffer)


@given(
    st.sampled_from([2, 3, 16, 20, 24, 25, 28, 29, 104, 105]),
    st.binary(max_size=12),
    st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=20)), max_size=5),
    st.binary(max_size=5),
)
def test_no_attributes_make_the_reader_fail(
    kind: int, header: bytes, attributes: list[tuple[int, bytes]], rest: bytes
) -> None:
    for body in (header, header.ljust(12, b"\0"), bytes([2]) + header.ljust(11, b"\0")):
        read_all(message(kind, body + b"".join(attribute(*each) for each in attributes) + rest))


@given(ENTRIES, st.data())
def test_truncated_messages_are_read_over(entry: Entry, data: st.DataObject) -> None:
    whole = rtnl.put(entry, 0)
    size = data.draw(st.integers(0, len(whole) - 1))
    assert list(rtnl.messages(whole[:size])) == []
    if size >= 16:
        read_all(size.to_bytes(4, "little") + whole[4:size])


@example(15)
@given(st.integers(0, 15))
def test_message_shorter_than_its_header_ends_the_reading(length: int) -> None:
    assert list(rtnl.messages(struct.pack("=IHHII", length, 24, 0, 0, 0) + bytes(40))) == []


SHAPES = {
    rtnl.NEWNEIGH: [
        ((rtnl.NDA_LLADDR, 6), (rtnl.NDA_DST, 4), (rtnl.NDA_CACHEINFO, 16)),
        ((rtnl.NDA_DST, 4), (rtnl.NDA_LLADDR, 6), (rtnl.NDA_PROBES, 4), (rtnl.NDA_CACHEINFO, 16)),
    ],
    rtnl.NEWNEXTHOP: [((rtnl.NHA_ID, 4), (rtnl.NHA_OIF, 4), (rtnl.NHA_GATEWAY, 4))],
    rtnl.NEWROUTE: [
        ((rtnl.RTA_TABLE, 4), (rtnl.RTA_DST, 4), (rtnl.RTA_NH_ID, 4), (rtnl.RTA_GATEWAY, 4), (rtnl.RTA_OIF, 4))
    ],
}
"""Attributes, as (type, length), in which the kernel lists what we have put; each such message is read in one go."""

HEADERS = {
    rtnl.NEWNEIGH: st.builds(
        lambda *fields: struct.pack("=BBHiHBB", *fields),
        st.sampled_from([rtnl.AF_BRIDGE, rtnl.AF_INET, 10]), st.just(0), st.just(0), st.sampled_from([DEVICE, 9]),
        STATES, st.sampled_from([0, rtnl.NTF_SELF, 0xFF]), BYTES,
    ),
    rtnl.NEWNEXTHOP: st.builds(lambda *fields: struct.pack("=BBBBI", *fields), BYTES, BYTES, BYTES, BYTES, NUMBERS),
    rtnl.NEWROUTE: st.builds(
        lambda *fields: struct.pack("=BBBBBBBBI", *fields),
        st.sampled_from([rtnl.AF_INET, 10]), st.sampled_from([0, 24, 32, 33]), st.sampled_from([0, 1]),
        st.sampled_from([0, 1]), st.sampled_from([rtnl.RT_TABLE_MAIN, 255]), BYTES, BYTES, BYTES,
        st.sampled_from([0, rtnl.RTM_F_CLONED]),
    ),
}  # fmt: skip


def test_what_the_kernel_lists_of_ours_reads_as_it_was_put() -> None:
    mac, base, remote, head = b"\2abcde", bytes((10, 0, 1, 0)), bytes((172, 30, 0, 1)), (0, 0, DEVICE, 0x80)
    number = struct.Struct("=I").pack
    fdb, neighbour = (
        struct.pack("=BBHiHBB", family, *head, flags, 0) for family, flags in ((rtnl.AF_BRIDGE, rtnl.NTF_SELF), (2, 0))
    )
    hop = struct.pack("=BBBBI", 2, 0, PROTOCOL, 0, 4)
    route = struct.pack("=BBBBBBBBI", 2, 24, 0, 0, rtnl.RT_TABLE_MAIN, PROTOCOL, 0, 1, 0)
    listed = [
        (rtnl.NEWNEIGH, fdb, [mac, remote, bytes(16)], Fdb((DEVICE, mac), remote)),
        (rtnl.NEWNEIGH, neighbour, [base, mac, bytes(4), bytes(16)], Neighbour((DEVICE, base), mac)),
        (rtnl.NEWNEXTHOP, hop, [number(77), number(DEVICE), base], NextHop(77, base, DEVICE)),
        (rtnl.NEWROUTE, route, [number(254), base, number(77), base, number(DEVICE)], Route(Prefix(base, 24), 77)),
    ]
    shapes = [shape for kind in SHAPES.values() for shape in kind]
    for (kind, header, values, expected), shape in zip(listed, shapes, strict=True):
        body = header + b"".join(attribute(name, value) for (name, _), value in zip(shape, values, strict=True))
        assert seen(message(kind, body)) == expected


@settings(max_examples=1000)
@given(st.data())
def test_what_is_read_in_one_go_reads_the_same_attribute_by_attribute(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(SHAPES)))
    shape = list(data.draw(st.sampled_from(SHAPES[kind])))
    if data.draw(st.booleans()):
        # Of the usual size, with something else in one place.
        place = data.draw(st.integers(0, len(shape) - 1))
        shape[place] = data.draw(st.integers(0, 40)), shape[place][1]
    attributes = [attribute(name, data.draw(st.binary(min_size=size, max_size=size))) for name, size in shape]
    body = data.draw(HEADERS[kind]) + b"".join(attributes)
    one_more = body + attribute(60, bytes(4))
    assert seen(message(kind, body)) == seen(message(kind, one_more))


# --- answers and other messages ---


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (-17, errno.EEXIST)])
def test_answers_carry_an_errno(code: int, expected: int) -> None:
    buffer = message(rtnl.NLMSG_ERROR, struct.pack("=i", code))
    assert rtnl.error_of(buffer, only(buffer)) == expected


def test_answer_without_an_errno_is_no_success() -> None:
    buffer = message(rtnl.NLMSG_ERROR, b"")
    assert rtnl.error_of(buffer, only(buffer)) == errno.EBADMSG


@pytest.mark.parametrize("kind", [rtnl.NEWNEIGH, rtnl.DELNEIGH])
def test_second_notice_of_an_fdb_entry_which_says_next_to_nothing_is_passed_over(kind: int) -> None:
    body = struct.pack("=BBHiHBB", 7, 0, 0, DEVICE, 0x80, rtnl.NTF_SELF, 0) + attribute(rtnl.NDA_LLADDR, bytes(6))
    assert seen(message(kind, body)) is None
    assert seen(message(kind, body + attribute(rtnl.NDA_CACHEINFO, bytes(16)))) is not None


def test_link_messages_name_their_device() -> None:
    buffer = message(rtnl.NEWLINK, struct.pack("=BxHiII", 0, 1, 9, 0, 0))
    assert rtnl.device_of(buffer, only(buffer)) == 9
    assert seen(buffer) is None
    assert rtnl.device_of(message(rtnl.NEWLINK, b""), only(message(rtnl.NEWLINK, b""))) == 0


@pytest.mark.parametrize(("scope", "device"), [(0, 9), (200, 9), (253, 0)])
def test_address_messages_name_their_device_unless_the_address_is_of_the_link_alone(scope: int, device: int) -> None:
    for kind in (rtnl.NEWADDR, rtnl.DELADDR):
        buffer = message(kind, struct.pack("=BBBBI", 10, 64, 0, scope, 9))
        assert rtnl.device_of(buffer, only(buffer)) == device


def dumped(requests: Iterable[bytes]) -> list[tuple[int, int, int]]:
    """(kind, address family, interface index asked for) of each request."""
    found = []
    for each in requests:
        request = only(each)
        assert request.flags == rtnl.REQUEST | rtnl.DUMP
        index = struct.unpack_from("=i", each, request.body + 4)[0] if request.kind == rtnl.GETNEIGH else 0
        if each[request.body] != rtnl.AF_BRIDGE and each[-8:-6] == b"\x08\0":
            (index,) = struct.unpack("=I", each[-4:])
        found.append((request.kind, each[request.body], index))
    return found


def test_dump_asks_for_each_table_and_family_by_device() -> None:
    neighbours = [(30, 7, DEVICE), (30, 2, DEVICE), (30, 10, DEVICE)]
    routes = [(26, 2, DEVICE), (26, 10, DEVICE)]
    assert dumped(rtnl.dump_requests([DEVICE], [], False)) == neighbours + routes
    by_link = [(26, 2, 3), (26, 10, 3)]
    hops = [(106, 0, DEVICE)], [(106, 0, 3)]
    assert dumped(rtnl.dump_requests([DEVICE], [3], False)) == neighbours + routes + by_link
    assert dumped(rtnl.dump_requests([DEVICE], [3], True)) == neighbours + routes + hops[0] + by_link + hops[1]
    assert dumped(rtnl.dump_requests([], [], True)) == []
    assert len(list(rtnl.dump_requests(TUNNELS, [3], True))) == 2 * 3 + 3 * 3


def test_dump_of_what_is_marked_asks_for_routes_of_our_protocol_and_all_nexthops() -> None:
    requests = list(rtnl.marked_dump_requests(True))
    assert [(only(each).kind, each[16], each[16 + 5]) for each in requests[:2]] == [
        (26, 2, PROTOCOL),
        (26, 10, PROTOCOL),
    ]
    assert requests[2:] == [rtnl.nexthop_dump_request()]
    assert list(rtnl.marked_dump_requests(False)) == requests[:2]


def test_end_of_a_batch_asks_for_nothing_but_an_answer() -> None:
    end = only(rtnl.end_of_batch(400))
    assert (end.kind, end.flags, end.sequence, end.end) == (1, rtnl.REQUEST | rtnl.ACK, 400, 16)


# --- what concerns us not ---


@pytest.mark.parametrize(
    "header",
    [{"family": 28}, {"family": 10}, {"table": 255}, {"source": 8}, {"tos": 4}, {"flags": 0x200}, {"length": 33}],
    ids=["MPLS", "a misfit", "another table", "by source", "by TOS", "a cloned route", "an impossible length"],
)
def test_routes_under_no_key_of_ours_are_read_over(header: dict[str, int]) -> None:
    assert seen(route_message(attribute(rtnl.RTA_PRIORITY, bytes(4)))) is not None
    assert seen(route_message(**header)) is None


@pytest.mark.parametrize(("base", "family", "length", "usual"), [("10.0.1.0", 2, 24, 0), ("fd00::", 10, 64, 1024)])
@pytest.mark.parametrize("metric", [0, 5, 256, 1024])
def test_routes_with_another_metric_than_the_usual_are_read_over(
    base: str, family: int, length: int, usual: int, metric: int
) -> None:
    priority = attribute(rtnl.RTA_PRIORITY, struct.pack("=I", metric))
    found = seen(route_message(priority, base=base, family=family, length=length))
    assert found == (Route(Prefix(pack_address(base), length)) if metric == usual else None)


def test_mtu_by_itself_is_read_and_other_metrics_make_a_route_unequal_to_any_of_ours() -> None:
    destination, hop = Prefix.parse("10.0.1.0/24"), attribute(rtnl.RTA_NH_ID, b"\5\0\0\0")
    mtu, advmss = attribute(rtnl.RTAX_MTU, struct.pack("=I", 1400)), attribute(8, struct.pack("=I", 1000))
    for metrics, expected in (
        (b"", Route(destination, nexthop=5)),
        (mtu, Route(destination, nexthop=5, mtu=1400)),
        (advmss, Route(destination)),
        (mtu + advmss, Route(destination)),
    ):
        assert seen(route_message(hop, attribute(rtnl.RTA_METRICS, metrics))) == expected


@pytest.mark.parametrize("kind", [rtnl.RTA_PREFSRC, rtnl.RTA_FLOW, rtnl.RTA_ENCAP])
def test_routes_that_carry_what_we_never_set_are_unequal_to_any_of_ours(kind: int) -> None:
    hop = attribute(rtnl.RTA_NH_ID, b"\5\0\0\0")
    assert seen(route_message(hop)) == Route(Prefix.parse("10.0.1.0/24"), nexthop=5)
    assert seen(route_message(hop, attribute(kind, bytes(4)))) == Route(Prefix.parse("10.0.1.0/24"))


@pytest.mark.parametrize(("family", "text", "metric"), [(2, "0.0.0.0/0", 0), (10, "::/0", 1024)])
def test_default_route_has_no_destination_attribute(family: int, text: str, metric: int) -> None:
    body = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 254, 3, 0, 1, 0)
    body += attribute(rtnl.RTA_PRIORITY, struct.pack("=I", metric))
    assert seen(message(rtnl.NEWROUTE, body)) == Route(Prefix.parse(text), protocol=3)


def test_fdb_entry_with_a_port_of_its_own_is_no_plain_one() -> None:
    mac = b"\x02\0\0\0\0\1"
    body = struct.pack("=BBHiHBB", 7, 0, 0, DEVICE, 0x80, 2, 0)
    plain = attribute(2, mac) + attribute(1, b"\xac\x1e\0\1")
    assert seen(message(28, body + plain)) == Fdb((DEVICE, mac), b"\xac\x1e\0\1")
    for kind in (6, 7, 8):
        assert seen(message(28, body + plain + attribute(kind, bytes(4)))) == Fdb((DEVICE, mac), b"")


@pytest.mark.parametrize(
    ("family", "index", "flags"),
    [(7, 9, 2), (7, DEVICE, 4), (2, 9, 0), (10, DEVICE, 0), (10, 9, 0)],
    ids=["another device", "a bridge's own", "another device's neighbour", "a misfit", "another device's of IPv6"],
)
def test_entries_of_others_are_read_over(family: int, index: int, flags: int) -> None:
    body = struct.pack("=BBHiHBB", family, 0, 0, index, 0x80, flags, 0)
    assert seen(message(28, body + attribute(1, bytes(4)) + attribute(2, bytes(6)))) is None


def test_neighbour_without_an_address_and_nexthop_without_an_id_are_read_over() -> None:
    assert seen(message(28, struct.pack("=BBHiHBB", 2, 0, 0, DEVICE, 0x80, 0, 0))) is None
    assert seen(message(28, struct.pack("=BBHiHBB", 7, 0, 0, DEVICE, 0x80, 2, 0))) is None
    assert seen(message(104, struct.pack("=BBBBI", 2, 0, PROTOCOL, 0, 0))) is None


def test_nexthop_without_a_gateway_is_unequal_to_any_of_ours() -> None:
    body = struct.pack("=BBBBI", 2, 0, PROTOCOL, 0, 0) + attribute(1, b"\5\0\0\0")
    assert seen(message(104, body)) == NextHop(5, b"", 0)
