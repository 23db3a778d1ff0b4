"""The memo's run over HTTP against the textbook loop, in CPU seconds of all processes, one thread each.

    python -m benchmarks.memo [repeats]

From POST to `succeeded`, with spectra of W and W − W₀ and the cut curves; and the 61-frame GIF. Medians of interleaved
repeats after one run of each to warm up.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
import torch

from benchmarks import textbook
from benchmarks.measure import cpu_seconds, require_one_thread, server_process, tree_cpu_s
from service.demo import running_server, wait_until_ready
from service.settings import Settings


def service_run(client: httpx.Client, pid: int, seed: int) -> tuple[float, float]:
    """CPU seconds of one experiment, and of its GIF."""
    start = tree_cpu_s(pid)
    path = f"/experiments/{client.post('/experiments', json={'seed': seed}).json()['id']}"
    while (status := client.get(path).json()["status"]) != "succeeded":
        if status not in {"queued", "running"}:
            raise RuntimeError(f"the experiment {status}")
        time.sleep(0.1)
    time.sleep(0.5)  # The child's last instants count, and are only seen once it is reaped.
    trained = tree_cpu_s(pid)
    client.get(f"{path}/spectrum?format=gif").raise_for_status()
    return trained - start, tree_cpu_s(pid) - trained


def main(repeats: int) -> None:
    """Print medians and ratios."""
    torch.set_num_threads(1)
    rows: list[tuple[float, float, float, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Settings(data=Path(folder) / "data"), Path(folder)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        wait_until_ready(client)
        server = server_process().pid
        for seed in range(repeats + 1):
            ours = service_run(client, server, seed)
            loop, spectra = cpu_seconds(textbook.train, 60, 64, seed)
            gif, _ = cpu_seconds(textbook.draw, spectra, Path(folder) / "textbook.gif")
            rows.append((*ours, loop, gif))
    run, our_gif, loop, gif = (statistics.median(column) for column in zip(*rows[1:], strict=True))
    print(f"experiment over HTTP {run:.2f} s, textbook loop {loop:.2f} s, ratio {run / loop:.3f} (goal < 0.5)")
    print(f"61-frame GIF {our_gif:.2f} s, FuncAnimation {gif:.2f} s, ratio {our_gif / gif:.3f} (goal < 0.1)")


if __name__ == "__main__":
    require_one_thread()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
