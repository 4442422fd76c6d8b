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
from overlay.cluster import wait_until
from overlay.health import Answer, HealthServer, HealthUnavailable


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
        for piece in (b"GET /hea", b"lthz HTTP/1.1\r\nHost: localhost\r\n", b"\r\n"):
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


# --- documents ---


class Desk:
    """Makes documents; those at /slow only when it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.begun = threading.Semaphore(0)
        self.queries: list[str] = []

    def quick(self, query: str) -> Answer:
        self.queries.append(query)
        return Answer(b"quick", "text/x-quick", "tag-1", ("X-Own: yes",))

    def slow(self, query: str) -> Answer:
        self.queries.append(query)
        self.begun.release()
        assert self.may.wait(20)
        return Answer(b"x" * 3_000_000)

    def broken(self, query: str) -> Answer:
        raise RuntimeError("a detail for nobody")


@pytest.fixture
def desk() -> Desk:
    return Desk()


@pytest.fixture
def office(desk: Desk) -> Iterator[HealthServer]:
    documents = {"/": desk.quick, "/slow": desk.slow, "/broken": desk.broken}
    running = HealthServer("127.0.0.1", 0, {"/healthz": lambda: (True, "alive")}, documents=documents)
    running.start()
    yield running
    desk.may.set()
    running.stop()


def page_threads() -> int:
    return sum(thread.name == "page" for thread in threading.enumerate())


def test_a_document_comes_with_its_type_tag_and_headers(office: HealthServer, desk: Desk) -> None:
    status, body, headers = ask(office, "/?find=1&b")
    assert (status, body, desk.queries) == (200, "quick", ["find=1&b"])
    assert (headers["Content-Type"], headers["ETag"], headers["X-Own"]) == ("text/x-quick", '"tag-1"', "yes")
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-cache", "nosniff")
    assert ask(office, "/", "HEAD")[:2] == (200, "")
    assert ask(office, "/", "POST")[0] == 405


@pytest.mark.parametrize(
    ("known", "status"), [('"tag-1"', 304), ('"other", W/"tag-1"', 304), ('"tag-2"', 200), ("tag-1", 200)]
)
def test_what_the_browser_has_is_not_sent_again(office: HealthServer, known: str, status: int) -> None:
    request = f"GET / HTTP/1.1\r\nHost: localhost\r\nIf-None-Match: {known}\r\n\r\n"
    answer = raw(office, request.encode())
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.endswith(b"quick") is (status == 200)


def test_a_document_that_fails_says_so_without_details_and_is_tried_again(office: HealthServer) -> None:
    for _ in range(2):
        assert ask(office, "/broken")[:2] == (500, "the document itself failed: RuntimeError\n")
    assert ask(office, "/")[0] == 200


def test_a_slow_document_delays_no_check_and_is_sent_whole(office: HealthServer, desk: Desk) -> None:
    with socket.create_connection(("127.0.0.1", office.port), timeout=5) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert desk.begun.acquire(timeout=5)
        assert ask(office, "/healthz")[0] == 200
        desk.may.set()
        received = b""
        while data := client.recv(1 << 16):
            received += data
    assert len(received.partition(b"\r\n\r\n")[2]) == 3_000_000


def test_nobody_makes_documents_once_all_are_made(office: HealthServer) -> None:
    assert page_threads() == 0
    assert ask(office, "/")[0] == 200
    wait_until(lambda: page_threads() == 0, 5, "the thread's end")


def test_documents_of_clients_that_left_are_not_made(
    office: HealthServer, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        for number in range(health.MAX_CONNECTIONS + 10):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", office.port), timeout=5))
            client.sendall(f"GET /slow?{number} HTTP/1.1\r\n\r\n".encode())
            if not number:
                assert desk.begun.acquire(timeout=5)
        # A later one is served at once, so all earlier ones have been read.
        assert ask(office, "/healthz")[0] == 200
        assert page_threads() == 1
    assert ask(office, "/healthz")[0] == 200
    desk.may.set()
    wait_until(lambda: page_threads() == 0, 5, "the thread's end")
    assert len(desk.queries) <= 1 + health.MAX_CONNECTIONS


def test_a_server_that_stops_waits_for_no_document(desk: Desk) -> None:
    office = HealthServer("127.0.0.1", 0, {}, documents={"/slow": desk.slow})
    office.start()
    with socket.create_connection(("127.0.0.1", office.port), timeout=5) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\n\r\n")
        assert desk.begun.acquire(timeout=5)
        office.stop()
        assert client.recv(1) == b""
    desk.may.set()
    wait_until(lambda: page_threads() == 0, 5, "the thread's end")


def test_where_no_thread_can_be_had_documents_wait_and_checks_do_not(
    office: HealthServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert ask(office, "/")[0] == 503
        assert ask(office, "/healthz")[0] == 200
    assert ask(office, "/")[0] == 200


@pytest.mark.parametrize("path", ["/..", "//", "/../etc/passwd", "/%2e%2e/x", "/slow/../healthz", "/page/"])
def test_there_are_no_paths_but_those_named(office: HealthServer, path: str) -> None:
    assert raw(office, f"GET {path} HTTP/1.1\r\n\r\n".encode()).startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:10256", 200),
        ("127.0.0.1:10256", 200),
        ("[::1]:10256", 200),
        ("10.0.0.21", 200),
        ("evil.example", 421),
        ("evil.example:10256", 421),
        ("localhost.evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("[evil.example]", 421),
        ("", 421),
    ],
)
def test_on_loopback_no_other_name_is_answered_to(office: HealthServer, host: str, status: int) -> None:
    for path in ("/", "/healthz"):
        answer = raw(office, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def test_beyond_loopback_every_name_is_answered_to() -> None:
    office = HealthServer("0.0.0.0", 0, {"/healthz": lambda: (True, "alive")})
    office.start()
    assert raw(office, b"GET /healthz HTTP/1.1\r\nHost: node-7.example\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    office.stop()
