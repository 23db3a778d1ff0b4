"""Pictures of the memo's run over HTTP against FuncAnimation with PillowWriter, and the API's health meanwhile.

    python -m benchmarks.gif [repeats]

The memo's 61 epochs, from GET to the picture, in CPU of all processes. `Drawn` is a picture that nobody has asked for
before, `again` one that is cached; the first picture of a server comes with the start of the drawing process. Health is
the time in which `/healthz` answers by the clock, asked every 20 ms, while ten GIFs are drawn and an experiment trains.
"""

import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks import textbook
from benchmarks.measure import cpu_seconds, finish, ready_server, require_one_thread, tree_cpu_s

FRAMES, GIFS = 61, 10
EVERY_S = 0.02


def costs(client: httpx.Client, pid: int, path: str, **query: Any) -> float:
    """CPU seconds of all processes for one picture."""
    start = tree_cpu_s(pid)
    client.get(f"{path}/spectrum", params=query).raise_for_status()
    return tree_cpu_s(pid) - start


def measure(client: httpx.Client, pid: int, path: str, repeat: int, folder: Path) -> dict[str, float]:
    """CPU seconds of each, of a GIF for a frame."""
    spectra = textbook.train(0, 64, repeat).repeat(FRAMES, axis=0)  # Costs nothing: what is drawn does not matter.
    found = {
        "GIF, a frame": costs(client, pid, path, format="gif", fps=repeat + 1) / FRAMES,
        "FuncAnimation, a frame": cpu_seconds(textbook.draw, spectra, folder / "textbook.gif")[0] / FRAMES,
    }
    # Counted by the kernel in hundredths of a second: several at a time.
    for name, widths in (("PNG, drawn", range(5)), ("PNG, again", [0] * 20)):
        pictures = [costs(client, pid, path, format="png", width=600 + 5 * repeat + width) for width in widths]
        found[name] = sum(pictures) / len(pictures)
    return found


def health(client: httpx.Client, path: str) -> list[float]:
    """Seconds of each answer of `/healthz` while GIFs are drawn and an experiment trains."""
    times: list[float] = []
    drawn = threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=client.base_url, timeout=60) as other:
            other.get("/healthz")
            while not drawn.wait(EVERY_S):
                start = time.perf_counter()
                other.get("/healthz").raise_for_status()
                times.append(time.perf_counter() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    job = client.post("/experiments", json={"training": {"epochs": 2000}}).raise_for_status().json()
    with ThreadPoolExecutor(GIFS) as threads:
        queries = [{"format": "gif", "height": 401 + number} for number in range(GIFS)]
        for answer in threads.map(lambda query: client.get(f"{path}/spectrum", params=query), queries):
            answer.raise_for_status()
    drawn.set()
    watcher.join()
    client.post(f"/experiments/{job['id']}/cancel").raise_for_status()
    return times


def report(first: float, medians: dict[str, float], times: list[float]) -> None:
    """Print a row for every picture, and the health."""
    ours, theirs = medians["GIF, a frame"], medians["FuncAnimation, a frame"]
    goals = {"GIF, a frame": "≤ 10", "PNG, drawn": "≤ 150"}
    print("| | ms of CPU | goal |")
    print("|---|---|---|")
    for name, seconds in {**medians, "PNG, first of a server": first}.items():
        print(f"| {name} | {1000 * seconds:.1f} | {goals.get(name, '')} |")
    print(f"\nA GIF frame costs 1/{theirs / ours:.0f} of FuncAnimation's (goal: 1/15 or less).")
    print(
        f"`/healthz` while {GIFS} GIFs are drawn and an experiment trains, {len(times)} answers: "
        f"median {1000 * statistics.median(times):.0f} ms, p99 {1000 * np.quantile(times, 0.99):.0f} ms (goal < 100)."
    )


def main(repeats: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ready_server(Path(name)) as (client, server):
        path = finish(client, client.post("/experiments", json={}))
        first = costs(client, server.pid, path, format="png")
        rows = [measure(client, server.pid, path, repeat, Path(name)) for repeat in range(repeats + 1)][1:]
        medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        report(first, medians, health(client, path))


if __name__ == "__main__":
    require_one_thread()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
