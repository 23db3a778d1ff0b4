"""PyTorch's optimizers at their default settings, over the rows of a batch of members.

The formulas are those of torch.optim, with biases decayed like weights. What they start from is a gradient that has
been scaled: SGD wants it times the learning rate, which costs nothing where the loss is scaled anyway. An update is a
function of the step's number, from 1; it changes the parameters, (M, P), and its state in place and spoils the
gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from service.schemas import ExperimentSpec, TrainingSpec
from worker.networks import Arrays, Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

Update = Callable[[int], None]


def state_names(members: Sequence[ExperimentSpec]) -> list[str]:
    """The vectors (M, P), zeros at first, that the members' optimizer remembers from one step to the next."""
    if members[0].training.optimizer == "sgd":
        return ["velocity"] if any(member.training.momentum for member in members) else []
    return ["first_moment", "second_moment"]


def gradient_scale(training: TrainingSpec) -> float:
    """What the gradient is to be multiplied by before an update."""
    return training.lr if training.optimizer == "sgd" else 1.0


@dataclass(frozen=True)
class Vectors:
    """What an update works on, each (M, P)."""

    parameters: Tensor
    gradient: Tensor
    scratch: Tensor
    state: dict[str, Tensor]


def make_update(members: Sequence[ExperimentSpec], vectors: Vectors, arrays: Arrays) -> Update:
    """The members' update, with the settings of each."""
    training = [member.training for member in members]
    optimizer = training[0].optimizer
    match optimizer:
        case "sgd":
            decay = _coupled_decay(vectors, [one.lr * one.weight_decay for one in training], arrays)
            return _after(decay, _sgd(vectors, [one.momentum for one in training], arrays))
        case "adam":
            decay = _coupled_decay(vectors, [one.weight_decay for one in training], arrays)
        case "adamw":
            decay = _decoupled_decay(vectors, [one.lr * one.weight_decay for one in training], arrays)
        case _:
            assert_never(optimizer)
    return _after(decay, _adam(vectors, [one.lr for one in training], arrays))


def _after(decay: Update | None, step: Update) -> Update:
    if decay is None:
        return step

    def update(number: int) -> None:
        decay(number)
        step(number)

    return update


def _coupled_decay(v: Vectors, decays: list[float], arrays: Arrays) -> Update | None:
    """gradient += decay·parameters, where the decay is scaled like the gradient."""
    if not any(decays):
        return None
    xp, column = arrays.xp, arrays.column(decays)

    def update(_number: int) -> None:
        xp.multiply(v.parameters, column, out=v.scratch)
        xp.add(v.gradient, v.scratch, out=v.gradient)

    return update


def _decoupled_decay(v: Vectors, lr_decays: list[float], arrays: Arrays) -> Update | None:
    """parameters *= 1 − lr·decay."""
    if not any(lr_decays):
        return None
    xp, kept = arrays.xp, arrays.column([1 - lr_decay for lr_decay in lr_decays])

    def update(_number: int) -> None:
        xp.multiply(v.parameters, kept, out=v.parameters)

    return update


def _sgd(v: Vectors, momenta: list[float], arrays: Arrays) -> Update:
    """velocity = momentum·velocity + gradient; parameters −= velocity, with lr in gradient and velocity alike."""
    xp = arrays.xp
    if (velocity := v.state.get("velocity")) is None:
        return lambda _number: xp.subtract(v.parameters, v.gradient, out=v.parameters)
    column = arrays.column(momenta)

    def update(_number: int) -> None:
        xp.multiply(velocity, column, out=velocity)
        xp.add(velocity, v.gradient, out=velocity)
        xp.subtract(v.parameters, velocity, out=v.parameters)

    return update


def _adam(v: Vectors, lr: list[float], arrays: Arrays) -> Update:
    """parameters −= lr·m̂/(√v̂ + ε), with m̂ and v̂ the bias-corrected means of gradient and gradient².

    The running sums kept are m/(1 − β₁) and v/(1 − β₂), which cost two operations less; numerator and denominator are
    both scaled by √((1 − β₂ᵗ)/(1 − β₂)) to make up for it.
    """
    xp, rates = arrays.xp, arrays.column(lr)
    first, second = v.state["first_moment"], v.state["second_moment"]

    def update(number: int) -> None:
        gradient, scratch = v.gradient, v.scratch
        scale = math.sqrt((1 - BETA2**number) / (1 - BETA2))
        xp.multiply(first, BETA1, out=first)
        xp.add(first, gradient, out=first)
        xp.multiply(second, BETA2, out=second)
        xp.multiply(gradient, gradient, out=gradient)
        xp.add(second, gradient, out=second)
        xp.sqrt(second, out=scratch)
        xp.add(scratch, EPSILON * scale, out=scratch)
        xp.divide(first, scratch, out=scratch)
        xp.multiply(scratch, rates * (scale * (1 - BETA1) / (1 - BETA1**number)), out=scratch)
        xp.subtract(v.parameters, scratch, out=v.parameters)

    return update
