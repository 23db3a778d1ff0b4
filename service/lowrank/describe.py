"""All numbers of a spectrum by name: the fields of the API."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.lowrank import noise, ranks
from service.lowrank.ranks import Array, Shape

COUNTS = {"energy_rank_90", "energy_rank_95", "energy_rank_99", "numerical_rank", "spikes", "optimal_rank"}


LINEAR = {"spectral_norm", "frobenius_norm", "nuclear_norm", "noise_edge", "spectral_error"}


def rescaled(fields: Mapping[str, Any], exponent: int) -> dict[str, Any]:
    """The fields of W from those of W/2^exponent: norms scale, ranks and shares do not.

    None stays None, and so does what no float64 holds.
    """
    if exponent == 0:
        return dict(fields)
    return {name: times_power(value, exponent) if name in LINEAR else value for name, value in fields.items()}


def times_power(value: float | None, exponent: int) -> float | None:
    """value·2^exponent; None for None, and where no float64 holds it."""
    try:
        return None if value is None else math.ldexp(value, exponent)
    except OverflowError:
        return None


def describe(s: Array, shape: Shape, dtype: str) -> list[dict[str, float | int | None]]:
    """Every rank and norm of each row of `s`, (rows, k), of matrices of one shape stored in `dtype`.

    Counts are integers; a number that does not exist is None.
    """
    tolerance = ranks.rank_tolerance(shape, dtype)
    columns: dict[str, NDArray[Any]] = {
        "spectral_norm": ranks.spectral_norm(s),
        "frobenius_norm": ranks.frobenius_norm(s),
        "nuclear_norm": ranks.nuclear_norm(s),
        "condition_number": ranks.condition_number(s, tolerance),
        "stable_rank": ranks.stable_rank(s),
        "entropy_rank": ranks.entropy_rank(s),
        "energy_entropy_rank": ranks.energy_entropy_rank(s),
        "participation_rank": ranks.participation_rank(s),
        "energy_rank_90": ranks.energy_rank(s, 0.90),
        "energy_rank_95": ranks.energy_rank(s, 0.95),
        "energy_rank_99": ranks.energy_rank(s, 0.99),
        "numerical_rank": ranks.numerical_rank(s, tolerance),
        "top_share_1": ranks.top_share(s, 1),
        "top_share_5": ranks.top_share(s, 5),
        "noise_edge": noise.noise_edge(s, shape, dtype),
        "spikes": noise.spikes(s, shape, dtype),
        "optimal_rank": noise.optimal_rank(s, shape, dtype),
    }
    listed = [_listed(values, int if name in COUNTS else float) for name, values in columns.items()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*listed, strict=True)]


def _listed(values: NDArray[Any], kind: Callable[[float], float | int]) -> list[float | int | None]:
    return [kind(value) if exists else None for value, exists in zip(values, np.isfinite(values), strict=True)]


FIELDS = tuple(describe(np.ones((1, 2)), (2, 2), "float32")[0])  # The names of them all.
