"""The iptables edge: the only runner of iptables, which keeps our accept at the top of its FORWARD chains.

A host may filter what it forwards with `iptables-legacy`, with `iptables-nft` or, during a migration, with both, and
with each of them for both IP versions. Where such a FORWARD chain exists it gets a jump to a chain of ours, whatever it
does today: its policy may become DROP any time. Where none exists nothing is made, for these programs make a table by
being asked about it.

What stands there is read with `-S` and compared; a transaction of `iptables-restore` is run only where it differs. What
rules there ought to be is decided in `firewall`.
"""

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from overlay.firewall import FORWARD_CHAIN, FORWARD_JUMP, forward_restore, forward_rules
from subnet_lease.model import Prefix

SECONDS = 30
"""How long one run may take."""

LOCK_SECONDS = 5
"""How long a run may wait for the lock that all users of iptables-legacy share."""

_NAMES = {4: Path("/proc/thread-self/net/ip_tables_names"), 6: Path("/proc/thread-self/net/ip6_tables_names")}
"""The tables of iptables-legacy that this network namespace has."""

_STEMS = {4: "iptables", 6: "ip6tables"}

_LEVELS = {4: (socket.AF_INET, socket.IPPROTO_IP), 6: (socket.AF_INET6, socket.IPPROTO_IPV6)}
_GET_INFO, _INFO_SIZE = 64, 84  # IPT_SO_GET_INFO and struct ipt_getinfo; the same for IPv6


@dataclass(frozen=True, slots=True)
class Outcome:
    """The FORWARD chain that `program` keeps was not as wanted. `error` says why it cannot be mended, or is empty."""

    program: str
    error: str = ""


def ensure(blocks: Collection[Prefix], nft_versions: Iterable[int]) -> list[Outcome]:
    """Have every FORWARD chain accept what comes from and goes to `blocks`, of each IP version its own.

    `nft_versions`: for which of them `iptables-nft` has such a chain; nftables is asked elsewhere. Chains in order are
    not mentioned. Where there is no block of its IP version, a chain of ours is removed: with no blocks at all, that is
    all this module ever made.
    """
    outcomes = []
    for gap in _gaps(blocks, nft_versions):
        error = gap.error
        if not error:
            try:
                _run(gap.table, "-restore", "--noflush", text=forward_restore(gap.rules, gap.jumps))
            except _Failed as failed:
                error = str(failed)
        outcomes.append(Outcome(gap.table.program, error))
    return outcomes


def missing(blocks: Collection[Prefix], nft_versions: Iterable[int]) -> list[Outcome]:
    """The FORWARD chains that are not as `ensure` would make them, with the reason for those that cannot be read."""
    return [Outcome(gap.table.program, gap.error) for gap in _gaps(blocks, nft_versions)]


def listed(nft_versions: Iterable[int]) -> dict[str, list[str]]:
    """All rules and policies of every table `filter`, as `-S` shows them, by the program that keeps it.

    `nft_versions` as for `ensure`. A table that cannot be read is left out.
    """
    found = {}
    for table in [_Table("legacy", version) for version in _legacy_versions()] + [
        _Table("nft", version) for version in sorted(nft_versions)
    ]:
        with contextlib.suppress(_Failed):
            found[table.program] = _run(table, "", "-S")
    return found


def legacy_shape() -> tuple[bytes, ...]:
    """A value that changes when rules are added to or removed from the tables of iptables-legacy.

    They announce nothing. This costs a few system calls and no process; it does not see rules that were replaced by
    others of the same size and number, so `missing` is to be asked now and then all the same.
    """
    return tuple(_table_info(version) for version in _legacy_versions())


# --- what is there -----------------------------------------------------------------------------------------------


class _Failed(Exception):
    """A program is missing or does not do as told; the text is one clause for the operator."""


class _Table(NamedTuple):
    """A table `filter` of iptables."""

    kind: Literal["legacy", "nft"]
    version: int

    @property
    def program(self) -> str:
        return f"{_STEMS[self.version]}-{self.kind}"


class _Gap(NamedTuple):
    """A table where something is to be done: the rules wanted, the jumps there are; or why it cannot be read."""

    table: _Table
    rules: list[str]
    jumps: int
    error: str = ""


def _gaps(blocks: Collection[Prefix], nft_versions: Iterable[int]) -> Iterator[_Gap]:
    legacy = [_Table("legacy", version) for version in _legacy_versions()]
    for table in legacy + [_Table("nft", version) for version in sorted(nft_versions)]:
        rules = forward_rules(blocks, table.version)
        try:
            found, jumps = _read(table)
        except _Failed as failed:
            yield _Gap(table, rules, 0, str(failed))
            continue
        if (found, jumps) != ((rules, 1) if rules else (None, 0)):
            yield _Gap(table, rules, jumps)


def _legacy_versions() -> list[int]:
    """The IP versions for which this network namespace has a legacy table `filter`. Asking so makes none."""
    found = []
    for version, path in _NAMES.items():
        try:
            if "filter" in path.read_text().split():
                found.append(version)
        except OSError:
            continue  # The kernel has no such iptables, or its module is not loaded.
    return found


def _read(table: _Table) -> tuple[list[str] | None, int]:
    """(the rules of our chain, None if there is no such chain; the jumps that lead there from FORWARD)."""
    forward = _run(table, "", "-S", "FORWARD")
    try:
        chain = _run(table, "", "-S", FORWARD_CHAIN)
    except _Failed:
        return None, forward.count(FORWARD_JUMP)
    return [line for line in chain if line.startswith("-A ")], forward.count(FORWARD_JUMP)


def _table_info(version: int) -> bytes:
    """What the kernel says of the size and layout of the legacy table (struct ipt_getinfo), empty if it is gone."""
    family, level = _LEVELS[version]
    buffer = ctypes.create_string_buffer(b"filter", _INFO_SIZE)
    size = ctypes.c_uint(_INFO_SIZE)
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        # The table's name goes in with the buffer, which the method of Python's sockets cannot do.
        refused = ctypes.CDLL(None).getsockopt(sock.fileno(), level, _GET_INFO, buffer, ctypes.byref(size))
    return b"" if refused else buffer.raw


# --- the programs ------------------------------------------------------------------------------------------------


def _run(table: _Table, suffix: str, *arguments: str, text: str = "") -> list[str]:
    """The lines that the program prints. Raises _Failed."""
    program = _find(table) + suffix
    done = _finished([program, *arguments, "-w", str(LOCK_SECONDS)], text)
    if done.returncode == 0:
        return done.stdout.splitlines()
    # Remarks on tables of the other kind begin with a hash sign.
    said = [line for line in done.stderr.splitlines() if line and not line.startswith("#")]
    raise _Failed(f"{program} failed: {' '.join(said) or f'exit code {done.returncode}'}")


def _find(table: _Table) -> str:
    """The program for a table: by its full name, or the one without a kind if it says to be of that kind."""
    if shutil.which(table.program):
        return table.program
    plain = _STEMS[table.version]
    # Before 1.8 there was one kind only, and no word of it.
    if shutil.which(plain) and ("nf_tables" in _finished([plain, "-V"]).stdout) == (table.kind == "nft"):
        return plain
    raise _Failed(
        f"this host filters forwarded packets with {table.program}, which is not installed here (package iptables)"
    )


def _finished(argv: list[str], text: str = "") -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            argv, input=text, capture_output=True, text=True, timeout=SECONDS, env={**os.environ, "LC_ALL": "C"}
        )
    except subprocess.TimeoutExpired:
        raise _Failed(f"{argv[0]} did not finish within {SECONDS} s") from None
    except OSError as error:
        raise _Failed(f"{argv[0]} cannot be run: {error.strerror}") from None
