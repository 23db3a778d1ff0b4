"""What keeping a matrix W (m×n) as two factors of rank r saves and costs: functions of its singular values.

Rank r means W ≈ U_r diag(σ₁…σ_r) V_rᵀ, r(m + n) parameters; its errors are exact by Eckart and Young (1936).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np

from service.dtypes import item_bytes
from service.errors import BadRequestValue
from service.lowrank import noise, ranks
from service.lowrank.ranks import SLACK, Array, Shape

R2_LOST = 0.01  # What a cut may cost of R² where nobody says how much.
RuleName = Literal["rank", "energy", "error", "budget", "entropy_rank", "optimal", "spikes"]


@dataclass(frozen=True)
class Rule:
    """How a rank is chosen, with the one parameter that the rule has."""

    name: RuleName
    rank: int | None = None
    threshold: float | None = None
    fraction: float | None = None


def break_even_rank(shape: Shape) -> int:
    """The largest r with r(m + n) < mn; 0 where no factorisation saves."""
    m, n = shape
    return (m * n - 1) // (m + n)


def rank_within_r2(r2_by_rank: Array) -> int | None:
    """The least rank whose cut costs at most R2_LOST of the whole's R², from R² (k,) at rank 1…k; None without R²."""
    if not np.isfinite(r2_by_rank[-1]):
        return None
    return int(np.argmax(r2_by_rank >= r2_by_rank[-1] - R2_LOST)) + 1


def relative_errors(s: Array) -> Array:
    """‖W − W_r‖_F/‖W‖_F for r = 0…k, of shape (k + 1,); summed from the smallest, so that tiny tails stay exact."""
    tails = np.append(np.hypot.accumulate(ranks.scaled(s)[::-1])[::-1], 0.0)  # Squares underflow below 1e-162.
    return tails / tails[0] if tails[0] > 0 else tails


def curve(s: Array, shape: Shape) -> dict[str, Array | np.ndarray[Any, Any]]:
    """Sizes and errors for r = 1…k, each of shape (k,); always of the two factors, also where they save nothing."""
    m, n = shape
    r = np.arange(1, len(s) + 1)
    errors = relative_errors(s)[1:]
    return {
        "rank": r,
        "parameters_after": r * (m + n),
        "kept_fraction": r * (m + n) / (m * n),
        "relative_frobenius_error": errors,
        "spectral_error": np.append(s[1:], 0.0),
        "energy_kept": 1 - np.square(errors),
    }


def choose_rank(s: Array, shape: Shape, dtype: str, rule: Rule) -> tuple[int, str]:
    """The rank of a rule for one spectrum (k,), and the sentence that says why.

    A nonzero matrix never gets rank 0, the zero matrix always. Raises BadRequestValue for a parameter out of bounds.
    """
    rank, reason = _by_rule(s, shape, dtype, rule)
    if s[0] == 0:
        return 0, "the matrix is zero: nothing is to be kept"
    if rank < 1:
        return 1, f"{reason}; raised to 1, since the matrix is not zero"
    return rank, reason


def _by_rule(s: Array, shape: Shape, dtype: str, rule: Rule) -> tuple[int, str]:
    match rule.name:
        case "rank":
            return _given(s, rule.rank)
        case "energy":
            return _by_energy(s, rule.threshold)
        case "error":
            return _by_error(s, rule.threshold)
        case "budget":
            return _by_budget(s, shape, rule.fraction)
        case "entropy_rank":
            rank = float(ranks.entropy_rank(s))
            return min(math.ceil(rank - 1e-9), len(s)), f"entropy rank {rank:.6g}, rounded up"
        case "optimal" | "spikes":
            return _by_noise(s, shape, dtype, rule.name)
        case _:
            assert_never(rule.name)


def _given(s: Array, rank: int | None) -> tuple[int, str]:
    if rank is None or not 1 <= rank <= len(s):
        raise BadRequestValue("rank", rank, f"must be 1 to {len(s)} for this layer")
    return rank, "given"


def _by_energy(s: Array, threshold: float | None) -> tuple[int, str]:
    if threshold is None or not 0 < threshold <= 1:
        raise BadRequestValue("threshold", threshold, "must be over 0 and at most 1")
    return int(ranks.energy_rank(s, threshold)), f"least rank that keeps {threshold:g} of Σσ²"


def _by_error(s: Array, threshold: float | None) -> tuple[int, str]:
    if threshold is None or not 0 <= threshold < 1:
        raise BadRequestValue("threshold", threshold, "must be at least 0 and below 1")
    enough = relative_errors(s) <= threshold * (1 + SLACK)
    return int(np.argmax(enough)), f"least rank with a relative Frobenius error of at most {threshold:g}"


def _by_budget(s: Array, shape: Shape, fraction: float | None) -> tuple[int, str]:
    m, n = shape
    if fraction is None or not 0 < fraction <= 1:
        raise BadRequestValue("fraction", fraction, "must be over 0 and at most 1")
    rank = min(math.floor(fraction * m * n * (1 + SLACK) / (m + n)), len(s))
    if rank < 1:
        raise BadRequestValue("fraction", fraction, _advice((m + n) / (m * n)))
    return rank, f"largest rank whose factors have at most {fraction:g} of the parameters"


def _advice(least: float) -> str:
    if least > 1:
        return "is below one rank, and so is any: even factors of rank 1 are larger than this layer"
    # Rounded up: the fraction that we name must not be refused in its turn.
    return f"is below one rank: at least {math.ceil(least * 1e6) / 1e6:.6f} gives this layer one"


def _by_noise(s: Array, shape: Shape, dtype: str, name: Literal["optimal", "spikes"]) -> tuple[int, str]:
    count = float((noise.optimal_rank if name == "optimal" else noise.spikes)(s, shape, dtype))
    if math.isnan(count):
        return 0, "a single singular value has no noise to stand out of"
    threshold = "the optimal hard threshold" if name == "optimal" else "the noise edge"
    return int(count), f"{int(count)} singular values above {threshold}"


def report(s: Array, shape: Shape, dtype: str, rule: Rule) -> dict[str, Any]:
    """The report for one spectrum (k,): the rank that the rule chose, and what it saves and costs.

    A layer whose factors would not be smaller is kept dense: nothing saved, nothing lost.
    """
    m, n = shape
    rank, chosen_by = choose_rank(s, shape, dtype, rule)
    dense = rank > break_even_rank(shape)
    after = m * n if dense else rank * (m + n)
    error = 0.0 if dense else float(relative_errors(s)[rank])
    parameters = {name: getattr(rule, name) for name in ("rank", "threshold", "fraction")}
    return {
        "rule": rule.name,
        **{name: value for name, value in parameters.items() if value is not None},
        "chosen_by": chosen_by,
        "rank": rank,
        "break_even_rank": break_even_rank(shape),
        "verdict": "keep_dense" if dense else "compress",
        "parameters_before": m * n,
        "parameters_after": after,
        "kept_fraction": after / (m * n),
        "removed_fraction": 1 - after / (m * n),
        "times_smaller": m * n / after if after else None,
        "relative_frobenius_error": error,
        "spectral_error": float(np.append(s, 0.0)[len(s) if dense else rank]),
        "energy_kept": 1 - error**2,
        "flops_before": 2 * m * n,
        "flops_after": 2 * after,
        "bytes_before": m * n * item_bytes(dtype),
        "bytes_after": after * item_bytes(dtype),
    }
