"""The journal on disk: segments that are only appended to, the thread that writes them, and what reads them.

Owns the files `events-N.log` below `journal/` in the state directory, the newest last. A segment begins with a base,
how each key stood by then, and is put in place with it by a rename. So it can be read without those before it, and the
oldest are simply removed when there is too much or it is too old. A process that is killed leaves a torn last line at
worst; whoever writes next begins on a new one.

No caller ever waits. What cannot be written (a full disk) is counted, and said in the journal when it goes on; how
leases stand is compared with what the disk says then, as it is at a start.
"""

import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from overlay.records import (
    BASE,
    HELD,
    LOGGED,
    MAX_LINE,
    Event,
    News,
    Record,
    Table,
    Tell,
    Turns,
    answer_of,
    decode,
    differences,
    encode,
    fingerprint,
    folded,
    standing_of,
    turned,
)
from subnet_lease.model import Lease
from subnet_lease.pulse import Pulse

DIRECTORY = "journal"

QUEUED = 4096
"""How many events wait for the disk at most; what is beyond that is counted only."""

SEGMENTS = 8
"""A segment takes this part of the size allowed, beside its base; a base at most twice as much."""

LATEST = 256
"""How many of this agent's events are kept in memory, for who asks the agent."""

ASKED = 50
"""How many of them are told when nobody says how many."""

SIGN_S = 60.0
"""Seconds from one sign of life to the next: the newest segment's time of modification, by which a gap is known."""

WRITE_S = 30.0
"""A disk that takes longer than this counts as failing."""

STEP = 50
"""Leases looked at in one go: half a millisecond's work, while the other threads wait."""

CHUNK = 1 << 16
"""Bytes of lines that are written at once."""

Item = TypeVar("Item")

_SEGMENT = re.compile(r"events-([0-9]{8})\.log")
_HELD = b'"kind":"%s"}\n' % HELD.encode()
"""How a line of a base ends: `kind` is the last in each."""


# --- reading -----------------------------------------------------------------------------------------------------


def segments(directory: Path) -> list[tuple[int, Path]]:
    """The segments there are, the oldest first. OSError if the directory cannot be read."""
    found = ((_SEGMENT.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def remove(directory: Path) -> bool:
    """Remove the journal, and nothing else that may be there; whether there was one. OSError."""
    if not directory.is_dir():
        return False
    for path in [*(path for _, path in segments(directory)), *directory.glob(".events-*.log")]:
        path.unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()
    return True


def last_written(directory: Path) -> float | None:
    """When the journal was last written to, or touched as a sign of life; None if there is none. OSError."""
    return max((path.stat().st_mtime for _, path in segments(directory)), default=None)


class Reading:
    """The records of a journal, the oldest first, one at a time; of the bases only the first.

    `damaged` counts the lines that could not be read so far. Nothing is locked: what is removed before it is read is
    missed, and the base of the next segment is read instead.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._number, self._offset = 0, 0
        """The segment that is read, and the bytes of it that have been."""
        self._based = False
        """Whether a base has been read, and every segment since."""
        self.damaged = 0

    def records(self) -> Iterator[Record]:
        """Those that have not been read yet. May be called again, for what has come since. OSError."""
        for number, path in segments(self._directory):
            if number < self._number:
                continue
            if number != self._number:
                self._based = self._based and number == self._number + 1
                self._number, self._offset = number, 0
            with suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(self._offset)
                yield from self._records(file)

    def _records(self, file: Any) -> Iterator[Record]:
        leading = not self._offset
        while line := file.readline(MAX_LINE):
            if line[-1:] != b"\n" and len(line) < MAX_LINE:
                # It is being written, or was never finished.
                break
            self._offset += len(line)
            leading = leading and line.endswith(_HELD)
            if leading and self._based:
                continue
            record = decode(line)
            # An empty line stands where somebody went on after a torn one.
            self.damaged += record is None and line != b"\n"
            if record is not None:
                self._based = self._based or record.kind == BASE
                yield record


def _last_table(directory: Path) -> object:
    """The fingerprint of the table in the journal's last record, if that is of an agent that was stopped. OSError."""
    for _, path in segments(directory)[-1:]:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_LINE))
            last = decode(file.read().rpartition(b"\n")[0].rpartition(b"\n")[2] + b"\n")
        return last.facts.get("table") if last is not None and last.kind == "stopped" else None
    return None


class Segment:
    """A segment as it is now, for the writer: its base, and how keys stand at its end. OSError.

    `pace` passes records on, with pauses for other threads.
    """

    def __init__(self, path: Path, pace: Callable[[Iterable[Record]], Iterable[Record]]) -> None:
        self.path = path
        self._pace = pace
        self.begun: float | None = None
        """When its first record was made; None if it has none."""
        self.base: Record | None = None
        """The record that ends its base; None where nothing is known of any lease."""
        self.after = 0
        """Bytes up to the end of the base."""
        self.uncovered = 0
        """Keys that the base lacks."""
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE):
                if line.endswith(_HELD):
                    self.after += len(line)
                    continue
                record = decode(line)
                self.begun = record.at if record is not None else None
                if record is not None and record.kind == BASE:
                    self.base, self.after = record, self.after + len(line)
                    lacks = record.facts.get("uncovered")
                    self.uncovered = lacks if isinstance(lacks, int) else 0
                break
            self.size = os.fstat(file.fileno()).st_size

    def standings(self) -> Iterator[Record]:
        """How each key stands at its end, as records of a base."""
        parts = self._part(0, self.after), self._part(self.after, self.size)
        return folded(*map(self._pace, parts))

    def _part(self, start: int, end: int) -> Iterator[Record]:
        with self.path.open("rb") as file:
            file.seek(start)
            while start < end and (line := file.readline(MAX_LINE)):
                start += len(line)
                if (record := decode(line)) is not None and (record.kind == HELD or start > self.after):
                    yield record


# --- writing -----------------------------------------------------------------------------------------------------


class Journal:
    """A thread's body: `run` writes what `tell` is told, until `stop`.

    `limit` is how many bytes all files may take, `age` how many seconds back segments reach. `about` are the facts of
    the record that an agent has started. `who` names the process behind a netlink port id, None if it cannot be told.
    `clock` gives seconds since 1970.
    """

    def __init__(
        self,
        directory: Path,
        *,
        limit: int,
        age: float,
        about: Mapping[str, Any],
        log: Any,
        who: Callable[[int], str | None] = lambda port: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._limit, self._share, self._age = limit, limit // SEGMENTS, age
        self._log = log
        self._who = who
        self._clock = clock
        self._pulse = Pulse(WRITE_S, time.monotonic)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopped = False
        self._queue: list[tuple[float, Event]] = []
        self._table: tuple[float, dict[str, Lease | str]] | None = None
        """The last table told, until it is taken in; `_turns` is what came after, the last word on each key."""
        self._turns: dict[str, tuple[float, Lease | str | None]] = {}
        self._missed = 0
        """Events that were not written, until that is."""
        self._started: Record | None = Record(clock(), "started", about)
        """Until it is written: without it a gap would not be told."""
        self._known: dict[str, Lease | str] | None = None
        """How each key stands; None before that is known. The leases are the reconciler's, so they take no room."""
        self._compared = False
        """Whether the disk has said the same of the leases in this agent's life."""
        self._behind = True
        """Whether it may say something else now, and since when: at a start, and after a failure."""
        self._behind_since: float | None = None
        self._left: object = None
        """The fingerprint of the table as the last agent left it, and the journal: then there is nothing to compare."""
        self._written: float | None = None
        """When the journal was last written, by whomever."""
        self._gap = False
        """Whether there is a failure that the journal does not tell of yet."""
        self._refused = ""
        self._cut = False
        """Whether the journal lacks leases that there was no room for."""
        self._latest: deque[bytes] = deque(maxlen=LATEST)
        self._descriptor: int | None = None
        self._size, self._full, self._begun = 0, 0, 0.0
        """Of the open segment: bytes in it, bytes at which the next one begins, and when it began."""

    # --- from any thread ---

    def tell(self, news: News) -> None:
        """Have it written. Never waits."""
        now = self._clock()
        with self._lock:
            match news:
                case Table(standings):
                    self._table = now, standings
                    self._turns.clear()
                case Turns(turns):
                    self._turns.update((key, (now, lease)) for key, lease in turns.items())
                case Event() if len(self._queue) < QUEUED:
                    self._queue.append((now, news))
                case Event():
                    self._missed += 1
        self._wake.set()

    def stop(self) -> None:
        """End `run` when all that was told is written."""
        self._stopped = True
        self._wake.set()

    @property
    def trouble(self) -> str:
        """Why it cannot be written at present, empty while it can: the cause `journal_failing`."""
        return self._refused or ("the disk does not answer" if self._pulse.trouble() else "")

    def answer(self, question: Mapping[str, Any]) -> Iterator[str]:
        """To the question `events` at the agent's socket: the latest, up to its `limit`."""
        limit = question.get("limit")
        yield answer_of(self.latest(limit if isinstance(limit, int) else ASKED), self.trouble)

    def latest(self, limit: int) -> list[Record]:
        """Up to `limit` events of this agent, the newest last, whether or not they could be written."""
        lines = list(self._latest)
        return [record for record in map(decode, lines[max(0, len(lines) - limit) :]) if record is not None]

    # --- the thread ---

    def run(self) -> None:
        """Write until `stop`."""
        self._begin()
        while not self._stopped:
            self._pulse.wait(self._wake, SIGN_S)
            self._wake.clear()
            self._write_news()
        self._write_news()
        told = self._known is not None and not self._behind and not self._cut
        facts = {"table": fingerprint(self._known or {})} if told else {}
        self._append(self._lines([Record(self._clock(), "stopped", facts)]))
        self._close()

    def _begin(self) -> None:
        """Say that an agent has started, and since when nobody wrote."""
        assert self._started is not None
        try:
            if self._directory.is_dir():
                self._behind_since = last_written(self._directory)
                self._left = _last_table(self._directory)
        except OSError as error:
            self._refuse(error)
        if self._behind_since is not None:
            facts = {**self._started.facts, "silent_since": self._behind_since}
            self._started = self._started._replace(facts=facts)
        self._latest.append(encode(self._started))
        self._write_news()

    def _write_news(self) -> None:
        """Write what was told since the last time; without news, a sign of life."""
        with self._lock:
            queue, self._queue = self._queue, []
            table, self._table = self._table, None
            turns, self._turns = self._turns, {}
            missed, self._missed = self._missed, 0
        head = [self._started] if self._started is not None else []
        gap, self._gap = self._gap, False
        if missed or gap:
            since = {"silent_since": self._behind_since} if gap else {}
            head.append(Record(self._clock(), "missed", {"events": missed, **since}))
        told = list(self._lines(Record(at, event.kind, self._named(event.facts)) for at, event in queue))
        leases = self._lines(self._take_in(table, turns))
        behind, known = self._behind, False
        if behind:
            # They are among all else in which the disk differs. What happens in this agent's life it has told itself.
            deque(leases, maxlen=0)
        try:
            if behind and (known := self._known is not None):
                leases = map(encode, self._catch_up()) if self._compared else self._lines(self._catch_up())
            written, done = self._append(chain(map(encode, head), told, leases))
        except OSError as error:
            self._refuse(error)
            written, done = 0, False
        if written >= len(head):
            self._started, gap, missed = None, False, 0
        self._gap = self._gap or gap
        with self._lock:
            self._missed += missed + len(told) - max(0, min(written - len(head), len(told)))
        if done and known:
            self._behind, self._compared, self._left = False, True, None
        elif done and self._behind and not behind:
            # Somebody has removed what was there: compared at once.
            self._wake.set()
        if done and self._refused:
            self._refused = ""
            self._log.info("journal_resumed", path=str(self._directory))
        if not written:
            self._sign()

    def _lines(self, records: Iterable[Record]) -> Iterator[bytes]:
        """The records encoded, and kept in memory as the latest."""
        for record in records:
            line = encode(record)
            self._latest.append(line)
            yield line

    def _named(self, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        """The facts, with the process that the port id in them is of, if that can be told."""
        port = facts.get("port")
        name = self._who(port) if isinstance(port, int) else None
        return {**facts, "by": name} if name else facts

    # --- leases ---

    def _take_in(
        self, table: tuple[float, dict[str, Lease | str]] | None, turns: Mapping[str, tuple[float, Lease | str | None]]
    ) -> Iterator[Record]:
        """Know how keys stand now, and say what has become of them since they were known."""
        if table is not None:
            now, standings = table
            known, self._known = self._known, standings
            if known is not None:
                gone = ((key, None) for key in known.keys() - standings.keys())
                for key, lease in self._gently(chain(gone, standings.items())):
                    yield from _turn(now, key, known.get(key), lease)
        known = self._known
        if known is None:
            return
        for key, (at, lease) in turns.items():
            yield from _turn(at, key, known.get(key), lease)
            if lease is None:
                known.pop(key, None)
            else:
                known[key] = lease

    def _catch_up(self) -> Iterable[Record]:
        """What the disk has otherwise than the leases are known to stand; OSError, from the records as well."""
        known, now = self._known or {}, self._clock()
        if self._left is not None and self._left == fingerprint(known):
            return ()
        newest = self._newest()
        if newest is None or newest.base is None:
            # A journal that begins: all keys at once, and none of it an event.
            self._rotate(
                Record(now, HELD, {"key": key, **standing_of(lease), "found": True})
                for key, lease in self._gently(known.items())
            )
            return [Record(now, "journal_began", {"leases": len(known)})]
        away = {"away_since": self._behind_since}
        events = differences(newest.standings(), known, complete=not newest.uncovered)
        records = (Record(now, event.kind, {**event.facts, **away}) for event in events)
        # With the first, the files are open: what is written before may be too much for the segment to stay.
        return chain(list(islice(records, 1)), records)

    def _gently(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with pauses: a thread that has work gives up the interpreter every 5 ms only."""
        for number, item in enumerate(items):
            if number % STEP == STEP - 1 and not self._stopped:
                time.sleep(0.001)
            yield item

    # --- files ---

    def _append(self, lines: Iterable[bytes]) -> tuple[int, bool]:
        """Write them behind the others; how many were, and whether all. All are taken from `lines` in any case."""
        written = 0
        rest = iter(lines)
        try:
            line = next(rest, None)
            if line is None:
                return 0, True
            while line is not None:
                descriptor = self._open()
                chunk, number = bytearray(), 0
                while line is not None and len(chunk) < CHUNK and (not number or self._size + len(chunk) < self._full):
                    chunk += line
                    number += 1
                    line = next(rest, None)
                self._write(descriptor, chunk)
                written += number
            os.fdatasync(descriptor)
        except OSError as error:
            self._refuse(error)
            with suppress(OSError):
                deque(rest, maxlen=0)
            return written, False
        self._written = self._clock()
        return written, True

    def _write(self, descriptor: int, chunk: bytearray) -> None:
        """Write it to the open segment, whole or not at all."""
        rest = memoryview(chunk)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, self._size)
            self._close()
            raise
        self._size += len(chunk)

    def _open(self) -> int:
        """The descriptor of a segment to write to: the newest, or one more if that is full, too old or gone."""
        if self._descriptor is not None:
            there = os.fstat(self._descriptor).st_nlink > 0
            if there and self._size < self._full and self._clock() - self._begun < self._age / SEGMENTS:
                return self._descriptor
            self._close()
            if not there:
                self._fall_behind()
        newest = self._newest()
        if newest is None:
            # The first of all, or somebody has removed the others.
            self._fall_behind()
        elif newest.size >= newest.after + self._share or (
            newest.size > newest.after and self._clock() - (newest.begun or 0.0) >= self._age / SEGMENTS
        ):
            self._rotate(newest.standings() if newest.base else None, newest.uncovered if self._behind else 0)
            newest = self._newest()
        path = newest.path if newest else self._segment(1)
        self._descriptor = descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size, after, begun = (newest.size, newest.after, newest.begun) if newest else (0, 0, None)
        self._full = after + self._share
        self._begun = self._clock() if begun is None else begun
        if self._size and os.pread(descriptor, 1, self._size - 1) != b"\n":
            # Somebody was killed in the middle of a line.
            self._write(descriptor, bytearray(b"\n"))
        return descriptor

    def _newest(self) -> Segment | None:
        self._directory.mkdir(parents=True, exist_ok=True)
        found = segments(self._directory)
        return Segment(found[-1][1], self._gently) if found else None

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _segment(self, number: int) -> Path:
        return self._directory / f"events-{number:08d}.log"

    def _rotate(self, held: Iterable[Record] | None, uncovered: int = 0) -> None:
        """Begin a new segment with this base, None where nothing is known of leases.

        `uncovered`: keys that the base before lacked. What there is no room for is counted, and said once.
        """
        self._close()
        found = segments(self._directory)
        number = found[-1][0] + 1 if found else 1
        self._make_room()
        temporary = self._directory / f".events-{number:08d}.log"
        room, leases, cut = 2 * self._share, 0, 0
        try:
            with open(temporary, "wb", opener=_private) as file:
                for record in held or ():
                    line = encode(record)
                    if len(line) > room:
                        cut += 1
                        continue
                    file.write(line)
                    room -= len(line)
                    leases += 1
                if held is not None:
                    facts = {"leases": leases, "uncovered": max(cut, uncovered)}
                    file.write(encode(Record(self._clock(), BASE, facts)))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._segment(number))
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        if cut and not self._cut:
            self._cut = True
            self._log.warning(
                "journal_too_small", path=str(self._directory), leases=leases, uncovered=cut,
                effect="`whois` will not know of the others what was before", remedy="a larger --journal-size",
            )  # fmt: skip

    def _make_room(self) -> None:
        """Remove the oldest segments until there is room for one more, and none is too old. The newest one stays."""
        sizes = [(path, path.stat()) for _, path in segments(self._directory)]
        total = sum(found.st_size for _, found in sizes)
        for path, found in sizes[:-1]:
            # A base is at most as large as the segment that it stands for.
            full = total + sizes[-1][1].st_size + self._share > self._limit
            if not full and self._clock() - found.st_mtime < self._age:
                break
            path.unlink(missing_ok=True)
            total -= found.st_size

    def _sign(self) -> None:
        """A sign of life, and an eye on the age of the oldest segments."""
        try:
            if self._descriptor is not None and not self._refused:
                os.utime(self._descriptor)
                self._written = self._clock()
                self._make_room()
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        """It cannot be written: say so once."""
        self._fall_behind()
        self._gap = True
        before, self._refused = self._refused, os.strerror(error.errno or 0)
        if not before:
            effect = "`events` and `whois` will lack what happens until then; nothing else does"
            self._log.error("journal_refused", path=str(self._directory), reason=self._refused, effect=effect)

    def _fall_behind(self) -> None:
        if not self._behind:
            self._behind, self._behind_since = True, self._written


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _turn(at: float, key: str, before: Lease | str | None, now: Lease | str | None) -> Iterator[Record]:
    if before is not now:
        was, stands = (None if lease is None else standing_of(lease) for lease in (before, now))
        event = turned(key, was, stands)
        if event is not None:
            yield Record(at, event.kind, event.facts)


# --- what the log says -------------------------------------------------------------------------------------------


class Retold:
    """A logger whose events of the kinds in `LOGGED` are told as well, whatever the log's own level.

    `clean` has the last word on their facts, as it does for lines of the log: no secret reaches the journal.
    """

    def __init__(self, log: Any, tell: Tell, clean: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        self._log = log
        self._tell = tell
        self._clean = clean

    def debug(self, event: str, **facts: Any) -> None:
        self._log.debug(event, **facts)

    def info(self, event: str, **facts: Any) -> None:
        self._log.info(event, **facts)
        self._retell(event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        self._log.warning(event, **facts)
        self._retell(event, facts)

    def error(self, event: str, **facts: Any) -> None:
        self._log.error(event, **facts)
        self._retell(event, facts)

    def _retell(self, event: str, facts: dict[str, Any]) -> None:
        if event in LOGGED:
            self._tell(Event(event, self._clean(facts)))
