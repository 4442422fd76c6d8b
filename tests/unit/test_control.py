"""The agent's socket over real unix sockets: answers, and clients that are slow, silent, hostile or many."""

import contextlib
import json
import os
import socket
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from overlay import control
from overlay.control import ControlServer, ControlUnavailable, NoAnswer, ask, ask_text


def failing(question: Mapping[str, Any]) -> Iterator[str]:
    yield '{"half": '
    raise RuntimeError("a detail for nobody")


def endless(question: Mapping[str, Any]) -> Iterator[str]:
    yield '"'
    while True:
        yield "x" * 65536


def broken(question: Mapping[str, Any]) -> Iterator[str]:
    yield str(1 / 0)


HANDLERS: dict[str, control.Handler] = {
    "echo": lambda question: [json.dumps(question)],
    "large": lambda question: ["[", "0," * 1_000_000, "0", "]"],
    "failing": failing,
    "broken": broken,
    "endless": endless,
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "agent.sock")


@pytest.fixture
def server(path: str) -> Iterator[ControlServer]:
    running = ControlServer(path, 0o600, HANDLERS)
    running.start()
    yield running
    running.stop()


def raw(path: str, data: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(path)
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while more := client.recv(65536):
            answer += more
        return answer


@pytest.mark.usefixtures("server")
def test_question_and_its_arguments_reach_the_handler(path: str) -> None:
    assert ask(path, "echo", 10, peers=False) == {"version": 1, "question": "echo", "peers": False}


@pytest.mark.usefixtures("server")
def test_large_answers_arrive_whole(path: str) -> None:
    assert len(ask(path, "large", 10)) == 1_000_001


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"hello\n", "a question is a JSON object on one line"),
        (b"[" * 4000 + b"\n", "a question is a JSON object on one line"),
        (b'{"version": 2, "question": "echo"}\n', "version 1 of the protocol"),
        (b'{"version": 1, "question": "no"}\n', "there is only echo, large"),
        (b'{"version": 1, "question": ["echo"]}\n', "there is only echo, large"),
        (b"x" * 5000, "the question is too long"),
    ],
)
def test_what_is_no_question_is_told_so(path: str, line: bytes, says: str) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        assert says in json.loads(raw(path, line))["error"]


@pytest.mark.usefixtures("server")
def test_client_that_ends_before_its_line_gets_nothing(path: str) -> None:
    assert raw(path, b'{"version"') == b""


@pytest.mark.usefixtures("server")
def test_answer_that_broke_off_is_known_as_such(path: str) -> None:
    with pytest.raises(NoAnswer, match="broke off"):
        ask(path, "failing", 10)
    assert ask(path, "echo", 10)["question"] == "echo"


@pytest.mark.usefixtures("server")
def test_handler_that_fails_at_once_is_told_and_harms_nobody_else(path: str) -> None:
    with pytest.raises(NoAnswer, match="the agent failed to answer: ZeroDivisionError"):
        ask(path, "broken", 10)
    assert ask(path, "echo", 10)["question"] == "echo"


@pytest.mark.usefixtures("server")
def test_answer_can_be_had_as_it_was_written(path: str) -> None:
    assert json.loads(ask_text(path, "large", 10)) == ask(path, "large", 10)


@pytest.mark.usefixtures("server")
def test_refused_question_is_no_answer(path: str) -> None:
    with pytest.raises(NoAnswer, match="does not answer that: there is only"):
        ask(path, "nothing", 10)


@pytest.mark.usefixtures("server")
def test_clients_that_hang_keep_nobody_waiting_and_make_room(path: str) -> None:
    with contextlib.ExitStack() as stack:
        hanging = []
        for number in range(3 * control.MAX_CONNECTIONS):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(path)
            client.settimeout(10)
            # Some say nothing, some ask for what they do not read.
            if number % 2:
                with contextlib.suppress(BrokenPipeError):
                    client.sendall(b'{"version": 1, "question": "endless"}\n')
            hanging.append(client)
        assert ask(path, "echo", 10)["question"] == "echo"
        assert hanging[0].recv(1) == b"", "the oldest has made room"


def test_connection_ends_after_its_time(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "SECONDS_PER_CONNECTION", 0.1)
    running = ControlServer(path, 0o600, HANDLERS)
    running.start()
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
        client.settimeout(10)
        client.connect(path)
        assert client.recv(1) == b""
    running.stop()


def test_socket_has_its_mode_whatever_the_umask(path: str) -> None:
    before = os.umask(0)
    try:
        running = ControlServer(path, 0o660, HANDLERS)
        running.start()
    finally:
        os.umask(before)
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o660
    running.stop()
    running.stop()
    assert not Path(path).exists()


def test_handlers_may_change_while_it_runs(path: str) -> None:
    handlers: dict[str, control.Handler] = {"it": lambda question: ["1"]}
    running = ControlServer(path, 0o600, handlers)
    running.start()
    assert ask(path, "it", 10) == 1
    handlers["it"] = lambda question: ["2"]
    assert ask(path, "it", 10) == 2
    running.stop()


def test_path_of_a_dead_process_is_taken_over(path: str) -> None:
    Path(path).parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
        dead.listen()
    with pytest.raises(NoAnswer, match=r"nobody listens at .* any more"):
        ask(path, "echo", 10)
    running = ControlServer(path, 0o600, HANDLERS)
    running.start()
    assert ask(path, "echo", 10)["question"] == "echo"
    running.stop()


@pytest.mark.usefixtures("server")
def test_path_of_a_living_process_is_not_taken(path: str) -> None:
    with pytest.raises(ControlUnavailable, match="another process listens there"):
        ControlServer(path, 0o600, HANDLERS).start()
    assert ask(path, "echo", 10)["question"] == "echo"


def test_file_that_is_no_socket_stays(path: str) -> None:
    Path(path).parent.mkdir()
    Path(path).write_text("mine")
    with pytest.raises(ControlUnavailable, match="it is no socket"):
        ControlServer(path, 0o600, HANDLERS).start()
    assert Path(path).read_text() == "mine"


def test_stopping_leaves_a_successors_socket_alone(path: str) -> None:
    first, second = ControlServer(path, 0o600, HANDLERS), ControlServer(path, 0o600, HANDLERS)
    first.start()
    Path(path).unlink()
    second.start()
    first.stop()
    assert ask(path, "echo", 10)["question"] == "echo"
    second.stop()


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/proc/none/agent.sock", "cannot listen on /proc/none/agent.sock: no such file"),
        ("/run/" + "x" * 200, "too long; choose another --control-socket"),
        ("/dev/null/agent.sock", "choose another --control-socket"),
    ],
)
def test_path_that_cannot_be_had_is_named_with_the_cause(path: str, says: str) -> None:
    with pytest.raises(ControlUnavailable, match=says):
        ControlServer(path, 0o600, HANDLERS).start()


def test_silence_has_its_reasons(path: str) -> None:
    with pytest.raises(NoAnswer, match=f"nobody listens at {path}"):
        ask(path, "echo", 10)
    with pytest.raises(NoAnswer, match="too long"):
        ask("/run/" + "x" * 200, "echo", 10)
    with pytest.raises(NoAnswer, match="not a directory"):
        ask("/dev/null/agent.sock", "echo", 10)
    Path(path).parent.mkdir()
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(path)
        deaf.listen()
        with pytest.raises(NoAnswer, match=r"no answer at .* within 0.1 s"):
            ask(path, "echo", 0.1)


def test_waiting_in_a_full_line_ends_in_time(path: str) -> None:
    Path(path).parent.mkdir()
    with socket.socket(socket.AF_UNIX) as deaf, contextlib.ExitStack() as stack:
        deaf.bind(path)
        deaf.listen(0)
        stack.enter_context(socket.socket(socket.AF_UNIX)).connect(path)
        with pytest.raises(NoAnswer, match=r"no answer at .* within 0.1 s") as found:
            ask(path, "echo", 0.1)
        assert found.value.listening


def test_answer_of_something_else_is_none(path: str) -> None:
    Path(path).parent.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()

        def say() -> None:
            client, _ = other.accept()
            with client:
                client.recv(4096)
                client.sendall(b"[]")

        thread = threading.Thread(target=say)
        thread.start()
        with pytest.raises(NoAnswer, match="does not answer that: None"):
            ask(path, "echo", 10)
        thread.join()
