"""Training by mini-batches, for a batch of members at once.

Members are experiments with the same shapes and the same schedule: their parameters are the rows of one array, and
data, seed, learning rate, weight decay and momentum are each member's own. What a member becomes does not depend on who
else is in the batch. The formulas are written once over an array namespace: numpy on the CPU, torch on CUDA.
Training yields; it does not write, and it measures losses only.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray

from service.lowrank.ranks import Array
from service.schemas import ExperimentSpec, Optimizer
from worker.datasets import Floats, make_dataset
from worker.networks import (
    Arrays,
    InPlace,
    Layer,
    Network,
    Tensor,
    activation_of,
    as_numpy,
    chain_of,
    forward,
    initial_parameters,
    layers_of,
    named_parameters,
    network_of,
)

Update = Callable[[int], None]

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
CHUNK = 2**16  # Values of a layer's output at once when a whole data set is evaluated: they stay in the cache.
GAMMA, MIX1, MIX2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Snapshot:
    """The members at the end of an epoch; epoch 0 is before training.

    Losses and R² are (M,); NaN stands for no validation set, and in R² for a target without variance. `weights` are
    live views (M, out, in): training goes on in them once the next snapshot is asked for. `diverged` (M,) marks the
    members of which some parameter or loss is, or has been, infinite or NaN.
    """

    epoch: int
    train_loss: Array
    validation_loss: Array
    train_r2: Array
    validation_r2: Array
    weights: list[Tensor]
    diverged: NDArray[np.bool_]


class Trainer:
    """A batch of members and the arrays that they are trained in; the parameters are live in `network`."""

    def __init__(
        self,
        members: Sequence[ExperimentSpec],
        device: str = "cpu",
        dtype: str = "float32",
        xp: ModuleType | None = None,
    ) -> None:
        check_alike(members)
        self.spec = members[0]
        self.arrays = Arrays(xp or (np if device == "cpu" else torch), device, dtype)
        self._seeds = self.arrays.stack([np.array([spec.seed], dtype=np.int64) for spec in members])
        datasets = [make_dataset(spec, dtype) for spec in members]
        self.x_train, self.y_train, self.x_validation, self.y_validation = map(
            self.arrays.stack, zip(*datasets, strict=True)
        )
        self._train_squares = np.stack([_squares_about_mean(data.y_train) for data in datasets])
        self._validation_squares = np.stack([_squares_about_mean(data.y_validation) for data in datasets])
        shapes, bias = list(self.spec.shapes.values()), self.spec.network.bias
        self._parameters = self.arrays.stack([initial_parameters(spec).astype(dtype) for spec in members])
        self._gradient = self.arrays.zeros(*self._parameters.shape)
        self.network = network_of(self._parameters, shapes, bias)
        self._layers = layers_of(self.network)
        self._activate = activation_of(self.spec.network.activation, self.arrays)
        self._update = _make_update(
            self.spec.training.optimizer, self._parameters, self._gradient, members, self.arrays
        )
