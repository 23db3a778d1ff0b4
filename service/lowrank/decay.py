"""How far weight decay alone shrinks the directions that get no gradient (Galanti et al., 2023)."""

import math
from dataclasses import dataclass

import numpy as np

from service.lowrank.ranks import Array


@dataclass(frozen=True)
class DecayLaw:
    """τ, e^−τ where the law is asserted, and what to know about it."""

    tau: float | None
    predicted_shrinkage: float | None
    notes: list[str]

    @property
    def applies(self) -> bool:
        """Whether measured shrinkage may be held against the prediction."""
        return self.predicted_shrinkage is not None


def decay_time(steps: int, lr: float, weight_decay: float, momentum: float, optimizer: str) -> float | None:
    """τ = −steps·ln(1 − lr·wd/(1 − momentum)); None for Adam, whose decay is coupled, and where lr·wd is too large.

    AdamW keeps its decay out of the momentum, so momentum is 0 in it.
    """
    rate = lr * weight_decay / (1 - (momentum if optimizer == "sgd" else 0.0))
    if optimizer == "adam" or not rate < 1:
        return None
    return steps * -math.log1p(-rate)  # In this order τ of no step is 0.0, not −0.0.


def decay_law(steps: int, lr: float, weight_decay: float, momentum: float, optimizer: str) -> DecayLaw:
    """τ over so many steps, and the shrinkage e^−τ of the median singular value where the law is asserted."""
    tau = decay_time(steps, lr, weight_decay, momentum, optimizer)
    if weight_decay == 0:
        return DecayLaw(tau, None, ["weight decay is 0: it has not moved the tail"])
    if optimizer == "adam":
        return DecayLaw(tau, None, ["Adam's weight decay is coupled with its gradient: no such law holds"])
    if tau is None:
        return DecayLaw(tau, None, ["lr·weight_decay/(1 − momentum) is 1 or more: no τ exists"])
    notes = ["τ < 1: weight decay cannot have moved the tail"] if tau < 1 else []
    if momentum and optimizer == "sgd":
        return DecayLaw(tau, None, [*notes, "with momentum the law is not asserted; τ is what it would be"])
    return DecayLaw(tau, math.exp(-tau), notes)


def measured_shrinkage(first: Array, last: Array) -> float:
    """median σ(last)/median σ(first), both (k,); NaN where the first median is 0."""
    start = float(np.median(first))
    return float(np.median(last)) / start if start > 0 else math.nan
