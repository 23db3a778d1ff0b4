"""What random matrix theory says of the noise in a spectrum: the Marchenko–Pastur edge and the optimal hard threshold.

Noise on trained weights is not independent and identically distributed: these numbers inform, and decide nothing.
"""

import functools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.lowrank.ranks import Array, Shape, count_above, rank_tolerance

QUADRATURE_POINTS = 400


@functools.cache
def marchenko_pastur_median(beta: float) -> float:
    """μ_β, the median of the Marchenko–Pastur law with ratio β in (0, 1] and unit variance, to 1e-10.

    The density is √((b − x)(x − a))/(2πβx) on [a, b] = (1 ∓ √β)². With x = a + (b − a) sin²φ its square roots
    vanish at both ends, and Gauss–Legendre quadrature converges geometrically.
    """
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    nodes, weights = np.polynomial.legendre.leggauss(QUADRATURE_POINTS)

    def mass(phi: float) -> float:
        angles = (nodes + 1) * phi / 2
        sine2, cosine2 = np.sin(angles) ** 2, np.cos(angles) ** 2
        x = low + (high - low) * sine2
        return float(weights @ ((high - low) ** 2 * sine2 * cosine2 / (math.pi * beta * x)) * phi / 2)

    left, right = 0.0, math.pi / 2
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (middle, right) if mass(middle) < 0.5 else (left, middle)
    return low + (high - low) * math.sin(left) ** 2


def hard_threshold(beta: float) -> float:
    """λ(β) for known noise: √(2(β+1) + 8β/(β+1+√(β²+14β+1))) (Gavish and Donoho, 2014, eq. 11)."""
    return math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))


def threshold_over_median(beta: float) -> float:
    """ω(β) = λ(β)/√μ_β for unknown noise (Gavish and Donoho, 2014, eq. 5)."""
    return hard_threshold(beta) / math.sqrt(marchenko_pastur_median(beta))


def noise_edge(s: Array, shape: Shape, dtype: str) -> Array:
    """Largest singular value of pure noise as strong as the median suggests, s of shape (..., k) → (...).

    σ̂(√m + √n) with σ̂ = median(σ)/√(max(m, n)·μ_β); never below the tolerance of the numerical rank. NaN for k = 1 and
    for the zero matrix.
    """
    m, n = shape
    median_of_noise = math.sqrt(max(m, n) * marchenko_pastur_median(min(m, n) / max(m, n)))
    edge = np.median(s, axis=-1) / median_of_noise * (math.sqrt(m) + math.sqrt(n))
    return _where_it_exists(s, np.maximum(edge, _floor(s, shape, dtype)))


def spikes(s: Array, shape: Shape, dtype: str) -> Array:
    """#{σ > noise_edge}: what stands out of the noise. NaN where the edge is."""
    edge = noise_edge(s, shape, dtype)
    return np.where(np.isnan(edge), np.nan, count_above(s, np.nan_to_num(edge)))


def optimal_rank(s: Array, shape: Shape, dtype: str) -> Array:
    """#{σ > max(ω(β)·median(σ), tolerance)}: the rank of least error under noise (Gavish and Donoho, 2014)."""
    m, n = shape
    threshold = threshold_over_median(min(m, n) / max(m, n)) * np.median(s, axis=-1)
    return _where_it_exists(s, count_above(s, np.maximum(threshold, _floor(s, shape, dtype))))


def _floor(s: Array, shape: Shape, dtype: str) -> Array:
    return (rank_tolerance(shape, dtype) or 0.0) * s[..., 0]


def _where_it_exists(s: Array, values: NDArray[Any]) -> Array:
    return np.where((s[..., 0] > 0) & (s.shape[-1] > 1), values, np.nan)
