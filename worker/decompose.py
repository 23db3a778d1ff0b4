"""Matrix → singular values and factors: the one place that calls an SVD. Everything is worked out in float64."""

from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from service.errors import NoConvergence
from service.lowrank.ranks import Array
from worker.networks import Tensor

# Just above it the Gram matrix was wrong by 2e-13·σ₁ at most in 6000 matrices; just above 1e-5, by 2e-11·σ₁.
GRAM_LIMIT = 1e-3
FAILED = (np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def singular_values(weights: Tensor, stored_dtype: str) -> Array:
    """Singular values (…, k), non-increasing, of matrices (…, m, n): numpy in float64 whatever came in.

    Every σ is good to 1e-12·σ₁. Squares must not overflow, so values of narrow floats are taken through their Gram
    matrix, where they cannot: `stored_dtype` says what the weights are stored in, however they are passed. The Gram
    matrix costs least, and its error in σ is about ε·σ₁²/(2σ): a matrix with a σ below 1e-3·σ₁ is decomposed again in
    full, and float64 weights, whose own rounding is finer than that error, always are. A matrix that is not finite has
    NaN for singular values, so that one diverged member does not take the others' from them. Raises NoConvergence.
    """
    matrices = _float64(weights)
    batch = matrices.reshape(-1, *matrices.shape[-2:])
    s = np.full((len(batch), min(batch.shape[1:])), np.nan)
    finite = torch.isfinite(batch).all(2).all(1)
    known = finite.cpu().numpy()
    if _is_narrow(stored_dtype):
        s[known] = _through_gram(batch[finite])
        # Where σ₁ is 0 this asks for nothing: the zero matrix is done.
        again = known & (s[:, -1] < GRAM_LIMIT * s[:, 0])
    else:
        again = known
    if again.any():
        s[again] = _in_full(batch[torch.from_numpy(again).to(batch.device)])
    return s.reshape(*matrices.shape[:-2], -1)


def difference(weights: Tensor, initial: Tensor) -> Tensor:
    """weights − initial as a float64 torch tensor, so that an update far smaller than its weight is not rounded."""
    return _float64(weights) - _float64(initial)


def svd(weight: Tensor) -> tuple[Array, Array, Array]:
    """The thin factors u (m, k), s (k,), vt (k, n) of one finite matrix, float64. Raises NoConvergence."""
    matrix = _float64(weight).cpu().numpy()
    try:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    except FAILED:
        u, s, vt = _slowly(matrix, compute_uv=True)
    return u, s, vt


def _float64(matrices: Tensor) -> torch.Tensor:
    if isinstance(matrices, torch.Tensor):
        return matrices.detach().to(torch.float64)
    return torch.from_numpy(np.array(matrices, dtype=np.float64))  # A copy: torch warns about read-only memory.


def _is_narrow(stored_dtype: str) -> bool:
    return "float" in stored_dtype and stored_dtype != "float64"


def _through_gram(batch: torch.Tensor) -> Array:
    """(N, m, n) → (N, k): square roots of the eigenvalues of the smaller of WWᵀ and WᵀW."""
    m, n = batch.shape[1:]
    gram = batch @ batch.mT if m <= n else batch.mT @ batch
    try:
        squares = torch.linalg.eigvalsh(gram)
    except FAILED:
        return _in_full(batch)
    return np.asarray(squares.flip(1).clamp(min=0).sqrt().cpu())


def _in_full(batch: torch.Tensor) -> Array:
    """(N, m, n) → (N, k)."""
    try:
        return np.asarray(torch.linalg.svdvals(batch).cpu())
    except FAILED:
        return np.stack([_slowly(matrix, compute_uv=False) for matrix in batch.cpu().numpy()])


def _slowly(matrix: NDArray[Any], *, compute_uv: bool) -> Any:
    """The slower of LAPACK's two drivers, which converges on the rare matrix that the faster one gives up on."""
    try:
        return scipy.linalg.svd(matrix, full_matrices=False, compute_uv=compute_uv, lapack_driver="gesvd")
    except np.linalg.LinAlgError as error:
        shape = "×".join(map(str, matrix.shape))
        raise NoConvergence(f"LAPACK found no singular values of a {shape} matrix by gesdd nor by gesvd") from error
