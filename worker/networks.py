"""Fully connected networks as flat vectors of parameters, for a batch of members at once.

All parameters of a member are one row of an array (M, P), layer after layer. A layer is one matrix (out, in + 1) with
the bias as its last column, so that biases and their gradients come out of the products with the weights: on small
networks a call costs as much as its arithmetic. A tensor is a numpy array or a torch tensor: everything here is spelled
so that the namespace `xp` can be either.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from service.schemas import Activation, ExperimentSpec

Tensor = Any  # numpy.ndarray or torch.Tensor
InPlace = Callable[[Tensor], object]


@dataclass(frozen=True)
class Arrays:
    """Where arrays live: the namespace that makes and transforms them, the device and the dtype."""

    xp: Any = np
    device: str = "cpu"
    dtype: str = "float32"

    def ones(self, *shape: int) -> Tensor:
        """An array of ones."""
        return self.xp.ones(shape, dtype=getattr(self.xp, self.dtype), device=self.device)

    def take(self, rows: Tensor, index: Tensor, out: Tensor) -> None:
        """out[i] = rows[index[i]] for valid indices, without a copy in between."""
        if self.xp is torch:
            torch.index_select(rows, 0, index, out=out)
        else:
            np.take(rows, index, axis=0, out=out, mode="clip")  # The mode that does not buffer.

    def column(self, values: Sequence[float], axes: int = 1) -> Tensor:
        """A number a member, to multiply arrays by: (M, 1, …), or () where all are the same, which costs less."""
        column = self.stack(values).reshape(-1, *[1] * axes)
        return column.reshape(-1)[0] if len(set(values)) == 1 else column

    def stack(self, arrays: Sequence[NDArray[Any]] | Sequence[float]) -> Tensor:
        """The members' arrays with a leading member axis, rounded to the dtype; always a copy."""
        # Rounded member by member, and what is beyond float32 is infinite there.
        with np.errstate(over="ignore", under="ignore"):
            return self.xp.asarray(
                np.stack([np.asarray(array).astype(self.dtype, copy=False) for array in arrays]), device=self.device
            )


def namespace_of(tensor: Tensor) -> ModuleType:
    """The namespace that a tensor belongs to."""
    return torch if isinstance(tensor, torch.Tensor) else np


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """The same values as a numpy array, which may share memory with the tensor."""
    return tensor.cpu().numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor)


@dataclass(frozen=True)
class Network:
    """Layers (…, out, in + 1), views of the parameters; the last column is the bias, and not there without `bias`."""

    layers: list[Tensor]
    bias: bool

    @classmethod
    def of(cls, flat: Tensor, spec: ExperimentSpec) -> "Network":
        """The layers of vectors (M, P) of parameters."""
        layers, start = [], 0
        for m, n in spec.shapes.values():
            end = start + m * (n + spec.network.bias)
            layers.append(flat[:, start:end].reshape(len(flat), m, -1))
            start = end
        return cls(layers, spec.network.bias)

    def __getitem__(self, members: slice | int) -> "Network":
        """Some networks of the batch, or one without the member axis."""
        return Network([layer[members] for layer in self.layers], self.bias)

    def cast(self, dtype: str) -> "Network":
        """The same network in another dtype."""
        xp = namespace_of(self.layers[0])
        return Network([xp.asarray(layer, dtype=getattr(xp, dtype)) for layer in self.layers], self.bias)

    @cached_property
    def weights(self) -> list[Tensor]:
        """The weights (…, out, in)."""
        return [layer[..., :-1] for layer in self.layers] if self.bias else self.layers

    @cached_property
    def biases(self) -> list[Tensor | None]:
        """The biases (…, 1, out)."""
        return [layer[..., None, :, -1] if self.bias else None for layer in self.layers]

    @property
    def widths(self) -> list[int]:
        """How many outputs every layer has."""
        return [layer.shape[-2] for layer in self.layers]


def named_parameters(network: Network, member: int) -> dict[str, NDArray[Any]]:
    """Copies of a member's parameters under the names that PyTorch would give them: `W1.weight`, `W1.bias`, …"""
    named = {}
    for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        named[f"W{i + 1}.weight"] = as_numpy(weight[member]).copy()
        if bias is not None:
            named[f"W{i + 1}.bias"] = as_numpy(bias[member, 0]).copy()
    return named


def initial_parameters(spec: ExperimentSpec) -> NDArray[np.float32]:
    """PyTorch's default initialisation for the specification's seed times its init_scale, as a flat vector (P,)."""
    flat = np.empty((1, spec.parameters), dtype=np.float32)
    network = Network.of(flat, spec)[0]
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that one would also seed the CUDA generators, which nobody saves and restores.
        torch.default_generator.manual_seed(spec.seed)
        for weight, bias in zip(network.weights, network.biases, strict=True):
            m, n = weight.shape
            linear = torch.nn.Linear(n, m, bias=bias is not None, device="cpu", dtype=torch.float32)
            weight[:] = linear.weight.detach().numpy()
            if bias is not None:
                bias[:] = linear.bias.detach().numpy()
    flat *= np.float32(spec.network.init_scale)
    return flat.ravel()


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


def forward(network: Network, activation: Activation, h: Tensor, first: int = 0, stop: int | None = None) -> Tensor:
    """The outputs (…, n, out) of layers first…stop−1 for inputs (…, n, in); the inputs stay as they are.

    Every layer but the network's last one is activated. Without a layer the inputs themselves come back.
    """
    xp = namespace_of(h)
    activate, last = activation_of(activation, xp), len(network.layers) - 1
    layers = list(zip(network.weights, network.biases, strict=True))
    for index, (weight, bias) in enumerate(layers[first:stop], first):
        h = xp.matmul(h, weight.swapaxes(-1, -2))
        if bias is not None:
            h += bias
        if index < last:
            activate(h)
    return h
