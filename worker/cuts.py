"""The price of a cut in the task's own loss: the trained network with one layer's weight truncated to every rank."""

from collections.abc import Collection, Iterator

import numpy as np

from service.lowrank.ranks import Array
from service.schemas import Activation
from worker.decompose import svd
from worker.networks import Network, Tensor, activation_of, as_numpy, forward, namespace_of
from worker.scores import loss_and_r2, squares_about_mean

CHUNK = 2**16  # Values of a layer's output at a time: the pass stays in the cache, and its memory is bounded.


def cut_curves(
    network: Network, activation: Activation, x: Tensor, y: Tensor, layers: Collection[str] | None = None
) -> dict[str, tuple[Array, Array]]:
    """Layer name → loss (k,) and R² (k,) of the network with that layer alone cut to its best rank r = 1…k.

    The network is a single one; x (n, features) and y (n, targets) are its validation set. All is worked out in
    float64. Both are NaN where there are no samples, R² also where a target does not vary. `layers` names the layers
    to cut; None cuts each of them in turn.
    """
    xp, network = namespace_of(x), network.cast("float64")
    x, y = xp.asarray(x, dtype=xp.float64), xp.asarray(y, dtype=xp.float64)
    total_squares = squares_about_mean(as_numpy(y))
    names = [f"W{index + 1}" for index in range(len(network.weights))]
    return {
        name: loss_and_r2(_squared_errors(network, activation, index, x, y), total_squares, len(x))
        for index, name in enumerate(names)
        if layers is None or name in layers
    }


def _squared_errors(network: Network, activation: Activation, index: int, x: Tensor, y: Tensor) -> Array:
    """Each target's sum of squared errors (k, targets) after the cut of one layer to rank 1…k."""
    xp = namespace_of(x)
    u, s, vt = (xp.asarray(factor, device=x.device) for factor in svd(network.weights[index]))
    n_rows = max(1, CHUNK // max(network.widths))
    squares = xp.zeros((len(s), y.shape[1]), dtype=xp.float64, device=x.device)
    for start in range(0, len(x), n_rows):
        rows = slice(start, start + n_rows)
        amounts = forward(network, activation, x[rows], stop=index) @ (vt.T * s)
        for rank, z in enumerate(_partial_sums(amounts, u.T, network.biases[index])):
            residual = _finish(network, activation, index, z) - y[rows]
            squares[rank] += (residual * residual).sum(0)
    return np.asarray(as_numpy(squares))


def _partial_sums(amounts: Tensor, directions: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    """z (n, out) at rank 1…k, all in one array: z_r = z_{r−1} + (a·σᵣvᵣ)uᵣᵀ, so that no W_r is ever formed.

    `amounts` (n, k) are the a·σᵣvᵣ of the inputs a, `directions` (k, out) the uᵣ.
    """
    z = amounts[:, :1] * directions[:1] * 0
    if bias is not None:
        z += bias
    for rank, direction in enumerate(directions):
        z += amounts[:, rank : rank + 1] * direction
        yield z


def _finish(network: Network, activation: Activation, index: int, z: Tensor) -> Tensor:
    """The network's answer from a layer's z on; z stays as it is."""
    if index == len(network.weights) - 1:
        return z
    xp = namespace_of(z)
    h = xp.asarray(z, copy=True)
    activation_of(activation, xp)(h)
    return forward(network, activation, h, first=index + 1)
