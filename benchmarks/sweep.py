"""A sweep of the memo's experiment over weight decay, learning rate and seed, 4 × 4 × 4, against the textbook loop.

    python -m benchmarks.sweep [repeats]

From POST to `succeeded` with all that is recorded, in CPU seconds of all processes.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import textbook
from benchmarks.measure import cpu_seconds, finish, ready_server, require_one_thread, tree_cpu_s

MEMBERS = 64
GOAL = 10


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


def measure(client: httpx.Client, pid: int, repeat: int) -> tuple[float, float]:
    """CPU seconds of the textbook loop, and of a sweep."""
    loop, _ = cpu_seconds(textbook.train, 60, 64, repeat)
    start = tree_cpu_s(pid)
    finish(client, client.post("/sweeps", json=body_of(MEMBERS, 1000 * repeat)))
    return loop, tree_cpu_s(pid) - start


def main(repeats: int) -> None:
    """Print medians and ratios."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, ready_server(Path(name)) as (client, server):
        rows = [measure(client, server.pid, repeat) for repeat in range(repeats + 1)][1:]
    loop, sweep = (statistics.median(column) for column in zip(*rows, strict=True))
    print("| | CPU | textbook runs | goal |")
    print("|---|---|---|---|")
    print(f"| textbook loop | {loop:.2f} s | 1 | |")
    print(f"| sweep of {MEMBERS} over HTTP | {sweep:.2f} s | {sweep / loop:.1f} | < {GOAL} |")
    print(f"| a member of it | {sweep / MEMBERS:.3f} s | {sweep / MEMBERS / loop:.3f} | |")


if __name__ == "__main__":
    require_one_thread()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
