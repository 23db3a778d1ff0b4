"""A model in GPT-2 small's shapes over HTTP: what its analysis costs in seconds, and in memory of both processes.

    python -m benchmarks.model

12 blocks and the position table, 49 matrices, once in float32 (340 MB) and once in bfloat16, posted to `/analyze` as a
stream. The goal for the job's process is three times the largest tensor in float64 and 300 MB, that for the API 50 MB
above idle.
"""

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from safetensors.torch import save_file

from benchmarks.measure import ready_server, require_one_thread, tree_cpu_s

WIDTH, N_BLOCKS, N_POSITIONS = 768, 12, 1024
LAYERS = {
    "attn.c_attn": (WIDTH, 3 * WIDTH),
    "attn.c_proj": (WIDTH, WIDTH),
    "mlp.c_fc": (WIDTH, 4 * WIDTH),
    "mlp.c_proj": (4 * WIDTH, WIDTH),
}
N_MATRICES = N_BLOCKS * len(LAYERS) + 1
SAMPLE_S = 0.05
POLL_S = 0.5  # An answer costs the API milliseconds; they are not what is measured.
API_GOAL = 50e6
JOB_GOAL = 3 * 8 * 4 * WIDTH**2 + 300e6  # Three times the largest tensor in float64, and what a process with torch has.


@dataclass
class Peaks:
    """Bytes of resident (RSS) and unshared (USS) memory at their highest."""

    api: int = 0
    job_rss: int = 0
    job_uss: int = 0


def save_model(path: Path, dtype: torch.dtype) -> None:
    """Write the model: gaussian noise of GPT-2's initial size."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"wpe.weight": (torch.randn(N_POSITIONS, WIDTH, generator=generator) * 0.01).to(dtype)}
    for block in range(N_BLOCKS):
        for name, (m, n) in LAYERS.items():
            tensors[f"h.{block}.{name}.weight"] = (torch.randn(m, n, generator=generator) * 0.02).to(dtype)
            tensors[f"h.{block}.{name}.bias"] = torch.zeros(n, dtype=dtype)
        for norm in ("ln_1", "ln_2"):
            tensors[f"h.{block}.{norm}.weight"] = torch.ones(WIDTH, dtype=dtype)
            tensors[f"h.{block}.{norm}.bias"] = torch.zeros(WIDTH, dtype=dtype)
    save_file(tensors, path)


@contextlib.contextmanager
def sampled(server: psutil.Process) -> Iterator[Peaks]:
    """The peaks of the server and of the processes that start under it meanwhile: the job's child."""
    before = {process.pid for process in server.children(recursive=True)}
    peaks, stop = Peaks(), threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_S):
            peaks.api = max(peaks.api, server.memory_info().rss)
            for process in server.children(recursive=True):
                if process.pid in before:
                    continue
                with contextlib.suppress(psutil.NoSuchProcess):
                    memory = process.memory_full_info()
                    peaks.job_rss = max(peaks.job_rss, memory.rss)
                    peaks.job_uss = max(peaks.job_uss, memory.uss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def analyse(client: httpx.Client, path: Path) -> dict[str, Any]:
    """Post the file as a stream and answer with the analysis when it is over."""
    headers = {"Content-Type": "application/octet-stream", "Prefer": "wait=0"}
    with path.open("rb") as file:
        answer = client.post("/analyze", content=file, headers=headers)
    if answer.status_code != httpx.codes.ACCEPTED:
        raise SystemExit(f"the server answered {answer.status_code}: {answer.text}")
    while True:
        state: dict[str, Any] = client.get(answer.headers["Location"], params={"top_k": 1}).raise_for_status().json()
        if state["status"] not in {"queued", "running", "canceling"}:
            break
        time.sleep(POLL_S)
    n_analysed = sum(tensor["status"] == "analysed" for tensor in state["tensors"])
    if state["status"] != "succeeded" or n_analysed != N_MATRICES:
        raise SystemExit(f"the analysis {state['status']} with {n_analysed} of {N_MATRICES} matrices: {state['error']}")
    return state


def warm_up(client: httpx.Client) -> None:
    """Run a job, so that the fork server has imported what every child finds."""
    answer = client.post("/experiments", json={"training": {"epochs": 1}}).raise_for_status()
    path = f"/experiments/{answer.json()['id']}"
    while client.get(path).json()["status"] in {"queued", "running"}:
        time.sleep(SAMPLE_S)
    time.sleep(1)  # What it allocated is idle by then.


def measure(client: httpx.Client, server: psutil.Process, path: Path) -> None:
    """Analyse one file and print what it took."""
    idle, cpu, start = server.memory_info().rss, tree_cpu_s(server.pid), time.monotonic()
    with sampled(server) as peaks:
        analyse(client, path)
        wall = time.monotonic() - start
    time.sleep(0.5)  # The child's last instants count, and are only seen once it is reaped.
    cpu, size = tree_cpu_s(server.pid) - cpu, path.stat().st_size
    job, api = (f"{memory / 1e6:.0f} MB" for memory in (peaks.job_rss, peaks.api - idle))
    goals = (f"≤ {goal / 1e6:.0f} MB" for goal in (JOB_GOAL, API_GOAL))
    cells = (path.stem, f"{size / 1e6:.0f} MB", f"{wall:.1f} s", f"{cpu:.1f} s", job, next(goals), api, next(goals))
    print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ready_server(folder) as (client, server):
            warm_up(client)
            print("| | file | time | CPU | job's memory (RSS) | goal | API above idle | goal |")
            print("|---|---|---|---|---|---|---|---|")
            for dtype in (torch.float32, torch.bfloat16):
                path = folder / f"{str(dtype).removeprefix('torch.')}.safetensors"
                save_model(path, dtype)
                measure(client, server, path)


if __name__ == "__main__":
    require_one_thread()
    main()
