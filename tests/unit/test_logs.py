"""Logging: one clean line for each event, for people and for machines, and never a secret."""

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from overlay import logs

ROOT = Path(__file__).parents[2]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    logs._secrets.clear()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_away_from_a_terminal_each_event_is_one_line_of_json() -> None:
    out = io.StringIO()
    logs.configure("info", "auto", {}, out)
    log = structlog.get_logger()
    log.info("reconciled", put=3, device="flannel.1", name="Übermut")
    log.debug("not_wanted")
    (event,) = lines(out)
    assert list(event)[:3] == ["timestamp", "level", "event"]
    assert event.pop("timestamp", "").endswith("Z")  # type: ignore[attr-defined]
    assert event == {"level": "info", "event": "reconciled", "put": 3, "device": "flannel.1", "name": "Übermut"}


def test_a_terminal_gets_text_with_colours_unless_it_asks_for_none() -> None:
    for environ, coloured in (
        ({"TERM": "tmux-256color"}, True),
        ({"TERM": "tmux-256color", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ):
        out = Terminal()
        logs.configure("info", "auto", environ, out)
        structlog.get_logger().info("reconciled", put=3)
        assert ("\x1b[" in out.getvalue()) is coloured
    assert out.getvalue().endswith("[info     ] reconciled               put=3\n")


def test_the_format_that_was_asked_for_overrides_the_terminal() -> None:
    out, terminal = io.StringIO(), Terminal()
    logs.configure("info", "console", {}, out)
    structlog.get_logger().info("reconciled")
    assert "[info     ] reconciled" in out.getvalue()
    logs.configure("info", "json", {}, terminal)
    structlog.get_logger().info("reconciled")
    assert lines(terminal)[0]["event"] == "reconciled"


def test_no_secret_is_written_wherever_it_stands() -> None:
    out = io.StringIO()
    logs.configure("debug", "json", {}, out)
    logs.hide("hush")
    logs.hide("")
    log = structlog.get_logger()
    log.info("a", text="the hush is here", nested={"list": ["hush", ("hush",)], "etcd_password": "x1"}, raw=b"hush")
    log.info("b", password="x1", etcd_password="x1", auth_token="x1", Authorization="x1", client_secret="x1")
    log.info("c", endpoint="https://user:x1@10.0.0.1:2379/", password_file="/etc/p", compass="north")
    try:
        raise OSError("cannot log in with hush at http://u:x1@h/")
    except OSError:
        log.exception("d")
    logging.getLogger("grpc").error("hush in a library: %s", "http://u:x1@h/")
    assert "hush" not in out.getvalue()
    assert "x1" not in out.getvalue()
    events = {event["event"]: event for event in lines(out)}
    assert events["c"]["endpoint"] == "https://<concealed>@10.0.0.1:2379/"
    assert (events["c"]["password_file"], events["c"]["compass"]) == ("/etc/p", "north")


def test_plain_values_keep_their_types() -> None:
    out = io.StringIO()
    logs.configure("info", "json", {}, out)
    structlog.get_logger().info("a", none=None, yes=True, ratio=0.5, path=Path("/x"), numbers=(1, 2))
    event = lines(out)[0]
    assert [event[key] for key in ("none", "yes", "ratio", "path", "numbers")] == [None, True, 0.5, "/x", [1, 2]]


def test_an_exception_is_one_line_with_the_place_it_came_from() -> None:
    out = io.StringIO()
    logs.configure("info", "json", {}, out)

    def inner() -> None:
        raise ValueError("two\nlines")

    try:
        inner()
    except ValueError as error:
        structlog.get_logger().exception("failed")
        structlog.get_logger().error("failed", exc_info=error)
    structlog.get_logger().error("nothing_raised", exc_info=True)
    first, second, third = lines(out)
    assert first["error"] == second["error"] == "ValueError: two lines"
    assert str(first["at"]).startswith("test_logs.py:")
    assert " inner < test_logs.py:" in str(first["at"])
    assert "error" not in third


def test_what_libraries_log_becomes_an_event_and_their_chatter_does_not() -> None:
    out = io.StringIO()
    logs.configure("debug", "json", {}, out)
    library = logging.getLogger("some.library")
    library.info("chatter")
    library.warning("odd: %s", 1)
    library.warning("wrong format: %d", "x")
    library.log(logging.CRITICAL + 25, "very loud")
    assert [(event["level"], event["library"], event["text"]) for event in lines(out)] == [
        ("warning", "some.library", "odd: 1"),
        ("warning", "some.library", "wrong format: %d"),
        ("critical", "some.library", "very loud"),
    ]


def test_the_journal_gets_the_severity_in_front(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w+") as out:
        found = os.fstat(out.fileno())
        logs.configure("debug", "auto", {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, out)
        log = structlog.get_logger()
        log.debug("a"), log.info("a"), log.warning("a"), log.error("a"), log.critical("a")
        out.seek(0)
        assert [line[:4] for line in out] == ["<7>{", "<6>{", "<4>{", "<3>{", "<2>{"]
        logs.configure("info", "auto", {"JOURNAL_STREAM": "1:1"}, out)
        structlog.get_logger().info("b")
    assert (tmp_path / "journal").read_text().splitlines()[-1].startswith("{")


def test_a_stream_that_is_gone_disturbs_nobody() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    out = os.fdopen(writing, "w")
    logs.configure("info", "json", {}, out)
    structlog.get_logger().info("into_a_broken_pipe")
    with pytest.raises(BrokenPipeError):
        out.close()
    structlog.get_logger().info("into_a_closed_file")


def test_lines_of_several_threads_do_not_mix() -> None:
    out = io.StringIO()
    logs.configure("info", "json", {}, out)
    log = structlog.get_logger()
    workers = [threading.Thread(target=lambda: [log.info("x", n=n) for n in range(100)]) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(lines(out)) == 800


def test_stderr_is_the_stream_unless_another_is_given() -> None:
    code = "from overlay.logs import configure, structlog as s; configure('info', 'auto', {}); s.get_logger().info('e')"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(ended.stderr)["event"] == "e"
    assert ended.stdout == ""
