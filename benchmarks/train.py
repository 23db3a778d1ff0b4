"""Training: the trainer alone, and the memo's run over HTTP with all that is recorded, against the textbook loop.

    python -m benchmarks.train [repeats]

The loop is the one in `benchmarks/textbook.py`, for as many epochs. The trainer alone computes no spectra, the loop
those of W2, but not 1024 wide. The members of a sweep differ in weight decay, learning rate and seed. Over HTTP is from
POST to `succeeded`, with spectra of W and W − W₀ at 61 epochs and the cut curves of all layers, in all processes.
YARDSTICK=file adds the loop of another textbook.py.

What spectra cost is the CPU of those of all layers, of W and W − W₀, at one epoch, over that of the 50 steps of 16
samples that train the epoch; `record.every` at the next whole number keeps them from costing more than the training.
"""

import importlib.util
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks import textbook
from benchmarks.measure import cpu_seconds, finish, ready_server, require_one_thread, tree_cpu_s
from benchmarks.sweep import body_of
from service.schemas import ExperimentSpec, resolve
from service.sweeps import expand
from worker import experiment
from worker.trainer import Trainer

Times = dict[str, float]
LOOP, LOOP_WIDE, YARDSTICK = "textbook loop", "textbook, 1024 wide", "yardstick"
WIDE: dict[str, Any] = {"network": {"hidden": [1024, 1024]}, "training": {"epochs": 6, "batch_size": 256}}
ROWS = {  # What is measured → the loop that it is measured against, and how many times less it shall cost.
    "the memo's run": (LOOP, 8.0),
    "the memo's run over HTTP": (LOOP, 2.0),
    "a member of 64": (LOOP, 15.0),
    "a member of 256": (LOOP, 15.0),
    "1024 wide, batches of 256": (LOOP_WIDE, 1.0),
}
FLAT = 0.25
WIDTHS = {64: 20, 256: 4, 1024: 1}  # width → epochs measured


def run(specs: list[ExperimentSpec]) -> None:
    """The trainer alone: no spectra, nothing stored."""
    for _ in Trainer(specs).train():
        pass


def sweep(members: int, repeat: int) -> float:
    """CPU seconds of one member."""
    specs = [member.spec for member in expand(body_of(members, 1000 * repeat))]
    return cpu_seconds(run, specs)[0] / members


def over_http(client: httpx.Client, pid: int, repeat: int) -> float:
    """CPU seconds of all processes for one experiment."""
    start = tree_cpu_s(pid)
    finish(client, client.post("/experiments", json={"seed": repeat}))
    return tree_cpu_s(pid) - start


def yardstick() -> Callable[[int, int, int], Any] | None:
    """`train(width, epochs, seed)` of another textbook, where one is named."""
    if not (path := os.environ.get("YARDSTICK")):
        return None
    found = importlib.util.spec_from_file_location("yardstick", path)
    if found is None or found.loader is None:
        raise SystemExit(f"YARDSTICK={path} is no Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    loop: Callable[[int, int, int], Any] = module.train
    return loop


def measure(client: httpx.Client, pid: int, repeat: int, other: Callable[[int, int, int], Any] | None) -> Times:
    """CPU seconds of all loops and of all rows."""
    wide_epochs = WIDE["training"]["epochs"]
    times = {
        LOOP: cpu_seconds(textbook.train, 60, 64, repeat)[0],
        "the memo's run": cpu_seconds(run, [resolve({"seed": repeat})])[0],
        "the memo's run over HTTP": over_http(client, pid, repeat),
        "a member of 64": sweep(64, repeat),
        "a member of 256": sweep(256, repeat),
        LOOP_WIDE: cpu_seconds(lambda: textbook.train(wide_epochs, 1024, repeat, 256, measure=False))[0],
        "1024 wide, batches of 256": cpu_seconds(run, [resolve({**WIDE, "seed": repeat})])[0],
    }
    if other is not None:
        times[YARDSTICK] = cpu_seconds(other, 64, 60, repeat)[0]
    return times


def spectra_over_training(width: int) -> tuple[float, float]:
    """CPU seconds of the training of an epoch, and of its spectra; each epoch's own, after one to warm up."""
    spec = resolve({"network": {"hidden": [width, width]}, "training": {"epochs": WIDTHS[width] + 1}})
    trainer = Trainer([spec])
    initial = trainer.copy_weights()

    def pairs() -> Iterator[tuple[float, float]]:
        snapshots = trainer.train()
        next(snapshots)
        for _ in range(WIDTHS[width] + 1):
            trained, snapshot = cpu_seconds(next, snapshots)
            yield trained, cpu_seconds(experiment.epochs, {0: spec}, snapshot, initial)[0]

    training, spectra = zip(*list(pairs())[1:], strict=True)
    return statistics.median(training), statistics.median(spectra)


def report(medians: Times) -> None:
    """Print a row for everything measured against a loop."""
    print("| | CPU | by hand | times less | goal |")
    print("|---|---|---|---|---|")
    for name, (loop, goal) in ROWS.items():
        ours, theirs = medians[name], medians[loop]
        print(f"| {name} | {ours:.3f} s | {theirs:.2f} s | {theirs / ours:.1f} | ≥ {goal:g} |")
    flat = medians["a member of 256"] / medians["a member of 64"]
    print(f"\nA member of 256 costs {flat:.2f} of one of 64 (goal: within {1 - FLAT:g} and {1 + FLAT:g}).")
    if YARDSTICK in medians:
        other = medians[YARDSTICK]
        print(
            f"The loop takes {medians[LOOP]:.2f} s, the yardstick given {other:.2f} s: a ratio of "
            f"{medians[LOOP] / other:.2f} (goal: within 0.9 and 1.1)."
        )


def report_spectra() -> None:
    """Print what spectra cost beside training."""
    print("\n| hidden layers | training of an epoch | its spectra | ratio | `record.every` |")
    print("|---|---|---|---|---|")
    for width in WIDTHS:
        training, spectra = spectra_over_training(width)
        cells = (f"{1000 * training:.1f} ms", f"{1000 * spectra:.1f} ms", f"{spectra / training:.2f}")
        print(f"| {width}, {width} | {' | '.join(cells)} | {math.ceil(spectra / training)} |")


def main(repeats: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    other = yardstick()
    with tempfile.TemporaryDirectory() as name, ready_server(Path(name)) as (client, server):
        rows = [measure(client, server.pid, repeat, other) for repeat in range(repeats + 1)][1:]
    report({name: statistics.median(row[name] for row in rows) for name in rows[0]})
    report_spectra()


if __name__ == "__main__":
    require_one_thread()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
