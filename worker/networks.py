"""Fully connected networks as flat vectors of parameters, for a batch of members at once.

All parameters of a member are one row of an array (M, P), in PyTorch's order W1, b1, W2, b2, …; weights (M, out, in)
and biases (M, out) are views of it. A tensor is a numpy array or a torch tensor: everything here is spelled so that the
namespace `xp` can be either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple, assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from service.schemas import Activation, ExperimentSpec

Tensor = Any  # numpy.ndarray or torch.Tensor
InPlace = Callable[[Tensor], object]
Chain = Callable[[Tensor, Tensor, Tensor], object]


@dataclass(frozen=True)
class Arrays:
    """Where arrays live: the namespace that makes and transforms them, the device and the dtype."""

    xp: Any = np
    device: str = "cpu"
    dtype: str = "float32"

    def empty(self, *shape: int) -> Tensor:
        """An array whose values are yet to be written."""
        return self.xp.empty(shape, dtype=getattr(self.xp, self.dtype), device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        """An array of zeros."""
        return self.xp.zeros(shape, dtype=getattr(self.xp, self.dtype), device=self.device)

    def stack(self, arrays: Sequence[NDArray[Any]]) -> Tensor:
        """The members' arrays with a leading member axis, rounded to the dtype; always a copy."""
        # Rounded member by member, and what is beyond float32 is infinite there.
        with np.errstate(over="ignore", under="ignore"):
            return self.xp.asarray(np.stack([array.astype(self.dtype) for array in arrays]), device=self.device)


def namespace_of(tensor: Tensor) -> ModuleType:
    """The namespace that a tensor belongs to."""
    return torch if isinstance(tensor, torch.Tensor) else np


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same values as a numpy array, which may share memory with the tensor."""
    return tensor.cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)


@dataclass(frozen=True)
class Network:
    """Views of the parameters: weights (…, out, in) and biases (…, 1, out), None where there are none."""

    weights: list[Tensor]
    biases: list[Tensor] | None

    @classmethod
    def of(cls, flat: Tensor, spec: ExperimentSpec) -> "Network":
        """The layers of vectors (M, P) of parameters in PyTorch's order W1, b1, W2, b2, …"""
        weights, biases, start = [], [], 0
        for m, n in spec.shapes.values():
            weights.append(flat[:, start : start + m * n].reshape(-1, m, n))
            start += m * n
            if spec.network.bias:
                biases.append(flat[:, start : start + m].reshape(-1, 1, m))
                start += m
        return cls(weights, biases if spec.network.bias else None)

    def __getitem__(self, members: slice) -> "Network":
        """Some networks of the batch."""
        biases = None if self.biases is None else [bias[members] for bias in self.biases]
        return Network([weight[members] for weight in self.weights], biases)

    def member(self, index: int) -> "Network":
        """One network of the batch: weights (out, in), biases (1, out)."""
        biases = None if self.biases is None else [bias[index] for bias in self.biases]
        return Network([weight[index] for weight in self.weights], biases)

    def cast(self, dtype: str) -> "Network":
        """The same network in another dtype."""
        xp = namespace_of(self.weights[0])
        to = getattr(xp, dtype)
        biases = None if self.biases is None else [xp.asarray(bias, dtype=to) for bias in self.biases]
        return Network([xp.asarray(weight, dtype=to) for weight in self.weights], biases)

    @property
    def widths(self) -> list[int]:
        """How many outputs every layer has."""
        return [weight.shape[-2] for weight in self.weights]

    @property
    def layers(self) -> "list[Layer]":
        """The views that a forward pass needs."""
        biases = self.biases or [None] * len(self.weights)
        return [Layer(weight.swapaxes(-1, -2), bias) for weight, bias in zip(self.weights, biases, strict=True)]


class Layer(NamedTuple):
    """A layer's weight transposed (…, in, out) and its bias (…, 1, out)."""

    transposed: Tensor
    bias: Tensor | None


def named_parameters(network: Network, member: int) -> dict[str, NDArray[Any]]:
    """Copies of a member's parameters under the names that PyTorch would give them: `W1.weight`, `W1.bias`, …"""
    named = {}
    for i, weight in enumerate(network.weights):
        named[f"W{i + 1}.weight"] = as_numpy(weight[member]).copy()
        if network.biases is not None:
            named[f"W{i + 1}.bias"] = as_numpy(network.biases[i][member, 0]).copy()
    return named


def initial_parameters(spec: ExperimentSpec) -> NDArray[np.float32]:
    """PyTorch's default initialisation for the specification's seed times its init_scale, as a flat vector (P,)."""
    flat = np.empty(spec.parameters, dtype=np.float32)
    start = 0
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one would also seed the CUDA generators, which nobody saves and restores.
        torch.default_generator.manual_seed(spec.seed)
        for n_inputs, n_outputs in pairwise(spec.widths):
            linear = torch.nn.Linear(n_inputs, n_outputs, bias=spec.network.bias, device="cpu", dtype=torch.float32)
            for parameter in linear.parameters():
                end = start + parameter.numel()
                flat[start:end] = parameter.detach().numpy().ravel()
                start = end
    flat *= np.float32(spec.network.init_scale)
    return flat


def activation_of(name: Activation, xp: Any) -> InPlace:
    """The function z → activation(z), in place."""
    match name:
        case "tanh":
            return lambda z: xp.tanh(z, out=z)
        case "relu":
            # A number would do for numpy, but not for torch.
            return lambda z: xp.maximum(z, xp.zeros((), dtype=z.dtype, device=z.device), out=z)
        case "sigmoid":
            return lambda z: _sigmoid(z, xp)
        case "identity":
            return lambda z: None
        case _:
            assert_never(name)


def _sigmoid(z: Tensor, xp: Any) -> None:
    """1/(1 + exp(−z)), which is 0 where exp overflows."""
    xp.negative(z, out=z)
    xp.exp(z, out=z)
    xp.add(z, 1.0, out=z)
    xp.reciprocal(z, out=z)


def chain_of(name: Activation, xp: Any) -> Chain:
    """The chain rule (delta, a, scratch): multiply delta in place by activation'(z), given a = activation(z)."""
    match name:
        case "tanh":
            return lambda delta, a, scratch: _tanh_chain(delta, a, scratch, xp)
        case "relu":
            return lambda delta, a, scratch: xp.multiply(delta, xp.sign(a, out=scratch), out=delta)
        case "sigmoid":
            return lambda delta, a, scratch: _sigmoid_chain(delta, a, scratch, xp)
        case "identity":
            return lambda delta, a, scratch: None
        case _:
            assert_never(name)


def _tanh_chain(delta: Tensor, a: Tensor, scratch: Tensor, xp: Any) -> None:
    xp.multiply(a, a, out=scratch)
    xp.multiply(delta, scratch, out=scratch)
    xp.subtract(delta, scratch, out=delta)


def _sigmoid_chain(delta: Tensor, a: Tensor, scratch: Tensor, xp: Any) -> None:
    xp.multiply(delta, a, out=delta)
    xp.multiply(delta, a, out=scratch)
    xp.subtract(delta, scratch, out=delta)


def forward(network: Network, activation: Activation, h: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
    """The outputs (…, n, out) of layers first…stop−1 for inputs (…, n, in); the inputs stay as they are.

    Every layer but the network's last one is activated. Without a layer the inputs themselves come back.
    """
    xp = namespace_of(h)
    activate, last = activation_of(activation, xp), len(network.weights) - 1
    for index, (transposed, bias) in enumerate(network.layers[first:stop], first):
        h = xp.matmul(h, transposed)
        if bias is not None:
            h += bias
        if index < last:
            activate(h)
    return h


class _Step(NamedTuple):
    """One layer on the way back: `delta` (M, n, out) is the derivative of the loss by its z, `below` its input."""

    delta_transposed: Tensor
    below: Tensor
    weight_gradient: Tensor
    delta: Tensor
    weight: Tensor
    delta_below: Tensor
    scratch: Tensor


class Backpropagation:
    """The gradient of the mean squared error of batches of `n_rows` rows, worked out in buffers that are made once."""

    def __init__(
        self, network: Network, gradient: Network, activation: Activation, n_rows: int, arrays: Arrays
    ) -> None:
        members, widths = len(network.weights[0]), network.widths
        self._xp = arrays.xp
        self._activate = activation_of(activation, arrays.xp)
        self._chain = chain_of(activation, arrays.xp)
        self._outputs, self._deltas, scratch = (
            [arrays.empty(members, n_rows, width) for width in widths] for _ in range(3)
        )
        self._layers = list(zip(network.layers, self._outputs, strict=True))
        transposed = [delta.swapaxes(1, 2) for delta in self._deltas]
        self._first = (transposed[0], gradient.weights[0])
        self._upper = [
            _Step(
                transposed[i], self._outputs[i - 1], gradient.weights[i],
                self._deltas[i], network.weights[i], self._deltas[i - 1], scratch[i - 1],
            )
            for i in reversed(range(1, len(widths)))
        ]  # fmt: skip
        self._biases = [] if gradient.biases is None else list(zip(self._deltas, gradient.biases, strict=True))
        self._ones = arrays.zeros(members, 1, n_rows) + 1  # A product with ones sums in half the time of a sum.
        self._scale = 2 / (n_rows * widths[-1])

    def __call__(self, x: Tensor, y: Tensor) -> None:
        """Write the gradient for inputs x (M, n, features) and targets y (M, n, targets)."""
        xp, matmul = self._xp, self._xp.matmul
        self._forward(x)
        delta = self._deltas[-1]
        xp.subtract(self._outputs[-1], y, out=delta)
        xp.multiply(delta, self._scale, out=delta)
        for delta_transposed, below, weight_gradient, delta, weight, delta_below, scratch in self._upper:
            matmul(delta_transposed, below, out=weight_gradient)
            matmul(delta, weight, out=delta_below)
            self._chain(delta_below, below, scratch)
        delta_transposed, weight_gradient = self._first
        matmul(delta_transposed, x, out=weight_gradient)
        for delta, bias_gradient in self._biases:
            matmul(self._ones, delta, out=bias_gradient)

    def _forward(self, h: Tensor) -> None:
        """What `forward` gives, layer by layer into the buffers."""
        matmul, add, last = self._xp.matmul, self._xp.add, self._outputs[-1]
        for (transposed, bias), output in self._layers:
            matmul(h, transposed, out=output)
            if bias is not None:
                add(output, bias, out=output)
            if output is not last:
                self._activate(output)
            h = output
