"""WeightWatcher in a process of its own: analyses one saved layer a line of standard input.

Run by `benchmarks/analyze.py` in an environment that holds WeightWatcher; imports nothing of ours. Every line is the
path of a .npy; the answer is a line of JSON with the CPU seconds of `analyze()` and the singular values that it found.
"""

import json
import os
import sys
import time

import numpy as np
import torch
import weightwatcher  # type: ignore[import-not-found]


def main() -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # WeightWatcher prints; its words are not answers.
    for line in sys.stdin:
        weight = torch.from_numpy(np.load(line.strip()))
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        watcher = weightwatcher.WeightWatcher(model=torch.nn.Sequential(layer))
        start = time.process_time()
        details = watcher.analyze()
        seconds = time.process_time() - start
        squares = watcher.get_ESD(layer=int(details.layer_id[0]))
        json.dump({"seconds": seconds, "s": np.sqrt(np.sort(squares)[::-1]).tolist()}, answers)
        print(file=answers, flush=True)


if __name__ == "__main__":
    main()
