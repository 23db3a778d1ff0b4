"""Factors of matrices whose singular values were put in, and their errors."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.worker.test_decompose import matrix_with
from worker import factoring
from worker.factoring import CannotFactor, auto_dtype, dense, factor, rounded, widened
from worker.reading import Matrix

SPLITS = ["balanced", "left"]
EPSILON = {"float64": 1e-14, "float32": 1e-6, "float16": 1e-2, "bfloat16": 1e-1}


def matrix_of(values: NDArray[Any], exponent: int = 0) -> Matrix:
    return Matrix(torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)), exponent, ())


def product(found: factoring.Factors) -> NDArray[np.float64]:
    return found.b.double().numpy() @ found.a.double().numpy()


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    share=st.floats(0, 1),
    dtype=st.sampled_from(["float64", "float32"]),
    split=st.sampled_from(SPLITS),
    decades=st.floats(0, 12),
)
@settings(max_examples=150, deadline=None)
def test_the_stored_factors_have_the_promised_error(
    shape: tuple[int, int], share: float, dtype: Any, split: Any, decades: float
) -> None:
    k = min(shape)
    s = np.logspace(1, 1 - decades, k)
    rank, matrix = round(share * k), matrix_with(s, shape)
    found = factor(matrix_of(matrix), rank, dtype, split)
    assert (found.a.shape, found.b.shape) == ((rank, shape[1]), (shape[0], rank))
    assert str(found.a.dtype) == str(found.b.dtype) == f"torch.{dtype}"
    promised = np.linalg.norm(s[rank:]) / np.linalg.norm(s)
    distance = np.linalg.norm(matrix - product(found)) / np.linalg.norm(matrix)
    assert found.errors.relative_frobenius == pytest.approx(promised, rel=1e-10, abs=1e-13)
    assert found.errors.spectral == pytest.approx(s[rank] if rank < k else 0, abs=1e-12)
    assert found.errors.measured == pytest.approx(distance, rel=1e-9, abs=1e-15)
    assert found.errors.measured == pytest.approx(promised, abs=1e-6)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("dtype", list(EPSILON))
def test_the_measured_error_tells_of_the_rounding(dtype: Any, split: Any) -> None:
    found = factor(matrix_of(matrix_with(np.array([3.0, 2.0, 1.0]), (7, 3))), 3, dtype, split)
    assert found.errors.relative_frobenius == found.errors.spectral == 0
    assert EPSILON[dtype] / 1e3 < found.errors.measured < EPSILON[dtype]


def test_a_split_says_which_factor_has_the_singular_values() -> None:
    s = np.array([9.0, 4.0, 1.0])
    norms = {}
    for split in SPLITS:
        found = factor(matrix_of(matrix_with(s, (3, 8))), 2, "float64", split)  # type: ignore[arg-type]
        norms[split] = (found.b.norm(dim=0).numpy(), found.a.norm(dim=1).numpy())
    np.testing.assert_allclose(norms["balanced"], [[3, 2], [3, 2]], rtol=1e-12)
    np.testing.assert_allclose(norms["left"], [[9, 4], [1, 1]], rtol=1e-12)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e300, 1e-300])
def test_huge_and_tiny_entries_neither_overflow_nor_vanish(scale: float, split: Any) -> None:
    s = np.array([1.0, 0.5, 0.25])
    matrix = matrix_with(s, (6, 3)) * scale
    found = factor(matrix_of(matrix), 1, "float64", split)
    assert found.errors.measured == pytest.approx(np.sqrt(5 / 21), rel=1e-12)
    assert found.errors.spectral == pytest.approx(0.5 * scale, rel=1e-12)
    np.testing.assert_allclose(product(found) / scale, product(factor(matrix_of(matrix / scale), 1, "float64", split)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("exponent", [7, -7, 600, -601])
def test_a_power_of_two_is_put_back(exponent: int, split: Any) -> None:
    matrix = matrix_with(np.array([1.0, 0.5, 0.25]), (3, 9))
    found = factor(matrix_of(matrix, exponent), 3, "float64", split)
    np.testing.assert_allclose(np.ldexp(product(found), -exponent), matrix, rtol=0, atol=1e-14)
    assert found.errors.measured < 1e-14
    assert factor(matrix_of(matrix, exponent), 2, "float64", split).errors.spectral == pytest.approx(
        float(np.ldexp(0.25, exponent)), rel=1e-12
    )


def test_the_error_is_measured_over_all_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factoring, "BLOCK_ENTRIES", 13)
    s = np.array([4.0, 2.0, 1.0, 1.0])
    found = factor(matrix_of(matrix_with(s, (11, 4))), 1, "float64", "balanced")
    assert found.errors.measured == pytest.approx(np.sqrt(6 / 22), rel=1e-12)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_zero_matrix_has_no_error(rank: int) -> None:
    found = factor(matrix_of(np.zeros((4, 3))), rank, "float32", "balanced")
    assert (found.a.shape, found.b.shape) == ((rank, 3), (4, rank))
    assert found.errors == factoring.Errors(0, 0, 0)


def test_what_does_not_fit_the_dtype_is_refused_with_the_figures() -> None:
    large = matrix_of(matrix_with(np.array([1e6, 1.0]), (2, 2)))
    with pytest.raises(CannotFactor, match=r"do not fit float16, whose largest number is 6\.55e\+04"):
        factor(large, 1, "float16", "left")
    assert factor(large, 1, "float16", "balanced").errors.measured < 1e-3
    with pytest.raises(CannotFactor, match="do not fit float32"):
        dense(matrix_of(np.ones((2, 2)), 200), "float32")
    with pytest.raises(CannotFactor, match="do not fit float64"):
        rounded(np.ones((2, 2)), 2000, "float64")


def test_a_matrix_left_dense_is_rounded_once() -> None:
    values = np.array([[1.0, 1 + 2**-30], [0.0, 1.0]])
    stored, errors = dense(matrix_of(values, 3), "float32")
    np.testing.assert_array_equal(stored.numpy(), [[8, 8], [0, 8]])
    assert errors.measured == pytest.approx(2**-30 / np.sqrt(3), rel=1e-6)
    assert dense(matrix_of(values), "float64")[1] == factoring.Errors(0, 0, 0)


@pytest.mark.parametrize(
    ("stored", "factors"),
    [
        *[(name, "float32") for name in ("float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2fnuz")],
        *[(name, "float64") for name in ("float64", "float128", "int8", "uint64", "bool")],
    ],
)
def test_factors_are_as_wide_as_the_weights(stored: str, factors: str) -> None:
    assert auto_dtype(stored) == factors


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2fnuz"])
def test_numbers_are_widened_whatever_the_chunks(dtype: str) -> None:
    numbers = torch.tensor([0.5, -2.0, 3.0, 1.5], dtype=torch.float32)
    content = numbers.to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()
    wide = b"".join(widened([content[:1], b"", content[1:]], dtype, "float32"))
    np.testing.assert_array_equal(np.frombuffer(wide, np.float32), numbers)


def test_long_doubles_are_narrowed_and_a_part_of_a_number_is_kept() -> None:
    numbers = np.array([1.5, -2.0], np.longdouble)
    chunks = [numbers.tobytes()[:20], numbers.tobytes()[20:]]
    np.testing.assert_array_equal(np.frombuffer(b"".join(widened(chunks, "float128", "float64"))), [1.5, -2])
    assert len(b"".join(widened([b"abc"], "bfloat16", "float32"))) == 5
