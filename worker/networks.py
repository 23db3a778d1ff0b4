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
        """The members' arrays with a leading member axis, always a copy."""
        return self.xp.asarray(np.stack(arrays), device=self.device)


def namespace_of(tensor: Tensor) -> ModuleType:
    """The namespace that a tensor belongs to."""
    return torch if isinstance(tensor, torch.Tensor) else np


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same values as a numpy array, which may share memory with the tensor."""
    return tensor.cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)


@dataclass(frozen=True)
class Network:
    """Weights (M, out, in) and biases (M, out; None without bias) layer by layer; without M for a single member."""

    weights: list[Tensor]
    biases: list[Tensor | None]

    def member(self, index: int) -> "Network":
        """One member's network, as views."""
        biases = [None if bias is None else bias[index] for bias in self.biases]
        return Network([weight[index] for weight in self.weights], biases)


def network_of(flat: Tensor, shapes: Sequence[tuple[int, int]], bias: bool) -> Network:
    """A flat vector (M, P) of parameters seen as a network."""
    network, start = Network([], []), 0
    for n_outputs, n_inputs in shapes:
        middle = start + n_outputs * n_inputs
        end = middle + n_outputs * bias
        network.weights.append(flat[:, start:middle].reshape(-1, n_outputs, n_inputs))
        network.biases.append(flat[:, middle:end] if bias else None)
        start = end
    return network


def named_parameters(network: Network, member: int) -> dict[str, NDArray[Any]]:
    """Copies of a member's parameters under the names that PyTorch would give them: `W1.weight`, `W1.bias`, …"""
    named, single = {}, network.member(member)
    for i, (weight, bias) in enumerate(zip(single.weights, single.biases, strict=True), 1):
        named[f"W{i}.weight"] = as_numpy(weight).copy()
        if bias is not None:
            named[f"W{i}.bias"] = as_numpy(bias).copy()
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


class Layer(NamedTuple):
    """The views of a layer that a pass needs, made once: (M, out, in), (M, in, out) and (M, 1, out)."""

    weight: Tensor
    transposed: Tensor
    bias: Tensor | None


def layers_of(network: Network) -> list[Layer]:
    """A batched network's layers."""
    return [
        Layer(weight, weight.swapaxes(1, 2), None if bias is None else bias[:, None, :])
        for weight, bias in zip(network.weights, network.biases, strict=True)
    ]


def activation_of(name: Activation, arrays: Arrays) -> InPlace:
    """The function z → activation(z), in place."""
    xp = arrays.xp
    match name:
        case "tanh":
            return lambda z: xp.tanh(z, out=z)
        case "relu":
            zero = arrays.zeros()  # torch's maximum takes no Python number.
            return lambda z: xp.maximum(z, zero, out=z)
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


def forward(layers: list[Layer], activate: InPlace, x: Tensor, outputs: list[Tensor], xp: Any) -> Tensor:
    """The network's answer (M, n, targets) to x (M, n, features); `outputs` keeps what every layer gave."""
    matmul, add, last = xp.matmul, xp.add, outputs[-1]
    for (_, transposed, bias), output in zip(layers, outputs, strict=True):
        matmul(x, transposed, out=output)
        if bias is not None:
            add(output, bias, out=output)
        if output is not last:
            activate(output)
        x = output
    return x
