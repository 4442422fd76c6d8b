"""The codec by itself: what is built reads back, and no bytes whatever make the reader fail.

That the bytes are those the kernel means is shown in tests/netns/test_firewall_edges.py.
"""

import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from overlay import nfnl, rtnl
from overlay.nfnl import Altered, Committed, Elements, Event, ForwardChanged
from subnet_lease.model import pack_address

INET, IPV4, IPV6, BRIDGE = 1, 2, 10, 7
NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE, DELRULE, NEWSET = 0, 2, 3, 5, 6, 8, 9
NEWSETELEM, DELSETELEM, NEWGEN, NEWOBJ = 12, 14, 15, 18
DESTROYCHAIN, DESTROYRULE, DESTROYSETELEM = 27, 28, 30

ADDRESSES = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def name(kind: int, text: str) -> bytes:
    return attribute(kind, text.encode() + b"\0")


def message(kind: int, family: int, *attributes: bytes, subsystem: int = 10) -> bytes:
    body = struct.pack(">BBH", family, 0, 0) + b"".join(attributes)
    return rtnl.HEADER.pack(16 + len(body), subsystem << 8 | kind, 0, 0, 0) + body


def only(buffer: bytes) -> rtnl.Message:
    (found,) = rtnl.messages(buffer)
    return found


def seen(buffer: bytes) -> Event | None:
    return nfnl.event(buffer, only(buffer))


def element(address: bytes) -> bytes:
    return attribute(1, attribute(1, attribute(1, address)))


# --- batches ---


@given(added=st.lists(ADDRESSES), removed=st.lists(ADDRESSES))
@example(added=[], removed=[pack_address("172.30.0.1")])
@example(added=[number.to_bytes(4, "big") for number in range(5000)], removed=[])
def test_batch_reads_back_as_what_went_in(added: list[bytes], removed: list[bytes]) -> None:
    if not added and not removed:
        return
    buffer = nfnl.batch(added, removed, 7, 8)
    first, *changes, last = rtnl.messages(buffer)
    assert (first.kind, last.kind) == (0x10, 0x11)
    read = [nfnl.event(buffer, change) for change in changes]
    put = [address for event in read if isinstance(event, Elements) and not event.gone for address in event.addresses]
    taken = [address for event in read if isinstance(event, Elements) and event.gone for address in event.addresses]
    # What is to go is put before, so that its absence refuses nothing.
    assert sorted(put) == sorted(added + removed)
    assert sorted(taken) == sorted(removed)
    assert [event.gone for event in read if isinstance(event, Elements)] == sorted(
        event.gone for event in read if isinstance(event, Elements)
    )


def test_only_the_last_change_of_a_batch_asks_for_an_answer() -> None:
    buffer = nfnl.batch([bytes(4), bytes(16)], [bytes([1] * 4)], 7, 8)
    found = list(rtnl.messages(buffer))
    assert [each.sequence for each in found] == [7, 7, 7, 8, 7]
    assert [bool(each.flags & rtnl.ACK) for each in found] == [False, False, False, True, False]


def test_no_list_of_elements_outgrows_its_attribute() -> None:
    buffer = nfnl.batch([number.to_bytes(16, "big") for number in range(10_000)], [], 1, 2)
    assert max(each.end - each.body for each in rtnl.messages(buffer)) < 1 << 16


# --- notifications ---


@pytest.mark.parametrize(("kind", "gone"), [(NEWSETELEM, False), (DELSETELEM, True), (DESTROYSETELEM, True)])
def test_elements_of_our_sets_are_seen_to_come_and_go(kind: int, gone: bool) -> None:
    addresses = (pack_address("172.30.0.1"), pack_address("fd00::1"))
    body = attribute(3, b"".join(map(element, addresses)))
    assert seen(message(kind, INET, name(1, "overlay_agent"), name(2, "peers4"), body)) == Elements(addresses, gone)


def test_elements_of_other_sets_of_ours_are_no_events_and_can_be_read() -> None:
    buffer = message(
        NEWSETELEM, INET, name(1, "overlay_agent"), name(2, "strangers4"), attribute(3, element(b"\xac\x1e\0\x01"))
    )
    assert seen(buffer) is None
    assert nfnl.addresses(buffer, only(buffer)) == [pack_address("172.30.0.1")]
    other = message(NEWOBJ, INET, name(1, "overlay_agent"))
    assert nfnl.addresses(other, only(other)) == []


@pytest.mark.parametrize("kind", [NEWTABLE, DELTABLE, NEWCHAIN, DELCHAIN, NEWRULE, DELRULE, NEWSET, NEWOBJ])
def test_anything_else_of_our_table_is_an_alteration(kind: int) -> None:
    assert seen(message(kind, INET, name(1, "overlay_agent"))) == Altered()


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        *((kind, name(3, chain)) for kind in (NEWCHAIN, DELCHAIN, DESTROYCHAIN) for chain in ("FORWARD",)),
        *((kind, name(2, chain)) for kind in (NEWRULE, DELRULE, DESTROYRULE) for chain in ("FORWARD",)),
        (NEWRULE, name(2, "OVERLAY-AGENT-FWD")),
        (DELCHAIN, name(3, "OVERLAY-AGENT-FWD")),
    ],
)
def test_changes_of_forward_chains_are_seen_by_ip_version(kind: int, attributes: bytes) -> None:
    for family, version in ((IPV4, 4), (IPV6, 6)):
        assert seen(message(kind, family, name(1, "filter"), attributes)) == ForwardChanged(version)


@pytest.mark.parametrize(
    "buffer",
    [
        message(NEWRULE, IPV4, name(1, "filter"), name(2, "INPUT")),
        message(NEWCHAIN, IPV4, name(1, "filter"), name(3, "INPUT")),
        message(NEWTABLE, IPV4, name(1, "filter")),
        message(NEWRULE, IPV4, name(1, "nat"), name(2, "FORWARD")),
        message(NEWRULE, BRIDGE, name(1, "filter"), name(2, "FORWARD")),
        message(NEWTABLE, IPV4, name(1, "overlay_agent")),
        message(NEWTABLE, INET, name(1, "theirs")),
        message(NEWTABLE, INET),
        message(NEWTABLE, INET, name(1, "overlay_agent"), subsystem=1),
        rtnl.HEADER.pack(18, 10 << 8, 0, 0, 0) + b"\1\0",
    ],
)
def test_what_concerns_nothing_of_ours_is_passed_over(buffer: bytes) -> None:
    assert seen(buffer) is None


def test_end_of_a_transaction_names_the_program() -> None:
    assert seen(message(NEWGEN, 0, attribute(1, b"\0\0\0\7"), name(3, "nft"))) == Committed("nft")
    assert seen(message(NEWGEN, 0)) == Committed("")


@pytest.mark.parametrize(
    "damaged",
    [
        attribute(3, attribute(1, b"")),
        attribute(3, attribute(1, attribute(1, b""))),
        attribute(3, element(b"five5")),
        attribute(3, b"\2\0\1\0"),
        b"",
    ],
)
def test_elements_that_cannot_be_read_are_none(damaged: bytes) -> None:
    assert seen(message(NEWSETELEM, INET, name(1, "overlay_agent"), name(2, "peers4"), damaged)) == Elements((), False)


# --- counters ---


def test_counter_is_read_with_its_packets() -> None:
    data = attribute(4, attribute(1, struct.pack(">Q", 420)) + attribute(2, struct.pack(">Q", 7)))
    buffer = message(NEWOBJ, INET, name(1, "overlay_agent"), name(2, "strangers"), data)
    assert nfnl.counter(buffer, only(buffer)) == ("strangers", 7)


@pytest.mark.parametrize(
    "buffer",
    [
        message(NEWGEN, INET),
        message(NEWOBJ, INET, name(2, "strangers")),
        message(NEWOBJ, INET, name(2, "strangers"), attribute(4, attribute(2, b"\0" * 4))),
        rtnl.HEADER.pack(16, 10 << 8 | NEWOBJ, 0, 0, 0),
    ],
)
def test_what_is_no_counter_is_none(buffer: bytes) -> None:
    assert nfnl.counter(buffer, only(buffer)) is None


# --- anything ---


@given(kind=st.integers(0, 40), family=st.sampled_from([INET, IPV4, IPV6]), body=st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail(kind: int, family: int, body: bytes) -> None:
    buffer = message(kind, family, body)
    nfnl.event(buffer, only(buffer))
    nfnl.counter(buffer, only(buffer))
    nfnl.addresses(buffer, only(buffer))


def test_requests_name_our_table_and_the_chain_of_iptables() -> None:
    for buffer, words in (
        (nfnl.dump_elements("peers4", 3), [b"overlay_agent", b"peers4"]),
        (nfnl.dump_counters(3), [b"overlay_agent"]),
        (nfnl.ask_table(3), [b"overlay_agent"]),
        (nfnl.ask_forward(4, 3), [b"filter", b"FORWARD"]),
        (nfnl.ask_forward(6, 3), [b"filter", b"FORWARD"]),
    ):
        assert only(buffer).sequence == 3
        assert all(word + b"\0" in buffer for word in words)
