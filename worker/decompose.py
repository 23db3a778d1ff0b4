"""Matrices → singular values: the one place that calls a decomposition."""

from typing import Any

import numpy as np
import scipy.linalg
import torch

from service.lowrank.ranks import Array
from worker.networks import namespace, to_numpy

# Where σ_k is smaller than this share of σ₁ the Gram matrix has lost it: an error of ε·σ₁² in σ² is ε·σ₁²/2σ_k in σ_k.
GRAM_LIMIT = 1e-5

FAILED = (np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def singular_values(matrices: Any, stored_dtype: str = "float32") -> Array:
    """Singular values of a batch (M, m, n) → (M, k), float64, non-increasing.

    For weights stored in float32 or less: the eigenvalues of the Gram matrix of the smaller side, in float64. That is
    half the work of a singular value decomposition, and exact to 1e-10·σ₁ or better as far as GRAM_LIMIT; beyond it,
    and for float64, the matrix itself is decomposed. Scaled first, so that entries of 1e±300 neither overflow nor
    vanish when they are squared.
    """
    xp = namespace(matrices)
    w = xp.asarray(matrices, dtype=xp.float64)
    scale = xp.amax(xp.abs(w), (-2, -1), keepdims=True)
    scale = xp.where(scale > 0, scale, 1.0)
    w = w / scale
    s = _direct(w) if stored_dtype == "float64" else _by_gram(w)
    return np.asarray(s * to_numpy(scale)[..., 0])


def update_singular_values(now: Any, before: Any) -> Array:
    """Singular values of now − before, both (M, m, n) and stored in float32; the difference is taken in float64."""
    xp = namespace(now)
    return singular_values(xp.asarray(now, dtype=xp.float64) - before)


def svd(matrix: Any) -> tuple[Any, Any, Any]:
    """U (m, k), σ (k,), Vᵀ (k, n) of one matrix, in float64, on its device."""
    xp = namespace(matrix)
    u, s, vt = xp.linalg.svd(xp.asarray(matrix, dtype=xp.float64), full_matrices=False)
    return u, s, vt


def _by_gram(w: Any) -> Array:
    xp = namespace(w)
    tall = w.shape[-2] > w.shape[-1]
    gram = xp.matmul(w.swapaxes(-1, -2), w) if tall else xp.matmul(w, w.swapaxes(-1, -2))
    try:
        squares = to_numpy(xp.linalg.eigvalsh(gram))
    except FAILED:
        return _direct(w)
    s: Array = np.sqrt(np.maximum(squares[..., ::-1], 0.0))
    for member in np.flatnonzero((s[:, -1] < GRAM_LIMIT * s[:, 0]) & (s[:, 0] > 0)):
        s[member] = _direct(w[member])
    return s


def _direct(w: Any) -> Array:
    try:
        return to_numpy(namespace(w).linalg.svdvals(w))
    except FAILED:
        # Divide and conquer fails on rare matrices on which the older QR iteration converges.
        flat = to_numpy(w).reshape(-1, *w.shape[-2:])
        found = [scipy.linalg.svd(one, compute_uv=False, lapack_driver="gesvd") for one in flat]
        return np.stack(found).reshape(*w.shape[:-2], -1)
