"""What random matrix theory says of the noise in a spectrum: the Marchenko–Pastur edge and the optimal hard threshold.

Noise on trained weights is not independent and identically distributed: these numbers inform, and decide nothing.
"""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.lowrank.ranks import Array, Shape, count_above, rank_tolerance, scaled, times_top


@functools.cache
def median_of_marchenko_pastur(beta: float) -> float:
    """μ_β, the median of the Marchenko–Pastur law with ratio β in (0, 1] and unit variance; error below 1e-15/β.

    The density is √((b − x)(x − a))/(2πβx) on [a, b] = (1 ∓ √β)². With x = a + (b − a) sin²φ its integral from a is
    elementary; quadrature in its place loses digits as β nears 1, where a pole comes close to the lower end.
    """
    root = math.sqrt(beta)

    def mass(phi: float) -> float:
        pole = math.atan2((1 + root) * math.sin(phi), (1 - root) * math.cos(phi))
        return ((1 + beta) * phi + root * math.sin(2 * phi) - (1 - beta) * pole) / (math.pi * beta)

    left, right = 0.0, math.pi / 2
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (middle, right) if mass(middle) < 0.5 else (left, middle)
    return (1 - root) ** 2 + 4 * root * math.sin(left) ** 2


def gavish_donoho_lambda(beta: float) -> float:
    """λ(β) for known noise: √(2(β+1) + 8β/(β+1+√(β²+14β+1))) (Gavish and Donoho, 2014, eq. 11)."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


def omega(beta: float) -> float:
    """ω(β) = λ(β)/√μ_β for unknown noise (Gavish and Donoho, 2014, eq. 5)."""
    return gavish_donoho_lambda(beta) / math.sqrt(median_of_marchenko_pastur(beta))


def noise_edge(s: Array, shape: Shape, dtype: str) -> Array:
    """Largest singular value of pure noise as strong as the median suggests, s of shape (..., k) → (...).

    σ̂(√m + √n) with σ̂ = median(σ)/√(max(m, n)·μ_β); never below the tolerance of the numerical rank, where there is
    one. NaN for k = 1 and for the zero matrix.
    """
    return times_top(s, _relative_edge(s, shape, dtype))


def spikes(s: Array, shape: Shape, dtype: str) -> Array:
    """#{σ > noise_edge}: what stands out of the noise. NaN where the edge is."""
    return _where_it_exists(s, count_above(scaled(s), _relative_edge(s, shape, dtype)))


def optimal_rank(s: Array, shape: Shape, dtype: str) -> Array:
    """#{σ > max(ω(β)·median(σ), tolerance)}: the rank of least error under noise (Gavish and Donoho, 2014)."""
    threshold = omega(_beta(shape)) * np.median(scaled(s), axis=-1)
    return _where_it_exists(s, count_above(scaled(s), np.maximum(threshold, _tolerance(shape, dtype))))


def _relative_edge(s: Array, shape: Shape, dtype: str) -> Array:
    """noise_edge/σ₁."""
    m, n = shape
    median_of_noise = math.sqrt(max(m, n) * median_of_marchenko_pastur(_beta(shape)))
    edge = np.median(scaled(s), axis=-1) / median_of_noise * (math.sqrt(m) + math.sqrt(n))
    return _where_it_exists(s, np.maximum(edge, _tolerance(shape, dtype)))


def _beta(shape: Shape) -> float:
    return min(shape) / max(shape)


def _tolerance(shape: Shape, dtype: str) -> float:
    return rank_tolerance(shape, dtype) or 0.0


def _where_it_exists(s: Array, values: NDArray[Any]) -> Array:
    return np.where((s[..., 0] > 0) & (s.shape[-1] > 1), values, np.nan)
