"""The last table on disk: it comes back as it was, and is as good as none where it may not be believed."""

import json
from pathlib import Path

import pytest

from subnet_lease.cache import FILE, Cached, CacheWriter, read, write
from subnet_lease.model import Lease, LeaseAttrs, Prefix, Vtep, encode_attrs, pack_address, pack_mac
from subnet_lease.store import Record, Snapshot

WRITTEN, UNTIL = 1_000_000.0, 1_086_400.0
CONFIG = b'{"Network":"10.0.0.0/8"}'


def lease(number: int, etcd_lease: int = 7) -> Lease:
    vtep = Vtep(1, pack_mac(f"02:00:00:00:00:{number:02x}"))
    attrs = LeaseAttrs(pack_address(f"172.30.0.{number}"), "vxlan", vtep)
    return Lease(Prefix.parse(f"10.0.{number}.0/24"), None, attrs, etcd_lease, number, 10 + number)


def cached(until: float | None = UNTIL) -> Cached:
    own = lease(1)._replace(attrs=lease(1).attrs._replace(mtu=1450, node_name="a"))
    return Cached(CONFIG, own, until, Snapshot((), 99, 5), WRITTEN)


def peers(*numbers: int) -> list[Lease]:
    return [lease(number) for number in numbers]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "state" / FILE
    write(found, cached(), peers(2, 3))
    return found


def test_what_was_written_comes_back(path: Path) -> None:
    found = read(path, WRITTEN + 60)
    assert found is not None
    assert found._replace(snapshot=Snapshot((), 99, 5)) == cached()
    records = tuple(
        Record(each.key, encode_attrs(each.attrs), 7, each.create_revision, each.mod_revision) for each in peers(2, 3)
    )
    assert found.snapshot == Snapshot(records, 99, 5)
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("now", [UNTIL, UNTIL + 1, WRITTEN - 1])
def test_lease_that_ended_or_a_clock_that_went_back_makes_it_useless(path: Path, now: float) -> None:
    assert read(path, now) is None


def test_reservation_does_not_end(tmp_path: Path) -> None:
    write(tmp_path / FILE, cached(until=None), [])
    assert read(tmp_path / FILE, WRITTEN - 1_000_000) == cached(until=None)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "nonsense\n" + text,
        lambda text: text[: len(text) // 3],
        lambda text: text[:-40],
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace("10.0.1.0-24", "10.0.1.7-24"),
        lambda text: text.replace("172.30.0.1", "172.30.0.999"),
        lambda text: text.replace('"until": 1086400.0', '"until": "soon"'),
        lambda text: text + "[" * 100_000,
        lambda text: text + '["10.0.4.0-24", "{}", 1, 2]\n',
    ],
)
def test_damage_makes_it_useless(path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    path.write_text(damage(path.read_text()))
    assert read(path, WRITTEN + 60) is None


def test_no_file_is_none(tmp_path: Path) -> None:
    assert read(tmp_path / FILE, WRITTEN) is None


def test_writer_writes_what_is_new_and_says_once_that_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    class Log:
        def warning(self, event: str, **facts: object) -> None:
            said.append(event)

    marks = [None, 1, 1, 2, 3]
    state = tmp_path / "state"

    def mark() -> object:
        if not marks:
            writer.stop()
            return None
        return marks.pop(0)

    def collect() -> tuple[Cached, list[Lease]]:
        collected.append(json.loads((state / FILE).read_text().splitlines()[0])["revision"] if state.is_dir() else None)
        if len(collected) == 2:
            (state / FILE).unlink()
            state.rmdir()
            state.write_text("in the way")
        return cached(), peers(2)

    collected: list[int | None] = []
    monkeypatch.setattr("subnet_lease.cache.FIRST_S", 0.0)
    monkeypatch.setattr("subnet_lease.cache.EVERY_S", 0.0)
    writer = CacheWriter(state / FILE, mark, collect, Log())
    writer.run()
    assert collected == [None, 99, None], "once for each mark"
    assert said == ["cache_refused"]
