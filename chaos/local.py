"""Workers and their jobs are killed, stopped and told to go while they work; every job must end as if nothing had been.

`python -m chaos.local --n-jobs 24 --n-workers 3` uses SQLite in a folder of its own, or the empty database of
RANKSCOPE_DATABASE_URL. The same jobs run undisturbed first: their results are the reference. The seed decides which
faults come and when; how they meet the jobs is up to the machine.
"""

import argparse
import contextlib
import io
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from chaos.audit import commits, install_audit, overlaps
from service.settings import Settings, environment
from service.store import TERMINAL

FAST = Settings(heartbeat_s=0.2, lease_s=1.0, checkpoint_s=0.3, max_attempts=100, poll_s=0.05)
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "sgd"},
    {"optimizer": "sgd", "momentum": 0.9},
    {"optimizer": "adam", "lr": 1e-3},
]
LIMIT_S = 300.0
Results = list[tuple[bytes, ...]]


def specs(n_jobs: int, epochs: int) -> list[dict[str, Any]]:
    """Experiments that differ in everything that training state consists of."""
    return [_spec(i, {"epochs": epochs, **OPTIMIZERS[i % len(OPTIMIZERS)]}) for i in range(n_jobs)]


def _spec(seed: int, training: dict[str, Any]) -> dict[str, Any]:
    hidden = [16 + 8 * (seed % 3)] * 2
    return {"seed": seed, "network": {"hidden": hidden}, "training": training, "record": {"every": 5}}


def matrices(n_files: int) -> list[bytes]:
    """Weight files of several matrices, so that an analysis can be interrupted between two."""

    files = []
    for i in range(n_files):
        rng, file = np.random.default_rng(i), io.BytesIO()
        np.savez(file, *(rng.normal(size=(300 + i, 400)).astype(np.float32) for _ in range(6)))
        files.append(file.getvalue())
    return files


@dataclass
class Site:
    """A server without workers of its own, and workers that come and go."""

    settings: Settings
    log: Path
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_worker(self) -> None:
        """Start one more worker."""
        self.workers.append(self.start("-m", "worker", "--tied"))

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a Python process under the site's settings, which ends when this one does."""
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment(self.settings)},
            )

    def replace_dead_workers(self) -> None:
        """Start a worker for each that has ended."""
        dead = [worker for worker in self.workers if worker.poll() is not None]
        self.workers = [worker for worker in self.workers if worker not in dead]
        for worker in dead:
            if worker.stdin is not None:
                worker.stdin.close()
            self.start_worker()


@contextlib.contextmanager
def site(settings: Settings, n_workers: int) -> Iterator[tuple[Site, httpx.Client]]:
    """A server that answers, with its workers; all are ended afterwards."""
    settings.data.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    here = Site(settings, settings.data / "log")
    server = here.start("-m", "service.cli", "serve", "--tied", f"--port={port}", "--workers=0")
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            _until(lambda: _answers(client), "the server to answer")
            for _ in range(n_workers):
                here.start_worker()
            yield here, client
    finally:
        for process in (*here.workers, server):
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in (*here.workers, server):
            process.wait(30)
            if process.stdin is not None:
                process.stdin.close()


def _answers(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").is_success
    except httpx.TransportError:
        return False


def _until(reached: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {LIMIT_S:g} s in vain for {what}")
        time.sleep(0.05)


def post_all(client: httpx.Client, bodies: list[dict[str, Any]], files: list[bytes]) -> list[str]:
    """Post the jobs; the answer has their paths."""
    answers = [client.post("/experiments", json=body) for body in bodies]
    answers += [client.post("/analyze", content=file, headers={"prefer": "respond-async"}) for file in files]
    for answer in answers:
        assert answer.status_code == 202, answer.text
    return [answer.headers["location"] for answer in answers]


def results(client: httpx.Client, paths: list[str]) -> Results:
    """Everything that the jobs have found; each must have succeeded."""
    found: Results = []
    for path in paths:
        state = client.get(path).json()
        assert state["status"] == "succeeded", state
        parts = ["/spectrum?format=npz", "/weights?at=final", "/weights?at=initial", "/metrics?format=csv"]
        views = parts if path.startswith("/experiments") else ["/spectrum?format=npz&layer=all"]
        answers = [client.get(f"{path}{view}") for view in views]
        assert all(answer.is_success for answer in answers), [answer.text[:200] for answer in answers]
        found.append(tuple(answer.content for answer in answers))
    return found


def all_over(client: httpx.Client, paths: list[str]) -> bool:
    """Whether every job has ended."""
    return all(client.get(path).json()["status"] in TERMINAL for path in paths)


class Faults:
    """What happens to workers and their jobs, in an order that the seed decides."""

    def __init__(self, here: Site, written: Callable[[], int | None], *, limit: int, seed: int) -> None:
        """`written` counts the commits of all jobs so far, where it can."""
        self.here, self.written, self.limit = here, written, limit
        self.rng = random.Random(seed)
        self.count = dict.fromkeys(("kill worker", "kill job", "stop past the lease", "drain"), 0)
        self.stopped: list[tuple[float, subprocess.Popen[bytes]]] = []

    @contextlib.contextmanager
    def brought(self) -> Iterator[None]:
        """Bring faults meanwhile. Raises what went wrong with that."""
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            bringing = pool.submit(self._bring_until, over)
            try:
                yield
            finally:
                over.set()
                bringing.result()

    def _bring_until(self, over: threading.Event) -> None:
        seen = 0
        while not over.wait(self.rng.uniform(0.1, 0.5)):
            self.wake(time.monotonic())
            self.here.replace_dead_workers()
            # Between two faults something is written: on a slow machine too the jobs get on.
            if sum(self.count.values()) < self.limit and (written := self.written() or 0) > seen + 3:
                seen = written
                self.bring(self.rng.choice(list(self.count)))
        self.wake(float("inf"))

    def wake(self, now: float) -> None:
        """Let go on what has been stopped for longer than a lease lasts."""
        for until, process in list(self.stopped):
            if until <= now:
                self.stopped.remove((until, process))
                process.send_signal(signal.SIGCONT)

    def bring(self, fault: str) -> None:
        """Bring one fault on one worker that has a job: one that never got to work would show nothing."""
        stopped = {process.pid for _, process in self.stopped}
        awake = [worker for worker in self.here.workers if worker.pid not in stopped]
        at_work = [(worker, jobs) for worker in awake if (jobs := _jobs_of(worker.pid))]
        if not at_work:
            return
        worker, jobs = self.rng.choice(at_work)
        match fault:
            case "kill worker":
                worker.kill()
            case "drain":
                worker.terminate()
            case "stop past the lease":
                worker.send_signal(signal.SIGSTOP)
                self.stopped.append((time.monotonic() + 2.5 * FAST.lease_s, worker))
            case "kill job":
                with contextlib.suppress(psutil.NoSuchProcess):
                    self.rng.choice(jobs).kill()
        self.count[fault] += 1


def _jobs_of(pid: int) -> list[psutil.Process]:
    """The processes that run a worker's jobs: grandchildren, by way of its fork server."""
    try:
        return [job for helper in psutil.Process(pid).children() for job in helper.children()]
    except psutil.NoSuchProcess:
        return []


@dataclass(frozen=True)
class Play:
    """How much happens; a sixth of the jobs are analyses."""

    n_jobs: int = 24
    n_workers: int = 3
    n_faults: int = 60
    epochs: int = 2000
    seed: int = 0

    def jobs(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        """The experiments and the files."""
        n_files = self.n_jobs // 6
        return specs(self.n_jobs - n_files, self.epochs), matrices(n_files)

    def undisturbed(self, data: Path) -> Results:
        """What the jobs find when nothing happens to them."""
        with site(FAST.model_copy(update={"data": data}), self.n_workers) as (_, client):
            paths = post_all(client, *self.jobs())
            _until(lambda: all_over(client, paths), "the reference")
            return results(client, paths)

    def disturbed(self, data: Path, url: str, reference: Results) -> str:
        """Play it; the answer is a line for people. Raises AssertionError where something does not hold."""
        settings = FAST.model_copy(update={"data": data, "database_url": url})
        with site(settings, self.n_workers) as (here, client):
            install_audit(settings.url)
            faults = Faults(here, lambda: commits(settings.url), limit=self.n_faults, seed=self.seed)
            with faults.brought():
                paths = post_all(client, *self.jobs())
                _until(lambda: all_over(client, paths), "every job to end")
            assert results(client, paths) == reference, "results differ from those of undisturbed runs"
            assert sum(faults.count.values()) >= self.n_faults // 2, f"hardly any fault was brought: {faults.count}"
            n_attempts = sum(client.get(path).json()["attempt"] for path in paths)
        assert (wrong := overlaps(settings.url)) == [], wrong
        log = here.log.read_text()
        for said in ("database is locked", "Traceback"):
            assert said not in log, log[max(0, log.index(said) - 2000) : log.index(said) + 4000]
        told = ", ".join(f"{name}: {number}" for name, number in faults.count.items())
        return f"{len(paths)} jobs in {n_attempts} attempts ended once each, bit for bit as undisturbed; {told}"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m chaos.local", description=__doc__)
    for one in fields(Play):
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=int, default=one.default)
    play = Play(**vars(parser.parse_args()))
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        reference = play.undisturbed(Path(folder) / "reference")
        print(play.disturbed(Path(folder) / "chaos", os.environ.get("RANKSCOPE_DATABASE_URL", ""), reference))


if __name__ == "__main__":
    main()
