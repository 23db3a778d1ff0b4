"""Faults that a worker and its jobs survive, by their rows; `test_chaos` brings them at random."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from service.settings import Settings, environment
from tests.conftest import Server, start_server, stop_server, wait_for
from worker.job import problem_of

pytestmark = pytest.mark.slow
FAST = {"RANKSCOPE_HEARTBEAT_S": "0.1", "RANKSCOPE_LEASE_S": "1", "RANKSCOPE_CHECKPOINT_S": "0.1"}
SMALL = {"network": {"hidden": [8]}, "data": {"n_samples": 128, "n_features": 8, "n_informative": 4, "n_targets": 2}}
LONG = {"training": {"epochs": 100_000}, "record": {"every": 1000}}  # Hours: it is canceled.
HUGE = {"network": {"hidden": [3000, 3000]}, "training": {"epochs": 1}, "data": {"n_samples": 64}}
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def spec(epochs: int, every: int = 10, **changes: Any) -> dict[str, Any]:
    return {**SMALL, "training": {"epochs": epochs}, "record": {"every": every}, **changes}


def epochs_of(server: Server, experiment_id: str) -> list[int]:
    document = server.client.get(f"/experiments/{experiment_id}/spectrum").json()
    return [epoch["epoch"] for epoch in document["epochs"]]


def job_row(server: Server, experiment_id: str) -> dict[str, Any]:
    """The row in the database, for what no answer tells."""
    with sqlite3.connect(server.data / "rankscope.sqlite3") as database:
        database.row_factory = sqlite3.Row
        row = dict(database.execute("SELECT * FROM jobs WHERE id = ?", (experiment_id,)).fetchone())
    database.close()
    return row


@contextlib.contextmanager
def only_writer(server: Server) -> Iterator[None]:
    """Hold the database's lock for writers, as soon as it is free."""
    with contextlib.closing(sqlite3.connect(server.data / "rankscope.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def jobs_of(worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [job for helper in psutil.Process(worker.pid).children() for job in helper.children()]


def suspend(family: list[psutil.Process]) -> None:
    """Stop them. One that writes to the disk stops only when that is done, and heeds a SIGTERM that comes before."""
    for process in family:
        process.suspend()
    stopped = {psutil.STATUS_STOPPED}
    wait_for(lambda: {process.status() for process in family} == stopped, "all to be stopped")


def is_asked_to_end(process: psutil.Process) -> bool:
    """Whether a SIGTERM waits for a process that is stopped."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def has_checkpoint(server: Server, experiment_id: str) -> bool:
    return job_row(server, experiment_id)["checkpoint"] is not None


def start_worker(server: Server, **changes: str) -> subprocess.Popen[bytes]:
    """A worker of the test's own beside the server; it ends with the test."""
    given = {**os.environ, **environment(Settings(data=server.data)), **FAST, **changes}
    with server.log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "worker", "--tied"], stdin=subprocess.PIPE, stdout=output, stderr=output, env=given
        )


def end(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGCONT)
    process.terminate()
    code = process.wait(30)
    assert process.stdin is not None
    process.stdin.close()
    return code


@pytest.fixture
def fast(tmp_path: Path) -> Iterator[Server]:
    """A server without workers; what it waits for comes soon."""
    running = start_server(tmp_path / "data", workers=0, **FAST)
    yield running
    stop_server(running)
    log = running.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") :][:4000]


def test_f5_what_was_accepted_before_everything_was_killed_is_done_afterwards(tmp_path: Path) -> None:
    first = start_server(tmp_path / "data", **FAST)
    posted = [first.post(spec(8000, every=400))["id"] for _ in range(3)]
    wait_for(lambda: has_checkpoint(first, posted[0]), "a checkpoint")
    for process in (first.workers()[0], psutil.Process(first.process.pid)):
        process.kill()
    stop_server(first)
    second = start_server(tmp_path / "data", **FAST)
    for one in posted:
        assert second.wait(one)["status"] == "succeeded"
        assert epochs_of(second, one) == list(range(0, 8001, 400))
    wait_for(lambda: not list((tmp_path / "data/checkpoints").iterdir()), "the checkpoints to be gone")
    stop_server(second)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_f6_a_job_waits_for_room_on_a_full_disk_and_new_ones_are_refused(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        # The log is elsewhere: it goes on.
        (tmp_path / "data").symlink_to(disk)
        server = start_server(tmp_path / "data", RANKSCOPE_FREE_DISK="0", **FAST)
        posted = server.post(spec(40_000, every=1))["id"]
        wait_for(lambda: job_row(server, posted)["done"] > 0, "some epochs")
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            while fill(file, 1 << 16) or fill(file, 512):
                pass
        wait_for(lambda: "for the database: database or disk is full" in server.log.read_text(), "the job to wait")
        answer = server.client.post("/experiments", json={})
        assert (answer.status_code, answer.json()["type"]) == (507, "/problems/storage-full")
        ballast.unlink()
        server.client.post(f"/experiments/{posted}/cancel")
        assert server.wait(posted)["attempt"] == 1
        assert server.run(spec(10))["status"] == "succeeded"
        stop_server(server)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(file: Any, n_bytes: int) -> int:
    """Write until the disk is full; 0 once nothing goes on it."""
    try:
        written: int = file.write(bytes(n_bytes))
    except OSError:
        return 0
    return written


def test_f7_a_lock_that_outlasts_every_lease_costs_a_running_job_nothing(fast: Server) -> None:
    workers = [start_worker(fast), start_worker(fast)]
    posted = fast.post(spec(3000))["id"]
    fast.wait(posted, "running")
    with only_writer(fast):
        refused = fast.client.post("/experiments", json={})  # It waits for five seconds first: five leases.
        assert (refused.status_code, refused.json()["type"]) == (503, "/problems/database-unavailable")
        assert int(refused.headers["retry-after"]) > 0
    state = fast.wait(posted)
    assert (state["status"], state["attempt"]) == ("succeeded", 1)
    assert epochs_of(fast, posted) == list(range(0, 3001, 10))
    assert [end(worker) for worker in workers] == [0, 0]


def test_f11_a_worker_that_slept_through_its_lease_finds_its_job_with_another(fast: Server) -> None:
    sleeper = start_worker(fast)
    posted = fast.post(LONG)["id"]
    wait_for(lambda: has_checkpoint(fast, posted), "a checkpoint")
    family = [psutil.Process(sleeper.pid), *psutil.Process(sleeper.pid).children(recursive=True)]
    with only_writer(fast):  # One that slept in mid-commit would hold SQLite's lock for as long.
        suspend(family)
    other = start_worker(fast)
    wait_for(lambda: job_row(fast, posted)["attempt"] == 2, "the other worker to take over")
    job = family[-1]
    for process in family:
        process.resume()
    wait_for(lambda: not job.is_running() or job.status() == psutil.STATUS_ZOMBIE, "the late attempt to end")
    assert job_row(fast, posted)["attempt"] == 2
    assert fast.client.post(f"/experiments/{posted}/cancel").status_code == 202
    assert fast.wait(posted)["status"] == "canceled"
    assert (end(sleeper), end(other)) == (0, 0)


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed")
def test_f13_a_wall_clock_that_jumps_changes_nothing(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    fake = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    server = start_server(tmp_path / "data", **FAST, **fake)
    posted = server.post(LONG)["id"]
    ids = [posted]
    for jump in ("+1h", "-1h", "+1y", "-1y"):
        clock.write_text(jump)
        before = job_row(server, posted)
        ids.append(server.post(spec(1))["id"])
        # Many heartbeats and several leases later it is still the same attempt.
        wait_for(lambda b=before: job_row(server, posted)["heartbeat"] > b["heartbeat"] + 15, "heartbeats")
        assert job_row(server, posted)["attempt"] == 1
    assert len({job_row(server, one)["created_at"] // 10**13 for one in ids}) > 1  # The clock did jump.
    server.client.post(f"/experiments/{posted}/cancel")
    assert server.wait(posted)["status"] == "canceled"
    assert {server.wait(one)["status"] for one in ids[1:]} == {"succeeded"}
    pages, url = [], "/experiments?limit=2"
    while url:
        answer = server.client.get(url)
        pages += [one["id"] for one in answer.json()["data"]]
        url = answer.links.get("next", {}).get("url", "")
    assert sorted(pages) == sorted(ids)
    stop_server(server)


def test_f14_a_worker_that_is_told_to_stop_keeps_where_its_job_was(fast: Server) -> None:
    first = start_worker(fast, RANKSCOPE_CHECKPOINT_S="3600")
    posted = fast.post(spec(3000))["id"]
    wait_for(lambda: job_row(fast, posted)["done"] > 0, "some epochs")
    assert end(first) == 0
    released = job_row(fast, posted)
    assert (released["status"], released["crashes"]) == ("queued", 0)
    assert released["checkpoint"] is not None
    reached = epochs_of(fast, posted)[-1]
    second = start_worker(fast)
    state = fast.wait(posted)
    assert (state["status"], state["attempt"]) == ("succeeded", 2)
    assert epochs_of(fast, posted) == list(range(0, 3001, 10))
    assert 0 < reached < 3000
    assert end(second) == 0


def test_f15_a_second_signal_is_immediate_and_costs_the_job_nothing(fast: Server) -> None:
    first = start_worker(fast)
    posted = fast.post(LONG)["id"]
    wait_for(lambda: has_checkpoint(fast, posted), "a checkpoint")
    # The job does not heed the first one, so that the worker is still there for the second.
    suspend(psutil.Process(first.pid).children(recursive=True))
    first.terminate()
    wait_for(lambda: all(is_asked_to_end(job) for job in jobs_of(first)), "the first signal to be passed on")
    first.terminate()
    assert first.wait(5) == 1
    assert first.stdin is not None
    first.stdin.close()
    second = start_worker(fast)
    wait_for(lambda: job_row(fast, posted)["attempt"] == 2, "another worker to take over")
    fast.client.post(f"/experiments/{posted}/cancel")
    assert fast.wait(posted)["status"] == "canceled"
    assert end(second) == 0


def test_f17_a_job_that_wants_too_much_memory_says_how_much_and_the_worker_goes_on(fast: Server) -> None:
    worker = start_worker(fast, RANKSCOPE_JOB_MEMORY=str(96 << 20))
    state = fast.run(HUGE)
    assert (state["status"], state["error"]["type"], state["attempt"]) == ("failed", "out-of-memory", 1)
    assert "allocation of" in state["error"]["detail"]
    assert fast.run(spec(1))["status"] == "succeeded"
    assert end(worker) == 0


GROUP = Path("/sys/fs/cgroup/memory/rankscope-test")


@pytest.mark.skipif(not os.access(GROUP.parent, os.W_OK), reason="no control group for memory can be made")
def test_f17_a_job_that_the_kernel_ends_for_want_of_memory_is_not_tried_again(fast: Server) -> None:
    worker = start_worker(fast)
    fast.run(spec(1))  # The fork server is there.
    GROUP.mkdir()
    try:
        posted = fast.post(LONG)["id"]
        wait_for(lambda: has_checkpoint(fast, posted), "a checkpoint")
        job = psutil.Process(worker.pid).children(recursive=True)[-1]
        (GROUP / "cgroup.procs").write_text(str(job.pid))
        # What it has already stays with its old group: what it takes from now on is more than nothing.
        (GROUP / "memory.limit_in_bytes").write_text("4096")
        state = fast.wait(posted)
        assert (state["status"], state["error"]["type"], state["attempt"]) == ("failed", "out-of-memory", 1)
        assert "bytes" in state["error"]["detail"]
        assert fast.run(spec(1))["status"] == "succeeded"
        assert end(worker) == 0
    finally:
        wait_for(lambda: not (GROUP / "cgroup.procs").read_text(), "the group to be empty")
        GROUP.rmdir()


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has"), "20.00 MiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), "4096 bytes"),
        (MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,)"), "7.45 GiB"),
        # CUDA tells none: its driver, and its libraries.
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), "an allocation"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "an allocation"),
    ],
)
def test_f18_every_allocators_error_tells_the_size(error: Exception, size: str) -> None:
    problem = problem_of(error)
    assert problem["type"] == "out-of-memory"
    assert size in problem["detail"]


def test_f30_the_fork_server_has_no_thread_when_it_forks(fast: Server) -> None:
    worker = start_worker(fast)
    posted = fast.post(LONG)["id"]
    wait_for(lambda: has_checkpoint(fast, posted), "a checkpoint")
    servers = [one for one in psutil.Process(worker.pid).children() if one.children()]
    assert [one.num_threads() for one in servers] == [1]
    fast.client.post(f"/experiments/{posted}/cancel")
    fast.wait(posted)
    assert end(worker) == 0
