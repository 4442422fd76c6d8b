"""The journal's files: what is told is read back, torn or not, within bounds, and no caller ever waits for the disk."""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlay import journal as module
from overlay.cluster import wait_until
from overlay.history import Whois
from overlay.journal import Journal, Reading, Retold, Segment, last_written, remove, segments
from overlay.records import BASE, HELD, Event, News, Record, Table, Turns, encode
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, pack_address
from tests.unit.test_records import key, lease

MIB = 1 << 20


class Log:
    """A log whose lines are kept, whatever their severity and whoever has configured the others."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __call__(self, event: str, **facts: Any) -> None:
        self.lines.append({"event": event, **facts})

    debug = info = warning = error = __call__

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.lines]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def made(
    directory: Path, limit: int = MIB, age: float = 1e9, clock: Clock | None = None, log: Log | None = None
) -> Journal:
    return Journal(
        directory, limit=limit, age=age, about={"version": "1"}, log=log or Log(), clock=clock or Clock(),
        who=lambda port: "ip (pid 5)" if port == 5 else None,
    )  # fmt: skip


@contextlib.contextmanager
def running(journal: Journal) -> Iterator[Journal]:
    thread = threading.Thread(target=journal.run)
    thread.start()
    try:
        yield journal
    finally:
        journal.stop()
        thread.join(30)
        assert not thread.is_alive()


def told(directory: Path, *news: News, limit: int = MIB, age: float = 1e9, clock: Clock | None = None) -> Log:
    """One run of an agent that has this to tell, at once; its log."""
    log = Log()
    with running(made(directory, limit, age, clock, log)) as journal:
        for each in news:
            journal.tell(each)
    return log


def read(directory: Path) -> list[Record]:
    """All records that are no base's."""
    return [record for record in Reading(directory).records() if record.kind not in (HELD, BASE)]


def kinds(directory: Path) -> list[str]:
    return [record.kind for record in read(directory)]


def known(directory: Path) -> dict[str, float]:
    """The keys that stand by the newest segment, and since when they do."""
    standings = Segment(segments(directory)[-1][1], lambda records: records).standings()
    return {record.facts["key"]: record.at for record in standings}


def size(directory: Path) -> int:
    total = 0
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # It was removed meanwhile.
            total += path.stat().st_size
    return total


def table(*numbers: int) -> dict[str, Lease | str]:
    return {key(number): lease(number) for number in numbers}


def event(number: int, size: int = 0) -> Event:
    return Event("drift", {"entry": number, "padding": "x" * size})


def test_what_is_told_is_read_back_in_its_order(tmp_path: Path) -> None:
    told(tmp_path, Event("drift", {"entry": "a", "port": 5}), Event("drift", {"entry": "b", "port": 6}))
    assert [(record.kind, record.facts) for record in read(tmp_path)] == [
        ("started", {"version": "1"}),
        ("drift", {"entry": "a", "port": 5, "by": "ip (pid 5)"}),
        ("drift", {"entry": "b", "port": 6}),
        ("stopped", {}),
    ]
    assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.iterdir())


def test_a_journal_begins_with_all_leases_at_once_and_none_of_them_an_event(tmp_path: Path) -> None:
    told(tmp_path, Table(table(1, 2)))
    told(tmp_path, Table(table(1, 2)), Turns(dict(table(3))))
    assert kinds(tmp_path) == ["started", "journal_began", "stopped", "started", "joined", "stopped"]
    first = [
        (record.facts["key"], record.facts["found"]) for record in Reading(tmp_path).records() if record.kind == HELD
    ]
    assert first == [(key(1), True), (key(2), True)]


def test_a_start_on_an_unchanged_table_records_nothing_of_it(tmp_path: Path) -> None:
    told(tmp_path, Table(table(1, 2)))
    told(tmp_path, Table(table(1, 2)))
    assert kinds(tmp_path) == ["started", "journal_began", "stopped", "started", "stopped"]


def test_a_start_records_what_happened_meanwhile_as_such(tmp_path: Path) -> None:
    told(tmp_path, Table(table(1, 2)))
    before = last_written(tmp_path)
    with running(made(tmp_path)) as journal:
        journal.tell(Table(table(2, 3)))
        wait_until(lambda: not journal._behind, 10, "the comparison")
        journal.tell(Turns({key(2): None}))
    turns = [(record.kind, record.facts["key"], record.facts.get("away_since")) for record in read(tmp_path)[4:-1]]
    assert sorted(turns[:2]) == [("joined", key(3), before), ("left", key(1), before)]
    assert turns[2:] == [("left", key(2), None)]


def test_an_agent_that_was_killed_leaves_the_comparison_to_the_next(tmp_path: Path) -> None:
    told(tmp_path, Table(table(1, 2)))
    path = segments(tmp_path)[0][1]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9])
    told(tmp_path, Table(table(2, 3)))
    assert sorted(kinds(tmp_path)[3:-1]) == ["joined", "left"]
    assert set(known(tmp_path)) == {key(2), key(3)}


def test_a_new_table_of_a_running_agent_tells_what_differs(tmp_path: Path) -> None:
    with running(made(tmp_path)) as journal:
        journal.tell(Table(table(1, 2)))
        wait_until(lambda: not journal._behind, 10, "the comparison")
        journal.tell(Table(table(2, 3)))
    assert [(r.kind, r.facts["key"]) for r in read(tmp_path)[2:-1]] == [("left", key(1)), ("joined", key(3))]


def test_rejections_come_and_go(tmp_path: Path) -> None:
    with running(made(tmp_path)) as journal:
        for news in (Table({}), Turns({key(1): "no"}), Turns({key(1): lease(1)}), Turns({key(1): None})):
            journal.tell(news)
            wait_until(lambda: not journal._turns and not journal._table and not journal._behind, 10, "it is taken in")
    assert kinds(tmp_path)[2:-1] == ["rejected", "joined", "left"]


def test_the_size_is_bounded_and_every_lease_is_still_known(tmp_path: Path) -> None:
    limit = 64 << 10
    with running(made(tmp_path, limit)) as journal:
        journal.tell(Table(table(1, 2, 3)))
        journal.tell(Turns(dict(table(4))))
        for number in range(3000):
            journal.tell(event(number, 100))
            if number % 100 == 0:
                # So that it is not one write.
                wait_until(lambda: not journal._queue, 10, "the queue written")
                assert size(tmp_path) <= limit
    assert size(tmp_path) <= limit
    assert segments(tmp_path)[0][0] > 1
    assert known(tmp_path) == dict.fromkeys(map(key, (1, 2, 3, 4)), 1000)
    search = Whois(pack_address("10.244.4.9"))
    for record in Reading(tmp_path).records():
        search.saw(record)
    assert [held.since for held in search.holdings] == [1000]
    entries = [record.facts["entry"] for record in read(tmp_path) if record.kind == "drift"]
    assert entries == list(range(entries[0], 3000))


def test_a_table_that_does_not_fit_is_cut_and_that_is_said(tmp_path: Path) -> None:
    numbers = range(1, 200)
    log = told(tmp_path, Table(table(*numbers)), limit=32 << 10)
    (line,) = [line for line in log.lines if line["event"] == "journal_too_small"]
    assert size(tmp_path) <= 32 << 10
    assert line["leases"] + line["uncovered"] == 199 and 0 < line["leases"] == len(known(tmp_path))
    (base,) = [record for record in Reading(tmp_path).records() if record.kind == BASE]
    assert base.facts == {"leases": line["leases"], "uncovered": line["uncovered"]}
    # What it lacks has not joined when the next agent finds it.
    told(tmp_path, Table(table(*numbers)), limit=1 << 20)
    assert "joined" not in kinds(tmp_path)
    assert set(known(tmp_path)) == set(map(key, numbers))


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    clock = Clock()
    for number in range(20):
        told(tmp_path, Table(table(1)), event(number), clock=clock, age=800)
        clock.now += 60
    assert len(segments(tmp_path)) > 3
    os.utime(segments(tmp_path)[0][1], (0, 0))
    first = segments(tmp_path)[0][0]
    clock.now += 200
    told(tmp_path, event(99), clock=clock, age=800)
    assert first not in [number for number, _ in segments(tmp_path)]
    assert known(tmp_path) == {key(1): 1000}


def test_a_journal_that_somebody_removes_begins_anew(tmp_path: Path) -> None:
    with running(made(tmp_path)) as journal:
        journal.tell(Table(table(1)))
        wait_until(lambda: not journal._behind, 10, "the comparison")
        assert remove(tmp_path)
        journal.tell(event(1))
        wait_until(lambda: tmp_path.exists() and "journal_began" in kinds(tmp_path), 10, "another beginning")
    assert kinds(tmp_path) == ["drift", "journal_began", "stopped"]
    assert set(known(tmp_path)) == {key(1)}


def test_a_journal_that_may_not_be_looked_at_is_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(directory: Path) -> float:
        raise PermissionError(errno.EACCES, "")

    monkeypatch.setattr("overlay.journal.last_written", refused)
    assert told(tmp_path).events == ["journal_refused", "journal_resumed"]


def test_a_base_that_cannot_be_put_in_place_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(errno.EIO, "")

    monkeypatch.setattr("overlay.journal.os.fsync", refused)
    with running(made(tmp_path)) as journal:
        wait_until(lambda: segments(tmp_path), 10, "the beginning")
        journal.tell(Table(table(1)))
        wait_until(lambda: bool(journal.trouble), 10, "the refusal")
        assert list(tmp_path.glob(".*")) == []
        monkeypatch.undo()
        journal.tell(Turns(dict(table(2))))
        wait_until(lambda: not journal.trouble, 10, "it goes on")
    assert set(known(tmp_path)) == {key(1), key(2)}


@given(st.binary(max_size=300), st.integers(0, 2000), st.booleans())
def test_whatever_stands_in_a_segment_the_whole_lines_are_read_and_it_goes_on(
    garbage: bytes, cut: int, newline: bool
) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        lines = [encode(Record(float(number), "drift", {"entry": number})) for number in range(9)]
        whole = b"".join(lines)
        path = directory / "events-00000001.log"
        path.write_bytes(whole[: min(cut, len(whole))] + garbage + (b"\n" if newline else b""))
        complete = whole[:cut].count(b"\n")
        told(directory)
        entries = [record.facts["entry"] for record in read(directory) if record.kind == "drift"]
        # What follows may happen to be just what the cut took.
        assert entries in (list(range(complete)), list(range(complete + 1)))
        assert kinds(directory)[-2:] == ["started", "stopped"]


def test_a_reader_goes_on_where_it_was(tmp_path: Path) -> None:
    told(tmp_path)
    reading = Reading(tmp_path)
    assert [record.kind for record in reading.records()] == ["started", "stopped"]
    assert list(reading.records()) == []
    with segments(tmp_path)[0][1].open("ab") as file:
        line = encode(Record(5.0, "drift", {}))
        file.write(line[:10])
        file.flush()
        assert list(reading.records()) == []
        file.write(line[10:])
    assert [record.at for record in reading.records()] == [5.0]
    assert reading.damaged == 0


def test_a_reader_that_lags_behind_goes_on_with_the_next_base(tmp_path: Path) -> None:
    reading = Reading(tmp_path)
    limit = 16 << 10
    told(tmp_path, Table(table(1)), limit=limit)
    assert {record.kind for record in reading.records()} == {"started", HELD, BASE, "journal_began", "stopped"}
    told(tmp_path, Table(table(1)), *(event(number, 200) for number in range(200)), limit=limit)
    records = list(reading.records())
    assert [record.kind for record in records[:2]] == [HELD, BASE]
    entries = [record.facts["entry"] for record in records if record.kind == "drift"]
    assert entries == list(range(entries[0], 200))


def test_a_disk_that_refuses_costs_the_journal_and_one_line(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    directory.write_text("in the way")
    log = Log()
    with running(made(directory, log=log)) as journal:
        journal.tell(Table(table(1)))
        journal.tell(event(1))
        wait_until(lambda: journal._missed == 1, 10, "the loss counted")
        assert journal.trouble in ("Not a directory", "File exists")
        journal.tell(Turns(dict(table(2))))
        journal.tell(event(2))
        wait_until(lambda: journal._missed == 2, 10, "the second loss counted")
        # Who asks the agent is told all the same.
        assert [record.facts.get("entry") for record in journal.latest(9)] == [None, 1, 2, None]
        directory.unlink()
        journal.tell(event(3))
        wait_until(lambda: not journal.trouble and not journal._behind, 10, "it goes on")
    assert log.events == ["journal_refused", "journal_resumed"]
    records = read(directory)
    assert [record.facts["events"] for record in records if record.kind == "missed"] == [2]
    assert [record.facts["entry"] for record in records if record.kind == "drift"] == [3]
    # How leases stand is caught up with, whatever was lost.
    assert set(known(directory)) == {key(1), key(2)}


def test_what_happens_while_the_disk_is_full_is_caught_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, write = False, os.write

    def bounded(descriptor: int, data: bytes) -> int:
        if not full:
            return write(descriptor, data)
        if len(data) > 40:
            return write(descriptor, data[:40])
        raise OSError(errno.ENOSPC, "")

    clock = Clock()
    monkeypatch.setattr("overlay.journal.os.write", bounded)
    with running(made(tmp_path, clock=clock)) as journal:
        journal.tell(Table(table(1, 2)))
        wait_until(lambda: not journal._behind, 10, "the comparison")
        full = True
        clock.now = 1005.0
        journal.tell(Turns({key(1): None, **table(3)}))
        wait_until(lambda: bool(journal.trouble), 10, "the refusal")
        full = False
        clock.now = 1010.0
        journal.tell(Turns(dict(table(4))))
        wait_until(lambda: not journal.trouble and not journal._behind, 10, "it goes on")
    missed, *turns = read(tmp_path)[2:-1]
    assert missed == Record(1010.0, "missed", {"events": 0, "silent_since": 1000.0})
    assert sorted((turn.kind, turn.facts["key"], turn.facts["away_since"]) for turn in turns) == [
        ("joined", key(3), 1000.0), ("joined", key(4), 1000.0), ("left", key(1), 1000.0),
    ]  # fmt: skip
    reading = Reading(tmp_path)
    assert list(reading.records()) and reading.damaged == 0


def test_what_the_queue_has_no_room_for_is_counted_but_leases_are_not_lost(tmp_path: Path) -> None:
    journal = made(tmp_path)
    for number in range(module.QUEUED + 5):
        journal.tell(event(number))
    journal.tell(Table(table(1, 2)))
    journal.tell(Turns({key(2): None, key(3): lease(3)}))
    with running(journal):
        pass
    assert [record.facts["events"] for record in read(tmp_path) if record.kind == "missed"] == [5]
    assert set(known(tmp_path)) == {key(1), key(3)}


def test_the_agent_answers_with_its_latest_events(tmp_path: Path) -> None:
    told(tmp_path, event(1))
    with running(made(tmp_path)) as journal:
        for number in range(2 * module.LATEST):
            journal.tell(event(number))
        wait_until(lambda: len(journal.latest(module.LATEST)) == module.LATEST, 10, "as many as are kept")
        wait_until(lambda: json.loads(next(journal.answer({})))["events"][-1]["entry"] == 2 * module.LATEST - 1, 10, "")
        (answer,) = journal.answer({"limit": 2})
        assert [told["entry"] for told in json.loads(answer)["events"]] == [510, 511]
        assert [len(json.loads(next(journal.answer({"limit": n})))["events"]) for n in (0, -1, "x", 999)] == [
            0, 0, module.ASKED, module.LATEST,
        ]  # fmt: skip


def test_only_kinds_of_the_journal_are_retold_and_cleaned_before() -> None:
    heard: list[News] = []
    inner = Log()
    log = Retold(inner, heard.append, lambda facts: {**facts, "clean": True})
    log.info("lease_acquired", subnet="s")
    log.warning("lease_lost", reason="r")
    log.error("config_unusable", reason="r")
    log.info("ready")
    log.debug("lease_acquired")
    assert inner.events == ["lease_acquired", "lease_lost", "config_unusable", "ready", "lease_acquired"]
    assert heard == [
        Event("lease_acquired", {"subnet": "s", "clean": True}),
        Event("lease_lost", {"reason": "r", "clean": True}),
        Event("config_unusable", {"reason": "r", "clean": True}),
    ]


def test_removing_takes_the_journal_and_no_file_of_anybody_elses(tmp_path: Path) -> None:
    directory = tmp_path / "journal"
    assert not remove(directory)
    told(directory, Table(table(1)))
    (directory / "notes.txt").write_text("mine")
    assert remove(directory) and [path.name for path in directory.iterdir()] == ["notes.txt"]
    (directory / "notes.txt").unlink()
    assert remove(directory) and not directory.exists()


def test_a_table_of_15000_hosts_takes_a_base_of_few_mebibytes(tmp_path: Path) -> None:
    many: dict[str, Lease | str] = {}
    for number in range(15_000):
        subnet = Prefix(bytes((10, number >> 8, number & 0xFF, 0)), 24)
        attrs = LeaseAttrs(bytes((172, 16, number >> 8, number & 0xFF)), "vxlan", Vtep(1, number.to_bytes(6, "big")))
        each = Lease(subnet, None, attrs, 7, number + 1, number + 1)
        many[each.key] = each
    told(tmp_path, Table(dict(many)), limit=64 * MIB)
    told(tmp_path, Table(many), limit=64 * MIB)
    assert kinds(tmp_path) == ["started", "journal_began", "stopped", "started", "stopped"]
    assert size(tmp_path) < 4 * MIB
