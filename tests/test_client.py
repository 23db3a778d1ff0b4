"""The client for other services, against a real server, one whose connections break, and a stream of events."""

import asyncio
import contextlib
import re
import select
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from service.access import fingerprint
from service.client import (
    AsyncClient,
    Client,
    Conflict,
    Event,
    NotFound,
    Refused,
    TooManyRequests,
    Unauthorized,
    Unprocessable,
    Unreachable,
    Unreadable,
    calls,
)
from service.client.errors import BY_STATUS, refusal
from service.problems import BY_SLUG
from service.store import TERMINAL
from tests.conftest import Server, serving, start_server, stop_server

QUICK = {"training": {"epochs": 2}}


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(url_of(server)) as client:
        yield client


def url_of(server: Server) -> str:
    return str(server.client.base_url)


def test_an_experiment_from_its_post_to_its_pictures(client: Client, tmp_path: Path) -> None:
    job = client.create_experiment({**QUICK, "name": "by the client"})
    done = client.wait(job, timeout_s=300)
    assert (done.id, done.status, done.spec.training.epochs) == (job.id, "succeeded", 2)
    assert client.label_experiment(done, {"tags": {"kept": "yes"}}).tags == {"kept": "yes"}
    assert [one["epoch"] for one in client.metrics(done, from_=1, layer="W2")["epochs"]] == [1, 2]
    assert client.spectrum(done, layer="W2", normalize=True)["epochs"][0]["layers"][0]["normalized"]
    assert client.compression(done, layer="W2", rule="rank", rank=3)["rank"] == 3
    assert client.spectrum_file(done, "png", layer="W2").startswith(b"\x89PNG")
    with (tmp_path / "weights").open("w+b") as file:
        client.download(calls.weights(done), file)
    assert (tmp_path / "weights").read_bytes() == client.weights(done) != client.weights(done, "initial")
    assert client.cancel(done).status == "succeeded"
    client.delete(done)
    with pytest.raises(NotFound, match=done.id):
        client.experiment(done.id)


def test_a_file_from_its_upload_to_its_factors(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    np.save(path, np.diag([3.0, 2.0, 1.0]))
    found = client.wait(client.analyze(path, name="a diagonal", top_k=2))
    assert found.tensors[0]["singular_values"] == pytest.approx([3, 2, 1])
    assert client.analysis(found.id, top_k=2).tensors[0]["singular_values"] == pytest.approx([3, 2])
    assert client.analyze(path.read_bytes(), wait_s=30).status == "succeeded"
    made = client.wait(client.create_factors(found.id, {"rule": "rank", "rank": 1, "format": "npz"}))
    assert [one.id for one in client.factors_of(found.id).data] == [made.id]
    assert client.factors(found.id, made.id).manifest == made.manifest
    assert client.factors_file(made).startswith(b"PK")
    assert any(one.name == "a diagonal" for one in client.analyses(limit=1))


def test_pages_are_one_iterator(client: Client) -> None:
    posted = {client.create_experiment({"training": {"epochs": 1}, "tags": {"page": "yes"}}).id for _ in range(3)}
    listed = [one.id for one in client.experiments(tag="page:yes", limit=2)]
    assert (set(listed), len(listed)) == (posted, 3)


def test_the_same_methods_can_be_awaited(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "array.npy"
    np.save(path, np.eye(3))

    async def use() -> None:
        async with AsyncClient(url_of(server)) as client:
            jobs = await asyncio.gather(*(client.create_experiment({**QUICK, "tags": {"by": "async"}}) for _ in "ab"))
            done = await asyncio.gather(*map(client.wait, jobs))
            assert {one.status for one in done} == {"succeeded"}
            assert {one.id async for one in client.experiments(tag="by:async", limit=1)} == {one.id for one in jobs}
            assert (await client.analyze(path, wait_s=30)).status == "succeeded"
            with (tmp_path / "weights").open("wb") as file:
                await client.download(calls.weights(done[0]), file)
            assert (tmp_path / "weights").read_bytes() == await client.weights(done[0])
            with pytest.raises(NotFound):
                await client.experiment("../limits")

    asyncio.run(use())


def test_every_refusal_is_an_exception_that_carries_the_problem(client: Client) -> None:
    with pytest.raises(Unprocessable) as refused:
        client.create_experiment({"training": {"epochs": 0}})
    assert (refused.value.slug, refused.value.status) == ("validation-error", 422)
    assert refused.value.problem["errors"][0]["pointer"] == "/training/epochs"
    assert refused.value.request_id
    with pytest.raises(Refused) as bad:
        client.analyze(b"these are no weights, they are words")
    assert bad.value.slug in BY_SLUG
    for problem in BY_SLUG.values():
        body = {"type": f"/problems/{problem.slug}", "title": problem.title}
        error = refusal(httpx.Response(problem.status, json=body))
        assert (error.slug, error.status) == (problem.slug, problem.status)
        assert type(error) is BY_STATUS.get(problem.status, type(error))
    assert {problem.status for problem in BY_SLUG.values()} - set(BY_STATUS) <= {405, 416, 500}


def test_an_answer_that_is_no_problem_document_is_shown_as_text() -> None:
    error = refusal(httpx.Response(502, html="<b>Bad Gateway</b>", headers={"retry-after": "7"}))
    assert (error.slug, error.passes, error.retry_after_s) == ("", True, 7)
    assert "Bad Gateway" in str(error)
    dated = refusal(httpx.Response(503, headers={"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}))
    assert dated.retry_after_s == 0


def test_a_newer_server_may_say_more_and_must_not_say_other_things(client: Client, memo: dict[str, Any]) -> None:
    known = {**memo, "spec": {**memo["spec"], "new": 1}, "also_new": {"x": 1}}
    call = calls.experiment(memo["id"])
    request = httpx.Request("GET", "http://server/experiments/x")
    assert call.result(httpx.Response(200, json=known, request=request)) == client.experiment(memo["id"])
    with pytest.raises(Unreadable, match="status"):
        call.result(httpx.Response(200, json={**memo, "status": "paused"}, request=request))


def test_the_key_comes_as_an_argument_or_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_API_KEYS=f"alice:{fingerprint('secret')}")
    monkeypatch.delenv("RANKSCOPE_API_KEY", raising=False)
    with Client(url_of(server)) as client, pytest.raises(Unauthorized):
        client.create_experiment()
    with Client(url_of(server), api_key="secret") as client:
        assert client.create_experiment().status == "queued"
    monkeypatch.setenv("RANKSCOPE_API_KEY", "secret")
    with Client(url_of(server)) as client:
        assert len(list(client.experiments())) == 1
    stop_server(server)


def test_a_refusal_for_now_is_waited_for_and_one_for_good_is_not(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_RATE_LIMIT="2/second")
    with Client(url_of(server), retries=0) as hasty, pytest.raises(TooManyRequests) as refused:
        [hasty.limits() for _ in range(9)]
    assert refused.value.retry_after_s is not None
    with Client(url_of(server)) as client:
        for _ in range(3):
            client.limits()
    stop_server(server)
    with Client(url_of(server), retries=1) as client, pytest.raises(Unreachable):
        client.limits()


@contextlib.contextmanager
def cut_connections(server: Server, cuts: int) -> Iterator[tuple[str, list[bytes]]]:
    """A relay that lets the server answer and then drops the answer, `cuts` times; its URL, and what it was sent."""
    seen: list[bytes] = []
    target = ("127.0.0.1", server.client.base_url.port or 0)

    def relay(caller: socket.socket, number: int) -> None:
        with caller, socket.create_connection(target) as upstream:
            while True:
                ready, _, _ = select.select([caller, upstream], [], [])
                source = ready[0]
                chunk = source.recv(65536)
                if not chunk or (source is upstream and number < cuts):
                    return
                if source is caller:
                    seen[number] += chunk
                (upstream if source is caller else caller).sendall(chunk)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = listener.accept()
                seen.append(b"")
                threading.Thread(target=relay, args=(caller, len(seen) - 1), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)


def test_a_post_whose_answer_is_lost_is_sent_again_and_makes_one_job(server: Server) -> None:
    with cut_connections(server, 2) as (url, seen), Client(url) as client:
        job = client.create_experiment({"training": {"epochs": 1}, "tags": {"lost": "twice"}})
    keys = [re.search(rb"idempotency-key: (\S+)", request, re.IGNORECASE) for request in seen]
    assert len(seen) == 3
    assert len({key and key[1] for key in keys}) == 1
    listed = server.client.get("/experiments", params={"tag": "lost"}).json()["data"]
    assert [one["id"] for one in listed] == [job.id]


def test_a_delete_whose_answer_is_lost_is_not_sent_again(server: Server) -> None:
    with Client(url_of(server)) as client:
        job = client.wait(client.create_experiment({"training": {"epochs": 1}}))
    with cut_connections(server, 1) as (url, seen), Client(url) as client, pytest.raises(Unreachable):
        client.delete(job)
    assert len(seen) == 1


def test_a_key_of_the_callers_own_outlives_the_caller(server: Server) -> None:
    made = []
    for _ in range(2):
        with Client(url_of(server)) as client:
            made.append(client.create_experiment({"training": {"epochs": 1}}, idempotency_key="order-17").id)
    assert made[0] == made[1]
    with Client(url_of(server)) as client, pytest.raises(Unprocessable) as reused:
        client.create_experiment({"training": {"epochs": 3}}, idempotency_key="order-17")
    assert reused.value.slug == "idempotency-key-reused"


def test_a_wait_has_an_end_of_its_own(server: Server) -> None:
    with Client(url_of(server)) as client:
        job = client.create_experiment({"training": {"epochs": 100_000}, "record": {"every": 1000}})
        with pytest.raises(TimeoutError, match=job.id):
            client.wait(job, timeout_s=0.2)
        behind = client.create_experiment(QUICK)
        with pytest.raises(Conflict) as refused:
            client.spectrum_file(behind, "png")
        assert refused.value.slug == "spectrum-not-ready"
        client.cancel(job)
        assert client.wait(job).status == "canceled"


SENT = [("status", {"status": "running"}), *(("epoch", {"epoch": n}) for n in range(4)), ("completed", {})]


@contextlib.contextmanager
def stream_that_breaks() -> Iterator[tuple[str, list[str | None]]]:
    """A server whose stream breaks off twice, says once that it stops, and goes on after Last-Event-ID."""
    asked: list[str | None] = []

    async def events(request: Request) -> StreamingResponse:
        asked.append(request.headers.get("last-event-id"))
        return StreamingResponse(chunks(int(asked[-1] or 0), len(asked)), media_type="text/event-stream")

    async def chunks(after: int, turn: int) -> AsyncIterator[str]:
        yield ": a comment keeps the connection alive\nretry: 1000\n\n"
        for number, (name, data) in list(enumerate(SENT, 1))[after:]:
            yield f"id: {number}\nevent: {name}\ndata: {str(data).replace(chr(39), chr(34))}\n\n"
            if turn == 1 and number == 2:
                yield "id: 3\nevent: epoch\nda"  # cut off in the middle of an event
                raise ConnectionResetError
            if turn == 2:
                yield "event: shutdown\ndata: {}\n\n"
                return

    app = Starlette(routes=[Route("/experiments/{id}/events", events)])
    with serving(app) as url:
        yield url, asked


def expected() -> list[Event]:
    return [Event(str(number), name, data) for number, (name, data) in enumerate(SENT, 1)]


def test_events_go_on_where_the_stream_broke_with_nothing_lost_or_twice(client: Client, memo: dict[str, Any]) -> None:
    job = client.experiment(memo["id"])
    with stream_that_breaks() as (url, asked), Client(url) as reader:
        assert list(reader.events(job)) == expected()
        assert asked == [None, "2", "3"]
        assert list(reader.events(job, last_event_id="4")) == expected()[4:]


def test_events_can_be_awaited(client: Client, memo: dict[str, Any]) -> None:
    job = client.experiment(memo["id"])

    async def read(url: str) -> list[Event]:
        async with AsyncClient(url) as reader:
            return [event async for event in reader.events(job)]

    with stream_that_breaks() as (url, asked):
        assert asyncio.run(read(url)) == expected()
        assert asked == [None, "2", "3"]
    assert job.status in TERMINAL


def test_events_of_nobody_end_in_the_error(client: Client, memo: dict[str, Any]) -> None:
    job = client.experiment(memo["id"])
    with stream_that_breaks() as (url, _), Client(url, retries=1) as reader, pytest.raises(NotFound):
        list(reader.events(job.model_copy(update={"object": "analysis"})))
    with Client(url, retries=1) as reader, pytest.raises(Unreachable):
        list(reader.events(job))
