"""Probes of the paths to peers: whom to measure next, what is said on the wire, what was found, and what it means.

Every host measures the way to a few peers each interval: both its neighbours in the ring of subnets, and some others,
so that in time every pair is covered and no host's work grows with the cluster. What is sent are ordinary packets
between the addresses of two hosts in the overlay: an ICMP echo and a UDP datagram of the MTU's size that nobody may
fragment, and a TCP SYN. Any kernel answers these; an agent's responder answers the datagram with what its host has
measured itself.

Owns the datagram's format, the choice of peers, the table of paths and the verdict. `probe_sockets` sends and receives;
`prober` is the loop. Clocks and randomness are passed in; times are seconds on the caller's steady clock.
"""

import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import NamedTuple, TypeVar

from subnet_lease.model import Prefix, format_address

K = TypeVar("K")
V = TypeVar("V")

ROUNDS = 3
"""Rounds in a row that must go unanswered before anything is concluded: a lost packet is no fault."""

MOST_PATHS = 2048
"""Paths remembered, some 700 bytes each. The one measured longest ago makes room."""

MOST_SUMMARIES = 1024
"""Peers whose latest summary is kept, of one datagram each."""

WINDOW = 16
"""Rounds that round trip times are taken from."""

PACKETS = 48
"""Packets that loss is taken from: of as many rounds, where all three are answered."""

# --- the datagram ------------------------------------------------------------------------------------------------

MAGIC = b"OAgP"
VERSION = 1
QUESTION, ANSWER = 1, 2

HEAD = struct.Struct("!4sBBHQQ")
"""Magic, version, kind, zero; a number that only the asker and who sees its packets know; the asker's clock."""

_STATE = struct.Struct("!BxH")
_HEALTH = struct.Struct("!BBHIIHxx")
_ROWS = {4: struct.Struct("!4s4sIHHBB"), 16: struct.Struct("!16s16sIHHBB")}
_MOST_AGE, _NO_TIME = 0xFFFF, 0xFFFFFFFF

SMALLEST = HEAD.size + _STATE.size
"""Bytes of a question at least."""

CAUSES = (
    "",
    "peer_down",
    "underlay_unreachable",
    "port_blocked",
    "port_blocked_out",
    "port_blocked_in",
    "path_mtu",
    "checksum_offload",
    "device_missing",
    "device_down",
    "fdb_wrong",
    "neighbour_wrong",
    "route_wrong",
    "route_foreign",
)
"""What can be wrong with a path, by the number that stands for it on the wire: new ones go to the end."""

UNKNOWN, FINE, SILENT = 0, 1, 2
"""What a host says in its question of its own latest measurement of the path to whom it asks."""


class Malformed(ValueError):
    """A datagram that no agent sends; the text says in what."""


class Question(NamedTuple):
    """`token` and `clock` come back in the answer. `state` is what the asker found of this path `age` s ago."""

    token: int
    clock: int
    state: int = UNKNOWN
    age: int = 0


class Row(NamedTuple):
    """One host's measurement: from one address to another, both packed, both in the overlay and of one family.

    `rtt` in seconds, None if nothing was answered; `loss` in percent; `mtu` the largest packet in bytes known to pass,
    0 if none; `age` in seconds, when it was sent or is asked for; `cause` one of CAUSES.
    """

    source: bytes
    target: bytes
    rtt: float | None
    loss: int
    mtu: int
    age: int
    cause: str


class Health(NamedTuple):
    """How a host fares: whether its dataplane is complete, how many peers it has, entries not in place, bad paths."""

    ready: bool
    peers: int
    missing: int
    troubled: int


class Answer(NamedTuple):
    """What a responder sends back."""

    token: int
    clock: int
    health: Health
    rows: tuple[Row, ...]


def encode_question(question: Question, size: int) -> bytes:
    """The datagram, `size` bytes long (SMALLEST at least): the room that the answer has."""
    head = HEAD.pack(MAGIC, VERSION, QUESTION, 0, question.token, question.clock)
    return (head + _STATE.pack(question.state, min(question.age, _MOST_AGE))).ljust(size, b"\0")


def decode_question(datagram: bytes) -> Question:
    """Malformed for anything else."""
    token, clock = _head(datagram, QUESTION, SMALLEST)
    state, age = _STATE.unpack_from(datagram, HEAD.size)
    if state not in (UNKNOWN, FINE, SILENT):
        raise Malformed(f"state {state}")
    return Question(token, clock, state, age)


def encode_answer(question: Question, health: Health, rows: Iterable[Row], room: int) -> bytes:
    """The answer in at most `room` bytes, with as many of the rows as fit; empty if not even its head does.

    All rows are of one family, that of the first; others are left out.
    """
    left = room - HEAD.size - _HEALTH.size
    if left < 0:
        return b""
    packed: list[bytes] = []
    family = 4
    for row in rows:
        if not packed:
            family = len(row.source)
        layout = _ROWS[family]
        if left < layout.size:
            break
        if len(row.source) != family or len(row.target) != family:
            continue
        left -= layout.size
        time = _NO_TIME if row.rtt is None else min(int(row.rtt * 1e6), _NO_TIME - 1)
        age = min(max(row.age, 0), _MOST_AGE)
        packed.append(layout.pack(row.source, row.target, time, age, row.mtu, row.loss, CAUSES.index(row.cause)))
    head = HEAD.pack(MAGIC, VERSION, ANSWER, 0, question.token, question.clock)
    counts = (min(number, limit) for number, limit in ((health.peers, _NO_TIME), (health.missing, _NO_TIME)))
    tail = _HEALTH.pack(health.ready, family, len(packed), *counts, min(health.troubled, _MOST_AGE))
    return head + tail + b"".join(packed)


def decode_answer(datagram: bytes) -> Answer:
    """Malformed for anything else. A row with a cause from a later version has none here and is left out."""
    token, clock = _head(datagram, ANSWER, HEAD.size + _HEALTH.size)
    ready, family, count, peers, missing, troubled = _HEALTH.unpack_from(datagram, HEAD.size)
    if ready > 1 or family not in _ROWS:
        raise Malformed("health")
    layout, at = _ROWS[family], HEAD.size + _HEALTH.size
    if at + count * layout.size > len(datagram):
        raise Malformed(f"{count} rows in {len(datagram)} bytes")
    rows = []
    for number in range(count):
        source, target, time, age, mtu, loss, cause = layout.unpack_from(datagram, at + number * layout.size)
        if loss > 100:
            raise Malformed(f"a loss of {loss} percent")
        if cause < len(CAUSES):
            rtt = None if time == _NO_TIME else time / 1e6
            rows.append(Row(source, target, rtt, loss, mtu, age, CAUSES[cause]))
    return Answer(token, clock, Health(bool(ready), peers, missing, troubled), tuple(rows))


def health_of(datagram: bytes) -> Health:
    """Of an answer that decodes, without its rows."""
    ready, _, _, peers, missing, troubled = _HEALTH.unpack_from(datagram, HEAD.size)
    return Health(bool(ready), peers, missing, troubled)


def _head(datagram: bytes, kind: int, least: int) -> tuple[int, int]:
    if len(datagram) < least:
        raise Malformed(f"{len(datagram)} bytes")
    magic, version, found, zero, token, clock = HEAD.unpack_from(datagram)
    if (magic, version, found, zero) != (MAGIC, VERSION, kind, 0):
        raise Malformed("its head is none of ours")
    return token, clock


def token_of(datagram: bytes) -> int | None:
    """The number in the head of a question of ours that somebody has quoted, perhaps cut short; None if it is none."""
    if len(datagram) < HEAD.size or datagram[:4] != MAGIC:
        return None
    token: int = HEAD.unpack_from(datagram)[4]
    return token


# --- who is next -------------------------------------------------------------------------------------------------


class Turns:
    """Numbers below a changing limit in a random order, each once before any comes again.

    A linear congruential sequence of full period (Hull and Dobell 1962) over the next power of two, without the numbers
    at or above the limit: it needs no memory, and goes on when the limit moves. Each round has an order of its own.
    `draw(n)` gives a random number from 0 to n - 1.
    """

    def __init__(self, draw: Callable[[int], int]) -> None:
        self._draw = draw
        self._period = 0
        self._left = 0
        self._at = self._factor = self._step = 0

    def take(self, count: int, limit: int) -> list[int]:
        """The next `count` numbers below `limit`, all that there are if there are no more."""
        if count >= limit:
            return list(range(limit))
        period = 1 << (limit - 1).bit_length()
        taken: list[int] = []
        while len(taken) < count:
            if self._period != period or not self._left:
                self._begin(period)
            self._left -= 1
            self._at = (self._factor * self._at + self._step) % period
            if self._at < limit and self._at not in taken:
                taken.append(self._at)
        return taken

    def _begin(self, period: int) -> None:
        self._period = self._left = period
        self._at = self._draw(period)
        self._factor = 4 * self._draw(max(1, period // 4)) + 1
        self._step = 2 * self._draw(period) + 1


def ring_neighbours(own: Prefix, subnets: Iterable[tuple[Prefix, str]]) -> tuple[str, ...]:
    """Of subnets with their names, the names of the two next to `own`, after and before it; the ring closes.

    Both, so that either of two neighbours measures the other: only then can it be told which direction is cut.
    """
    after = before = first = last = None
    for each in subnets:
        if each[0] > own:
            after = each if after is None or each < after else after
        else:
            before = each if before is None or each > before else before
        first = each if first is None or each < first else first
        last = each if last is None or each > last else last
    found = (after or first, before or last)
    return tuple(dict.fromkeys(each[1] for each in found if each is not None))


# --- what is measured --------------------------------------------------------------------------------------------

ECHO, UDP, TCP = 1, 2, 4
ALL = ECHO | UDP | TCP
"""What one round asks: bits of `Path.answers`."""


class Target(NamedTuple):
    """A path: from our address `source` to the peer's `address`, packed, in the overlay; with host-gw on the underlay.

    `key` and `subnets` are of the peer's lease, `underlay` is the packed address that tunnel packets go to. `device` is
    the interface index that packets should leave by, `direct` whether that is the underlay's; `mtu` in bytes.
    """

    key: str
    subnets: tuple[Prefix, ...]
    source: bytes
    address: bytes
    underlay: bytes
    device: int
    direct: bool
    mtu: int


class Path(NamedTuple):
    """What is known of the path to a peer.

    `reachable`: whether anything got there and back in the latest rounds. `rtt` is the least and `rtt_median` the
    median in seconds, of the rounds in the window, None without any; `loss` the part of them, from 0 to 1, that had no
    answer in time. `mtu` is the largest packet in bytes known to pass, 0 if none is, `mtu_verified` whether it is what
    the path should carry, None where that cannot be told; `mtu_when` says when. `answers` are bits of what is answered.
    `cause` is one of CAUSES, empty if nothing is wrong, with what was seen in `evidence`; `since` when that has been
    so, `when` the time of the latest round.
    """

    target: Target
    reachable: bool
    rtt: float | None
    rtt_median: float | None
    loss: float
    mtu: int
    mtu_verified: bool | None
    mtu_when: float
    answers: int
    cause: str
    evidence: tuple[str, ...]
    since: float
    when: float


class Evidence(NamedTuple):
    """What was found of a path that left something unanswered in ROUNDS rounds.

    In the tunnel: `small`, `echo`, `udp` and `tcp` whether these were answered, the first being an echo of the size
    that every link carries; `finished` whether the datagram was whose checksum the kernel had finished; `largest`
    packet in bytes that came back, of `mtu`; `spoiled` whether this host received wrong checksums meanwhile.
    `says_fine`: the peer says, out of the tunnel, that what it sends is answered; `heard`: that it sends at all;
    `complains`: other hosts pass on that the peer hears us and is not heard. On the wire: whether tunnel packets to it
    have left, None where that was not watched, and whether such from it arrived.

    Around it: `entry` is the cause if our own entries are wrong. `underlay`: whether the peer answers beside the
    tunnel; `route`: whether there is a way to it, `on_link` without a router, `next_hop` whether that, or the first
    router, is there, None if that is not known. `others`: whether other hosts answer at the same time, None if there
    are none.
    """

    mtu: int
    small: bool = False
    echo: bool = False
    udp: bool = False
    tcp: bool = False
    finished: bool = False
    largest: int = 0
    fails: int = 0
    spoiled: bool = False
    says_fine: bool = False
    heard: bool = False
    complains: bool = False
    left: bool | None = None
    arrived: bool = False
    entry: str = ""
    tunnel: bool = True
    underlay: bool = False
    route: bool = True
    on_link: bool = True
    next_hop: bool | None = None
    others: bool | None = None

    @property
    def passes(self) -> bool:
        """Whether anything was answered in the tunnel."""
        return self.small or self.echo or self.udp or self.tcp or self.finished

    @property
    def whole(self) -> bool:
        """Whether a packet of the MTU's size came through."""
        return self.echo or self.udp or self.finished


def verdict(evidence: Evidence) -> str:
    """The cause, one of CAUSES; empty if the path does its work, or if what was seen may have a harmless reason.

    A host may refuse to answer some or all of our probes, and the underlay every ping: as long as something shows that
    the tunnel carries packets, that is nobody's fault.
    """
    if evidence.passes:
        if evidence.small and not evidence.whole:
            return "path_mtu"
        if not evidence.udp and (evidence.finished or (evidence.echo and not evidence.tcp and evidence.spoiled)):
            return "checksum_offload"
        return ""
    if evidence.says_fine:
        return ""
    if evidence.entry:
        return evidence.entry
    if not evidence.tunnel:
        return "underlay_unreachable" if evidence.underlay else _beyond(evidence)
    alive = evidence.underlay or evidence.heard or evidence.arrived
    out = evidence.heard or (evidence.left is False and alive)
    into = evidence.complains or (evidence.arrived and not evidence.heard)
    if alive:
        return "port_blocked" if out == into else "port_blocked_out" if out else "port_blocked_in"
    return _beyond(evidence)


def _beyond(evidence: Evidence) -> str:
    """Which of the two it is when nothing comes from a peer, in the tunnel or beside it."""
    if not evidence.route:
        return "underlay_unreachable"
    if evidence.on_link:
        # Nobody has its address on the link; where nobody answers at all, it is this host that has no link.
        return "underlay_unreachable" if evidence.next_hop or evidence.others is False else "peer_down"
    return "peer_down" if evidence.others and evidence.next_hop is not False else "underlay_unreachable"


def explained(evidence: Evidence, target: Target) -> tuple[str, ...]:
    """What was seen, a line each, for people."""
    address, underlay = format_address(target.address), format_address(target.underlay)
    answered = {
        f"echo of {evidence.mtu} bytes": evidence.echo,
        f"UDP of {evidence.mtu} bytes": evidence.udp,
        "TCP": evidence.tcp,
    }
    yes = [what for what, found in answered.items() if found]
    no = [what for what, found in answered.items() if not found]
    lines = []
    if yes:
        lines.append(f"{address} answers {' and '.join(yes)}")
    if no:
        lines.append(f"{address} does not answer {', '.join(no)}: {ROUNDS} rounds")
    if evidence.largest and not evidence.whole:
        lines.append(f"{evidence.largest} bytes are the most that pass, of {evidence.mtu}")
    if evidence.finished and not evidence.udp:
        lines.append(
            "the same datagram is answered when its checksum is computed by the kernel, not left to the device"
        )
    if evidence.spoiled:
        lines.append("packets with wrong checksums arrived here meanwhile")
    if evidence.passes:
        return tuple(lines)
    lines.append(f"{underlay} {'answers' if evidence.underlay else 'does not answer'} beside the tunnel")
    if not evidence.route:
        lines.append(f"this host has no route to {underlay}")
    if evidence.next_hop is False:
        who = underlay if evidence.on_link else f"the router to {underlay}"
        lines.append(f"nobody on the link answers for {who}")
    if not evidence.underlay and evidence.others is not None:
        lines.append(f"other hosts {'answer' if evidence.others else 'do not answer either'}")
    if evidence.says_fine:
        lines.append("the peer says that its own packets are answered")
    elif evidence.heard:
        lines.append("packets of the peer come out of the tunnel")
    if evidence.complains:
        lines.append("other hosts pass on that the peer hears this host and is not heard")
    if evidence.left is False:
        lines.append("no tunnel packet to it leaves this host")
    if evidence.arrived and not evidence.heard:
        lines.append("tunnel packets of the peer arrive on the wire, and nothing comes out of the tunnel")
    return tuple(lines)


def sizes_between(passes: int, fails: int, number: int) -> list[int]:
    """Up to `number` sizes that divide what lies between a size that passes and one that does not, evenly."""
    span = fails - passes
    return sorted({passes + span * step // (number + 1) for step in range(1, number + 1)} - {passes})


def narrowed(evidence: Evidence, sizes: Mapping[int, bool], least: int) -> Evidence:
    """With the outcome of a search: which sizes came back. One below another that did was lost by chance."""
    largest = max((size for size, passed in sizes.items() if passed), default=evidence.largest or least)
    fails = min((size for size, passed in sizes.items() if not passed and size > largest), default=evidence.fails)
    return evidence._replace(largest=largest, fails=fails)


@dataclass(slots=True)
class _Record:
    target: Target
    reachable: bool
    since: float
    when: float
    times: tuple[float, ...] = ()
    history: int = 1  # Packets as bits, 1 for answered, the latest lowest; beyond the oldest a 1 to mark the end.
    mtu: int = 0
    mtu_verified: bool | None = None
    mtu_when: float = 0.0
    answers: int = 0
    accepted: int = 0
    silent: float | None = None
    arrived: float | None = None
    cause: str = ""
    evidence: tuple[str, ...] = ()


class Paths:
    """The paths measured so far, by the peer's address. At most `most`: the one measured longest ago makes room.

    One thread writes; `rows` and the numbers may be read from any.
    """

    def __init__(self, most: int = MOST_PATHS) -> None:
        self._most = most
        self._records: OrderedDict[bytes, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, address: bytes) -> bool:
        return address in self._records

    def round(self, target: Target, answers: int, rtt: float | None, now: float) -> bool:
        """Take in a round; whether it is as good as usual, so that nothing more need be asked.

        Usual is that all is answered, or what was when nothing was found amiss in spite of the rest.
        """
        record = self._records.get(target.address)
        if record is None:
            record = self._records[target.address] = _Record(target, bool(answers), now, now)
            if len(self._records) > self._most:
                self._records.popitem(last=False)
        self._records.move_to_end(target.address)
        expected = record.accepted or ALL
        good = answers & expected == expected
        if answers == ALL:
            record.accepted = 0
        record.target, record.when = target, now
        record.silent = None if answers else now if record.silent is None else record.silent
        for asked in (ECHO, UDP, TCP):
            if asked & expected:
                record.history = _shifted(record.history, bool(asked & answers))
        if rtt is not None:
            record.times = (*record.times[-WINDOW + 1 :], rtt)
        if answers & (ECHO | UDP):
            record.mtu, record.mtu_verified, record.mtu_when = target.mtu, True, now
        if good:
            self._settle(record, True, answers, "", (), now)
        return good

    def silent_since(self, address: bytes, now: float, recent: float) -> float:
        """The end of the first of the rounds that nothing of was answered since something was; at most `recent` s ago.

        What else was seen of the peer from then on is of the same fault.
        """
        record = self._records.get(address)
        return max(now - recent, record.silent if record and record.silent is not None else now)

    def arrived_since(self, address: bytes, since: float) -> bool:
        """Whether an examination has seen tunnel packets of the peer arrive."""
        record = self._records.get(address)
        return bool(record and record.arrived is not None and record.arrived >= since)

    def conclude(self, target: Target, evidence: Evidence, now: float) -> str:
        """Take in what an examination found after rounds that were not as usual; the cause."""
        record = self._records[target.address]
        cause = verdict(evidence)
        answers = evidence.echo * ECHO | evidence.udp * UDP | evidence.tcp * TCP
        if cause == "path_mtu":
            record.mtu, record.mtu_verified, record.mtu_when = evidence.largest, False, now
        elif not evidence.whole:
            record.mtu_verified = None
        if not cause and record.accepted != answers:
            # What it does not answer is its own affair, and no loss.
            record.accepted, record.history = answers, 1
        if evidence.arrived:
            record.arrived = now
        seen = explained(evidence, target)
        self._settle(record, evidence.passes or evidence.says_fine, answers, cause, seen, now)
        return cause

    @staticmethod
    def _settle(
        record: _Record, reachable: bool, answers: int, cause: str, evidence: tuple[str, ...], now: float
    ) -> None:
        if (record.reachable, record.cause) != (reachable, cause):
            record.since = now
        record.reachable, record.answers, record.cause, record.evidence = reachable, answers, cause, evidence

    def state(self, address: bytes, now: float) -> tuple[int, int]:
        """What to tell the peer of this path: FINE, SILENT or UNKNOWN, and for how many seconds that has been known."""
        record = self._records.get(address)
        if record is None:
            return UNKNOWN, 0
        # A second too many: nobody may take it for newer than it is.
        return (FINE if record.answers else SILENT), int(now - record.when) + 1

    def cause(self, address: bytes) -> str:
        """What was last found wrong with the path, empty if nothing or if it is not known."""
        record = self._records.get(address)
        return record.cause if record else ""

    def troubled(self, most: int) -> list[str]:
        """The keys of the leases whose paths have a cause, at most so many, those measured longest ago first."""
        found = (record.target.key for record in self._records.values() if record.cause)
        return list(islice(dict.fromkeys(found), most))

    def forget(self, gone: Callable[[str], bool]) -> None:
        """Drop the paths to peers whose lease, by its key, is gone."""
        for address in [address for address, record in self._records.items() if gone(record.target.key)]:
            del self._records[address]

    def rows(self) -> list[Path]:
        """All of them, the latest measured last. From any thread."""
        return [_shown(record) for record in self._copy()]

    def failing(self) -> list[Path]:
        """Those with a cause, as `rows`, and cheaper where there are few."""
        return [_shown(record) for record in self._copy() if record.cause]

    def answered(self, address: bytes) -> int:
        """Bits of what was answered when the latest verdict was found."""
        record = self._records.get(address)
        return record.answers if record else 0

    def narrow(self, address: bytes) -> int:
        """The largest size that passes, as it was last found, of a path that does not carry all; else 0."""
        record = self._records.get(address)
        return record.mtu if record and record.mtu_verified is False else 0

    def evidence(self, address: bytes) -> tuple[str, ...]:
        """What was seen when the path was last found to fail."""
        record = self._records.get(address)
        return record.evidence if record else ()

    def underlays(self, most: int) -> list[bytes]:
        """Underlay addresses of peers, those measured last first."""
        addresses = (record.target.underlay for record in reversed(self._records.values()))
        return list(islice(dict.fromkeys(addresses), most))

    def causes(self) -> dict[str, int]:
        """How many paths each cause was found of. From any thread."""
        counts: dict[str, int] = {}
        for record in self._copy():
            if record.cause:
                counts[record.cause] = counts.get(record.cause, 0) + 1
        return counts

    def summary(self, now: float, most: int, family: int) -> list[Row]:
        """For a peer, by addresses of `family`: what is wrong, then what is fresh; at most `most`."""
        records = [record for record in reversed(self._records.values()) if len(record.target.address) == family]
        records.sort(key=lambda record: not record.cause)
        return [_row(record, now) for record in records[:most]]

    def _copy(self) -> list[_Record]:
        return [record for _, record in _copied(self._records)]


def _shifted(history: int, answered: bool) -> int:
    history = history << 1 | answered
    return history if history >> PACKETS + 1 == 0 else history & (1 << PACKETS) - 1 | 1 << PACKETS


def _loss(record: _Record) -> float:
    packets = record.history.bit_length() - 1
    return 1 - (record.history.bit_count() - 1) / packets if packets else 0.0


def _shown(record: _Record) -> Path:
    times = record.times
    return Path(
        record.target,
        record.reachable,
        min(times, default=None),
        median(times) if times else None,
        _loss(record),
        record.mtu,
        record.mtu_verified,
        record.mtu_when,
        record.answers,
        record.cause,
        record.evidence,
        record.since,
        record.when,
    )


def _row(record: _Record, now: float) -> Row:
    target = record.target
    rtt = median(record.times) if record.times and record.reachable else None
    mtu = 0 if record.mtu_verified is None else record.mtu
    loss = round(100 * _loss(record))
    return Row(target.source, target.address, rtt, loss, mtu, int(now - record.when), record.cause)


class Peer(NamedTuple):
    """How the peer at `address` (in the overlay) fares by its own words, and when it said so."""

    address: bytes
    health: Health
    when: float


class Heard:
    """What peers tell: the latest answer of each, as it came, and who asks us. At most `most` of each, the oldest out.

    One thread writes; `rows` and `peers` may be called from any.
    """

    def __init__(self, most: int = MOST_SUMMARIES) -> None:
        self._most = most
        self._answers: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()
        self._questions: OrderedDict[bytes, tuple[float, Question]] = OrderedDict()
        self._complaints: OrderedDict[tuple[bytes, bytes], tuple[float, Row]] = OrderedDict()
        """By source and target: who says that what it sends there is dropped, to be passed on to the target."""

    def answered(self, address: bytes, own: bytes, datagram: bytes, now: float) -> None:
        """The peer at `address` has sent this, which decodes, to our address `own`."""
        _keep(self._answers, address, (now, datagram), self._most)
        for row in _believed(decode_answer(datagram).rows, address, own):
            if row.cause == "port_blocked_out":
                _keep(self._complaints, (row.source, row.target), (now - row.age, row), self._most)

    def asked(self, address: bytes, question: Question, now: float) -> None:
        """The peer has asked this."""
        _keep(self._questions, address, (now, question), self._most)

    def voice(self, address: bytes, since: float) -> tuple[bool, bool]:
        """Of the peer: whether it has asked anything `since`, and whether it says that it was answered since then."""
        when, question = self._questions.get(address, (since - 1, None))
        if question is None or when < since:
            return False, False
        return True, question.state == FINE and when - question.age >= since

    def complains(self, source: bytes, target: bytes, since: float) -> bool:
        """Whether others have passed on that `source` says, of a time after `since`, that `target` does not hear it."""
        when, _ = self._complaints.get((source, target), (since - 1, None))
        return when >= since

    def complaints(self, target: bytes, now: float) -> list[Row]:
        """What others say of their packets to `target`, for its ears."""
        found = self._complaints.items()
        return [
            row._replace(age=int(now - when))
            for (source, each), (when, row) in found
            if each == target and source != target and now - when < COMPLAINT_S
        ]

    def rows(self, now: float, addresses: Collection[bytes] | None = None) -> list[Row]:
        """The measurements of others that are known, of all or of those with these addresses, with their age by now.
        From any thread."""
        return [
            row._replace(age=row.age + int(now - when))
            for address, (when, datagram) in _copied(self._answers)
            if addresses is None or address in addresses
            for row in decode_answer(datagram).rows
            if row.source == address
        ]

    def peers(self) -> list[Peer]:
        """All who have answered, the latest last. From any thread."""
        return [Peer(address, health_of(datagram), when) for address, (when, datagram) in _copied(self._answers)]


COMPLAINT_S = 60
"""Seconds for which a complaint is passed on."""


def _believed(rows: Iterable[Row], address: bytes, own: bytes) -> Iterator[Row]:
    """Rows of an answer from `address` that are its own business or ours: nobody speaks of others to a third."""
    return (row for row in rows if row.source == address or row.target == own)


def _keep(table: "OrderedDict[K, V]", key: K, value: V, most: int) -> None:
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)


def _copied(table: "OrderedDict[K, V]") -> list[tuple[K, V]]:
    """Its items, though another thread may write."""
    while True:
        try:
            return list(table.items())
        except RuntimeError:
            continue
