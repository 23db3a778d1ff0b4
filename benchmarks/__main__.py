"""CPU seconds, one BLAS thread, medians of interleaved repeats after one of each to warm up.

Measured on a shared two-core machine; only the ratios, taken within one run, mean anything. `make bench` writes this
file from what each benchmark says and prints, and keeps all other sections: `make soak` tells the numbers of those.

    python -m benchmarks [name …]
"""

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
TITLES = {
    "train": "Training",
    "sweep": "A sweep over HTTP",
    "gif": "Pictures",
    "http": "Answers",
    "load": "Under load",
    "streams": "Fifty event streams",
    "start": "Start and memory",
    "analyze": "Singular values of a layer",
    "model": "A model of GPT-2 small's shapes over HTTP",
    "queue": "From POST to the first epoch",
}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def prose(name: str) -> str:
    """What a benchmark says of itself."""
    return ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""


def measure(name: str) -> str:
    """A benchmark's section."""
    begun = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ONE_THREAD).stdout
    print(f"{printed}\n{name} took {time.monotonic() - begun:.0f} s\n", flush=True)
    return f"{prose(name)}\n\n{printed.strip()}\n"


def sections() -> dict[str, str]:
    """Title → text of the file as it is."""
    _, *parts = re.split(r"^## ", RESULTS.read_text(), flags=re.MULTILINE) if RESULTS.exists() else [""]
    return {title: text.strip() + "\n" for title, _, text in (part.partition("\n") for part in parts)}


def main(names: list[str]) -> None:
    """Measure these and write the file; the others' sections stay."""
    for name in names:
        found = {**sections(), TITLES[name]: measure(name)}
        ours = list(TITLES.values())
        order = [*(title for title in ours if title in found), *(title for title in found if title not in ours)]
        text = "".join(f"\n## {title}\n\n{found[title]}" for title in order)
        RESULTS.write_text(f"# Results\n\n{prose('__main__')}\n{text}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(TITLES))
