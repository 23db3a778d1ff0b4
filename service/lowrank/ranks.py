"""Ranks and norms of a matrix as functions of its singular values.

Convention: `s` is float64 of shape (..., k), non-increasing and non-negative along its last axis; every function maps
the leading axes, so that a whole history of epochs is one call. A number that does not exist is NaN. The zero matrix
has rank 0 under every notion.
"""

import numpy as np
from numpy.typing import NDArray

from service.dtypes import MANTISSA_BITS

Array = NDArray[np.float64]
Shape = tuple[int, ...]

SLACK = 1e-12  # Relative; σ that equal a threshold up to rounding must not depend on the machine.


def spectral_norm(s: Array) -> Array:
    """σ₁."""
    return np.asarray(s[..., 0])


def frobenius_norm(s: Array) -> Array:
    """√Σσ²."""
    return times_top(s, np.sqrt(stable_rank(s)))


def nuclear_norm(s: Array) -> Array:
    """Σσ."""
    return times_top(s, scaled(s).sum(axis=-1))


def condition_number(s: Array, tolerance: float | None) -> Array:
    """σ₁/σ_k; NaN where the numerical rank is below k or unknown."""
    full = numerical_rank(s, tolerance) == s.shape[-1]
    result = np.full(s.shape[:-1], np.nan)
    return np.asarray(np.divide(s[..., 0], s[..., -1], out=result, where=full & (s[..., -1] > 0)))


def stable_rank(s: Array) -> Array:
    """Σσ²/σ₁², in [1, k] (Rudelson and Vershynin, 2007)."""
    return np.asarray(np.square(scaled(s)).sum(axis=-1))


def entropy_rank(s: Array) -> Array:
    """exp(−Σ p ln p) with p = σ/Σσ, in [1, k] (Roy and Vetterli, 2007): the memo's effective rank."""
    return _entropy_rank(scaled(s))


def energy_entropy_rank(s: Array) -> Array:
    """The same with p = σ²/Σσ²."""
    return _entropy_rank(np.square(scaled(s)))


def participation_rank(s: Array) -> Array:
    """(Σσ²)²/Σσ⁴, in [1, k]."""
    energy = np.square(scaled(s))
    return _ratio(np.square(energy.sum(axis=-1)), np.square(energy).sum(axis=-1), when_zero=0.0)


def energy_rank(s: Array, threshold: float) -> NDArray[np.int64]:
    """Least r with Σ_{i≤r} σ² ≥ threshold·Σσ²; 0 for the zero matrix."""
    energy = np.cumsum(np.square(scaled(s)), axis=-1)
    enough = energy >= threshold * energy[..., -1:] * (1 - SLACK)
    return np.where(s[..., 0] > 0, np.argmax(enough, axis=-1) + 1, 0)


def numerical_rank(s: Array, tolerance: float | None) -> Array:
    """#{σ > tolerance·σ₁}; NaN where there is no tolerance, because the dtype cannot tell."""
    if tolerance is None:
        return np.full(s.shape[:-1], np.nan)
    return count_above(scaled(s), np.asarray(tolerance)).astype(np.float64)


def top_share(s: Array, j: int) -> Array:
    """Σ_{i≤min(j,k)} σ/Σσ; NaN for the zero matrix."""
    shares = scaled(s)
    return _ratio(shares[..., :j].sum(axis=-1), shares.sum(axis=-1), when_zero=np.nan)


def normalized(s: Array) -> Array:
    """s*_j = σ_j/Σσ, of the shape of `s`; zeros for the zero matrix. What the memo draws."""
    shares = scaled(s)
    return _ratio(shares, shares.sum(axis=-1, keepdims=True), when_zero=0.0)


def rank_tolerance(shape: Shape, dtype: str) -> float | None:
    """Relative tolerance of the numerical rank, from the dtype that the weights were stored in.

    max(m, n)·ε for float64 and float32 (integers and bool: float64's), as LAPACK's rounding asks; √k·ε/2 for narrower
    floats, the Frobenius bound of their own rounding. None where it is 1 or more.
    """
    m, n = shape
    if dtype in MANTISSA_BITS:
        tolerance = np.sqrt(min(m, n)) * 2.0 ** -MANTISSA_BITS[dtype] / 2
    else:
        tolerance = max(m, n) * np.finfo(np.float32 if dtype == "float32" else np.float64).eps
    return float(tolerance) if tolerance < 1 else None


def count_above(s: Array, threshold: Array) -> NDArray[np.int64]:
    """#{σ > threshold}, equality up to rounding not counted; `threshold` has the leading shape of `s` or is 0-d."""
    return np.asarray(np.count_nonzero(s > np.expand_dims(threshold, -1) * (1 + SLACK), axis=-1))


def scaled(s: Array) -> Array:
    """σ/σ₁, zeros for the zero matrix: squares of raw singular values overflow for σ > 1e154."""
    return _ratio(s, s[..., :1], when_zero=0.0)


def times_top(s: Array, factor: Array) -> Array:
    """factor·σ₁, undoing `scaled`; infinite, without a warning, where no float64 holds it."""
    with np.errstate(over="ignore"):
        return np.asarray(s[..., 0] * factor)


def _ratio(numerator: Array, denominator: Array, when_zero: float) -> Array:
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    result = np.full(shape, when_zero)
    return np.asarray(np.divide(numerator, denominator, out=result, where=np.asarray(denominator) > 0))


def _entropy_rank(weights: Array) -> Array:
    p = _ratio(weights, weights.sum(axis=-1, keepdims=True), when_zero=0.0)
    logarithms = np.log(p, out=np.zeros_like(p), where=p > 0)
    return np.where(weights[..., 0] > 0, np.exp(-np.sum(p * logarithms, axis=-1)), 0.0)
