"""What the benchmarks measure with."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from service.demo import running_server, wait_until_ready
from service.settings import Settings


def require_one_thread() -> None:
    """Exit unless BLAS has been held to one thread, which only the environment can do in time."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        sys.exit("set OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 first: the baseline takes one thread too")


def cpu_seconds(work: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """CPU seconds that a call took in this process, and its answer."""
    start = time.process_time()
    answer = work(*arguments)
    return time.process_time() - start, answer


def finish(client: httpx.Client, posted: httpx.Response) -> str:
    """The path of a job that was posted, once it has succeeded and its process has gone."""
    path = str(posted.raise_for_status().headers["location"])
    while (status := client.get(path).json()["status"]) != "succeeded":
        if status not in {"queued", "running"}:
            raise RuntimeError(f"{path} {status}")
        time.sleep(0.1)
    time.sleep(0.5)  # The child's last instants count, and are only seen once it is reaped.
    return path


@contextlib.contextmanager
def ready_server(folder: Path) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A server with one worker that takes work, and keeps what it has in the folder."""
    with (
        running_server(Settings(data=folder / "data"), folder) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        wait_until_ready(client)
        (server,) = [child for child in psutil.Process().children() if "serve" in child.cmdline()]
        yield client, server


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and all its descendants, the ended ones included."""
    root = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:4]) for process in [root, *root.children(recursive=True)])
