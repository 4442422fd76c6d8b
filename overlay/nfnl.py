"""The nfnetlink codec: bytes for the elements of our nftables sets and for what is asked of the kernel, and back.

Owns the layout of the few messages of include/uapi/linux/netfilter/{nfnetlink,nf_tables}.h that are used while the
agent runs: element batches, dumps of elements and counters, the look-up of a chain, and what notifications say of our
table and of the chains that `iptables-nft` keeps. Rules and sets themselves are made by `nft`, from the text of
`firewall`. No sockets: `nft` sends and receives.

Relied upon: a batch is one transaction, carried out whole or not at all (nfnetlink_rcv_batch). Adding an element that
is there succeeds. Deleting one that is not fails with ENOENT, and with it the batch; so what is to be deleted is added
first, in the same batch, and ENOENT always means that the table or its sets are gone. (NFT_MSG_DESTROYSETELEM would do
as well, from kernel 6.3 on.) A transaction is announced change by change, then by NFT_MSG_NEWGEN, which names the
program that made it.

Numbers in attributes are in network order, other than in rtnetlink; headers are in the host's own.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from overlay.firewall import FORWARD_CHAIN, NAME, SETS
from overlay.rtnl import ACK, CREATE, DUMP, HEADER, REQUEST, Message, attribute

GROUP = 7
"""NFNLGRP_NFTABLES: every change of the rule set in this network namespace."""

_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NFTABLES = 10  # NFNL_SUBSYS_NFTABLES

# NFT_MSG_*, of this subsystem. What was removed by a "destroy" is announced as such.
_GETTABLE, _GETCHAIN, _NEWGEN, _NEWOBJ, _GETOBJ = 1, 4, 15, 18, 19
_NEWSETELEM, _GETSETELEM, _DELSETELEM, _DESTROYSETELEM = 12, 13, 14, 30
_CHAIN_CHANGES = (3, 5, 27)  # NFT_MSG_NEWCHAIN, _DELCHAIN, _DESTROYCHAIN
_RULE_CHANGES = (6, 8, 28)  # NFT_MSG_NEWRULE, _DELRULE, _DESTROYRULE

_INET, _IPV4, _IPV6 = 1, 2, 10  # NFPROTO_*
_NFPROTO = {4: _IPV4, 6: _IPV6}
_VERSIONS = {_IPV4: 4, _IPV6: 6}

# NFTA_*: the table's name has the same number in all messages; number 2 is a rule's chain, and an element's set.
_TABLE = 1
_RULE_CHAIN, _CHAIN_NAME = 2, 3
_SET, _ELEMENTS, _ELEMENT, _KEY, _VALUE = 2, 3, 1, 1, 1
_OBJECT_NAME, _OBJECT_TYPE, _OBJECT_DATA, _COUNTER_PACKETS = 2, 3, 4, 2
_PROGRAM = 3
_OBJECT_COUNTER = 1

_GENMSG = struct.Struct(">BBH")  # nfgenmsg: family, version, resource id
_ATTR = struct.Struct("=HH")
_NESTED = 0x8000
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")

_CHUNK = 2000
"""Elements in one message: its list is one attribute, whose length has 16 bits."""


class Elements(NamedTuple):
    """Elements of our sets: packed addresses that are in, or, with `gone`, have been taken out."""

    addresses: tuple[bytes, ...]
    gone: bool


class Altered(NamedTuple):
    """Something of our table other than elements was made, changed or removed; or the table was."""


class ForwardChanged(NamedTuple):
    """The FORWARD chain that `iptables-nft` keeps for IP `version`, or our chain beside it, was changed."""

    version: int


class Committed(NamedTuple):
    """The end of a transaction, and the name of the program that made it (16 bytes at most: the kernel's comm)."""

    program: str


Event = Elements | Altered | ForwardChanged | Committed


# --- building ----------------------------------------------------------------------------------------------------


def batch(added: Iterable[bytes], removed: Iterable[bytes], sequence: int, end: int) -> bytes:
    """One transaction that puts packed addresses into our sets, then takes others out; there must be something to do.

    The first answer tells what came of it: an error, with either number, or an acknowledgement with the number `end`,
    which the last change has. (Errors of changes are kept until the transaction has failed or been committed.)
    """
    added, removed = list(added), list(removed)
    changes = [
        (kind, length, chunk)
        for kind, addresses in ((_NEWSETELEM, added + removed), (_DELSETELEM, removed))
        for length in SETS
        for chunk in _chunks([address for address in addresses if len(address) == length])
    ]
    messages = [_batch_limit(_BATCH_BEGIN, sequence)]
    for number, (kind, length, chunk) in enumerate(changes, 1):
        last = number == len(changes)
        flags = REQUEST | (ACK if last else 0) | (CREATE if kind == _NEWSETELEM else 0)
        body = _name(_TABLE, NAME) + _name(_SET, SETS[length]) + _elements(length, chunk)
        messages.append(_message(kind, flags, end if last else sequence, _INET, body))
    messages.append(_batch_limit(_BATCH_END, sequence))
    return b"".join(messages)


def dump_elements(name: str, sequence: int) -> bytes:
    """A dump of a set of our table. ENOENT if the table or the set is gone."""
    return _message(_GETSETELEM, REQUEST | DUMP, sequence, _INET, _name(_TABLE, NAME) + _name(_SET, name))


def dump_counters(sequence: int) -> bytes:
    """A dump of the counters of our table; empty if there is none."""
    body = _name(_TABLE, NAME) + attribute(_OBJECT_TYPE, _U32.pack(_OBJECT_COUNTER))
    return _message(_GETOBJ, REQUEST | DUMP, sequence, _INET, body)


def ask_table(sequence: int) -> bytes:
    """Is our table there? ENOENT if not."""
    return _message(_GETTABLE, REQUEST | ACK, sequence, _INET, _name(_TABLE, NAME))


def ask_forward(version: int, sequence: int) -> bytes:
    """Does `iptables-nft` have a FORWARD chain for IP `version`? ENOENT if not."""
    body = _name(_TABLE, "filter") + _name(_CHAIN_NAME, "FORWARD")
    return _message(_GETCHAIN, REQUEST | ACK, sequence, _NFPROTO[version], body)


def _chunks(addresses: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(addresses), _CHUNK):
        yield addresses[start : start + _CHUNK]


def _elements(length: int, addresses: list[bytes]) -> bytes:
    """NFTA_SET_ELEM_LIST_ELEMENTS: for each address an element, in it its key, in that its value."""
    head = _ATTR.pack(12 + length, _ELEMENT | _NESTED) + _ATTR.pack(8 + length, _KEY | _NESTED)
    head += _ATTR.pack(4 + length, _VALUE)
    content = b"".join([head + address for address in addresses])
    return _ATTR.pack(4 + len(content), _ELEMENTS | _NESTED) + content


def _batch_limit(kind: int, sequence: int) -> bytes:
    return HEADER.pack(20, kind, REQUEST, sequence, 0) + _GENMSG.pack(0, 0, _NFTABLES)


def _message(kind: int, flags: int, sequence: int, family: int, body: bytes) -> bytes:
    return HEADER.pack(20 + len(body), _NFTABLES << 8 | kind, flags, sequence, 0) + _GENMSG.pack(family, 0, 0) + body


def _name(kind: int, name: str) -> bytes:
    return attribute(kind, name.encode() + b"\0")


# --- reading -----------------------------------------------------------------------------------------------------


def event(buffer: bytes, message: Message) -> Event | None:
    """What a notification, or one message of a dump of elements, says; None if it concerns nothing of ours."""
    kind = _kind(message)
    if kind is None or message.end - message.body < _GENMSG.size:
        return None
    family: int = buffer[message.body]
    attrs = dict(_attrs(buffer, message.body + _GENMSG.size, message.end))
    if kind == _NEWGEN:
        return Committed(_text(attrs, _PROGRAM))
    table = _text(attrs, _TABLE)
    if (family, table) == (_INET, NAME):
        if kind in (_NEWSETELEM, _DELSETELEM, _DESTROYSETELEM):
            # What comes and goes in other sets of ours is nobody's concern.
            mine = _text(attrs, _SET) in SETS.values()
            return Elements(tuple(_addresses(attrs.get(_ELEMENTS, b""))), kind != _NEWSETELEM) if mine else None
        return Altered()
    if family in _VERSIONS and table == "filter" and _concerns_forward(kind, attrs):
        return ForwardChanged(_VERSIONS[family])
    return None


def addresses(buffer: bytes, message: Message) -> list[bytes]:
    """The packed addresses in one message of the answer to `dump_elements`."""
    if _kind(message) != _NEWSETELEM:
        return []
    attrs = dict(_attrs(buffer, message.body + _GENMSG.size, message.end))
    return list(_addresses(attrs.get(_ELEMENTS, b"")))


def counter(buffer: bytes, message: Message) -> tuple[str, int] | None:
    """(name, packets) of a counter, from one message of the answer to `dump_counters`."""
    if _kind(message) != _NEWOBJ:
        return None
    attrs = dict(_attrs(buffer, message.body + _GENMSG.size, message.end))
    data = attrs.get(_OBJECT_DATA, b"")
    packets = dict(_attrs(data, 0, len(data))).get(_COUNTER_PACKETS, b"")
    if len(packets) != _U64.size:
        return None
    return _text(attrs, _OBJECT_NAME), _U64.unpack(packets)[0]


def _kind(message: Message) -> int | None:
    """NFT_MSG_*, None for what is not of nftables."""
    return message.kind & 0xFF if message.kind >> 8 == _NFTABLES else None


def _concerns_forward(kind: int, attrs: dict[int, bytes]) -> bool:
    """Whether a message on the table `filter` is about its FORWARD chain or ours.

    That the table itself comes or goes says nothing that its chains' messages do not: they come first, or after.
    """
    if kind in _CHAIN_CHANGES:
        return _text(attrs, _CHAIN_NAME) in ("FORWARD", FORWARD_CHAIN)
    return kind in _RULE_CHANGES and _text(attrs, _RULE_CHAIN) in ("FORWARD", FORWARD_CHAIN)


def _addresses(elements: bytes) -> Iterator[bytes]:
    """The keys of a list of elements."""
    for _, element in _attrs(elements, 0, len(elements)):
        key = dict(_attrs(element, 0, len(element))).get(_KEY, b"")
        value = dict(_attrs(key, 0, len(key))).get(_VALUE, b"")
        if len(value) in SETS:
            yield value


def _attrs(buffer: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    while at + 4 <= end:
        length, kind = _ATTR.unpack_from(buffer, at)
        if length < 4 or at + length > end:
            return
        yield kind & 0x3FFF, buffer[at + 4 : at + length]
        at += (length + 3) & ~3


def _text(attrs: dict[int, bytes], kind: int) -> str:
    return attrs.get(kind, b"").rstrip(b"\0").decode(errors="replace")
