"""Real parts for the tests: a server on a port with its worker, databases in files, finished experiments."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import uvicorn

from service import store
from service.settings import Settings
from service.store import Database
from tests import postgres as postgresql
from tests.postgres import Postgres

# Permissions bind root only once it has given up the right to pass them over.
OBEDIENT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
OVER = {"succeeded", "failed", "canceled"}


def wait_for(found: Callable[[], Any], what: str, limit_s: float = 60.0) -> Any:
    """The first true answer of `found`; the limit is only there to end a test that has failed."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if answer := found():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"waited {limit_s} s in vain for {what}")


@dataclass(frozen=True)
class Server:
    """A running `rankscope serve`."""

    process: subprocess.Popen[bytes]
    client: httpx.Client
    data: Path
    log: Path

    def post(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Post an experiment that is accepted."""
        answer = self.client.post("/experiments", json=spec)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def delete_unchanged(self, path: str) -> None:
        """Delete something by the ETag it has, after a try with one that it has not."""
        tag = self.client.get(path).headers["etag"]
        assert self.client.delete(path, headers={"if-match": '"other"'}).status_code == 412
        assert self.client.delete(path, headers={"if-match": f'{tag}, "other"'}).status_code == 204

    def analyze(self, content: bytes, **query: Any) -> dict[str, Any]:
        """Post a file whose analysis succeeds; the answer is its report."""
        answer = self.client.post("/analyze", content=content, params=query, headers={"prefer": "wait=30"})
        assert answer.status_code == 200, answer.text
        state: dict[str, Any] = answer.json()
        assert state["status"] == "succeeded", state["error"]
        return state

    def read(self, experiment_id: str) -> dict[str, Any]:
        """The experiment's state now."""
        answer = self.client.get(f"/experiments/{experiment_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    def wait(self, experiment_id: str, *statuses: str) -> dict[str, Any]:
        """The experiment once it has one of the statuses, or is over."""
        wanted = set(statuses) or OVER

        def reached() -> dict[str, Any] | None:
            state = self.read(experiment_id)
            return state if state["status"] in wanted | OVER else None

        return wait_for(reached, f"{experiment_id} to be {sorted(wanted)}")

    def run(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Post an experiment and wait until it is over."""
        return self.wait(self.post(spec)["id"])

    def workers(self) -> list[psutil.Process]:
        """The worker processes, without their children."""
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "-m worker" in command_line(child)]

    def job_children(self) -> list[psutil.Process]:
        """The processes that run jobs: children of the workers' fork servers."""
        return [
            job
            for worker in self.workers()
            for helper in worker.children()
            if "forkserver" in command_line(helper)
            for job in helper.children()
        ]


def command_line(process: psutil.Process) -> str:
    """How the process was started; nothing once it has ended, be it this very moment."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def be_patient(request: httpx.Request) -> None:
    """Wait for an analysis as long as may be, unless the test says otherwise."""
    if request.url.path == "/analyze":
        request.headers.setdefault("prefer", "wait=30")


def start_server(data: Path, workers: int = 1, **environment: str) -> Server:
    """Start `rankscope serve` on a free port and wait until it answers."""
    port, log = free_port(), data.parent / f"{data.name}.log"
    command = [sys.executable, "-m", "service.cli", "serve", "--tied"]
    command += [f"--port={port}", f"--data={data}", f"--workers={workers}"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, env={**os.environ, **environment}
        )
    # On a busy machine the worker's first job may take longer than the ten seconds that are waited by default.
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, event_hooks={"request": [be_patient]})

    def healthy() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return client.get("/healthz").is_success
        except httpx.TransportError:
            return False

    wait_for(healthy, "the server to answer")
    return Server(process, client, data, log)


def stop_server(server: Server) -> int:
    """Ask the server to stop; the answer is its exit code."""
    server.client.close()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.stdin is not None
    code = server.process.wait(30)
    server.process.stdin.close()
    return code


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let everything that goes over HTTP be tested on PostgreSQL too: minutes, for `make soak`."""
    parser.addoption("--on-postgresql", action="store_true", help="the shared servers keep their jobs in PostgreSQL")


@pytest.fixture(scope="session")
def shared_database(request: pytest.FixtureRequest) -> dict[str, str]:
    """What gives the shared servers their database."""
    if not request.config.getoption("--on-postgresql"):
        return {}
    return {"RANKSCOPE_DATABASE_URL": request.getfixturevalue("postgres").new_database()}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, shared_database: dict[str, str]) -> Iterator[Server]:
    """One server with one worker for all tests that only use it as a client does."""
    running = start_server(tmp_path_factory.mktemp("server") / "data", **shared_database)
    yield running
    assert stop_server(running) == 0, running.log.read_text()
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="session")
def torch_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that takes PyTorch checkpoints, with one worker."""
    folder = tmp_path_factory.mktemp("torch")
    running = start_server(folder / "data", RANKSCOPE_TORCH_FILES="true")
    yield running
    assert stop_server(running) == 0, running.log.read_text()
    assert "Traceback" not in running.log.read_text()


@pytest.fixture(scope="session")
def memo(server: Server) -> dict[str, Any]:
    """The memo's experiment, finished."""
    state = server.run({"name": "the memo"})
    assert state["status"] == "succeeded", state["error"]
    return state


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server for all tests that only use databases of their own."""
    if postgresql.programs() is None:
        pytest.skip(postgresql.MISSING)
    with postgresql.running(free_port()) as running:
        yield running


def pytest_report_header() -> str:
    """Say in the first lines which databases are tested."""
    folder = postgresql.programs()
    return f"databases: SQLite, PostgreSQL of {folder}" if folder else f"databases: SQLite alone; {postgresql.MISSING}"


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    """Settings with a data folder and an empty database of the test's own, on SQLite and on PostgreSQL."""
    url = request.getfixturevalue("postgres").new_database() if request.param == "postgresql" else ""
    return Settings(data=tmp_path / "data", database_url=url)


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """An empty database with the current schema."""
    database = store.connect(settings)
    store.migrate(database, settings)
    yield database
    database.engine.dispose()


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """An ASGI application on a port, in a thread of this process; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=(port := free_port()), log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_for(lambda: server.started, "the application to listen")
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
