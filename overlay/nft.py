"""The nftables edge: the only runner of `nft`, and the netlink sockets for the elements of our sets.

Whole rule sets go through `nft`, one atomic transaction a call, which costs a process; the elements of our sets change
with every host that joins, and go through a socket of our own, as does all that is asked while the agent runs. A third
way in is the monitor: what others do to our table, and to the chains of `iptables-nft` that matter to us. Built for one
thread.

Relied upon: notifications are queued to the monitor while the kernel carries out the transaction, and carry the port
id of the socket that caused it, which for `nft` is its process id. So what we cause ourselves is left out: that of our
own socket by a filter, that of `nft` because all of it is there by the time the process has ended.
"""

import errno
import json
import os
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from overlay import firewall, netlink, nfnl, rtnl
from overlay.firewall import Finding
from subnet_lease.model import Prefix

BUFFER = 8 << 20
"""Bytes asked for on both sockets: to send a transaction in one go, and to hold what others announce meanwhile."""

SECONDS = 30
"""How long one run of `nft` may take."""

DUMP_ATTEMPTS = 5

_NETLINK_NETFILTER = 12
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1


class NftFailed(Exception):
    """`nft` is missing or refused the ruleset, or the kernel a request; the text is one clause for the operator."""


class TableGone(NftFailed):
    """Our table or its sets do not exist: apply the ruleset, which carries the elements."""

    def __init__(self) -> None:
        super().__init__(f"the nftables table {firewall.TABLE} is gone")


@dataclass(frozen=True, slots=True)
class Seen:
    """What others did since the last look, as things stand after it.

    `elements` tells of packed addresses whether they now are in our sets. `altered`: our table, or something in it
    besides elements, was changed or removed; applying the ruleset puts it right. `forward`: the IP versions whose
    FORWARD chain of `iptables-nft` changed. `programs` are the names of those who did it. `lost`: there was more than
    could be held, so that only `dump`, `has_table` and a check of the chains tell the truth.
    """

    elements: Mapping[bytes, bool] = field(default_factory=dict)
    altered: bool = False
    forward: frozenset[int] = frozenset()
    programs: tuple[str, ...] = ()
    lost: bool = False


class Questions:
    """A socket to ask the nftables of this network namespace by. Raises NftFailed where the kernel has none."""

    def __init__(self, buffer: int = 1 << 20) -> None:
        try:
            self._commands = netlink.open_socket(_NETLINK_NETFILTER, buffer)
        except OSError as error:
            raise NftFailed(f"nfnetlink cannot be used: {error.strerror}") from error
        self._commands.settimeout(10)
        self._sequence = 0

    def close(self) -> None:
        """Close the socket."""
        self._commands.close()

    def counters(self) -> dict[str, int]:
        """Packets counted since the table was last loaded, by the name of the counter; empty without a table."""
        answers = self._dump("counters", nfnl.dump_counters)
        return dict(found for answer in answers if (found := nfnl.counter(*answer)))

    def sources(self, counter: str) -> list[bytes]:
        """Latest sources, packed, of what `counter` of `firewall.SAMPLED` counts; empty without a table."""
        try:
            return [
                address for length in firewall.SETS for address in self._elements(firewall.sample_set(counter, length))
            ]
        except TableGone:
            return []

    def _elements(self, name: str) -> list[bytes]:
        answers = self._dump("elements", partial(nfnl.dump_elements, name))
        return [address for answer in answers for address in nfnl.addresses(*answer)]

    def _dump(self, what: str, request: Callable[[int], bytes]) -> "list[_Answer]":
        for _ in range(DUMP_ATTEMPTS):
            number = self._number()
            code, answers = self._exchange(request(number), number)
            if code:
                raise _refused(what, code)
            if not any(answer.message.flags & rtnl.DUMP_INTERRUPTED for answer in answers):
                return answers
        raise NftFailed(f"the nftables {what} change faster than they can be read")

    def _number(self) -> int:
        """A sequence number that no earlier question had, so that a belated answer is nobody's."""
        self._sequence = self._sequence % 0x7FFFFFFF + 1
        return self._sequence

    def _exchange(self, request: bytes, *numbers: int) -> "tuple[int, list[_Answer]]":
        """Send what has these sequence numbers; (errno, all answers up to the first error or the end)."""
        answers: list[_Answer] = []
        try:
            self._commands.send(request)
            while True:
                buffer = self._commands.recv(1 << 18)
                for message in rtnl.messages(buffer):
                    if message.sequence not in numbers:
                        continue
                    if message.kind in (rtnl.NLMSG_ERROR, rtnl.NLMSG_DONE):
                        return rtnl.error_of(buffer, message), answers
                    answers.append(_Answer(buffer, message))
        except OSError as error:
            raise NftFailed(f"nfnetlink: {error.strerror or error}") from error


class Nftables(Questions):
    """The nftables of this network namespace. Raises NftFailed where the kernel has none."""

    def __init__(self) -> None:
        super().__init__(BUFFER)
        try:
            self._monitor = netlink.open_socket(_NETLINK_NETFILTER, BUFFER)
            netlink.drop_from(self._monitor, self._commands)
            self._monitor.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, nfnl.GROUP)
        except OSError as error:
            raise NftFailed(f"nfnetlink cannot be used: {error.strerror}") from error
        self._monitor.setblocking(False)
        self._unread: list[nfnl.Event] = []
        self._lost = False

    def close(self) -> None:
        """Close both sockets."""
        super().close()
        self._monitor.close()

    # --- the rule set ---

    def apply(self, ruleset: str) -> None:
        """Replace our table in one transaction, or remove it: all of `ruleset`, or nothing and NftFailed.

        What others did to the table until then is forgotten with it, and `observe` says nothing of it.
        """
        self._drain()
        self._drain(own=_load(ruleset))

    def has_table(self) -> bool:
        """Whether our table exists."""
        return self._is_there("table", nfnl.ask_table)

    def forward_versions(self) -> frozenset[int]:
        """The IP versions for which `iptables-nft` keeps a FORWARD chain."""
        return frozenset(
            version for version in (4, 6) if self._is_there("chain FORWARD", partial(nfnl.ask_forward, version))
        )

    def _is_there(self, what: str, request: Callable[[int], bytes]) -> bool:
        number = self._number()
        code, _ = self._exchange(request(number), number)
        if code not in (0, errno.ENOENT):
            raise _refused(what, code)
        return code == 0

    # --- elements ---

    def put(self, added: Collection[bytes], removed: Collection[bytes] = ()) -> None:
        """Put packed addresses into our sets, then take others out, in one transaction; either may be so already.

        Raises TableGone, or NftFailed if the kernel refuses; then none of it was done.
        """
        if not added and not removed:
            return
        number, end = self._number(), self._number()
        code, _ = self._exchange(nfnl.batch(added, removed, number, end), number, end)
        if code:
            raise _refused("elements", code)

    def dump(self) -> set[bytes]:
        """All packed addresses in our sets. Raises TableGone, or NftFailed."""
        return {address for name in firewall.SETS.values() for address in self._elements(name)}

    # --- the monitor ---

    def fileno(self) -> int:
        """Readable when others have changed something."""
        return self._monitor.fileno()

    def observe(self) -> Seen:
        """What others changed since the last call."""
        self._drain()
        events, self._unread = self._unread, []
        lost, self._lost = self._lost, False
        elements: dict[bytes, bool] = {}
        forward: set[int] = set()
        programs: dict[str, None] = {}
        altered = concerned = False
        for event in events:
            match event:
                case nfnl.Committed(program):
                    if concerned:
                        programs[program] = None
                    concerned = False
                    continue
                case nfnl.Elements(addresses, gone):
                    elements.update(dict.fromkeys(addresses, not gone))
                case nfnl.Altered():
                    altered = True
                case nfnl.ForwardChanged(version):
                    forward.add(version)
            concerned = True
        return Seen(elements, altered, frozenset(forward), tuple(programs), lost)

    def _drain(self, own: int = 0) -> None:
        """Move what concerns us from the monitor to memory, but for what the process `own` has caused."""
        for buffer in netlink.queued(self._monitor):
            if buffer is None:
                self._lost = True
                continue
            # What comes in one go is of one transaction, and so of one socket (nft_commit_notify). The kernel gives the
            # first socket of a process the id of the process (netlink_autobind).
            if own and rtnl.HEADER.unpack_from(buffer)[4] == own:
                # The table has been replaced: what others did to it before is no more.
                self._unread = [event for event in self._unread if isinstance(event, nfnl.ForwardChanged)]
                continue
            for message in rtnl.messages(buffer):
                event = nfnl.event(buffer, message)
                if event is not None:
                    self._unread.append(event)


def _refused(what: str, code: int) -> NftFailed:
    if code == errno.ENOENT:
        return TableGone()
    reason = "more of them than a set has room for" if code == errno.ENFILE else os.strerror(code)
    return NftFailed(f"the kernel refused nftables {what}: {reason}")


class _Answer(NamedTuple):
    """One message that answers a question, and the buffer it lies in."""

    buffer: bytes
    message: rtnl.Message


# --- the program -------------------------------------------------------------------------------------------------


def apply(ruleset: str) -> None:
    """Load `ruleset` in one transaction: all of it, or nothing and NftFailed."""
    _load(ruleset)


def findings(blocks: Iterable[Prefix]) -> list[Finding]:
    """What other tools' tables have in the way of forwarding for `blocks`; see `firewall.forward_findings`.

    Empty without the program. Costs a process for each table that filters forwarded packets, and one.
    """
    found: list[Finding] = []
    for family, table in firewall.forward_tables(_listing("chains")):
        found += firewall.forward_findings(_listing("table", family, table), blocks)
    return found


def ruleset() -> Mapping[str, Any]:
    """All tables, chains and rules of this network namespace, as `nft -j list ruleset` tells them, without the elements
    of sets. Empty without the program. Raises NftFailed.
    """
    # Terse: our own sets have an element for each host.
    done = _run(["-t", "-j", "list", "ruleset"])
    if done is None:
        return {}
    if done.code:
        raise NftFailed(f"nft cannot list the ruleset: {done.errors.strip()[:200]}")
    listing: Mapping[str, Any] = json.loads(done.output)
    return listing


def rule_text(family: str, table: str, chain: str, handle: int) -> str:
    """The rule of this handle as `nft` writes it, empty if it is not there."""
    done = _run(["-a", "list", "chain", family, table, chain])
    ending = f" # handle {handle}"
    lines = done.output.splitlines() if done is not None and not done.code else []
    return next((line.strip().removesuffix(ending) for line in lines if line.endswith(ending)), "")


def _listing(*what: str) -> Mapping[str, Any]:
    done = _run(["-j", "list", *what])
    # A table may have gone since it was listed.
    if done is None or done.code:
        return {}
    listing: Mapping[str, Any] = json.loads(done.output)
    return listing


def _load(ruleset: str) -> int:
    """Load it; returns the id of the process that did."""
    done = _run(["-f", "-"], ruleset)
    if done is None:
        raise NftFailed("the program nft is not installed (package nftables)")
    if done.code:
        first = done.errors.strip().splitlines()[:1]
        raise NftFailed(f"nft refused the ruleset: {first[0] if first else f'exit code {done.code}'}")
    return done.pid


class _Done(NamedTuple):
    pid: int
    code: int
    output: str
    errors: str


def _run(arguments: list[str], text: str = "") -> _Done | None:
    """What came of the process, None if the program is missing."""
    try:
        process = subprocess.Popen(
            ["nft", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
    except FileNotFoundError:
        return None
    with process:
        try:
            output, errors = process.communicate(text, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise NftFailed(f"nft did not finish within {SECONDS} s") from None
    return _Done(process.pid, process.returncode, output, errors)
