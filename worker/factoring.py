"""Matrix and rank → the two factors as they are stored, and how far their product is from the matrix.

W (m×n) ≈ B·A with A (r×n) and B (m×r), from W = UΣVᵀ cut at rank r. All is worked out in float64; the factors are
rounded once, to the dtype that they are stored in, and the measured error is that of the rounded ones.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.dtypes import NARROW, item_bytes
from service.errors import CannotFactor
from service.lowrank.compression import relative_errors
from service.lowrank.ranks import Array
from service.schemas import FactorDtype, Split
from worker.decompose import svd
from worker.reading import Matrix

FORMULAS: dict[Split, str] = {
    "balanced": "W ≈ B·A, where W = UΣVᵀ is cut at the layer's rank, B = U√Σ and A = √ΣVᵀ",
    "left": "W ≈ B·A, where W = UΣVᵀ is cut at the layer's rank, B = UΣ and A = Vᵀ",
}
BLOCK_ENTRIES = 1 << 20  # The product is compared by blocks of rows, so that it never exists as a whole.


@dataclass(frozen=True)
class Errors:
    """How far a layer in the file is from the layer: what the spectrum promises, and what the stored numbers give.

    `relative_frobenius` is √(Σ_{i>r}σ²/Σσ²), `spectral` is σ_{r+1}; `measured` is ‖W − B·A‖_F/‖W‖_F after rounding.
    """

    relative_frobenius: float = 0.0
    spectral: float = 0.0
    measured: float = 0.0


@dataclass(frozen=True)
class Factors:
    """A (r, n) and B (m, r) in the dtype that they are stored in."""

    a: torch.Tensor
    b: torch.Tensor
    errors: Errors


def auto_dtype(stored: str) -> FactorDtype:
    """The dtype of factors where none was asked for: float32 for weights in narrow floats, otherwise float64."""
    return "float32" if stored in NARROW else "float64"


def factor(matrix: Matrix, rank: int, dtype: FactorDtype, split: Split) -> Factors:
    """The best factors of a rank 0…k of a finite matrix. Raises CannotFactor where they do not fit the dtype."""
    u, s, vt = svd(matrix.values)
    root = np.sqrt(s[:rank])
    left, right = (root, root) if split == "balanced" else (s[:rank], np.ones(rank))
    at_b = matrix.exponent // 2 if split == "balanced" else matrix.exponent
    at_a = matrix.exponent - at_b
    b = rounded(u[:, :rank] * left, at_b, dtype)
    a = rounded(right[:, None] * vt[:rank], at_a, dtype)
    wide = _scaled(a, -at_a)
    errors = Errors(
        relative_frobenius=float(relative_errors(s)[rank]),
        spectral=_spectral(float(np.append(s, 0.0)[rank]), matrix.exponent),
        measured=_distance(matrix.values.numpy(), lambda rows: _scaled(b[rows], -at_b) @ wide),
    )
    return Factors(a, b, errors)


def dense(matrix: Matrix, dtype: FactorDtype) -> tuple[torch.Tensor, Errors]:
    """The matrix itself (m, n) in a dtype. Raises CannotFactor where it does not fit."""
    values = matrix.values.numpy()
    stored = rounded(values, matrix.exponent, dtype)
    return stored, Errors(measured=_distance(values, lambda rows: _scaled(stored[rows], -matrix.exponent)))


def rounded(values: Array, exponent: int, dtype: FactorDtype) -> torch.Tensor:
    """values·2^exponent in a dtype, contiguous. Raises CannotFactor where that makes an entry infinite."""
    with np.errstate(over="ignore"):
        wide = torch.from_numpy(np.ldexp(values, exponent) if exponent else np.ascontiguousarray(values))
    result = wide.to(getattr(torch, dtype))
    if not torch.isfinite(result).all():
        raise CannotFactor(
            f"entries up to {_largest(wide.numpy()):.3g} do not fit {dtype}, whose largest number is "
            f"{torch.finfo(result.dtype).max:.3g}; ask for a wider dtype or split=balanced"
        )
    return result


def widened(chunks: Iterable[bytes], dtype: str, wider: FactorDtype) -> Iterator[bytes]:
    """The same numbers in another dtype, for a format that has no name for theirs; a chunk may end within a number."""
    size, rest = item_bytes(dtype), b""
    for chunk in chunks:
        rest += chunk
        whole = len(rest) // size * size
        if whole:
            yield _widen(rest[:whole], dtype, wider)
        rest = rest[whole:]
    yield rest  # Empty, or a count of bytes that is wrong and must stay so, to be noticed.


def _widen(numbers: bytes, dtype: str, wider: FactorDtype) -> bytes:
    if dtype == "float128":
        with np.errstate(over="ignore"):
            return np.frombuffer(numbers, np.dtype(dtype)).astype(wider).tobytes()
    narrow = torch.frombuffer(bytearray(numbers), dtype=getattr(torch, dtype))
    return narrow.to(getattr(torch, wider)).numpy().tobytes()


def _scaled(stored: torch.Tensor, exponent: int) -> Array:
    return np.asarray(np.ldexp(stored.double().numpy(), exponent))


def _spectral(sigma: float, exponent: int) -> float:
    with np.errstate(over="ignore"):
        result = float(np.ldexp(sigma, exponent))
    return min(result, float(np.finfo(np.float64).max))  # JSON has no infinity.


def _distance(matrix: Array, stored: Callable[[slice], Array]) -> float:
    """‖W − S‖_F/‖W‖_F, where `stored` gives any rows of S; 0 where W is zero."""
    largest = _largest(matrix)
    if largest == 0:
        return 0.0
    distances, norms = [], []
    step = max(1, BLOCK_ENTRIES // matrix.shape[1])
    for start in range(0, len(matrix), step):
        rows = slice(start, start + step)
        # Divided first: squares of entries over 1e154 would overflow.
        distances.append(np.linalg.norm((matrix[rows] - stored(rows)) / largest))
        norms.append(np.linalg.norm(matrix[rows] / largest))
    return float(np.linalg.norm(distances) / np.linalg.norm(norms))


def _largest(values: NDArray[Any]) -> float:
    """max |entry|, without a copy of the whole; 0 where there are none."""
    return max(float(values.max()), -float(values.min())) if values.size else 0.0
