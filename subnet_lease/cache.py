"""The last table on disk, for a boot while the store is away.

Owns one file, replaced in one step: a line about the network and this host's own lease, then a line for each accepted
lease of another. A file that is damaged, of another version or no longer true is as good as none: all it does is spare
a wait.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from subnet_lease.model import Lease, LeaseInvalid, decode_attrs, encode_attrs, parse_subnet_key
from subnet_lease.pulse import Pulse
from subnet_lease.store import Record, Snapshot

FILE = "table.jsonl"

VERSION = 1

FIRST_S = 5.0
EVERY_S = 60.0
"""Seconds until it is looked whether there is something new to write, and from one writing to the next."""

STEP = 50
"""How many leases are written in one go: half a millisecond's work."""

WRITING_S = 600.0
"""Longest that a writing may take: a slow disk is no reason to end an agent whose network is in order."""

MAX_BYTES = 256 << 20
"""Some 200 bytes a lease; beyond that it is no file of ours."""


class Cached(NamedTuple):
    """What the file holds. Times are in seconds since 1970.

    `config` is the network configuration as the operator wrote it. `until`: when `own`, this host's lease, ends unless
    it was renewed later; None for a reservation, which does not end. `snapshot` has the accepted leases of the others.
    """

    config: bytes
    own: Lease
    until: float | None
    snapshot: Snapshot
    written: float


def write(path: Path, cached: Cached, peers: Iterable[Lease]) -> None:
    """Put the file in place, mode 0600; of `cached.snapshot` only revision and cluster count, `peers` are the leases.

    OSError if that is impossible. Takes its time: there is no hurry, and the other threads may not be kept waiting.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "version": VERSION,
        "written": cached.written,
        "config": cached.config.decode("utf-8", "surrogateescape"),
        "until": cached.until,
        "revision": cached.snapshot.revision,
        "cluster": cached.snapshot.cluster_id,
        "own": _line(cached.own),
    }
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)  # By a writer that was killed; there is one writer at a time.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(json.dumps(head) + "\n")
            for number, lease in enumerate(peers):
                file.write(json.dumps(_line(lease)) + "\n")
                if number % STEP == STEP - 1:
                    # A thread that has work gives up the interpreter every 5 ms only, to each that asks for it in turn.
                    time.sleep(0.001)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).rename(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path, now: float) -> Cached | None:
    """The file's content; None if there is none that can be used at `now`: own lease at an end, clock set back."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                return None
            head = json.loads(file.readline())
            if head["version"] != VERSION:
                return None
            until, written = head["until"], float(head["written"])
            # With a clock that has gone back nobody can tell whether the lease has run out.
            if until is not None and not written <= now < float(until):
                return None
            own = _record(head["own"])
            lease = Lease(*parse_subnet_key(own.key), decode_attrs(own.value), *own[2:])
            records = tuple(_record(json.loads(line)) for line in file)
            snapshot = Snapshot(records, int(head["revision"]), int(head["cluster"]))
            return Cached(head["config"].encode("utf-8", "surrogateescape"), lease, until, snapshot, written)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, LeaseInvalid):
        return None


def _line(lease: Lease) -> list[Any]:
    value = encode_attrs(lease.attrs).decode()
    return [lease.key, value, lease.etcd_lease, lease.create_revision, lease.mod_revision]


def _record(line: list[Any]) -> Record:
    key, value, *numbers = line
    etcd_lease, created, modified = map(int, numbers)
    return Record(str(key), value.encode(), etcd_lease, created, modified)


class CacheWriter:
    """A thread's body: `run` writes the file whenever `mark` has changed, at most every EVERY_S, until `stop`.

    `mark` gives something that differs when the file is out of date, None while there is nothing to write. `collect`
    gives what to write, with the leases of the others; None if that cannot be had now.
    """

    def __init__(
        self,
        path: Path,
        mark: Callable[[], object],
        collect: Callable[[], tuple[Cached, list[Lease]] | None],
        log: Any,
    ) -> None:
        self._path = path
        self._mark = mark
        self._collect = collect
        self._log = log
        self._stopped = threading.Event()
        self._refused = ""
        self.pulse = Pulse(WRITING_S, time.monotonic)

    @property
    def refused(self) -> str:
        """Why the table could not be written when it last was to be, empty if it was."""
        return self._refused

    def run(self) -> None:
        """Write until `stop`."""
        written: object = None
        pause = FIRST_S
        while not self.pulse.wait(self._stopped, pause):
            pause = FIRST_S
            mark = self._mark()
            if mark is None or mark == written:
                continue
            found = self._collect()
            if found is not None:
                self._write(*found)
                found = None  # Thousands of leases may be gone by the next time.
                written = None if self._refused else mark
                pause = EVERY_S

    def _write(self, cached: Cached, peers: list[Lease]) -> None:
        refused = ""
        try:
            write(self._path, cached, peers)
        except OSError as error:
            refused = os.strerror(error.errno or 0)
        if refused and refused != self._refused:
            self._log.warning(
                "cache_refused", path=str(self._path), reason=refused, effect="a boot while etcd is away has to wait"
            )
        self._refused = refused

    def stop(self) -> None:
        """End `run`, once a file that is being written is complete."""
        self._stopped.set()
