"""A connection that is cut at any stage of a POST, and a retry with the same Idempotency-Key: exactly one job.

A key makes one job of many requests only where each of them is taken whole or not at all. So a request that was not
whole must have made nothing, one whose answer had begun must have made its job, and in between either may be.
"""

import socket
import struct
import uuid
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from tests.conftest import Server, wait_for
from tests.uploads.builders import saved

FILE = saved(np.diag([3.0, 2.0, 1.0]))
ABRUPT = struct.pack("ii", 1, 0)  # What is not sent yet is dropped, and the server gets a reset.


class Post(NamedTuple):
    """A request that makes one job: where it is sent and listed, its query and body for a name of the job."""

    path: str
    listed: str
    query: str
    body: bytes


POSTS = {
    "/experiments": Post("/experiments", "/experiments", "", b'{"name": "%s", "training": {"epochs": 1}}'),
    "/analyses": Post("/analyze", "/analyses", "?reuse=false&name=%s", FILE),
    "/sweeps": Post(
        "/sweeps", "/sweeps", "", b'{"base": {"name": "%s", "training": {"epochs": 1}}, "grid": {"seed": [1]}}'
    ),
    "/factors": Post("/analyses/{}/factors", "/analyses/{}/factors", "", b'{"name": "%s"}'),
}
UNFINISHED = [
    "in the request line",
    "after the request line",
    "in the headers",
    "after the headers",
    "in the body",
    "before the last byte",
]
STAGES = [*UNFINISHED, "after the body", "once the job is stored", "in the answer"]
COMMITTED = STAGES[-2:]


class Request:
    """A POST under a key and a name of its own, as bytes and as httpx sends it."""

    def __init__(self, kind: str, analysis: str = "") -> None:
        self.key, self.name, self.post = str(uuid.uuid4()), f"cut-{uuid.uuid4()}", POSTS[kind]
        self.listed = self.post.listed.format(analysis)
        self.target = self.post.path.format(analysis) + self.post.query.replace("%s", self.name)
        self.body = self.post.body.replace(b"%s", self.name.encode())

    def until(self, stage: str) -> bytes:
        """What has been sent at the stage."""
        line = f"POST {self.target} HTTP/1.1\r\n".encode()
        prefer = "wait=30" if stage == "once the job is stored" else "respond-async"
        fields = ["Host: localhost", f"Content-Length: {len(self.body)}", f"Idempotency-Key: {self.key}"]
        head = line + "\r\n".join([*fields, f"Prefer: {prefer}", "Content-Type: application/json", "", ""]).encode()
        whole = head + self.body
        ends = [20, len(line), len(head) - 20, len(head), len(head) + len(self.body) // 2, len(whole) - 1]
        return whole[: dict(zip(UNFINISHED, ends, strict=True)).get(stage, len(whole))]

    def send(self, server: Server) -> httpx.Response:
        """Send it whole, again while the server still has an earlier one in its hands."""
        headers = {"idempotency-key": self.key, "content-type": "application/json", "prefer": "respond-async"}

        def answered() -> httpx.Response | None:
            answer = server.client.post(self.target, content=self.body, headers=headers)
            return None if answer.status_code == 409 else answer

        answer: httpx.Response = wait_for(answered, "the request to be taken")
        assert answer.is_success, answer.text
        return answer

    def jobs(self, server: Server) -> list[dict[str, Any]]:
        """The jobs that it has made."""
        query = {} if "factors" in self.listed else {"name_prefix": self.name}
        jobs: list[dict[str, Any]] = server.client.get(self.listed, params=query).json()["data"]
        return [job for job in jobs if job["name"] == self.name]


@pytest.fixture(scope="module")
def analysis(server: Server) -> str:
    """The id of an analysis that factors can be made of."""
    return str(server.analyze(FILE)["id"])


def cut(server: Server, request: Request, stage: str, abruptly: bool) -> None:
    """Begin the request and leave it at the stage."""
    with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0), timeout=60) as connection:
        connection.sendall(request.until(stage))
        if stage == "once the job is stored":
            wait_for(lambda: request.jobs(server), "the job to be stored")
        if stage == "in the answer":
            assert connection.recv(12).startswith(b"HTTP/1.1 20")
        if abruptly:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABRUPT)


def was_replayed(answer: httpx.Response) -> bool:
    return answer.headers.get("idempotency-replayed") == "true"


@pytest.mark.parametrize("abruptly", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", POSTS)
def test_a_connection_cut_at_any_stage_and_its_retry_make_one_job(
    server: Server, analysis: str, kind: str, stage: str, abruptly: bool
) -> None:
    request = Request(kind, analysis)
    cut(server, request, stage, abruptly)
    first, again = request.send(server), request.send(server)
    if stage in UNFINISHED or stage in COMMITTED:
        assert was_replayed(first) == (stage in COMMITTED)
    assert was_replayed(again)
    (job,) = request.jobs(server)
    assert {first.json()["id"], again.json()["id"]} == {job["id"]}
    server.client.post(f"{request.listed}/{job['id']}/cancel")  # The next tests need not wait for it.


def test_a_request_cut_many_times_makes_one_job(server: Server) -> None:
    request = Request("/experiments")
    for stage in [*UNFINISHED, *["after the body"] * 5]:  # Some of them meet an earlier one, and are refused with 409.
        cut(server, request, stage, abruptly=False)
    request.send(server)
    (job,) = request.jobs(server)
    assert server.wait(job["id"])["status"] == "succeeded"
