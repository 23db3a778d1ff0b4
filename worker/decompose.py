"""Matrix → singular values and factors: the one place that calls an SVD. Everything is worked out in float64.

Numpy does it on the CPU, torch on any other device: numpy's LAPACK calls cost a third of torch's on tiny matrices, and
its W·Wᵀ half of torch's on large ones, since it sees that the product is symmetric.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray

from service.dtypes import NARROW
from service.errors import NoConvergence
from service.lowrank.ranks import Array
from worker.networks import Tensor, as_numpy, namespace_of

# Just above it the Gram matrix was wrong by 1.5e-10·σ₁ at most in 39 000 matrices of 1 to 300 a side, worst where half
# of the σ lie there, and by 2.6e-10·σ₁ at 3072 a side; just above 1e-6 it would be 1.8e-9·σ₁.
GRAM_LIMIT = 1e-5
AT_ONCE = 2**18  # Values decomposed together; beyond it a batch only costs memory.
FAILED = (np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


def singular_values(weights: Tensor, stored_dtype: str) -> Array:
    """Singular values (…, k), non-increasing, of matrices (…, m, n): numpy in float64 whatever came in.

    Every σ is good to 1e-12·σ₁ for weights stored in float64, and to 1e-9·σ₁ for weights stored in float32 or less,
    whose own rounding moves σ by more. `stored_dtype` says what they are stored in, however they are passed. Narrow
    ones are taken through their Gram matrix, which costs least and in which their squares cannot overflow; its error
    in σ is about ε·σ₁²/(2σ), so a matrix with a σ below GRAM_LIMIT·σ₁ is decomposed again in full. A matrix that is
    not finite has NaN for singular values, so that one diverged member does not take the others' from them. Raises
    NoConvergence.
    """
    m, n = weights.shape[-2:]
    batch = weights.reshape(-1, m, n)
    step = max(1, AT_ONCE // (m * n))
    found = [_decompose(batch[start : start + step], stored_dtype) for start in range(0, len(batch), step)]
    return np.concatenate(found).reshape(*weights.shape[:-2], -1)


def spectra(matrices: Iterable[Tensor], stored_dtype: str) -> list[Array]:
    """The singular values (k,) of each of many matrices (m, n), as `singular_values` gives them one by one.

    Equal shapes are decomposed together, which is what makes many tiny matrices cheap. The matrices are taken from
    the iterable as they are needed, so that of large ones only a few exist at a time.
    """
    found: list[Array] = []
    waiting: list[Tensor] = []
    n_values = 0
    for matrix in matrices:
        waiting.append(matrix)
        n_values += matrix.shape[0] * matrix.shape[1]
        if n_values >= AT_ONCE:
            found += _by_shape(waiting, stored_dtype)
            waiting, n_values = [], 0
    return found + _by_shape(waiting, stored_dtype)


def difference(weights: Tensor, initial: Tensor) -> Tensor:
    """weights − initial in float64, so that an update far smaller than its weight is not rounded."""
    result = _float64(weights, copy=True)
    result -= _float64(initial)
    return result


def svd(weight: Tensor) -> tuple[Array, Array, Array]:
    """The thin factors u (m, k), s (k,), vt (k, n) of one finite matrix, float64. Raises NoConvergence."""
    matrix = as_numpy(_float64(weight))
    try:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    except FAILED:
        u, s, vt = _slowly(matrix, compute_uv=True)
    return u, s, vt


def _by_shape(matrices: list[Tensor], stored_dtype: str) -> list[Array]:
    places = defaultdict(list)
    for place, matrix in enumerate(matrices):
        places[tuple(matrix.shape)].append(place)
    found: dict[int, Array] = {}
    for alike in places.values():
        first = matrices[alike[0]]
        batch = first[None] if len(alike) == 1 else namespace_of(first).stack([matrices[place] for place in alike])
        found.update(zip(alike, singular_values(batch, stored_dtype), strict=True))
    return [found[place] for place in range(len(matrices))]


def _decompose(batch: Tensor, stored_dtype: str) -> Array:
    """(N, m, n) → (N, k)."""
    try:
        return _narrow(batch) if stored_dtype in NARROW else _where_finite(_float64(batch), _in_full)
    except FAILED:
        if len(batch) == 1:
            return np.stack([_slowly(as_numpy(_float64(batch[0])), compute_uv=False)])
        # One at a time, so that the others' values come from where they always do.
        return np.concatenate([_decompose(batch[place : place + 1], stored_dtype) for place in range(len(batch))])


def _narrow(batch: Tensor) -> Array:
    """(N, m, n) → (N, k), through the Gram matrices where those are good enough."""
    s = _where_finite(_gram(batch), _roots)
    # Neither NaN nor the zero matrix asks for more: they are done.
    again = np.flatnonzero(s[:, -1] < GRAM_LIMIT * s[:, 0])
    if again.size:
        s[again] = _in_full(_float64(_take(batch, again)))
    return s


def _where_finite(batch: Tensor, decompose: Callable[[Tensor], Array]) -> Array:
    known = np.flatnonzero(as_numpy(namespace_of(batch).isfinite(batch).all((1, 2))))
    if known.size == len(batch):
        return decompose(batch)
    s = np.full((len(batch), min(batch.shape[1:])), np.nan)
    if known.size:
        s[known] = decompose(_take(batch, known))
    return s


def _take(batch: Tensor, places: NDArray[np.intp]) -> Tensor:
    # All of a batch is the batch itself: of a large matrix a copy is dear.
    return batch if places.size == len(batch) else batch[places.tolist()]


def _float64(weights: Tensor, *, copy: bool = False) -> Tensor:
    """In float64, and as numpy where it is in the CPU's memory; a view where that is enough, unless a copy is asked."""
    if not isinstance(weights, torch.Tensor):
        return np.array(weights, dtype=np.float64, copy=copy or None)
    wide = weights.detach().to(torch.float64, copy=copy)
    return wide.numpy() if wide.device.type == "cpu" else wide


def _gram(batch: Tensor) -> Tensor:
    """(N, m, n) → (N, k, k): the smaller of WWᵀ and WᵀW, not finite where W is not."""
    matrices = _float64(batch)
    m, n = matrices.shape[1:]
    with np.errstate(all="ignore"):
        return matrices @ matrices.mT if m <= n else matrices.mT @ matrices


def _roots(gram: Tensor) -> Array:
    """(N, k, k) → (N, k): square roots of the eigenvalues."""
    squares = as_numpy(namespace_of(gram).linalg.eigvalsh(gram))[:, ::-1]
    return np.asarray(np.sqrt(squares.clip(0)))


def _in_full(batch: Tensor) -> Array:
    """(N, m, n) → (N, k)."""
    return np.asarray(as_numpy(namespace_of(batch).linalg.svdvals(batch)))


def _slowly(matrix: NDArray[Any], *, compute_uv: bool) -> Any:
    """The slower of LAPACK's two drivers, which converges on the rare matrix that the faster one gives up on."""
    try:
        return scipy.linalg.svd(matrix, full_matrices=False, compute_uv=compute_uv, lapack_driver="gesvd")
    except np.linalg.LinAlgError as error:
        shape = "×".join(map(str, matrix.shape))
        raise NoConvergence(f"LAPACK found no singular values of a {shape} matrix by gesdd nor by gesvd") from error
