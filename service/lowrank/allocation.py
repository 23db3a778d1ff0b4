"""One parameter budget for a whole model: which layer gets which rank, and which stays dense.

Minimises Σ_l w_l·(energy lost by l) subject to Σ_l cost_l ≤ fraction·Σ_l m_l·n_l. Energy lost is Σ_{i>r} σ²; w_l is 1
("absolute") or 1/‖W_l‖_F² ("relative"). A layer's options are the ranks 1…break_even_rank at r(m + n), and dense at mn,
which buys all the rest for the price of a rank or less: gains do not fall along the options, so the filling goes along
the upper concave envelope of (cost, energy kept). A zero matrix has one option, rank 0 for nothing.
"""

import heapq
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from service.errors import BadRequestValue
from service.lowrank.compression import break_even_rank, relative_errors
from service.lowrank.ranks import SLACK, Array, Shape, stable_rank

Weighting = Literal["absolute", "relative"]


@dataclass(frozen=True)
class Layer:
    """A matrix of a model by its name, its shape (m, n) and its singular values (k,)."""

    name: str
    shape: Shape
    s: Array


@dataclass(frozen=True)
class Plan:
    """A rank for each layer, None where it stays dense; what they cost, and the weighted energy that they lose."""

    ranks: dict[str, int | None]
    cost: int
    objective: float


@dataclass(frozen=True)
class Allocation:
    """The plan, the bound that the objective of no plan can beat, and what one fraction for all layers would do."""

    plan: Plan
    bound: float
    uniform: Plan


@dataclass(frozen=True)
class _Options:
    """What one layer can be: (rank, cost, weighted energy lost), by rising cost."""

    ranks: tuple[int | None, ...]
    costs: NDArray[np.int64]
    lost: Array

    def best_within(self, cost: float) -> int:
        """The dearest option of at most this cost, the cheapest where none is."""
        return max(int(np.searchsorted(self.costs, cost, side="right")) - 1, 0)


def global_budget(layers: Sequence[Layer], fraction: float, weighting: Weighting) -> Allocation:
    """The better of the envelope's plan and the uniform plan, never worse than uniform, with the bound beside it.

    objective − bound ≤ the largest gain of one envelope step. Names are unique. Raises BadRequestValue for a fraction
    outside (0, 1], and for one that does not give every layer its cheapest option.
    """
    return allocator(layers, weighting)(fraction)


def allocator(layers: Sequence[Layer], weighting: Weighting) -> Callable[[float], Allocation]:
    """`global_budget` as a function of the fraction: what does not depend on it is worked out once."""
    sizes = [math.prod(layer.shape) for layer in layers]
    unit, options = _weighted_options(layers, weighting)
    fill = _filler(options)

    def allocate(fraction: float) -> Allocation:
        budget = _budget(options, fraction, sum(sizes))
        filled, bound = fill(budget)
        improved = _improve(options, filled, budget)
        uniform = _uniform(options, sizes, fraction, budget)
        chosen = min(improved, uniform, key=lambda choice: _lost(options, choice))
        plans = [_plan(layers, options, choice, unit) for choice in (chosen, uniform)]
        return Allocation(plan=plans[0], bound=bound * unit * unit, uniform=plans[1])

    return allocate


def total_energy(layers: Sequence[Layer], weighting: Weighting) -> float:
    """Σ_l w_l·‖W_l‖_F²: the objective of a plan that keeps nothing."""
    unit, energies = _weighted_energies(layers, weighting)
    return math.fsum(energies) * unit * unit


def _weighted_energies(layers: Sequence[Layer], weighting: Weighting) -> tuple[float, list[float]]:
    """A unit, and w_l·‖W_l‖_F² of each layer over its square: the squares themselves might overflow."""
    if weighting == "relative":
        return 1.0, [float(layer.s[0] > 0) for layer in layers]
    unit = max((float(layer.s[0]) for layer in layers), default=0.0) or 1.0
    return unit, [float((layer.s[0] / unit) ** 2 * stable_rank(layer.s)) for layer in layers]


def _weighted_options(layers: Sequence[Layer], weighting: Weighting) -> tuple[float, list[_Options]]:
    """The unit, and the options with energies over its square."""
    unit, energies = _weighted_energies(layers, weighting)
    return unit, [_options(layer, energy) for layer, energy in zip(layers, energies, strict=True)]


def _options(layer: Layer, weight: float) -> _Options:
    if layer.s[0] == 0:
        return _Options((0,), np.zeros(1, dtype=np.int64), np.zeros(1))
    m, n = layer.shape
    ranks = range(1, break_even_rank(layer.shape) + 1)
    lost = weight * np.square(relative_errors(layer.s)[1 : len(ranks) + 1])
    costs = np.append(np.arange(1, len(ranks) + 1, dtype=np.int64) * (m + n), m * n)
    return _Options((*ranks, None), costs, np.append(lost, 0.0))


def _budget(options: list[_Options], fraction: float, total: int) -> int:
    if not 0 < fraction <= 1:
        raise BadRequestValue("fraction", fraction, "must be over 0 and at most 1")
    budget = math.floor(fraction * total * (1 + SLACK))
    least = sum(int(option.costs[0]) for option in options)
    if least > budget:
        enough = math.ceil(least / total * 1e6) / 1e6  # Rounded up: what we name must not be refused in its turn.
        raise BadRequestValue("fraction", fraction, f"is too little for every layer: at least {enough:.6f} is needed")
    return budget


def _filler(options: list[_Options]) -> Callable[[int], tuple[list[int], float]]:
    """Budget → whole envelope edges by falling slope while they fit, and the bound.

    The first edge that does not fit gives the bound its fraction.
    """
    stops = [_envelope(option) for option in options]
    layer, cost, gain, slope = _edges(options, stops)
    order = np.argsort(-slope, kind="stable")
    spent = np.cumsum(cost[order])
    least = sum(int(option.costs[0]) for option in options)

    def fill(budget: int) -> tuple[list[int], float]:
        left = budget - least
        n_whole = int(np.searchsorted(spent, left, side="right"))
        steps = np.bincount(layer[order[:n_whole]], minlength=len(options))
        choice = [int(stop[step]) for stop, step in zip(stops, steps, strict=True)]
        bound = _lost(options, choice)
        if n_whole < len(order):
            edge = order[n_whole]
            share = (left - int(spent[n_whole] - cost[edge])) / cost[edge]
            bound = max(bound - float(share * gain[edge]), 0.0)
        return choice, bound

    return fill


def _envelope(options: _Options) -> NDArray[np.int64]:
    """The options on the upper concave envelope of (cost, energy kept): the first few ranks, then dense.

    The ranks alone are concave, because σ falls; the edge to dense leaves them where its slope is least.
    """
    last = len(options.costs) - 1
    if last == 0:
        return np.zeros(1, dtype=np.int64)
    slopes = options.lost[:-1] / (options.costs[-1] - options.costs[:-1])
    return np.append(np.arange(int(np.argmin(slopes)) + 1), last)


def _edges(
    options: list[_Options], stops: list[NDArray[np.int64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], Array, Array]:
    """Layer, cost, gain and slope of every envelope edge that gains anything, along each layer in turn."""
    costs = [np.diff(option.costs[stop]) for option, stop in zip(options, stops, strict=True)]
    gains = [-np.diff(option.lost[stop]) for option, stop in zip(options, stops, strict=True)]
    # Rounding must not let a later edge of a layer come before an earlier one.
    slopes = [np.minimum.accumulate(gain / cost) for gain, cost in zip(gains, costs, strict=True)]
    layer = np.repeat(np.arange(len(options)), [len(cost) for cost in costs])
    cost, gain, slope = _joined(costs).astype(np.int64), _joined(gains), _joined(slopes)
    useful = slope > 0
    return layer[useful], cost[useful], gain[useful], slope[useful]


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0), *parts])


def _improve(options: list[_Options], choice: list[int], budget: int) -> list[int]:
    """Single changes of one layer's option that still fit, largest gain first, until none gains.

    What is left only falls, and gains with it: a gain computed earlier is an upper bound, so a heap finds the largest,
    and a layer that took its best option has none better later.
    """
    choice = list(choice)
    left = budget - _cost(options, choice)
    heap = [(-float(option.lost[at]), i) for i, (option, at) in enumerate(zip(options, choice, strict=True))]
    heapq.heapify(heap)
    while heap:
        i = heapq.heappop(heap)[1]
        costs, lost, at = options[i].costs, options[i].lost, choice[i]
        best = options[i].best_within(int(costs[at]) + left)
        gain = float(lost[at] - lost[best])
        if gain <= 0:
            continue
        if heap and gain < -heap[0][0]:
            heapq.heappush(heap, (-gain, i))
            continue
        choice[i] = best
        left -= int(costs[best] - costs[at])
    return choice


def _uniform(options: list[_Options], sizes: list[int], fraction: float, budget: int) -> list[int]:
    """The dearest option of at most the same fraction of each layer, at least the cheapest.

    Where the cheapest options of small layers then pass the budget, the largest smaller fraction that fits.
    """

    def choose(share: float) -> list[int]:
        return [option.best_within(share * size * (1 + SLACK)) for option, size in zip(options, sizes, strict=True)]

    if _cost(options, choose(fraction)) <= budget:
        return choose(fraction)
    shares = np.unique(_joined([option.costs / size for option, size in zip(options, sizes, strict=True)])).tolist()
    n_fitting = bisect_right(shares, budget, key=lambda share: _cost(options, choose(share)))
    return choose(shares[n_fitting - 1] if n_fitting else 0.0)


def _cost(options: list[_Options], choice: list[int]) -> int:
    return sum(int(option.costs[at]) for option, at in zip(options, choice, strict=True))


def _lost(options: list[_Options], choice: list[int]) -> float:
    return math.fsum(float(option.lost[at]) for option, at in zip(options, choice, strict=True))


def _plan(layers: Sequence[Layer], options: list[_Options], choice: list[int], unit: float) -> Plan:
    ranks = {layer.name: option.ranks[at] for layer, option, at in zip(layers, options, choice, strict=True)}
    return Plan(ranks, _cost(options, choice), _lost(options, choice) * unit * unit)
