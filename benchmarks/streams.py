"""How late the epochs of an experiment reach fifty clients that follow it, beside another one that trains.

    python -m benchmarks.streams [seconds]

The benchmark records the epochs itself, of three layers of 64 singular values, in a commit every 100 ms as a worker
does, so that it knows when: lateness is from the beginning of an epoch's commit until its event has arrived at a
client, in ms by the clock, over all epochs and clients. The memo's run records 600 epochs a second. The clients and the
recording share one process, and all processes two cores.
"""

import asyncio
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np

from service import store
from service.lowrank.ranks import Array
from service.settings import Settings
from service.store import Database, Epoch
from tests.conftest import Server, start_server, stop_server

CLIENTS, COMMIT_S, GOAL_MS = 50, 0.1, 1000
EPOCHS_A_COMMIT = (1, 10, 60)
FIRST = 3  # the number of the first epoch's event: the job has been queued and running before
LONG = {"training": {"epochs": 100_000}, "record": {"every": 1000}}
EPOCH = re.compile(rb"^event: epoch\ndata: .*\nid: (\d+)$", re.MULTILINE)


class Followed(NamedTuple):
    """The numbers of the epochs' events that one client got, and the moment of each."""

    numbers: list[int]
    moments: list[float]

    def late(self, recorded: Array) -> tuple[Array, int]:
        """Seconds from its recording of every epoch that came, and how many never came or came twice."""
        came = np.array(self.numbers) - FIRST
        lost_or_more = np.count_nonzero(np.bincount(came, minlength=len(recorded)) != 1)
        return np.array(self.moments) - recorded[came], lost_or_more


def record(database: Database, epochs_a_commit: int, seconds: float) -> Array:
    """Run the next job in line as a worker would; the answer is the moment of each epoch."""
    s = np.linspace(1, 0.5, 64)
    spectra = dict.fromkeys(("W1", "W2", "W3"), (s, s))
    with database.write.begin() as session:
        if (row := store.claim_next(session, "benchmark")) is None:
            raise RuntimeError("somebody else has claimed the job")
        token = store.Token(row.id, row.attempt)
    moments: list[float] = []
    end = time.perf_counter() + seconds
    while (now := time.perf_counter()) < end:
        new = range(len(moments), len(moments) + epochs_a_commit)
        with database.write.begin() as session:
            store.add_epochs(session, token, [Epoch(epoch, 0.5, 0.5, None, None, spectra) for epoch in new])
        moments += [now] * epochs_a_commit
        time.sleep(max(0.0, now + COMMIT_S - time.perf_counter()))
    with database.write.begin() as session:
        store.end(session, token, "succeeded")
    return np.array(moments)


async def follow(client: httpx.AsyncClient, path: str, opened: asyncio.Semaphore) -> Followed:
    """Follow a job to its end."""
    found, rest = Followed([], []), b""
    async with client.stream("GET", f"{path}/events") as answer:
        answer.raise_for_status()
        opened.release()
        async for chunk in answer.aiter_bytes():
            whole, end, rest = (rest + chunk).rpartition(b"\n\n")
            new = EPOCH.findall(whole + end)
            found.numbers.extend(map(int, new))
            found.moments.extend([time.perf_counter()] * len(new))
    return found


async def measure(server: Server, database: Database, epochs_a_commit: int, seconds: float) -> tuple[Array, int]:
    """Lateness of all epochs at all clients, and how many never came or came twice."""
    path, opened = f"/experiments/{server.post(LONG)['id']}", asyncio.Semaphore(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.client.base_url, timeout=60, limits=limits) as client:
        following = [asyncio.create_task(follow(client, path, opened)) for _ in range(CLIENTS)]
        for _ in following:
            await opened.acquire()
        recorded = await asyncio.to_thread(record, database, epochs_a_commit, seconds)
        found = await asyncio.gather(*following)
    late, wrong = zip(*(one.late(recorded) for one in found), strict=True)
    return np.concatenate(late), sum(wrong)


def main(seconds: float) -> None:
    """Measure and print."""
    print("| epochs a second | events sent | lost or twice | goal | p50 | p99 | latest | goal |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        server = start_server(data, RANKSCOPE_LEASE_S="600")  # Its worker leaves our job alone.
        database = store.connect(Settings(data=data))
        try:
            server.wait(server.post(LONG)["id"], "running")
            for epochs_a_commit in EPOCHS_A_COMMIT:
                late, n_wrong = asyncio.run(measure(server, database, epochs_a_commit, seconds))
                p50, p99, latest = 1000 * np.quantile(late, [0.5, 0.99, 1])
                rate = len(late) / CLIENTS / seconds
                missed = ", missed" if latest > GOAL_MS or n_wrong else ""
                cells = (f"{rate:.0f}", late.size, n_wrong, 0, f"{p50:.0f}", f"{p99:.0f}", f"{latest:.0f}")
                print(f"| {' | '.join(map(str, cells))} | ≤ {GOAL_MS}{missed} |", flush=True)
        finally:
            database.engine.dispose()
            stop_server(server)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10)
