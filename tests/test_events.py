"""Live events: streams and pages of real jobs, through disconnects, restarts, many readers and slow ones."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import pytest

from service import store
from service.settings import Settings
from service.store import Epoch
from tests.conftest import Server, start_server, stop_server, wait_for
from tests.postgres import Postgres
from tests.test_bad_inputs import problem
from tests.test_processes import FAST, LONG
from tests.uploads.builders import saved

SHORT = {"training": {"epochs": 6}}


class Event(NamedTuple):
    """One event as a client reads it."""

    id: int | None
    name: str
    data: dict[str, Any]


def parsed(block: list[str]) -> Event | None:
    """An event of its lines; None for comments and the like."""
    fields = dict(line.split(": ", 1) for line in block if not line.startswith(":"))
    if "event" not in fields:
        return None
    return Event(int(fields["id"]) if "id" in fields else None, fields["event"], json.loads(fields["data"]))


def events_in(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a stream."""
    block: list[str] = []
    for line in lines:
        if line:
            block.append(line)
        elif (event := parsed(block)) is not None:
            yield event
            block = []
        else:
            block = []


@contextmanager
def stream(server: Server, job: str, after: int | None = None, kind: str = "experiments") -> Iterator[Iterator[Event]]:
    headers = {"accept": "text/event-stream", **({} if after is None else {"last-event-id": str(after)})}
    with server.client.stream("GET", f"/{kind}/{job}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events_in(answer.iter_lines())


def whole(server: Server, job: str, after: int | None = None, kind: str = "experiments") -> list[Event]:
    """All events of a stream that ends by itself."""
    with stream(server, job, after, kind) as events:
        return list(events)


def epochs(events: Iterable[Event]) -> list[int]:
    return [event.data["epoch"] for event in events if event.name == "epoch"]


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose jobs stay queued, with room for three streams."""
    running = start_server(tmp_path_factory.mktemp("idle") / "data", workers=0, RANKSCOPE_STREAM_LIMIT="3")
    yield running
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()
    assert "ERROR" not in running.log.read_text().upper().replace('"LOGGER": "UVICORN.ERROR"', "")


def test_a_stream_tells_every_epoch_and_ends_with_the_job(server: Server, memo: dict[str, Any]) -> None:
    events = whole(server, memo["id"])
    assert [event.id for event in events] == list(range(1, 65))
    assert [event.name for event in events] == ["status"] * 2 + ["epoch"] * 61 + ["completed"]
    assert [event.data["status"] for event in events if event.name != "epoch"] == ["queued", "running", "succeeded"]
    assert epochs(events) == list(range(61))
    path = f"/experiments/{memo['id']}"
    metrics = server.client.get(f"{path}/metrics").json()["epochs"]
    spectra = server.client.get(f"{path}/spectrum", params={"layer": "all"}).json()["epochs"]
    for event, metric, spectrum in zip(events[2:-1], metrics, spectra, strict=True):
        assert event.data["train_loss"] == metric["train_loss"]
        assert event.data["validation_loss"] == metric["validation_loss"]
        for layer, ranks, values in zip(event.data["layers"], metric["layers"], spectrum["layers"], strict=True):
            assert layer["name"] == ranks["name"] == values["name"]
            assert layer["top"] == values["singular_values"][:8]
            np.testing.assert_allclose(
                [layer["entropy_rank"], layer["stable_rank"]], [ranks["entropy_rank"], ranks["stable_rank"]], rtol=1e-12
            )


def test_pages_of_json_hold_the_same_events(server: Server, memo: dict[str, Any]) -> None:
    seen: list[Event] = []
    url = f"/experiments/{memo['id']}/events?limit=30"
    while url:
        answer = server.client.get(url, headers={"accept": "application/json"})
        assert answer.headers["content-type"] == "application/json"
        seen += [Event(event["id"], event["event"], event["data"]) for event in answer.json()["data"]]
        assert answer.json()["has_more"] == ("next" in answer.links)
        url = answer.links.get("next", {}).get("url", "")
    assert seen == whole(server, memo["id"])
    tag = {"if-none-match": answer.headers["etag"], "accept": "application/json"}
    assert server.client.get(answer.url, headers=tag).status_code == 304


@pytest.mark.parametrize("after", [0, 1, 2, 30, 62, 63])
def test_a_stream_goes_on_after_the_event_that_it_is_told(server: Server, memo: dict[str, Any], after: int) -> None:
    rest = whole(server, memo["id"])[after:]
    assert whole(server, memo["id"], after) == rest
    path = f"/experiments/{memo['id']}/events"
    assert list(events_in(server.client.get(path, params={"after": after}).text.splitlines())) == rest
    header = {"last-event-id": str(after)}  # It is newer than the address that a browser was given.
    assert list(events_in(server.client.get(f"{path}?after=1", headers=header).text.splitlines())) == rest


def test_who_has_all_of_a_finished_job_is_told_to_ask_no_more(server: Server, memo: dict[str, Any]) -> None:
    for last in ("64", "65", "9223372036854775807"):
        answer = server.client.get(f"/experiments/{memo['id']}/events", headers={"last-event-id": last})
        assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize(
    ("query", "headers"),
    [
        ("?after=-1", {}), ("?after=x", {}), ("?after=9223372036854775808", {}), ("?limit=0", {}), ("?limit=101", {}),
        ("?format=xml", {}), ("?since=1", {}), ("", {"last-event-id": "x"}), ("", {"last-event-id": "-1"}),
        ("", {"last-event-id": ""}), ("", {"last-event-id": "9" * 30}),
    ],
)  # fmt: skip
def test_bad_places_in_a_stream_are_refused(
    server: Server, memo: dict[str, Any], query: str, headers: dict[str, str]
) -> None:  # as in rows 39 and 40
    answer = server.client.get(f"/experiments/{memo['id']}/events{query}", headers=headers)
    assert problem(answer, 422, "validation-error")["errors"][0]["parameter"]


def test_row_35_events_are_not_acceptable_as_anything_else(server: Server, memo: dict[str, Any]) -> None:
    answer = server.client.get(f"/experiments/{memo['id']}/events", headers={"accept": "application/xml"})
    assert problem(answer, 406, "not-acceptable")["available"] == ["text/event-stream", "application/json"]


def test_a_failed_job_tells_its_error_before_it_is_completed(server: Server) -> None:
    spec = {"training": {"epochs": 9, "lr": 1e300}, "network": {"activation": "relu"}, "data": {"target": "relu"}}
    posted = server.post(spec)
    *_, error, completed = whole(server, posted["id"])
    assert (error.name, error.data) == ("error", server.read(posted["id"])["error"])
    assert error.data["type"] == "diverged"
    assert (completed.name, completed.data["status"]) == ("completed", "failed")


def test_an_analysis_has_events_too(server: Server) -> None:
    state = server.analyze(saved(np.eye(3)))
    events = whole(server, state["id"], kind="analyses")
    assert [event.data["status"] for event in events] == ["queued", "running", "succeeded"]
    problem(server.client.get(f"/experiments/{state['id']}/events"), 404, "not-found")


async def read_live(client: httpx.AsyncClient, path: str) -> list[Event]:
    async def lines() -> AsyncIterator[str]:
        async with client.stream("GET", path, headers={"accept": "text/event-stream"}) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                yield line

    return list(events_in([line async for line in lines()]))


def test_fifty_streams_get_every_epoch_while_other_requests_go_on(server: Server) -> None:
    blocker, posted = server.post(LONG), server.post({"training": {"epochs": 60}})
    path = f"/experiments/{posted['id']}/events"

    async def follow() -> list[list[Event]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.client.base_url, timeout=60, limits=limits) as client:
            streams = [asyncio.create_task(read_live(client, path)) for _ in range(50)]
            await asyncio.sleep(0)
            assert (await client.get("/healthz")).is_success
            assert (await client.get("/experiments")).is_success  # The threads of the routes are free.
            assert (await client.post(f"/experiments/{blocker['id']}/cancel")).is_success
            return await asyncio.gather(*streams)

    first, *others = asyncio.run(follow())
    assert epochs(first) == list(range(61))
    assert first[-1].name == "completed"
    assert all(other == first for other in others)


def restart_in_the_middle(folder: Path, **environment: str) -> tuple[list[Event], list[Event], Server]:
    """The events before and after a kill -9 of the server and its worker, and the server that is there now."""
    first = start_server(folder / "data", **FAST, **environment)
    posted = first.post({"training": {"epochs": 300}, "record": {"every": 10}})
    before: list[Event] = []
    with stream(first, posted["id"]) as events:
        for event in events:
            before.append(event)
            if epochs(before) == [0, 10, 20]:
                break
    first.process.kill()
    stop_server(first)
    second = start_server(folder / "data", **FAST, **environment)
    after = whole(second, posted["id"], before[-1].id)
    return before, after, second


def check_nothing_is_lost(before: list[Event], after: list[Event], server: Server) -> None:
    numbers = [event.id for event in before + after if event.id is not None]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == len(before + after)
    assert {*epochs(before), *epochs(after)} == set(range(0, 301, 10))
    assert after[-1].data["status"] == "succeeded"
    assert any(event.data.get("attempt") == 2 for event in after)
    assert stop_server(server) == 0


@pytest.mark.slow
def test_a_stream_is_resumed_from_the_database_after_a_crash(tmp_path: Path) -> None:
    check_nothing_is_lost(*restart_in_the_middle(tmp_path))


@pytest.mark.slow
def test_a_stream_is_resumed_from_postgresql_too(tmp_path: Path, postgres: Postgres) -> None:
    check_nothing_is_lost(*restart_in_the_middle(tmp_path, RANKSCOPE_DATABASE_URL=postgres.new_database()))


def test_a_server_that_stops_says_so_and_where_to_go_on(tmp_path: Path) -> None:  # F14
    server = start_server(tmp_path / "data", workers=0)
    posted = server.post(SHORT)
    with stream(server, posted["id"]) as events:
        assert next(events).id == 1
        server.process.send_signal(signal.SIGTERM)
        (last,) = events
    assert server.process.wait(30) == 0
    assert (last.id, last.name) == (None, "shutdown")
    assert "Traceback" not in server.log.read_text()
    stop_server(server)


def test_a_stream_of_a_job_that_is_deleted_ends(idle: Server) -> None:
    posted = idle.post(SHORT)
    with stream(idle, posted["id"]) as events:
        assert next(events).data["status"] == "queued"
        assert idle.client.delete(f"/experiments/{posted['id']}").status_code == 204
        (last,) = events
    assert (last.id, last.name, last.data["type"]) == (None, "error", "not-found")
    problem(idle.client.get(f"/experiments/{posted['id']}/events"), 404, "not-found")


def test_a_queued_job_that_is_canceled_completes_its_stream(idle: Server) -> None:
    posted = idle.post(SHORT)
    with stream(idle, posted["id"]) as events:
        assert next(events).data["status"] == "queued"
        assert idle.client.post(f"/experiments/{posted['id']}/cancel").status_code == 200
        (last,) = events
    assert (last.name, last.data["status"]) == ("completed", "canceled")


def test_more_streams_than_there_may_be_are_refused_until_one_goes(idle: Server) -> None:  # F16; the log is read last
    path = f"/experiments/{idle.post(SHORT)['id']}/events"
    connections = [open_stream(idle, path) for _ in range(3)]
    answer = idle.client.get(path)
    assert problem(answer, 429, "too-many-streams")["limit"] == 3
    assert int(answer.headers["retry-after"]) > 0
    assert idle.client.get(path, params={"format": "json"}).status_code == 200
    # HEAD is no stream: it ends at once.
    assert idle.client.head(path).headers["content-type"].startswith("text/event-stream")
    connections.pop().close()
    connections.append(wait_for(lambda: try_stream(idle, path), "room for a stream"))
    for connection in connections:
        # With a reset, as a process that is killed does it.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
    wait_for(lambda: try_stream(idle, path), "all streams to be gone").close()


def try_stream(server: Server, path: str, buffer: int = 65536) -> socket.socket | None:
    """A connection on which a stream has begun; None where it is refused."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", server.client.base_url.port or 0))
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    if connection.recv(12) == b"HTTP/1.1 200":
        return connection
    connection.close()
    return None


def open_stream(server: Server, path: str) -> socket.socket:
    connection = try_stream(server, path)
    assert connection is not None
    return connection


def test_a_reader_that_takes_nothing_costs_no_memory_and_is_cut_off(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_ANSWER_S="1", RANKSCOPE_STREAM_LIMIT="1")
    job = server.post(SHORT)["id"]
    write_history(server.data, 25_000)
    path = f"/experiments/{job}/events"
    server.client.get(path, params={"format": "json"})
    before = psutil.Process(server.process.pid).memory_info().rss
    lazy = try_stream(server, path, buffer=4096)
    assert lazy is not None
    # The history is some 8 MB: more than any buffer of the system holds, and it is never all in memory.
    other = wait_for(lambda: try_stream(server, path), "the lazy one to be cut off")
    assert psutil.Process(server.process.pid).memory_info().rss - before < 30 << 20
    lazy.close()
    assert stop_server(server) == 0  # The other one takes nothing either.
    other.close()
    assert "Traceback" not in server.log.read_text()


def write_history(data: Path, n_epochs: int) -> None:
    """Record epochs as a worker does, without training."""
    database = store.connect(Settings(data=data))
    s = np.linspace(1, 0.5, 8)
    with database.write.begin() as session:
        row = store.claim_next(session, "w")
        assert row is not None
        token = store.Token(row.id, row.attempt)
        store.add_epochs(session, token, [Epoch(n, 0.5, 0.5, None, None, {"W1": (s, s)}) for n in range(n_epochs)])
    database.engine.dispose()
