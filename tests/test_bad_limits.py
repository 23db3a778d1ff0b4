"""Requests at the limits that the operator sets: rows 6, 59 and 60 of the list of bad inputs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Server, start_server, stop_server
from tests.test_bad_inputs import JSON, problem
from tests.uploads.builders import saved

CREATE: dict[str, dict[str, Any]] = {
    "/experiments": {"json": {}},
    "/sweeps": {"json": {"base": {}, "grid": {"seed": [1]}}},
    "/analyze": {"content": saved(np.eye(3))},
}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with room for one job, which it has, and for longer bodies."""
    limits = {"RANKSCOPE_QUEUE_LIMIT": "1", "RANKSCOPE_BODY_LIMIT": "1000000"}
    running = start_server(tmp_path_factory.mktemp("limits") / "data", workers=0, **limits)
    running.post({})
    yield running
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()


def stored(server: Server) -> list[str]:
    """The ids of all jobs."""
    lists = [server.client.get(path).json()["data"] for path in ("/experiments", "/analyses", "/sweeps")]
    return [job["id"] for jobs in lists for job in jobs]


@pytest.mark.parametrize("bracket", [b"[", b'{"a":'], ids=["row 6: arrays", "row 6: objects"])
@pytest.mark.parametrize("path", ["/experiments", "/sweeps"])
def test_a_body_100_000_deep_is_malformed(full: Server, path: str, bracket: bytes) -> None:
    body = bracket * 100_000
    problem(full.client.post(path, content=body, headers=JSON), 400, "malformed-json")


@pytest.mark.parametrize("path", CREATE)
def test_row_59_a_full_queue_takes_no_more(full: Server, path: str) -> None:
    before = stored(full)
    answer = full.client.post(path, **CREATE[path])
    problem(answer, 429, "queue-full")
    assert int(answer.headers["retry-after"]) > 0
    assert stored(full) == before
    assert list(full.data.glob("uploads/*")) == []


def test_row_60_a_disk_below_its_reserve_takes_no_more(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0)
    server.post({})
    assert stop_server(server) == 0
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_FREE_DISK=str(10**18))
    before = stored(server)
    for path, request in CREATE.items():
        problem(server.client.post(path, **request), 507, "storage-full")
    assert server.client.get("/readyz").status_code == 503
    assert len(before) == 1  # What is stored can be read.
    assert stored(server) == before
    assert stop_server(server) == 0
