"""What the client makes of answers that no rankscope gives, and of what no request can carry."""

import asyncio
import io
from collections.abc import Iterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from service.client import AsyncClient, Client, Refused, Unavailable, Unreachable, Unreadable, Unsendable, calls
from service.views import Job
from tests.conftest import serving


def job(job_id: str) -> Job:
    """A job of which only its place is known."""
    return Job.model_construct(id=job_id, object="analysis")


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """The paths that `strange` was asked for."""
    return []


@pytest.fixture(scope="module")
def strange(asked: list[str]) -> Iterator[str]:
    """A server that answers with a page, a list, broken compression, no events, and a refusal until tomorrow."""

    async def answer(request: Request) -> Response:
        asked.append(request.url.path)
        packed = {"content-type": "text/event-stream", "content-encoding": "gzip"}
        match request.url.path:
            case "/limits":
                return HTMLResponse("<h1>Welcome</h1>")
            case "/presets":
                return JSONResponse([])
            case "/readyz" | "/analyses/packed/events":
                return Response(b"no gzip", headers=packed)
            case "/analyses/moved/events":
                return Response(status_code=301, headers={"location": "/"})
            case "/analyses/words/events":
                return Response("id: 1\nevent: status\ndata: running\n\n", media_type="text/event-stream")
        return Response("tomorrow", 503, {"retry-after": "86400"})

    with serving(Starlette(routes=[Route("/{path:path}", answer)])) as url:
        yield url


def test_what_no_request_can_carry_is_told_before_it_is_sent(strange: str, asked: list[str]) -> None:
    before = len(asked)
    with Client(strange) as client:
        for use in (
            lambda: client.create_experiment({"name": "\ud800"}),
            lambda: client.create_experiment({"seed": 2**70}),
            lambda: client.create_sweep({"base": object()}),
            lambda: client.experiment("x" * 70_000),
            lambda: next(client.events(job("1"), last_event_id="é")),
        ):
            with pytest.raises(Unsendable):
                use()
    assert len(asked) == before


def test_a_stream_that_is_moved_is_refused(strange: str) -> None:
    with Client(strange) as client, pytest.raises(Refused):
        next(client.events(job("moved")))


def test_an_answer_that_is_no_object_is_unreadable(strange: str) -> None:
    async def use() -> None:
        async with AsyncClient(strange) as client:
            with pytest.raises(Unreadable):
                await client.ready()

    with Client(strange) as client:
        for method in (client.limits, client.presets, client.ready):
            with pytest.raises(Unreadable):
                method()
        with pytest.raises(Unreadable):
            client.download(calls.Call("GET", "/readyz", bytes), io.BytesIO())
    asyncio.run(use())


def test_events_that_cannot_be_read_end_in_an_error_of_the_client(strange: str) -> None:
    with Client(strange, retries=0) as client:
        with pytest.raises(Unreadable, match="event 1 is not JSON"):
            list(client.events(job("words")))
        with pytest.raises(Unreachable):
            list(client.events(job("packed")))


def test_nobody_waits_until_tomorrow(strange: str, asked: list[str]) -> None:
    asked.clear()

    async def use() -> None:
        async with AsyncClient(strange) as client:
            with pytest.raises(Unavailable):
                [event async for event in client.events(job("late"))]

    with Client(strange) as client:
        with pytest.raises(Unavailable) as refused:
            client.analysis("late")
        with pytest.raises(Unavailable):
            list(client.events(job("late")))
    asyncio.run(use())
    assert (refused.value.passes, refused.value.retry_after_s) == (False, 86400)
    assert len(asked) == 3


@pytest.mark.parametrize("key", ["a\nb", "clé", "a b", "\udcff"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_told(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(Unsendable, match="visible ASCII") as refused:
            kind("http://127.0.0.1:1", api_key=key)
        assert key not in str(refused.value)
    monkeypatch.setenv("RANKSCOPE_API_KEY", "a\tb")
    with pytest.raises(Unsendable):
        Client("http://127.0.0.1:1")


@pytest.mark.parametrize("server", ["http://[::1", "localhost:8000", "", "http://", "http://a/\udcff"])
def test_an_address_that_is_none_is_refused_at_once(server: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(Unsendable, match="is no server"):
            kind(server)


def test_a_name_that_none_can_have_is_refused() -> None:
    with Client("http://a..b") as client, pytest.raises(Unsendable, match="label"):
        client.limits()


@pytest.mark.parametrize("job_id", ["", ".", "..", "a\nb", "\udcff"])
def test_an_id_that_is_none_reads_nothing_else(strange: str, asked: list[str], job_id: str) -> None:
    asked.clear()
    with Client(strange) as client:
        for read in (client.experiment, client.analysis, client.sweep, client.factors_of, client.create_factors):
            with pytest.raises(Unsendable, match="is no id"):
                read(job_id)
        with pytest.raises(ValueError, match="is no id"):
            client.factors("some", job_id)
    assert not asked
