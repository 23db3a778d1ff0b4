"""What answers cost the API, in hellos: CPU of its process for a request, over that of a bare FastAPI route.

    python -m benchmarks.http [repeats]

The hello is `benchmarks/hello.py` under the same uvicorn settings in the same run; over one connection that stays open.
The spectrum is W2's of 900 epochs, 57 600 floats, and in JSON every epoch's ranks with it; `first` is a request that
nobody has sent before. The others about a finished job are sent again and answered from memory, after a look at the
job's revision: they meet the goals for JSON and npy, a first answer does not. What is left there is reading 900 rows
(about a third of the JSON's time), the 17 ranks and norms of every epoch (a third), and writing it all. The database is
SQLite, and a POST is answered when its job is safely on the disk.
"""

import contextlib
import http.client
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.measure import require_one_thread
from service import store
from service.settings import Settings
from service.store import Epoch, Token
from tests.conftest import free_port, start_server, stop_server, wait_for

SPEC: dict[str, Any] = {"training": {"epochs": 899}, "record": {"layers": ["W2"]}}


class Case(NamedTuple):
    """A request, how often it is sent in a repeat, and the goal in hellos; `{}` in a path is a new number each time."""

    name: str
    times: int
    goal: float | None
    method: str
    path: str
    status: int
    if_none_match: str = ""
    body: bytes | None = None


class Asked:
    """A server's process and a connection to it."""

    def __init__(self, pid: int, port: int) -> None:
        self.process = psutil.Process(pid)
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, case: Case) -> http.client.HTTPResponse:
        """One request; its answer has been read."""
        path = case.path.format(next(NUMBERS)) if "{}" in case.path else case.path
        headers = {"content-type": "application/json"} if case.body else {}
        headers |= {"if-none-match": case.if_none_match} if case.if_none_match else {}
        self.connection.request(case.method, path, case.body, headers)
        answer = self.connection.getresponse()
        answer.read()
        if answer.status != case.status:
            raise RuntimeError(f"{case.name}: {answer.status}, not {case.status}")
        return answer

    def cost(self, case: Case) -> float:
        """Seconds of the process's CPU for one request."""
        self.connection.close()  # The server has closed one that was idle for five seconds; this opens a new one.
        before = sum(self.process.cpu_times()[:2])
        for _ in range(case.times):
            self.ask(case)
        return (sum(self.process.cpu_times()[:2]) - before) / case.times


@contextlib.contextmanager
def greeter() -> Iterator[Asked]:
    """The bare route's server."""
    port = free_port()
    with subprocess.Popen([sys.executable, "-m", "benchmarks.hello", str(port)]) as process:

        def answers() -> bool:
            with contextlib.suppress(OSError):
                return Asked(process.pid, port).ask(HELLO).status == HELLO.status
            return False

        try:
            wait_for(answers, "the hello")
            yield Asked(process.pid, port)
        finally:
            process.terminate()


@contextlib.contextmanager
def service(folder: Path) -> Iterator[tuple[Asked, str]]:
    """The API alone, and the path of an experiment that has succeeded."""
    server = start_server(folder / "data", workers=0, RANKSCOPE_QUEUE_LIMIT="1000000")
    try:
        job = server.post(SPEC)["id"]
        record(Settings(data=folder / "data"))
        yield Asked(server.process.pid, server.client.base_url.port or 0), f"/experiments/{job}"
    finally:
        stop_server(server)


def record(settings: Settings) -> None:
    """Do a worker's part, without the training: an experiment's cost to the API is what it has recorded."""
    database, random = store.connect(settings), np.random.default_rng(0)
    with database.write.begin() as session:
        row = store.claim_next(session, "benchmark")
        if row is None:
            raise RuntimeError("the experiment is not in the queue")
        token = Token(row.id, row.attempt)
        for epoch in range(SPEC["training"]["epochs"] + 1):
            s = -np.sort(-random.random(64))
            store.add_epochs(session, token, [Epoch(epoch, 1 / (1 + epoch), 0.5, 0.5, 0.5, {"W2": (s, s)})])
        store.record_progress(session, token, done=row.total)
        store.end(session, token, "succeeded")
    database.engine.dispose()


NUMBERS = itertools.count(160)  # of pixels: the width of a picture, which these answers are not
HELLO = Case("hello", 1500, None, "GET", "/", 200)


def cases(asked: Asked, path: str) -> list[Case]:
    """What is measured."""
    spectrum = f"{path}/spectrum?layer=W2"
    tags = {where: asked.ask(Case("", 1, None, "GET", where, 200)).headers["etag"] for where in (path, spectrum)}
    queued = asked.ask(Case("", 1, None, "POST", "/experiments", 202, body=b"{}")).headers["location"]
    return [
        Case("spectrum, JSON, first", 20, None, "GET", spectrum + "&width={}", 200),
        Case("spectrum, JSON", 200, 10, "GET", spectrum, 200),
        Case("spectrum, npy, first", 40, None, "GET", spectrum + "&format=npy&width={}", 200),
        Case("spectrum, npy", 300, 2, "GET", f"{spectrum}&format=npy", 200),
        Case("spectrum, 304", 600, 1.3, "GET", spectrum, 304, tags[spectrum]),
        Case("experiment, queued", 200, 4, "GET", queued, 200),
        Case("experiment", 600, 4, "GET", path, 200),
        Case("experiment, 304", 600, 1.3, "GET", path, 304, tags[path]),
        Case("POST /experiments", 150, 14, "POST", "/experiments", 202, body=b"{}"),
    ]


def measure(hello: Asked, asked: Asked, them: list[Case]) -> dict[str, float]:
    """CPU seconds a request of every kind."""
    return {HELLO.name: hello.cost(HELLO), **{case.name: asked.cost(case) for case in them}}


def main(repeats: int) -> None:
    """Print a row for every request."""
    with tempfile.TemporaryDirectory() as name, greeter() as hello, service(Path(name)) as (asked, path):
        them = cases(asked, path)
        rows = [measure(hello, asked, them) for _ in range(repeats + 1)][1:]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    print("| | µs of CPU | hellos | goal |")
    print("|---|---|---|---|")
    for case in (HELLO, *them):
        seconds = medians[case.name]
        goal = f"≤ {case.goal:g}" if case.goal else ""
        print(f"| {case.name} | {1e6 * seconds:.0f} | {seconds / medians[HELLO.name]:.2f} | {goal} |")


if __name__ == "__main__":
    require_one_thread()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
