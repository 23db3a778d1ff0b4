"""Mean squared error and R² of a batch of networks on whole data sets, summed in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.lowrank.ranks import Array
from worker.backpropagation import ForwardOf
from worker.networks import Arrays, Network, Tensor, as_numpy

CHUNK = 2**17  # Values of all layers' outputs at a time: the pass stays in the cache, and its memory is bounded.
DEVICE_CHUNK = 2**24  # The same where what a call costs is its start.

Score = Callable[[], tuple[Array, Array]]


def squares_about_mean(y: NDArray[Any]) -> Array:
    """Each target's sum of squares about its mean, (n, targets) → (targets,); exactly 0 where it does not vary."""
    return np.array([_column_squares(column.astype(np.float64)) for column in y.T])


def _column_squares(column: Array) -> float:
    if column.size == 0:
        return 0.0
    # The computed mean of equal numbers need not equal them; that of zeros is 0.
    centred = column - column[0]
    centred -= centred.mean()
    return float(centred @ centred)


def loss_and_r2(squared_errors: Array, total_squares: Array, n_samples: int) -> tuple[Array, Array]:
    """Mean squared error and R² from each target's sum of squared errors (…, targets), the average over targets.

    NaN: the loss without samples, R² where some target's sum of squares about its mean (targets,) is 0.
    """
    if n_samples == 0:
        nothing = np.full(squared_errors.shape[:-1], np.nan)
        return nothing, nothing.copy()
    with np.errstate(all="ignore"):
        loss = squared_errors.mean(axis=-1) / n_samples
        r2 = (1 - squared_errors / total_squares).mean(axis=-1)
    return loss, np.where((total_squares == 0).any(axis=-1), np.nan, r2)


def score_of(network: Network, forward_of: ForwardOf, x: Tensor, y: Tensor, arrays: Arrays) -> Score:
    """A function that gives every member's loss (M,) and R² (M,) on its own x (M, n, features + 1), y (M, n, targets).

    On the CPU it goes by few members at a time, of many rows each: a row costs half as much in a large product as in a
    small one. The 1 is the bias's, as `Forward` takes it.
    """
    n_members, n_samples, n_targets = y.shape
    total_squares = np.stack([squares_about_mean(member) for member in as_numpy(y)])
    xp, width = arrays.xp, sum(network.widths)
    chunk = CHUNK if arrays.device == "cpu" else DEVICE_CHUNK
    at_once = min(n_members, max(1, chunk // (max(1, n_samples) * width)))
    n_rows = max(1, chunk // (at_once * width))
    parts = [slice(start, start + at_once) for start in range(0, n_members, at_once)]
    networks = [(members, network[members].layers) for members in parts]

    def score() -> tuple[Array, Array]:
        squares = xp.zeros((n_members, n_targets), dtype=xp.float64, device=arrays.device)
        for members, layers in networks:
            for start in range(0, n_samples, n_rows):
                inputs, targets = (values[members, start : start + n_rows] for values in (x, y))
                outputs = forward_of(*inputs.shape[:2])(layers, inputs)
                residual = xp.asarray(outputs - targets.swapaxes(1, 2), dtype=xp.float64)
                squares[members] += (residual * residual).sum(2)
        return loss_and_r2(as_numpy(squares), total_squares, n_samples)

    return score
