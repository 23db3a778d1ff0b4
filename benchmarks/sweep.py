"""One member of a sweep of the memo's experiment against the textbook loop, in CPU seconds, one thread each.

    python -m benchmarks.sweep [repeats]

The trainer alone, and over HTTP from POST to `succeeded` with all that is recorded, of all processes; sweeps of 64 and
of 256 members, over weight decay, learning rate and seed. Medians of interleaved repeats after one of each to warm up.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import textbook
from benchmarks.measure import cpu_seconds, require_one_thread, server_process, tree_cpu_s
from service.demo import running_server, wait_until_ready
from service.settings import Settings
from service.sweeps import expand
from worker.trainer import Trainer

SIZES = (64, 256)


def body_of(members: int, first_seed: int) -> dict[str, Any]:
    """4 × 4 cells, the rest seeds."""
    return {
        "base": {},
        "grid": {
            "training.weight_decay": [0, 1e-3, 3e-3, 6e-3],
            "training.lr": [0.05, 0.1, 0.2, 0.4],
            "seed": {"range": [first_seed, first_seed + members // 16]},
        },
    }


def train(body: dict[str, Any]) -> None:
    """The trainer alone: no spectra, nothing stored."""
    for _ in Trainer([member.spec for member in expand(body)]).train():
        pass


def over_http(client: httpx.Client, pid: int, body: dict[str, Any]) -> float:
    """CPU seconds of one sweep, of all processes."""
    start = tree_cpu_s(pid)
    path = f"/sweeps/{client.post('/sweeps', json=body).json()['id']}"
    while (status := client.get(path).json()["status"]) != "succeeded":
        if status not in {"queued", "running"}:
            raise RuntimeError(f"the sweep {status}")
        time.sleep(0.2)
    time.sleep(0.5)  # The child's last instants count, and are only seen once it is reaped.
    return tree_cpu_s(pid) - start


def measure(client: httpx.Client, pid: int, repeat: int) -> dict[str, float]:
    """CPU seconds of the textbook loop, and of a member of every sweep."""
    found = {"textbook loop": cpu_seconds(textbook.train, 60, 64, repeat)[0]}
    for members in SIZES:
        body = body_of(members, 1000 * repeat)
        found[f"trainer alone, {members} members"] = cpu_seconds(train, body)[0] / members
        found[f"over HTTP, {members} members"] = over_http(client, pid, body) / members
    return found


def main(repeats: int) -> None:
    """Print medians and ratios."""
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Settings(data=Path(folder) / "data"), Path(folder)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        wait_until_ready(client)
        rows = [measure(client, server_process().pid, repeat) for repeat in range(repeats + 1)][1:]
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    loop = medians["textbook loop"]
    print("| | CPU ms a member | textbook runs | textbook / ours (goal ≥ 15) |")
    print("|---|---|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1000 * seconds:.0f} | {seconds / loop:.4f} | {loop / seconds:.1f} |")
    for what in ("trainer alone", "over HTTP"):
        small, large = (medians[f"{what}, {members} members"] for members in SIZES)
        print(f"{what}: a member of 256 costs {large / small:.2f} of one of 64 (goal: within 0.75–1.25)")


if __name__ == "__main__":
    require_one_thread()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
