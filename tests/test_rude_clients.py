"""Clients that are slow, silent, malformed or gone, each on a socket of its own, against a real server."""

import contextlib
import json
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import Server, start_server, stop_server, wait_for
from tests.uploads.builders import saved

FILE = saved(np.eye(3))


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with short deadlines whose jobs stay queued."""
    folder = tmp_path_factory.mktemp("impatient")
    running = start_server(folder / "data", workers=0, RANKSCOPE_HEADER_S="0.4", RANKSCOPE_BODY_S="0.4")
    yield running
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()
    assert "Exception in ASGI" not in running.log.read_text()


def connect(server: Server) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.client.base_url.port or 0))
    connection.settimeout(20)
    return connection


def rest(connection: socket.socket) -> bytes:
    """All that the server still says until it closes the connection."""
    said = b""
    with contextlib.suppress(ConnectionResetError):  # It may close with bytes of ours unread.
        while part := connection.recv(65536):
            said += part
    return said


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


def problem_type(said: bytes, status: int) -> str:
    """The type of the problem that is the last word on a connection."""
    first, _, body = said.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 %d " % status), said
    for line in (b"connection: close", b"content-type: application/problem+json", b"x-content-type-options: nosniff"):
        assert line in first.lower()
    problem = json.loads(body)
    assert (problem["status"], len(problem["request_id"])) == (status, 36)
    return str(problem["type"])


def is_timeout(said: bytes) -> bool:
    return problem_type(said, 408) == "/problems/request-timeout"


def nameless_uploads(server: Server) -> list[str]:
    """Files without a name that the server holds."""
    held = []
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # It may be closed by now.
            held.append(str(link.readlink()))
    return [target for target in held if "uploads" in target]


def test_an_idle_connection_is_closed(impatient: Server) -> None:
    with connect(impatient) as connection:
        assert rest(connection) == b""


@pytest.mark.parametrize("start", [b"G", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "])
def test_row_27_a_head_that_does_not_end_is_timed_out(impatient: Server, start: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(start)
        assert is_timeout(rest(connection))


def test_row_27_a_head_that_trickles_is_timed_out_all_the_same(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        connection.settimeout(0.05)
        said = b""
        for _ in range(200):
            try:
                connection.sendall(b"X: y\r\n")
                said += connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if said:
                break
        connection.settimeout(20)
        assert is_timeout(said + rest(connection))


@pytest.mark.parametrize("path", ["/experiments", "/analyze"])
@pytest.mark.parametrize("body", [b"", b'{"name": '])
def test_row_24_a_silent_body_is_timed_out_and_leaves_no_file(impatient: Server, path: str, body: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(head(path, "Content-Length: 100") + body)
        assert is_timeout(rest(connection))
    wait_for(lambda: not nameless_uploads(impatient), "the upload to be gone")
    assert list((impatient.data / "uploads").glob("*")) == []
    for kind in ("/experiments", "/analyses"):
        assert impatient.client.get(kind).json()["data"] == []


def test_a_slow_body_that_keeps_coming_is_taken(server: Server, tmp_path: Path) -> None:
    running = start_server(tmp_path / "data", workers=0, RANKSCOPE_HEADER_S="0.3", RANKSCOPE_BODY_S="2")
    with connect(running) as connection:
        connection.sendall(head("/analyze", f"Content-Length: {len(FILE)}", "Prefer: respond-async"))
        for place in range(0, len(FILE), 20):
            connection.sendall(FILE[place : place + 20])
            server.client.get("/healthz")  # Some time passes.
        assert connection.recv(12) == b"HTTP/1.1 202"
    assert stop_server(running) == 0


def test_a_kept_connection_has_its_deadline_for_every_head(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"ok"}'):  # Head and body may come apart.
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        assert is_timeout(rest(connection))


def test_a_waiting_answer_has_no_deadline(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(
            head("/analyze", f"Content-Length: {len(FILE)}", "Prefer: wait=2", "Connection: close") + FILE
        )
        assert rest(connection).startswith(b"HTTP/1.1 202")  # After five times the deadline.


def test_row_22_an_endless_chunked_body_is_refused_and_closed(impatient: Server) -> None:
    with connect(impatient) as connection:
        connection.sendall(head("/experiments", "Transfer-Encoding: chunked", "Content-Type: application/json"))
        chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
        answer = b""
        connection.settimeout(0.02)
        for _ in range(2000):  # until it is closed
            try:
                connection.sendall(chunk)
                answer += connection.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            pytest.fail("the server reads on")
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"/problems/body-too-large" in answer


@pytest.mark.parametrize(
    ("start", "endless"),
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"y", id="a header"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"X: y\r\n", id="many headers"),
        pytest.param(head("/analyze", "Transfer-Encoding: chunked") + b"1;x=", b"y", id="an extension of a chunk"),
        pytest.param(head("/analyze", "Transfer-Encoding: chunked") + b"1\r\ny\r\n0\r\n", b"X: y\r\n", id="trailers"),
        pytest.param(head("/analyze", "Transfer-Encoding: chunked") + b"1\r\ny\r\n0\r\nX: ", b"y", id="a trailer"),
    ],
)
def test_what_does_not_end_between_bodies_is_refused(impatient: Server, start: bytes, endless: bytes) -> None:
    with connect(impatient) as connection:
        with contextlib.suppress(ConnectionError):  # It is closed before all is sent.
            connection.sendall(start + endless * (4_000_000 // len(endless)))
        said = rest(connection)
    assert said == b"" or problem_type(said, 400) == "/problems/malformed-request"  # A reset may overtake the answer.
    assert impatient.client.get("/healthz").is_success


@pytest.mark.parametrize(("path", "length"), [("/experiments", 65537), ("/analyze", 3 << 30)])
def test_row_21_a_length_over_the_limit_is_refused_unread(impatient: Server, path: str, length: int) -> None:
    with connect(impatient) as connection:
        connection.sendall(head(path, f"Content-Length: {length}", "Content-Type: application/json"))
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"/problems/body-too-large" in answer


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"POST /experiments HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n", id="row 25"),
        pytest.param(
            b"POST /experiments HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            id="row 25: two lengths",
        ),
        pytest.param(
            b"POST /experiments HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"0\r\n\r\n",
            id="row 25: length and chunks",
        ),
        pytest.param(
            b"POST /experiments HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n{}\r\n",
            id="row 26: chunk framing",
        ),
        pytest.param(
            head("/experiments", "Connection: Upgrade", "Upgrade: h2c", "Content-Length: 2") + b"{}", id="upgrade"
        ),
        pytest.param(b"G\0T / HTTP/1.1\r\nHost: localhost\r\n\r\n", id="row 26: NUL in the method"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40), id="row 26: TLS"),
        pytest.param(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", id="row 29: 100 kB URL"),
    ],
)
def test_what_is_no_request_is_refused(impatient: Server, request_bytes: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(request_bytes)
        assert problem_type(rest(connection), 400) == "/problems/malformed-request"
    assert impatient.client.get("/healthz").is_success


def test_an_offer_of_another_protocol_is_not_taken(impatient: Server) -> None:
    offer = {"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    assert impatient.client.get("/healthz", headers=offer).json() == {"status": "ok"}


def test_rubbish_behind_a_request_is_not_answered_in_the_middle_of_its_answer(impatient: Server) -> None:
    job = impatient.post({})["id"]
    events = f"GET /experiments/{job}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    whole = head("/experiments", "Content-Type: application/json", "Content-Length: 2") + b"{}"
    for requests in (events + head("/healthz"), events + b"GET /healthz HTTP/1.1\r\n\r\n", whole):
        with connect(impatient) as connection:
            connection.sendall(requests + b"\0rubbish\r\n\r\n")
            assert b"HTTP/1.1 400" not in rest(connection)


@pytest.mark.parametrize(
    "host",
    [b"", b"Host:\r\n", b"Host: evil.example\r\n", b"Host: localhost\r\nHost: evil.example\r\n"],
    ids=["none", "empty", "foreign", "two"],
)
def test_row_30_a_host_that_is_not_ours_is_refused(impatient: Server, host: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n" + host + b"Connection: close\r\n\r\n")
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"/problems/host-not-allowed" in answer


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/experiments/../../etc/passwd", "/docs/../../app.py", "/a%00b"])
def test_row_31_a_path_is_taken_as_it_is_sent(impatient: Server, path: str) -> None:  # httpx would shorten it
    with connect(impatient) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"/problems/not-found" in answer


@pytest.mark.parametrize("control", [b"\0", b"\x01", b"\x1f", b"\x7f"])
def test_row_41_control_bytes_in_a_key_are_refused(impatient: Server, control: bytes) -> None:
    with connect(impatient) as connection:
        connection.sendall(
            b"POST /experiments HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: a" + control + b"b\r\n\r\n"
        )
        assert problem_type(rest(connection), 400) == "/problems/idempotency-key-invalid"


def test_row_26_a_tls_client_is_refused(impatient: Server) -> None:
    with connect(impatient) as connection, pytest.raises((ssl.SSLError, OSError)):
        ssl.create_default_context().wrap_socket(connection, server_hostname="localhost")


def test_clients_that_go_away_leave_nothing(server: Server, memo: dict[str, str]) -> None:  # F16; the log is read last
    job = f"/experiments/{memo['id']}/spectrum?format=gif&width=1999&height=1999"
    requests = [
        head("/analyze", "Content-Length: 5000000") + bytes(2_000_000),
        head("/analyze?name=left%20alone", f"Content-Length: {len(FILE)}", "Prefer: wait=30") + FILE,
        f"GET {job} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
        head("/experiments", "Transfer-Encoding: chunked") + b"5\r\n{",
    ]
    connections = [connect(server) for _ in requests]
    for connection, request in zip(connections, requests, strict=True):
        connection.sendall(request)

    def left_alone(*statuses: str) -> bool:
        listed = server.client.get("/analyses?limit=100").json()["data"]
        return any(job["name"] == "left alone" and job["status"] in statuses for job in listed)

    wait_for(lambda: left_alone("queued", "running", "succeeded"), "the analysis to be stored")
    wait_for(lambda: nameless_uploads(server), "the upload to be received")
    for connection in connections:
        # Closed with a reset, as a process that is killed does it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    wait_for(lambda: left_alone("succeeded"), "the analysis that nobody waits for to go on")
    wait_for(lambda: not nameless_uploads(server), "the half-sent upload to be gone")
    assert "Traceback" not in server.log.read_text()


def test_f20_idle_sockets_do_not_starve_health(server: Server) -> None:
    idle = [connect(server) for _ in range(100)]
    try:
        assert server.client.get("/healthz", headers={"connection": "close"}).is_success
        assert server.client.get("/readyz", headers={"connection": "close"}).is_success
    finally:
        for connection in idle:
            connection.close()


def test_f19_a_server_without_file_handles_recovers(tmp_path: Path) -> None:
    running = start_server(tmp_path / "data", workers=0)
    running.post({})
    process = psutil.Process(running.process.pid)
    process.rlimit(resource.RLIMIT_NOFILE, (40, 40))
    idle = [connect(running) for _ in range(60)]
    wait_for(lambda: process.num_fds() >= 40, "the handles to be used up")
    for connection in idle:
        connection.close()
    assert wait_for(lambda: running.client.get("/experiments").is_success, "the server to answer")
    assert running.post({})["status"] == "queued"
    assert stop_server(running) == 0
