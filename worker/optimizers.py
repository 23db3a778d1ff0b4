"""PyTorch's optimizers at their default settings, over the rows of a batch of members.

The formulas are those of torch.optim, with biases decayed like weights; learning rate, weight decay and momentum are
columns (M, 1). An update is a function of the step's number, from 1, and of the members that it is for; it changes
their parameters, rows of (M, P), in place and spoils their gradients.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, assert_never

import numpy as np

from service.lowrank.ranks import Array
from service.schemas import ExperimentSpec
from worker.networks import Arrays, Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

Update = Callable[[int, slice], None]


class Optimizer(NamedTuple):
    """An update, and what it remembers from one step to the next: vectors (M, P) that it changes in place."""

    update: Update
    state: dict[str, Tensor]


@dataclass(frozen=True)
class _Vectors:
    """What every update works on, each (M, P)."""

    arrays: Arrays
    parameters: Tensor
    gradient: Tensor
    scratch: Tensor

    def zeros(self) -> Tensor:
        """Another such vector, for the optimizer's state."""
        return self.arrays.zeros(*self.parameters.shape)


def make_optimizer(
    members: Sequence[ExperimentSpec], parameters: Tensor, gradient: Tensor, arrays: Arrays
) -> Optimizer:
    """The members' optimizer, with the settings of each."""
    training = [member.training for member in members]
    lr = np.array([[one.lr] for one in training])
    decay = np.array([[one.weight_decay] for one in training])
    vectors = _Vectors(arrays, parameters, gradient, arrays.zeros(*parameters.shape))
    optimizer = training[0].optimizer
    match optimizer:
        case "sgd":
            momentum = np.array([[one.momentum] for one in training])
            return _after(_coupled_decay(vectors, decay), _sgd(vectors, lr, momentum))
        case "adam":
            return _after(_coupled_decay(vectors, decay), _adam(vectors, lr))
        case "adamw":
            return _after(_decoupled_decay(vectors, lr * decay), _adam(vectors, lr))
        case _:
            assert_never(optimizer)


def _column(values: Array, arrays: Arrays) -> Tensor:
    return arrays.stack(list(values))


def _after(decay: Update | None, step: Optimizer) -> Optimizer:
    if decay is None:
        return step

    def update(number: int, rows: slice) -> None:
        decay(number, rows)
        step.update(number, rows)

    return Optimizer(update, step.state)


def _coupled_decay(v: _Vectors, decay: Array) -> Update | None:
    """gradient += decay·parameters."""
    if not decay.any():
        return None
    xp, decays = v.arrays.xp, _column(decay, v.arrays)

    def update(number: int, rows: slice) -> None:
        gradient, scratch = v.gradient[rows], v.scratch[rows]
        xp.multiply(v.parameters[rows], decays[rows], out=scratch)
        xp.add(gradient, scratch, out=gradient)

    return update


def _decoupled_decay(v: _Vectors, lr_decay: Array) -> Update | None:
    """parameters *= 1 − lr·decay."""
    if not lr_decay.any():
        return None
    xp, kept = v.arrays.xp, _column(1 - lr_decay, v.arrays)

    def update(number: int, rows: slice) -> None:
        parameters = v.parameters[rows]
        xp.multiply(parameters, kept[rows], out=parameters)

    return update


def _sgd(v: _Vectors, lr: Array, momentum: Array) -> Optimizer:
    """velocity = momentum·velocity + gradient; parameters −= lr·velocity."""
    xp, rates, momenta = v.arrays.xp, _column(lr, v.arrays), _column(momentum, v.arrays)
    velocity = v.zeros() if momentum.any() else v.gradient

    def update(number: int, rows: slice) -> None:
        parameters, scratch, moving = v.parameters[rows], v.scratch[rows], velocity[rows]
        if velocity is not v.gradient:
            xp.multiply(moving, momenta[rows], out=moving)
            xp.add(moving, v.gradient[rows], out=moving)
        xp.multiply(moving, rates[rows], out=scratch)
        xp.subtract(parameters, scratch, out=parameters)

    return Optimizer(update, {} if velocity is v.gradient else {"velocity": velocity})


def _adam(v: _Vectors, lr: Array) -> Optimizer:
    """parameters −= lr·m̂/(√v̂ + ε), with m̂ and v̂ the bias-corrected means of gradient and gradient².

    The running sums kept are m/(1 − β₁) and v/(1 − β₂), which cost two operations less; numerator and denominator are
    both scaled by √((1 − β₂ᵗ)/(1 − β₂)) to make up for it.
    """
    xp, rates = v.arrays.xp, _column(lr, v.arrays)
    firsts, seconds = v.zeros(), v.zeros()

    def update(number: int, rows: slice) -> None:
        parameters, gradient, scratch = v.parameters[rows], v.gradient[rows], v.scratch[rows]
        first, second = firsts[rows], seconds[rows]
        scale = math.sqrt((1 - BETA2**number) / (1 - BETA2))
        xp.multiply(first, BETA1, out=first)
        xp.add(first, gradient, out=first)
        xp.multiply(second, BETA2, out=second)
        xp.multiply(gradient, gradient, out=gradient)
        xp.add(second, gradient, out=second)
        xp.sqrt(second, out=scratch)
        xp.add(scratch, EPSILON * scale, out=scratch)
        xp.divide(first, scratch, out=scratch)
        xp.multiply(scratch, rates[rows] * (scale * (1 - BETA1) / (1 - BETA1**number)), out=scratch)
        xp.subtract(parameters, scratch, out=parameters)

    return Optimizer(update, {"first_moment": firsts, "second_moment": seconds})
