"""A POST that is sent again with its Idempotency-Key: one job, whatever happened to the first one."""

import socket
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Server, start_server, stop_server, wait_for
from tests.test_bad_inputs import problem
from tests.uploads.builders import saved

FILE = saved(np.diag([3.0, 2.0, 1.0]))
BODY = b'{"name": "%s", "training": {"epochs": 1}}'


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose jobs stay queued."""
    running = start_server(tmp_path_factory.mktemp("idle") / "data", workers=0)
    yield running
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()


def keyed(**more: str) -> dict[str, str]:
    return {"idempotency-key": str(uuid.uuid4()), **more}


def names(server: Server, path: str = "/experiments") -> list[str]:
    listed: list[dict[str, Any]] = server.client.get(path, params={"limit": 100}).json()["data"]
    return [job["name"] for job in listed]


def is_replay(answer: httpx.Response) -> bool:
    return answer.headers.get("idempotency-replayed") == "true"


def test_a_second_post_with_the_key_answers_with_the_first_ones_job(idle: Server) -> None:
    headers = keyed()
    first = idle.client.post("/experiments", content=b'{"name": "once", "seed": 1}', headers=headers)
    again = idle.client.post("/experiments", content=b'{ "seed": 1, "name": "\\u006fnce" }', headers=headers)
    assert (first.status_code, is_replay(first)) == (202, False)
    assert (again.status_code, is_replay(again)) == (202, True)
    assert (again.json(), again.headers["location"]) == (first.json(), first.headers["location"])
    assert names(idle).count("once") == 1


def test_row_42_a_key_belongs_to_one_body_one_path_and_one_upload(idle: Server) -> None:
    headers = keyed()
    assert idle.client.post("/experiments", json={"seed": 1}, headers=headers).status_code == 202
    other = idle.client.post("/experiments", json={"seed": 2}, headers=headers)
    problem(other, 422, "idempotency-key-reused")
    upload = {**headers, "prefer": "respond-async"}
    first = idle.client.post("/analyze", content=FILE, headers=upload)
    assert (first.status_code, is_replay(first)) == (202, False)
    again = idle.client.post("/analyze", files={"file": ("another name", FILE)}, headers=upload)
    assert (again.json()["id"], is_replay(again)) == (first.json()["id"], True)
    for content, query in ((FILE, "?top_k=1"), (saved(np.eye(2)), "")):
        problem(idle.client.post(f"/analyze{query}", content=content, headers=upload), 422, "idempotency-key-reused")


def test_cancel_and_factors_take_keys_too(server: Server) -> None:
    analysis = server.analyze(FILE)["id"]
    headers = keyed()
    first, again = (server.client.post(f"/analyses/{analysis}/factors", json={}, headers=headers) for _ in range(2))
    assert (first.json()["id"], is_replay(first), is_replay(again)) == (again.json()["id"], False, True)
    assert len(server.client.get(f"/analyses/{analysis}/factors").json()["data"]) == 1
    for path in (f"/analyses/{analysis}", again.headers["location"]):
        answers = [server.client.post(f"{path}/cancel", headers=headers) for _ in range(2)]
        assert [is_replay(answer) for answer in answers] == [False, True]
        assert answers[0].json()["id"] == answers[1].json()["id"]


def test_a_refusal_is_not_remembered_and_a_deleted_job_is_not_made_again(idle: Server) -> None:
    headers = keyed()
    problem(idle.client.post("/experiments", json={"seed": -1}, headers=headers), 422, "validation-error")
    made = idle.client.post("/experiments", json={"name": "gone"}, headers=headers)
    assert (made.status_code, is_replay(made)) == (202, False)
    assert idle.client.delete(made.headers["location"]).status_code == 204
    problem(idle.client.post("/experiments", json={"name": "gone"}, headers=headers), 404, "not-found")
    assert "gone" not in names(idle)


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "naïve".encode(), b"a\tb"])
def test_row_41_what_is_no_key_is_refused(idle: Server, key: str | bytes) -> None:
    for path in ("/experiments", "/analyze", "/experiments/none/cancel", "/analyses/none/factors"):
        answer = idle.client.post(path, json={}, headers={"idempotency-key": key})
        problem(answer, 400, "idempotency-key-invalid")
    assert idle.client.post("/experiments", json={}, headers={"idempotency-key": "~" * 255}).status_code == 202


def test_two_keys_are_none(idle: Server) -> None:
    headers = [("idempotency-key", "a"), ("idempotency-key", "b")]
    problem(idle.client.post("/experiments", json={}, headers=headers), 400, "idempotency-key-invalid")


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.client.base_url.port or 0))


def head(path: str, length: int, key: str, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", f"Idempotency-Key: {key}", *more]
    return "\r\n".join([*lines, "Content-Type: application/json", "", ""]).encode()


def until_it_is_in_flight(server: Server, key: str) -> None:
    """Another request meets the first one while it is being received; it must not be the one that gets through."""
    refused = {"idempotency-key": key, "content-encoding": "gzip"}
    wait_for(lambda: server.client.post("/analyze", headers=refused).status_code == 409, "the upload to be in flight")


def test_row_42_while_the_first_is_received_a_second_one_is_told_to_wait(idle: Server) -> None:
    key = str(uuid.uuid4())
    with connect(idle) as first:
        first.sendall(head("/analyze", len(FILE), key, "Prefer: respond-async") + FILE[:-1])
        until_it_is_in_flight(idle, key)
        answer = idle.client.post("/analyze", content=FILE, headers={"idempotency-key": key})
        problem(answer, 409, "idempotency-in-progress")
        assert int(answer.headers["retry-after"]) > 0
        first.sendall(FILE[-1:])
        assert first.recv(12) == b"HTTP/1.1 202"
    again = idle.client.post("/analyze", content=FILE, headers={"idempotency-key": key, "prefer": "wait=0"})
    assert is_replay(again)


def sent_again(server: Server, path: str, body: bytes, key: str) -> httpx.Response | None:
    headers = {"idempotency-key": key, "content-type": "application/json", "prefer": "respond-async"}
    answer = server.client.post(path, content=body, headers=headers)
    return None if answer.status_code == 409 else answer


@pytest.mark.parametrize("path", ["/experiments", "/analyze"])
def test_f4_an_api_killed_between_commit_and_answer_has_made_one_job(tmp_path: Path, path: str) -> None:
    """F4: the answer is being waited for, so it is committed and not sent."""
    server, key = start_server(tmp_path / "data", workers=0), str(uuid.uuid4())
    body, listed = (BODY % b"once", "/experiments") if path == "/experiments" else (FILE, "/analyses")
    with connect(server) as connection:
        connection.sendall(head(path, len(body), key, "Prefer: wait=30") + body)
        (job,) = wait_for(lambda: server.client.get(listed).json()["data"], "the commit")
        server.process.kill()
        assert connection.recv(1) == b""
    stop_server(server)
    second = start_server(tmp_path / "data", workers=0)
    retry = sent_again(second, path, body, key)
    assert retry is not None
    assert (retry.status_code, is_replay(retry), retry.json()["id"]) == (202, True, job["id"])
    assert len(second.client.get(listed).json()["data"]) == 1
    assert stop_server(second) == 0


def test_a_record_is_dropped_after_a_day(idle: Server) -> None:
    headers = keyed()
    first = idle.client.post("/experiments", json={}, headers=headers)
    with closing(sqlite3.connect(idle.data / "rankscope.sqlite3")) as database, database:
        database.execute("UPDATE idempotency SET created_at = created_at - 86400000000")
    second = idle.client.post("/experiments", json={"seed": 5}, headers=headers)
    assert (second.status_code, is_replay(second)) == (202, False)
    assert second.json()["id"] != first.json()["id"]
    with closing(sqlite3.connect(idle.data / "rankscope.sqlite3")) as database:
        assert database.execute("SELECT count(*) FROM idempotency").fetchone() == (1,)


def test_an_experiment_is_waited_for_only_if_that_is_asked(server: Server) -> None:
    spec = {"training": {"epochs": 1}}
    headers = keyed(prefer="wait=30")
    done = server.client.post("/experiments", json=spec, headers=headers)
    assert (done.status_code, done.headers["preference-applied"], done.json()["status"]) == (
        200,
        "wait=30",
        "succeeded",
    )
    assert "retry-after" not in done.headers
    again = server.client.post("/experiments", json=spec, headers=headers)
    assert (again.status_code, is_replay(again), again.json()) == (200, True, done.json())
    for prefer, applied in (("respond-async", "respond-async"), ("handling=lenient", None)):
        queued = server.client.post("/experiments", json=spec, headers={"prefer": prefer})
        assert (queued.status_code, queued.headers.get("preference-applied")) == (202, applied)
        assert queued.headers["retry-after"] == "1"
