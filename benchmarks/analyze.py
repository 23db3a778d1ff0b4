"""Singular values of layers as trained networks have them: ours against what else there is, on one thread.

    python -m benchmarks.analyze [repeats]

Float32 layers of gaussian noise under 64 directions of falling size, new ones in every repeat; milliseconds of CPU, in
brackets as a multiple of ours; the worst error against LAPACK in float64 as a share of σ₁. WeightWatcher's time is that
of `analyze()` alone, with its power-law fit, without its import; it is installed into an environment of its own on the
first run. The goal against it is missed: on one thread it is about 3 times slower, not 10. What is left here is the
product W·Wᵀ in float64 (half of the time at 768×2304) and the eigenvalues of the result; ten times would ask for both
in 30 ms.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import cpu_seconds, require_one_thread
from worker.decompose import singular_values

SHAPES = [(768, 2304), (768, 768), (768, 3072), (1024, 1024)]
WEIGHTWATCHER = "weightwatcher==0.7.7"
GOALS = {"WeightWatcher": 10.0, "torch svdvals, float32": 1.8}
ERROR_GOAL = 1e-8
Matrix = NDArray[np.float32]
Contender = Callable[[Matrix], tuple[float, NDArray[Any]]]


def trained(shape: tuple[int, int], seed: int) -> Matrix:
    """Gaussian noise under 64 directions of falling size."""
    rng, (m, n) = np.random.default_rng([seed, *shape]), shape
    trend = rng.standard_normal((m, 64)) / np.arange(1, 65) @ rng.standard_normal((64, n))
    return ((rng.standard_normal(shape) + trend) * 0.02).astype(np.float32)


def weightwatcher_python() -> Path:
    """The interpreter of an environment with WeightWatcher, made where there is none, that borrows our torch."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "rankscope-benchmarks" / f"{WEIGHTWATCHER}-py{sys.version_info.major}.{sys.version_info.minor}"
    python, finished = folder / "bin" / "python", folder / "finished"
    if not finished.exists():
        print(f"installing {WEIGHTWATCHER} into {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-qq", WEIGHTWATCHER], check=True)
        finished.touch()
    # Ours come last on the path, and torch is all that it lacks.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch_of_rankscope.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


@contextlib.contextmanager
def weightwatcher(folder: Path) -> Iterator[Contender]:
    """WeightWatcher's `analyze()` as a contender: a process that has imported it and waits for layers."""
    script = Path(__file__).with_name("weightwatcher_process.py")
    with (
        (folder / "weightwatcher.log").open("w") as log,
        subprocess.Popen(
            [weightwatcher_python(), "-P", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
        ) as process,
    ):
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("no pipes")
        questions, answers = process.stdin, process.stdout

        def analyze(matrix: Matrix) -> tuple[float, NDArray[Any]]:
            np.save(folder / "layer.npy", matrix)
            print(folder / "layer.npy", file=questions, flush=True)
            line = answers.readline()
            if not line:
                raise RuntimeError(f"WeightWatcher ended: {(folder / 'weightwatcher.log').read_text()}")
            answer = json.loads(line)
            return answer["seconds"], np.array(answer["s"])

        yield analyze
        questions.close()


def contenders() -> dict[str, Contender]:
    """Name → CPU seconds and singular values, in this process."""
    works: dict[str, Callable[[Matrix], Any]] = {
        "rankscope": lambda w: singular_values(w, "float32"),
        "numpy svd, float64": lambda w: np.linalg.svd(w.astype(np.float64), compute_uv=False),
        "torch svdvals, float32": lambda w: torch.linalg.svdvals(torch.from_numpy(w)).numpy(),
    }
    return {name: functools.partial(cpu_seconds, work) for name, work in works.items()}


def error(found: NDArray[Any], matrix: Matrix) -> float:
    """The worst error as a share of σ₁; infinite where singular values are missing."""
    truth = torch.linalg.svdvals(torch.from_numpy(matrix.astype(np.float64))).numpy()
    return float(np.abs(found - truth).max() / truth[0]) if found.shape == truth.shape else np.inf


def report(seconds: dict[str, NDArray[Any]], errors: dict[str, float]) -> None:
    """Print a row a contender, of `seconds` (repeats, layers) each, and how ours stands against the goals."""
    medians = {name: np.median(times, axis=0) for name, times in seconds.items()}
    ours = medians["rankscope"]
    print("| ms of CPU | " + " | ".join(f"{m}×{n}" for m, n in SHAPES) + " | all | times ours | goal | worst error |")
    print("|---" * (len(SHAPES) + 5) + "|")
    for name, times in medians.items():
        cells = [f"{1e3 * time:.0f} ({time / base:.1f})" for time, base in zip(times, ours, strict=True)]
        goal = f"≥ {GOALS[name]:g}" if name in GOALS else ""
        ratio = times.sum() / ours.sum()
        print(f"| {name} | {' | '.join(cells)} | {1e3 * times.sum():.0f} | {ratio:.1f} | {goal} | {errors[name]:.0e} |")
    missed = [name for name, goal in GOALS.items() if medians[name].sum() < goal * ours.sum()]
    if errors["rankscope"] > ERROR_GOAL:
        missed.append(f"an error of at most {ERROR_GOAL:g}·σ₁")
    print(f"\ngoals missed: {', '.join(missed) or 'none'}")


def main(repeats: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, weightwatcher(Path(folder)) as watcher:
        them: dict[str, Contender] = {**contenders(), "WeightWatcher": watcher}
        seconds = {name: np.zeros((repeats + 1, len(SHAPES))) for name in them}
        errors = dict.fromkeys(them, 0.0)
        for repeat in range(repeats + 1):
            for column, shape in enumerate(SHAPES):
                matrix = trained(shape, repeat)
                for name, contender in them.items():
                    seconds[name][repeat, column], found = contender(matrix)
                    errors[name] = max(errors[name], error(found, matrix))
    report({name: times[1:] for name, times in seconds.items()}, errors)


if __name__ == "__main__":
    require_one_thread()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
