"""The price of a cut in the task's own loss: the trained network with one layer's weight truncated to every rank."""

from collections.abc import Iterator

from service.lowrank.ranks import Array
from worker.decompose import svd
from worker.networks import Arrays, Network, Tensor, activation_of, as_numpy, forward, namespace_of
from worker.scores import loss_and_r2, squares_about_mean

CHUNK = 2**16  # Values of a layer's output at a time: the pass stays in the cache, and its memory is bounded.


def cut_curve(network: Network, layer: int, x: Tensor, y: Tensor) -> tuple[Array, Array]:
    """Loss (k,) and R² (k,) on x (n, features), y (n, targets) with W, of layer 0, 1, …, replaced by W_r, r = 1…k.

    The network is a single one, in the dtype and on the device of x and y; float64 is what keeps small differences
    between ranks. Both are NaN where there are no samples, R² also where a target does not vary.
    """
    arrays = Arrays(namespace_of(x), x.device, str(x.dtype).removeprefix("torch."))
    squares = arrays.zeros(min(network.weights[layer].shape), y.shape[1])
    n_rows = max(1, CHUNK // max(network.widths))
    u, s, vt = (arrays.cast(factor) for factor in svd(network.weights[layer]))
    for start in range(0, len(x), n_rows):
        part = slice(start, start + n_rows)
        inputs = _below(network, layer, x[part], arrays)
        for rank, z in enumerate(_partial_sums(inputs @ (vt.T * s), u.T, network.layers[layer].bias)):
            squares[rank] += ((_above(network, layer, z, arrays) - y[part]) ** 2).sum(0)
    return loss_and_r2(as_numpy(squares), squares_about_mean(as_numpy(y)), len(x))


def _partial_sums(amounts: Tensor, directions: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    """z (n, out) at rank 1…k, each in the same array: z_r = z_{r−1} + (a·σᵣvᵣ)uᵣᵀ, so no truncated W is ever formed.

    `amounts` (n, k) are the a·σᵣvᵣ of inputs a, `directions` (k, out) the uᵣ.
    """
    z = 0 * amounts[:, :1] * directions[:1]
    if bias is not None:
        z += bias
    for rank, direction in enumerate(directions):
        z += amounts[:, rank : rank + 1] * direction
        yield z
