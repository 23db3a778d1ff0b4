"""What an operator sees: the log and the metrics of a real server and its worker."""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import DBAPIError

from service import store
from service.settings import Settings, environment
from service.store import Database
from tests.conftest import Server, start_server, stop_server, wait_for

PRIVATE = "a-name-that-nobody-else-uses"


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose worker shows its metrics; the database is small and this module's own."""
    running = start_server(tmp_path_factory.mktemp("watched") / "data", RANKSCOPE_WORKER_METRICS="127.0.0.1:0")
    running.client.headers["x-api-token"] = PRIVATE
    yield running
    assert stop_server(running) == 0


def lines(server: Server) -> list[dict[str, Any]]:
    """The log; every line is a JSON object, or this fails."""
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, sorted label values …) → value, as Prometheus's own parser reads them."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def worker_metrics(server: Server) -> dict[tuple[str, ...], float]:
    """The worker's own metrics, at the address that it has logged."""

    def address() -> str | None:
        found = re.search(r"http://127\.0\.0\.1:\d+/metrics", server.log.read_text())
        return found and found[0]

    return samples(httpx.get(wait_for(address, "the worker to tell its address")).text)


def test_every_line_of_the_log_is_json_with_its_ids(watched: Server) -> None:
    posted = watched.client.post("/experiments?", json={"training": {"epochs": 1}}, headers={"x-request-id": "mine"})
    job = watched.wait(posted.json()["id"])["id"]
    requests = [line for line in lines(watched) if line["logger"] == "service.access"]
    (request,) = (line for line in requests if line.get("request_id") == "mine")
    assert (request["method"], request["route"], request["status"]) == ("POST", "/experiments", posted.status_code)
    assert request["duration_s"] > 0
    templates = {line["route"] for line in requests}
    assert "/experiments/{experiment_id}" in templates
    assert not any(job in route for route in templates)
    assert "/healthz" not in templates  # A probe every few seconds would be all there is to read.
    assert {line["logger"].partition(".")[0] for line in lines(watched)} == {"service", "uvicorn", "worker"}


def test_a_job_logs_under_its_id_attempt_and_worker(watched: Server) -> None:
    spec = {"training": {"epochs": 9, "lr": 1e300}, "network": {"activation": "relu"}, "data": {"target": "relu"}}
    state = watched.run(spec)
    assert state["error"]["type"] == "diverged"
    found = [line for line in lines(watched) if line.get("job_id") == state["id"]]
    assert [line["event"] for line in found] == ["the job has failed: diverged"]
    assert found[0]["attempt"] == 1
    (worker,) = {line["worker"] for line in found}
    assert any(line["event"] == "the worker is ready" and line["worker"] == worker for line in lines(watched))


def test_what_clients_send_is_not_in_the_log(watched: Server) -> None:
    watched.post({"name": PRIVATE, "training": {"epochs": 1}})
    watched.client.post("/experiments", json={"name": PRIVATE, "tags": {"x": 1}})
    watched.client.post("/analyze", params={"name": PRIVATE}, files={"file": (PRIVATE, b"no array" * 9)})
    watched.client.get(f"/experiments/{PRIVATE}?q={PRIVATE}")
    watched.client.get("/experiments", headers={"host": PRIVATE})
    assert len([line for line in lines(watched) if line["logger"] == "service.access"]) >= 5
    assert PRIVATE not in watched.log.read_text()


def test_an_error_of_the_database_does_not_tell_its_parameters(database: Database) -> None:
    job: dict[str, Any] = {"kind": "experiment", "owner": "public", "name": PRIVATE, "tags": {}, "spec": {}}
    with pytest.raises(DBAPIError) as caught, database.write.begin() as session:  # Its total is missing.
        store.create_job(session, {**job, "priority": "normal"}, queue_limit=9)
    assert PRIVATE not in str(caught.value)


def test_an_unexpected_error_leaves_its_traceback_under_the_request_id(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0)
    (tmp_path / "data" / "rankscope.sqlite3").write_bytes(b"this is no database any more" * 1000)
    answer = server.client.get("/experiments", headers={"x-request-id": "unlucky"})
    assert (answer.status_code, answer.headers.get("connection")) in {(500, "close"), (503, None)}
    stop_server(server)
    found = [line for line in lines(server) if line.get("request_id") == "unlucky"]
    assert any("Traceback" in line.get("exception", "") for line in found)
    assert any(line["event"] == "request" and line["status"] == answer.status_code for line in found)


@pytest.mark.parametrize(("form", "is_json"), [("auto", True), ("console", False)])
def test_the_form_of_the_log_is_a_setting(tmp_path: Path, form: str, is_json: bool) -> None:
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_LOG_FORMAT=form, RANKSCOPE_LOG_LEVEL="debug")
    server.client.get("/healthz")
    stop_server(server)
    text = server.log.read_text()
    assert "/healthz" in text
    assert text.startswith("{") == is_json
    assert "\x1b" not in text


def test_prometheus_reads_requests_jobs_sizes_and_disk(watched: Server) -> None:
    done = watched.run({"training": {"epochs": 1}})
    watched.client.head(f"/experiments/{done['id']}")
    watched.client.get("/no/such/path")
    watched.client.request("PROPFIND", "/experiments")
    answer = watched.client.get("/metrics", headers={"accept": "text/plain;version=0.0.4"})
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = samples(answer.text)
    requests = "rankscope_http_request_seconds_count"
    assert found[requests, "method=HEAD", "route=/experiments/{experiment_id}", "status=200"] == 1
    assert found[requests, "method=GET", "route=other", "status=404"] == 1
    assert found[requests, "method=other", "route=/experiments", "status=405"] == 1
    assert found["rankscope_jobs", "kind=experiment", "status=succeeded"] >= 1
    assert found[("rankscope_queue_depth",)] == 0
    assert found[("rankscope_database_up",)] == 1
    file = watched.data / "rankscope.sqlite3"
    assert found["rankscope_database_bytes", "file=main"] == file.stat().st_size
    assert found["rankscope_database_bytes", "file=wal"] == 0 or store.journal_mode() == "WAL"
    assert found[("rankscope_disk_free_bytes",)] > 0
    assert done["id"] not in answer.text


def test_prometheus_reads_queue_depth_and_may_be_sent_away(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0)
    for _ in range(3):
        server.post({})
    found = samples(server.client.get("/metrics").text)
    assert found[("rankscope_queue_depth",)] == found["rankscope_jobs", "kind=experiment", "status=queued"] == 3
    stop_server(server)
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_METRICS="off", RANKSCOPE_DOCS="off")
    assert [server.client.get(path).status_code for path in ("/metrics", "/docs", "/docs/start.js")] == [404] * 3
    assert "documentation" not in server.client.get("/").json()["links"]
    stop_server(server)


def test_prometheus_reads_a_worker(watched: Server) -> None:
    watched.run({"training": {"epochs": 1}})
    name = ("rankscope_job_seconds_count", "kind=experiment", "status=succeeded")
    found = wait_for(lambda: (read := worker_metrics(watched)).get(name, 0) >= 1 and read, "the job to be counted")
    assert 0 <= found[("rankscope_worker_heartbeat_age_seconds",)] < 60
    assert found[("rankscope_worker_jobs",)] == 0


@pytest.mark.parametrize("command", [["-m", "service.cli", "serve", "--workers=2"], ["-m", "worker"]])
def test_two_workers_cannot_share_a_port(tmp_path: Path, command: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        given = environment(Settings(data=tmp_path, worker_metrics=address))
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=given)
    assert done.returncode == 2, done.stderr
    assert "port 0" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
