"""Which packets of a capture are wanted: `--filter` in a few words, as tcpdump's users would guess them.

    tcp port 80 and host 10.244.7.2
    icmp not in
    remarks

Each word or pair says one thing, and all of them must be true; `and` between them may be left out, `not` turns the next
one round. They speak of the inner packet, `host` of either.
"""

from collections.abc import Callable
from typing import NamedTuple

from overlay.packets import Packet
from overlay.roster import Target
from subnet_lease.model import Prefix, pack_address


class Seen(NamedTuple):
    """A packet and its way: whether it left this host, None where that is not known."""

    packet: Packet
    outgoing: bool | None


Wanted = Callable[[Seen], bool]

WORDS: dict[str, tuple[str, Wanted]] = {
    "tcp": ("TCP", lambda seen: seen.packet.protocol == "tcp"),
    "udp": ("UDP", lambda seen: seen.packet.protocol == "udp"),
    "icmp": ("ICMP and ICMPv6", lambda seen: seen.packet.protocol in ("icmp", "nd")),
    "arp": ("ARP", lambda seen: seen.packet.protocol == "arp"),
    "nd": ("IPv6 neighbour discovery", lambda seen: seen.packet.protocol == "nd"),
    "ip": ("IPv4", lambda seen: seen.packet.inner is not None and len(seen.packet.inner.src) == 4),
    "ip6": ("IPv6", lambda seen: seen.packet.inner is not None and len(seen.packet.inner.src) == 16),
    "fragment": ("fragments", lambda seen: any(remark.kind == "fragment" for remark in seen.packet.remarks)),
    "remarks": ("packets with something off", lambda seen: bool(seen.packet.remarks)),
    "in": ("what arrives at this host", lambda seen: seen.outgoing is False),
    "out": ("what leaves it", lambda seen: seen.outgoing is True),
}
"""Words that stand alone: what they select."""

PAIRS = {"port": "port NUMBER", "host": "host ADDRESS", "net": "net CIDR", "vni": "vni NUMBER"}
"""Words that take a value: how they are written."""


def parse(text: str) -> Wanted:
    """What a filter selects; ValueError says what is wrong, and what could have been meant."""
    wanted: list[Wanted] = []
    words = text.split()
    if not words:
        raise ValueError(f"it is empty; use {_usage()}")
    negated = joined = False
    while words:
        word = words.pop(0).lower()
        if word == "and" and wanted and not joined and not negated:
            joined = True
            continue
        if word == "not":
            negated = not negated
            continue
        one = WORDS[word][1] if word in WORDS else _pair(word, words)
        wanted.append(_opposite(one) if negated else one)
        negated = joined = False
    if negated or joined:
        raise ValueError("something is missing at the end")
    return lambda seen: all(one(seen) for one in wanted)


def _pair(word: str, rest: list[str]) -> Wanted:
    if word == "or":
        raise ValueError("there is no 'or': everything that is named must be true; run two captures")
    if word not in PAIRS:
        raise ValueError(f"{word[:32]!r} is not understood; use {_usage()}")
    if not rest:
        raise ValueError(f"{word!r} needs a value: {PAIRS[word]}")
    value = rest.pop(0)
    if word == "host":
        return _host(pack_address(value))
    if word == "net":
        return _net(Prefix.parse(value, strict=False))
    most = 65535 if word == "port" else (1 << 24) - 1
    if not value.isascii() or not value.isdigit() or int(value) > most:
        raise ValueError(f"{value[:32]!r} is no {word}: a number from 0 to {most}")
    number = int(value)
    if word == "port":
        return lambda seen: (inner := seen.packet.inner) is not None and number in (inner.src_port, inner.dst_port)
    return lambda seen: seen.packet.vni == number


def _opposite(wanted: Wanted) -> Wanted:
    return lambda seen: not wanted(seen)


def _host(address: bytes) -> Wanted:
    def has(seen: Seen) -> bool:
        return any(ip is not None and address in (ip.src, ip.dst) for ip in (seen.packet.inner, seen.packet.outer))

    return has


def _net(block: Prefix) -> Wanted:
    def has(seen: Seen) -> bool:
        inner = seen.packet.inner
        return inner is not None and (block.holds(inner.src) or block.holds(inner.dst))

    return has


def _usage() -> str:
    return ", ".join((*WORDS, *PAIRS.values())) + ", with 'and' and 'not'"


def concerns(target: Target, packet: Packet) -> bool:
    """Whether the packet goes to or comes from the host or the pod, by outer or by inner address."""
    if packet.outer is not None and target.underlay & {packet.outer.src, packet.outer.dst}:
        return True
    inner = packet.inner
    return inner is not None and any(block.holds(inner.src) or block.holds(inner.dst) for block in target.pods)
