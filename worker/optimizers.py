"""PyTorch's SGD, Adam and AdamW as a few vector operations over all parameters of all members, in place."""

from collections.abc import Callable, Sequence
from typing import Any, assert_never

from service.schemas import ExperimentSpec

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # PyTorch's defaults


def make_update(xp: Any, members: Sequence[ExperimentSpec], parameters: Any, gradients: Any) -> Callable[[], None]:
    """The function that takes one step; parameters and gradients are buffers of shape (M, P), gradients are used up."""

    def column(values: list[float]) -> Any:
        return xp.asarray(values, dtype=xp.float64).reshape(-1, 1)

    def cast(values: Any) -> Any:
        return xp.asarray(values, dtype=parameters.dtype, device=parameters.device)

    lr = column([spec.training.lr for spec in members])
    decay = column([spec.training.weight_decay for spec in members])
    momentum = column([spec.training.momentum for spec in members])
    match members[0].training.optimizer:
        case "sgd" if (momentum > 0).any():
            return _momentum(xp, parameters, gradients, [cast(values) for values in (lr, decay, momentum)])
        case "sgd":
            return _sgd(xp, parameters, gradients, [cast(values) for values in (lr, 1 - lr * decay)])
        case "adam":
            return _adam(xp, parameters, gradients, [cast(lr), cast(decay), None])
        case "adamw":
            return _adam(xp, parameters, gradients, [cast(lr), None, cast(1 - lr * decay)])
        case other:
            assert_never(other)


def _sgd(xp: Any, p: Any, g: Any, rates: list[Any]) -> Callable[[], None]:
    lr, shrink = rates

    def update() -> None:
        xp.multiply(p, shrink, out=p)
        xp.multiply(g, lr, out=g)
        xp.subtract(p, g, out=p)

    return update


def _momentum(xp: Any, p: Any, g: Any, rates: list[Any]) -> Callable[[], None]:
    lr, decay, momentum = rates
    velocity, scratch = xp.zeros_like(p), xp.zeros_like(p)

    def update() -> None:
        xp.multiply(p, decay, out=scratch)
        xp.add(g, scratch, out=g)
        xp.multiply(velocity, momentum, out=velocity)
        xp.add(velocity, g, out=velocity)
        xp.multiply(velocity, lr, out=scratch)
        xp.subtract(p, scratch, out=p)

    return update


def _adam(xp: Any, p: Any, g: Any, rates: list[Any]) -> Callable[[], None]:
    """Kingma and Ba (2015); with `decay` coupled into the gradient (Adam) or `shrink` beside it (AdamW)."""
    lr, decay, shrink = rates
    mean, square, scratch, rate = xp.zeros_like(p), xp.zeros_like(p), xp.zeros_like(p), xp.zeros_like(lr)
    step = 0

    def update() -> None:
        nonlocal step
        step += 1
        if decay is not None:
            xp.multiply(p, decay, out=scratch)
            xp.add(g, scratch, out=g)
        if shrink is not None:
            xp.multiply(p, shrink, out=p)
        xp.subtract(g, mean, out=scratch)
        xp.multiply(scratch, 1 - BETA1, out=scratch)
        xp.add(mean, scratch, out=mean)
        xp.square(g, out=g)
        xp.multiply(g, 1 - BETA2, out=g)
        xp.multiply(square, BETA2, out=square)
        xp.add(square, g, out=square)
        xp.sqrt(square, out=scratch)
        xp.multiply(scratch, (1 - BETA2**step) ** -0.5, out=scratch)
        xp.add(scratch, EPSILON, out=scratch)
        xp.divide(mean, scratch, out=scratch)
        xp.multiply(lr, 1 / (1 - BETA1**step), out=rate)
        xp.multiply(scratch, rate, out=scratch)
        xp.subtract(p, scratch, out=p)

    return update
