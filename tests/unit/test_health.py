"""The health endpoint over real sockets: answers, and clients that are slow, hostile or many."""

import http.client
import os
import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from overlay import health
from overlay.health import HealthServer, HealthUnavailable


class State:
    """What the two checks say."""

    alive = (True, "alive")
    ready = (False, "waiting for etcd")


def failing() -> tuple[bool, str]:
    raise RuntimeError("a detail for nobody")


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def server(state: State) -> Iterator[HealthServer]:
    pages = {"/healthz": lambda: state.alive, "/readyz": lambda: state.ready, "/broken": failing}
    running = HealthServer("127.0.0.1", 0, pages, {"/healthz": "text/special", "/broken": "text/special"})
    running.start()
    yield running
    running.stop()


def ask(server: HealthServer, path: str, method: str = "GET") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode(), dict(response.getheaders())
    finally:
        connection.close()


def raw(server: HealthServer, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(request)
        answer = b""
        while data := client.recv(4096):
            answer += data
        return answer


def test_a_check_that_is_well_answers_200_and_one_that_is_not_503(server: HealthServer, state: State) -> None:
    assert ask(server, "/healthz")[:2] == (200, "alive\n")
    assert ask(server, "/readyz")[:2] == (503, "waiting for etcd\n")
    state.ready = (True, "ready")
    assert ask(server, "/readyz?verbose")[:2] == (200, "ready\n")


def test_a_page_has_the_type_it_was_given_and_what_went_wrong_is_plain_text(server: HealthServer) -> None:
    kinds = [ask(server, path)[2]["Content-Type"] for path in ("/healthz", "/readyz", "/broken", "/none")]
    assert kinds == ["text/special", *["text/plain; charset=utf-8"] * 3]


def test_a_long_page_arrives_whole(server: HealthServer, state: State) -> None:
    state.alive = (True, "\n".join(f"line {number}" for number in range(100_000)))
    assert ask(server, "/healthz")[:2] == (200, state.alive[1] + "\n")


def test_head_has_the_same_head_and_no_body(server: HealthServer) -> None:
    status, body, headers = ask(server, "/readyz", "HEAD")
    assert (status, body, headers["Content-Length"]) == (503, "", "17")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/healthz/", 404), ("HEAD", "/x", 404), ("POST", "/healthz", 405)],
)
def test_all_else_is_refused(server: HealthServer, method: str, path: str, status: int) -> None:
    assert ask(server, path, method)[0] == status


@pytest.mark.parametrize("request_", [b"\x16\x03\x01\r\n\r\n", b"GET\r\n\r\n", b"GET / FTP/1.0\r\n\r\n", b"\n\n"])
def test_what_is_no_http_is_answered_and_survived(server: HealthServer, request_: bytes) -> None:
    assert raw(server, request_).startswith(b"HTTP/1.1 400 ")
    assert ask(server, "/healthz")[0] == 200


def test_a_check_that_raises_is_a_failed_check_without_details(server: HealthServer) -> None:
    status, body, _ = ask(server, "/broken")
    assert (status, body) == (503, "the check itself failed: RuntimeError\n")
    assert ask(server, "/healthz")[0] == 200


def test_a_request_in_pieces_is_put_together(server: HealthServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in (b"GET /hea", b"lthz HTTP/1.1\r\nHost: x\r\n", b"\r\n"):
            client.sendall(piece)
        assert client.recv(4096).startswith(b"HTTP/1.1 200 OK")


def test_an_endless_request_is_cut_off(server: HealthServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\n" + b"A: " + b"b" * health.MAX_REQUEST_BYTES)
        assert client.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_clients_that_say_nothing_neither_delay_others_nor_grow_threads(server: HealthServer) -> None:
    threads = threading.active_count()
    with ExitStack() as silent:
        clients = [
            silent.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
            for _ in range(3 * health.MAX_CONNECTIONS)
        ]
        assert ask(server, "/healthz")[0] == 200
        assert threading.active_count() == threads
        # The oldest had to make room: its connection is closed.
        assert clients[0].recv(1) == b""


def test_a_client_that_says_nothing_is_dropped_when_its_time_is_over(
    server: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "SECONDS_PER_CONNECTION", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        assert client.recv(1) == b""


def test_who_is_dropped_for_being_slow_or_in_a_crowd_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = dict.fromkeys(health.DROPPED, 0)
    monkeypatch.setattr(health, "SECONDS_PER_CONNECTION", 0.2)
    running = HealthServer("127.0.0.1", 0, {"/": lambda: (True, "")}, None, dropped)
    running.start()
    try:
        assert ask(running, "/")[0] == 200
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            assert client.recv(1) == b""
        assert dropped == {"crowded": 0, "slow": 1}
        monkeypatch.setattr(health, "MAX_CONNECTIONS", 1)
        monkeypatch.setattr(health, "SECONDS_PER_CONNECTION", 60)
        with (
            socket.create_connection(("127.0.0.1", running.port)) as first,
            socket.create_connection(("127.0.0.1", running.port)),
        ):
            assert first.recv(1) == b""
        assert dropped == {"crowded": 1, "slow": 1}
    finally:
        running.stop()


def test_a_client_that_resets_its_connection_is_survived(server: HealthServer) -> None:
    for request in (b"", b"GET /healthz HTTP/1.1\r\n\r\n"):
        client = socket.create_connection(("127.0.0.1", server.port), timeout=5)
        client.sendall(request)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    assert ask(server, "/healthz")[0] == 200


def test_a_large_answer_reaches_a_client_that_reads_late(state: State, server: HealthServer) -> None:
    state.alive = (True, "x" * 8_000_000)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
        assert ask(server, "/readyz")[0] == 503
        size = 0
        while data := client.recv(1 << 20):
            size += len(data)
    assert size > 8_000_000


def test_running_out_of_descriptors_delays_an_answer_and_no_more(server: HealthServer) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    client = socket.socket()
    client.settimeout(5)
    fillers = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (client.fileno() + 20, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                fillers.append(os.dup(client.fileno()))
        client.connect(("127.0.0.1", server.port))
        client.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in fillers:
            os.close(descriptor)
    with client:
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_port_that_is_taken_is_a_clear_error(server: HealthServer) -> None:
    second = HealthServer("127.0.0.1", server.port, {})
    with pytest.raises(HealthUnavailable, match=rf"127\.0\.0\.1:{server.port}: another program listens there"):
        second.start()
    second.stop()


def test_an_address_of_another_host_is_a_clear_error() -> None:
    with pytest.raises(HealthUnavailable, match="this host has no such address"):
        HealthServer("203.0.113.1", 0, {}).start()


def test_it_serves_on_ipv6_as_well() -> None:
    running = HealthServer("::1", 0, {"/healthz": lambda: (True, "alive")})
    running.start()
    try:
        with socket.create_connection(("::1", running.port), timeout=5) as client:
            client.sendall(b"GET /healthz HTTP/1.0\n\n")
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
    finally:
        running.stop()


def test_after_stop_the_port_is_free_and_the_thread_gone(server: HealthServer) -> None:
    port = server.port
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        server.stop()
        server.stop()
        assert client.recv(1) == b""
    assert "health" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
