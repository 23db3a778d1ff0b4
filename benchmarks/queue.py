"""From POST to the first epoch recorded, and how jobs spread over workers; on SQLite, PostgreSQL and a Ray cluster.

    python -m benchmarks.queue [repeats]

The first is the median over an idle service that has run a job before, seen by polling over HTTP. The second counts the
starts in the log of 60 tiny jobs posted to three workers: a double start is a job with more than one.
"""

import collections
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests import postgres, ray_cluster
from tests.conftest import Server, free_port, start_server, stop_server

WARM_UPS, WORKERS, TINY = 6, 3, 60
IDLE_S = 0.3
Environment = dict[str, str]


@contextlib.contextmanager
def sqlite() -> Iterator[Callable[[], Environment]]:
    """SQLite in the data folder, local workers."""
    yield dict


@contextlib.contextmanager
def postgresql() -> Iterator[Callable[[], Environment]]:
    """PostgreSQL, local workers."""
    with postgres.running(free_port()) as server:
        yield lambda: {"RANKSCOPE_DATABASE_URL": server.new_database()}


@contextlib.contextmanager
def ray() -> Iterator[Callable[[], Environment]]:
    """PostgreSQL, and a Ray cluster of two nodes with two CPUs each; the workers are dispatchers."""
    with postgres.running(free_port()) as server, ray_cluster.cluster() as cluster:
        for _ in range(2):
            cluster.add_node(cpus=2)
        place = {"RANKSCOPE_ENGINE": "ray", "RANKSCOPE_RAY_ADDRESS": cluster.address}
        yield lambda: {**place, "RANKSCOPE_DATABASE_URL": server.new_database()}


def first_epoch_s(server: Server) -> float:
    """Seconds from POST to the first epoch that a client sees."""
    start = time.perf_counter()
    path = f"/experiments/{server.post({'device': 'cpu'})['id']}"
    while not ((answer := server.client.get(f"{path}/metrics?layer=W2")).is_success and answer.json()["epochs"]):
        time.sleep(0.002)
    took = time.perf_counter() - start
    server.wait(path.rpartition("/")[2])
    time.sleep(IDLE_S)
    return took


def starts(server: Server) -> list[tuple[str, str]]:
    """(worker, job) of every start in the log."""
    lines = (json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{"))
    return [(line["worker"], line["event"].split()[2]) for line in lines if line["event"].startswith("starting ")]


def measure(name: str, environment: Callable[[], Environment], folder: Path, repeats: int) -> None:
    """Print both figures of one engine."""
    server = start_server(folder / f"{name}-idle", **environment())
    times = [first_epoch_s(server) for _ in range(WARM_UPS + repeats)][WARM_UPS:]
    stop_server(server)
    server = start_server(folder / f"{name}-busy", workers=WORKERS, **environment())
    begun = time.perf_counter()
    jobs = [server.post({"device": "cpu", "training": {"epochs": 1}})["id"] for _ in range(TINY)]
    attempts = [server.wait(job)["attempt"] for job in jobs]
    took = time.perf_counter() - begun
    stop_server(server)
    spread = sorted(collections.Counter(worker for worker, _ in starts(server)).values(), reverse=True)
    doubles = len(starts(server)) - len(set(jobs)) + sum(attempt > 1 for attempt in attempts)
    median, slowest = statistics.median(times) * 1000, max(times) * 1000
    jobs_of = ", ".join(map(str, spread))
    print(f"| {name} | {median:.0f} ms | {slowest:.0f} ms | {took:.1f} s | {jobs_of} | {doubles} |", flush=True)


def main(repeats: int) -> None:
    """Measure what is installed, and say what is not."""
    print(
        f"| | to the first epoch (goal ≤ 150 ms local) | slowest | {TINY} jobs | by worker | double starts (goal 0) |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for engine in (sqlite, postgresql, ray):
            if engine is not sqlite and postgres.programs() is None:
                print(f"| {engine.__name__} | {postgres.MISSING} |")
            elif engine is ray and not ray_cluster.installed():
                print(f"| ray | {ray_cluster.MISSING} |")
            else:
                with engine() as environment:
                    measure(engine.__name__, environment, Path(folder), repeats)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
