"""From the start of a server to its first answer, and the memory that it and its workers hold.

    python -m benchmarks.start [repeats]

Seconds from `rankscope serve` to an answer of `/healthz`, of the API alone and with a worker starting beside it: by the
clock, and CPU of the API's process; medians after one to warm up. Memory is resident (RSS), of the API
before the first job, of the worker, its fork server and a child that trains, and of the drawing process after a PNG and
a GIF. Memory shared between processes is counted in each. The worker misses its goal by 2 MB. What it holds most after
its imports is Python itself (11 MB), SQLAlchemy (17), pydantic (14), numpy (11), and structlog (9, half of it rich,
which structlog loads wherever it is installed); it runs on 3 MB more.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import finish, ready_server, require_one_thread
from tests.conftest import command_line, start_server, stop_server

GOALS = {"API": 120, "worker": 80, "fork server": 400, "job": 400, "drawing process": 150}
MARKS = {"worker": "-m worker", "fork server": "forkserver", "drawing process": "spawn_main"}


def start(folder: Path, workers: int) -> tuple[float, float]:
    """Seconds to the first answer, and of CPU."""
    begun = time.perf_counter()
    server = start_server(folder, workers=workers)
    took = time.perf_counter() - begun
    cpu = sum(psutil.Process(server.process.pid).cpu_times()[:2])
    stop_server(server)
    return took, cpu


def processes(server: psutil.Process) -> dict[str, psutil.Process]:
    """The server and what it has started, by what it is."""
    found = {"API": server}
    for process in server.children(recursive=True):
        line = command_line(process)
        name = next((name for name, mark in MARKS.items() if mark in line), "")
        # A child of the fork server looks like it.
        if name == "fork server" and process.ppid() != found.get("worker", server).pid:
            name = "job"
        found[name] = process
    return found


def memory(folder: Path) -> dict[str, int]:
    """Bytes of every process: of the API before the first job, of the others while one trains, after pictures.

    A server is ready before its worker has loaded all that it will.
    """
    with ready_server(folder) as (client, server):
        held = {"API": server.memory_info().rss}
        path = finish(client, client.post("/experiments", json={}))
        for form in ("png", "gif"):
            client.get(f"{path}/spectrum", params={"format": form}).raise_for_status()
        job = client.post("/experiments", json={"training": {"epochs": 5000}}).raise_for_status().json()
        while client.get(f"/experiments/{job['id']}").json()["progress"]["done"] < 100:
            time.sleep(0.1)
        busy = processes(server)
        held |= {name: process.memory_info().rss for name, process in busy.items() if name != "API"}
        if "torch" in " ".join(one.path for one in busy["worker"].memory_maps()):
            raise RuntimeError("the worker itself has loaded torch")
        client.post(f"/experiments/{job['id']}/cancel").raise_for_status()
    return {name: held[name] for name in GOALS}


def main(repeats: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        starts: dict[int, Any] = {
            workers: [start(folder / f"{workers}", workers) for _ in range(repeats + 1)][1:] for workers in (0, 1)
        }
        held = memory(folder / "memory")
    print("| | s to the first answer | s of CPU | goal |")
    print("|---|---|---|---|")
    for workers, times in starts.items():
        took, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| API{' beside a starting worker' * workers} | {took:.2f} | {cpu:.2f} | < 2 |")
    print("\n| | MB | goal |")
    print("|---|---|---|")
    for name, limit in GOALS.items():
        print(f"| {name} | {held[name] / 1e6:.0f} | < {limit} |")


if __name__ == "__main__":
    require_one_thread()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
