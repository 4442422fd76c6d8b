"""The watch of the network configuration, over a store that answers what the test says."""

import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from subnet_lease.config_watch import ConfigWatch
from subnet_lease.store import Store, StoreDenied, StoreUnavailable


class Scripted:
    """Answers the reads in turn: a value, or an error that is raised."""

    def __init__(self, answers: list[Any]) -> None:
        self._answers = iter(answers)
        self.watch: ConfigWatch
        self.last = threading.Event()

    def read_config(self) -> bytes | None:
        answer = next(self._answers, self)
        if answer is self:
            self.watch.stop()
            self.last.set()
            raise StoreUnavailable("the end")
        self.watch.check()
        if isinstance(answer, Exception):
            raise answer
        return cast("bytes | None", answer)


@pytest.fixture
def said() -> Iterator[list[object]]:
    yield []


def run(answers: list[Any], said: list[object]) -> None:
    store = Scripted(answers)
    store.watch = ConfigWatch(cast("Store", store), b"1", said.append, lambda reason: said.append(f"denied: {reason}"))
    store.watch.check()
    store.watch.run()
    assert store.last.is_set()


def test_each_new_value_is_told_once_and_its_absence_too(said: list[object]) -> None:
    run([b"1", b"2", b"2", None, StoreUnavailable("away"), None, b"1"], said)
    assert said == [b"2", None, b"1"]


def test_a_refusal_is_told_when_it_begins_and_again_after_it_has_ended(said: list[object]) -> None:
    denied = StoreDenied("no permission")
    run([denied, denied, StoreUnavailable("away"), denied, b"1", denied], said)
    assert said == ["denied: no permission"] * 2
