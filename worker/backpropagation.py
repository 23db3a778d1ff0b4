"""The forward pass and the gradient of the mean squared error, for a batch of members, in buffers that are made once.

Activations are columns: a layer's output is (M, out, n) for n rows of data, and what the next layer takes is the same
with a row of ones below, for the bias. All hidden layers lie in one buffer, so that their slopes are one operation.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple, assert_never

from service.schemas import Activation
from worker.networks import Arrays, Network, Tensor, activation_of

Slope = Callable[[Tensor, Tensor], object]
ForwardOf = Callable[[int, int], "Forward"]


def slope_of(name: Activation, arrays: Arrays) -> Slope:
    """The function (a, out): write activation'(z) to `out`, given a = activation(z); `out` holds ones at first."""
    xp, one = arrays.xp, arrays.ones()

    def tanh(a: Tensor, out: Tensor) -> None:
        xp.multiply(a, a, out=out)
        xp.subtract(one, out, out=out)

    def sigmoid(a: Tensor, out: Tensor) -> None:
        xp.subtract(one, a, out=out)
        xp.multiply(out, a, out=out)

    match name:
        case "tanh":
            return tanh
        case "relu":
            return lambda a, out: xp.sign(a, out=out)
        case "sigmoid":
            return sigmoid
        case "identity":
            return lambda a, out: None
        case _:
            assert_never(name)


class Hidden:
    """A buffer (M, Σ(out + 1), n) for something of all hidden layers, and their parts of it."""

    def __init__(self, network: Network, n_rows: int, arrays: Arrays) -> None:
        widths, bias = network.widths[:-1], int(network.bias)
        *starts, height = [0, *accumulate(width + bias for width in widths)]
        self.all = arrays.ones(len(network.layers[0]), height, n_rows)
        self.layers = [self.all[:, start : start + width] for start, width in zip(starts, widths, strict=True)]
        self.with_ones = [self.all[:, start : start + w + bias] for start, w in zip(starts, widths, strict=True)]


class Forward:
    """What answers batches of `n_rows` rows, for this network or another of its shape."""

    def __init__(self, network: Network, activation: Activation, n_rows: int, arrays: Arrays) -> None:
        self.hidden = Hidden(network, n_rows, arrays)
        self.outputs = arrays.ones(len(network.layers[0]), network.widths[-1], n_rows)
        self.slope = slope_of(activation, arrays)
        self._matmul, self._activate = arrays.xp.matmul, activation_of(activation, arrays.xp)
        self._places = list(zip(self.hidden.layers, self.hidden.with_ones, strict=True))

    def __call__(self, layers: Sequence[Tensor], x: Tensor) -> Tensor:
        """The outputs (M, targets, n), to be overwritten by the next call, for x (M, n, features + 1).

        The 1 is the bias's and not there without biases.
        """
        matmul, h = self._matmul, x.swapaxes(1, 2)
        for layer, (z, a) in zip(layers, self._places, strict=False):
            matmul(layer, h, out=z)
            self._activate(z)
            h = a
        matmul(layers[-1], h, out=self.outputs)
        return self.outputs


class _Back(NamedTuple):
    """A layer above another, on the way back: `delta` (M, out, n) is the derivative of the loss by its z."""

    delta: Tensor
    below_transposed: Tensor
    gradient: Tensor
    weight_transposed: Tensor
    delta_below: Tensor
    slope_below: Tensor


class Backpropagation:
    """What writes the gradient of the members' losses times `scales` (M,), for batches of `n_rows` rows."""

    def __init__(
        self, network: Network, gradient: Network, forward: Forward, scales: Sequence[float], arrays: Arrays
    ) -> None:
        *_, n_targets, n_rows = forward.outputs.shape
        self._xp, self._layers, self._forward, self._slope = arrays.xp, network.layers, forward, forward.slope
        self._slopes = Hidden(network, n_rows, arrays)
        deltas = [*Hidden(network, n_rows, arrays).layers, forward.outputs]
        self._back = [
            _Back(
                deltas[i], forward.hidden.with_ones[i - 1].swapaxes(1, 2), gradient.layers[i],
                network.weights[i].swapaxes(1, 2), deltas[i - 1], self._slopes.layers[i - 1],
            )
            for i in reversed(range(1, len(network.layers)))
        ]  # fmt: skip
        self._first = (deltas[0], gradient.layers[0])
        self._scales = arrays.column([2 * scale / (n_rows * n_targets) for scale in scales], axes=2)

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Write the gradient for inputs x (M, n, features + 1), like Forward's, and targets y (M, n, targets)."""
        xp, matmul = self._xp, self._xp.matmul
        delta = self._forward(self._layers, x)
        xp.subtract(delta, y.swapaxes(1, 2), out=delta)
        xp.multiply(delta, self._scales, out=delta)
        self._slope(self._forward.hidden.all, self._slopes.all)
        for delta, below_transposed, gradient, weight_transposed, delta_below, slope_below in self._back:
            matmul(delta, below_transposed, out=gradient)
            matmul(weight_transposed, delta, out=delta_below)
            xp.multiply(delta_below, slope_below, out=delta_below)
        delta, gradient = self._first
        matmul(delta, x, out=gradient)
