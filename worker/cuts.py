"""The price of a cut in the task's own loss: the trained network with one layer truncated to every rank."""

from typing import Any

import numpy as np

from service.lowrank.ranks import Array
from worker.decompose import svd
from worker.networks import Network, namespace, to_numpy
from worker.trainer import mean_squared_error, r_squared

BUFFER_VALUES = 1 << 20


def cut_curve(network: Network, layer: int, x: Any, y: Any) -> tuple[Array, Array]:
    """Loss and R² on (x, y) with the layer's W replaced by W_r, for r = 1…k; arrays of shape (k,).

    `network` is one network in float64 (weights of shape (out, in)); x is (n, features), y (n, targets). With a the
    layer's input and W = UΣVᵀ, W_r a = Σ_{i≤r} σ_i u_i (v_iᵀ a): the layer's output at every rank is one cumulative
    sum, and the layers above take all ranks as one batch.
    """
    xp, n = namespace(x), len(x)
    u, s, vt = svd(network.weights[layer])
    if n == 0:
        return np.full(len(s), np.nan), np.full(len(s), np.nan)
    width = max(max(weights.shape) for weights in network.weights)
    rows = min(n, max(1, BUFFER_VALUES // (16 * width)))
    squared = np.zeros((len(s), y.shape[1]))
    for start in range(0, n, rows):
        part = slice(start, start + rows)
        below = network.forward(x[part], 0, layer)
        projected = xp.matmul(below, vt.swapaxes(0, 1)) * s
        squared += _squared_errors(network, layer, (projected, u), y[part])
    mean = xp.sum(y, 0) / n
    total = to_numpy(xp.sum(xp.square(y - mean), 0))
    return mean_squared_error(squared, n), r_squared(squared, total)


def _squared_errors(network: Network, layer: int, factors: tuple[Any, Any], y: Any) -> Array:
    """Squared errors summed over the rows, (k, targets), by rank; `factors` are ΣVᵀa (rows, k) and U (out, k)."""
    (projected, u), xp = factors, namespace(y)
    rows, k = projected.shape
    width = max(max(weights.shape) for weights in network.weights)
    ranks = max(1, BUFFER_VALUES // (rows * width))
    squared, before = [], 0.0
    for start in range(0, k, ranks):
        part = slice(start, start + ranks)
        z = projected[:, part].swapaxes(0, 1)[:, :, None] * u[:, part].swapaxes(0, 1)[:, None, :]
        z[0] += before
        xp.cumsum(z, 0, out=z)
        before = xp.asarray(z[-1], copy=True)  # `finish` changes z, and the next ranks go on from here.
        network.finish(xp, layer, z)
        squared.append(xp.sum(xp.square(network.forward(z, layer + 1) - y), 1))
    return to_numpy(xp.concatenate(squared))
