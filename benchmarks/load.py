"""A minute under load: 64 clients that never pause, beside an experiment that trains all the time.

    python -m benchmarks.load [seconds]

Every client sends its next request when the last is answered: 80 % GET of spectra, metrics, jobs, the list and now and
then a picture, three of four about a finished experiment, the others about the one that trains; 15 % GET with an ETag
of the finished one, to be answered 304; 5 % POST of an experiment of one or two epochs, which is refused with 429 while
the queue is full. So the times, in ms by the clock, are those of a server that is asked for more than it can do, with
the clients on the same two cores: what counts is that nothing fails. A new picture is the slowest to come, for one
process draws them all; there are a hundred. Memory is that of the API's process (RSS), seen ten times a second.
It grows while caches fill and answers about the training experiment get longer: beside one that recorded hardly
anything it stayed within 3 MB of 170 MB from the 105th second to the 240th, over 80 000 requests.
"""

import asyncio
import collections
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil

from tests.conftest import Server, start_server, stop_server

CLIENTS, SAMPLE_S = 64, 0.1
# Percent of all requests.
SHARES = {
    "spectrum, JSON": 20,
    "spectrum, npy": 15,
    "metrics": 15,
    "experiment": 18,
    "list": 10,
    "PNG": 2,
    "304": 15,
    "POST": 5,
}
LONG = {"network": {"hidden": [256, 256]}, "training": {"epochs": 100_000}, "record": {"every": 50}}
NO_ANSWER = 0
FAILURES = ("200, not 304", "3xx", "4xx", "5xx", "no answer")


class Jobs(NamedTuple):
    """The paths of the finished experiment and of the one that trains, and what of the first can be asked again."""

    finished: str
    training: str
    tags: dict[str, str]


class Answer(NamedTuple):
    """What a request was, the status of its answer, and after how many seconds it had come."""

    kind: str
    status: int
    seconds: float


def request(kind: str, jobs: Jobs, random: np.random.Generator) -> tuple[str, str, dict[str, Any]]:
    """Method, path and what goes with it, of a request of a kind."""
    job = jobs.finished if random.random() < 0.75 else jobs.training
    if kind == "POST":
        spec = {"training": {"epochs": int(random.integers(1, 3))}, "record": {"layers": ["W2"]}}
        return "POST", "/experiments", {"json": spec}
    if kind == "304":
        path, tag = list(jobs.tags.items())[random.integers(len(jobs.tags))]
        return "GET", path, {"headers": {"if-none-match": tag}}
    paths = {
        "spectrum, JSON": f"{job}/spectrum?layer=W2&top_k={random.integers(1, 65)}",
        "spectrum, npy": f"{job}/spectrum?layer=W2&format=npy",
        "metrics": f"{job}/metrics?layer=W{random.integers(1, 4)}",
        "experiment": job,
        "list": f"/experiments?limit={random.integers(1, 21)}",
        "PNG": f"{jobs.finished}/spectrum?format=png&width={random.integers(600, 700)}",
    }
    return "GET", paths[kind], {}


async def keep_asking(client: httpx.AsyncClient, jobs: Jobs, seed: int, deadline: float) -> list[Answer]:
    """What one client was answered until the deadline."""
    random, answers = np.random.default_rng(seed), []
    kinds, shares = list(SHARES), np.array(list(SHARES.values())) / 100
    while (begun := time.perf_counter()) < deadline:
        kind = str(random.choice(kinds, p=shares))
        method, path, content = request(kind, jobs, random)
        try:
            status = (await client.request(method, path, **content)).status_code
        except httpx.TransportError:
            status = NO_ANSWER
        answers.append(Answer(kind, status, time.perf_counter() - begun))
    return answers


async def watch(process: psutil.Process) -> int:
    """The most bytes that the process was seen to have, until this is canceled."""
    peak = process.memory_info().rss
    try:
        while True:
            await asyncio.sleep(SAMPLE_S)
            peak = max(peak, process.memory_info().rss)
    except asyncio.CancelledError:
        return peak


async def load(server: Server, jobs: Jobs, seconds: float) -> tuple[list[Answer], int]:
    """All answers, and the peak of the API's memory."""
    trust = httpx.create_ssl_context()  # Unused, but each client would make one of its own.
    clients = [httpx.AsyncClient(base_url=server.client.base_url, timeout=60, verify=trust) for _ in range(CLIENTS)]
    watcher = asyncio.create_task(watch(psutil.Process(server.process.pid)))
    deadline = time.perf_counter() + seconds
    found = await asyncio.gather(*(keep_asking(client, jobs, seed, deadline) for seed, client in enumerate(clients)))
    watcher.cancel()
    for client in clients:
        await client.aclose()
    return [answer for answers in found for answer in answers], await watcher


def prepare(server: Server) -> Jobs:
    """Run one experiment, and begin another."""
    finished = f"/experiments/{server.run({'name': 'finished'})['id']}"
    training = f"/experiments/{server.post(LONG)['id']}"
    while not server.client.get(f"{training}/spectrum?format=npy").is_success:
        time.sleep(0.1)
    paths = (finished, f"{finished}/spectrum?layer=W2", f"{finished}/metrics?layer=W2")
    return Jobs(finished, training, {path: server.client.get(path).headers["etag"] for path in paths})


def class_of(answer: Answer) -> str:
    """How an answer is counted."""
    if answer.status == NO_ANSWER:
        return "no answer"
    if answer.kind == "304" and answer.status == 200:
        return "200, not 304"
    return str(answer.status) if answer.status in {304, 429} else f"{answer.status // 100}xx"


def report(answers: list[Answer], seconds: float, memory: dict[str, int]) -> None:
    """Print a row for every kind and class, and the memory."""
    print("| | requests | p50 | p99 |")
    print("|---|---|---|---|")
    for kind in ("all", *SHARES):
        times = [1000 * answer.seconds for answer in answers if kind in {"all", answer.kind}]
        print(f"| {kind} | {len(times)} | {np.quantile(times, 0.5):.0f} | {np.quantile(times, 0.99):.0f} |")
    print(f"\n{len(answers) / seconds:.0f} requests a second, over {seconds:.0f} s.\n")
    counts = collections.Counter(class_of(answer) for answer in answers)
    print("| answered | times | goal |")
    print("|---|---|---|")
    for name in ("2xx", "304", "429", *FAILURES):
        goal = "0" if name in FAILURES else ""
        print(f"| {name} | {counts[name]} | {goal}{', missed' * bool(goal and counts[name])} |")
    print("\n| memory of the API | MB |")
    print("|---|---|")
    for when, size in memory.items():
        print(f"| {when} | {size / 1e6:.0f} |")


def main(seconds: float) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        server = start_server(Path(name) / "data", RANKSCOPE_JOBS="2")  # One that trains, and one after the other.
        try:
            jobs = prepare(server)
            process = psutil.Process(server.process.pid)
            before, begun = process.memory_info().rss, time.perf_counter()
            answers, peak = asyncio.run(load(server, jobs, seconds))
            took, after = time.perf_counter() - begun, process.memory_info().rss
            if (status := server.client.get(jobs.training).json()["status"]) != "running":
                raise RuntimeError(f"the experiment that was to train all the time is {status}")
        finally:
            stop_server(server)
        if faults := [line for line in server.log.read_text().splitlines() if "Traceback" in line]:
            raise RuntimeError(faults[0])
    report(answers, took, {"before": before, "after": after, "peak": max(peak, after)})


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
