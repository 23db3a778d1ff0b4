"""Singular values that were put in are read back."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.errors import JobFailed
from service.lowrank.ranks import MANTISSA_BITS
from worker import decompose
from worker.decompose import difference, singular_values, spectra, svd

SHAPES = [(9, 4), (4, 9), (6, 6), (1, 5), (5, 1), (1, 1), (64, 20)]
STORED = ["float32", "float64"]
PROMISED = {"float32": 1e-9, "float64": 1e-12}  # Of σ₁, by what the weights are stored in.


def matrix_with(s: NDArray[Any], shape: tuple[int, int], seed: int = 0) -> NDArray[np.float64]:
    """A matrix of a shape with singular values s and random singular vectors."""
    rng, k = np.random.default_rng(seed), min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in shape)
    return (u * s) @ v.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("lowest", [0.5, 1e-4, 1e-7, 1e-12, 0.0])
def test_singular_values_are_those_put_in(shape: tuple[int, int], stored: str, lowest: float) -> None:
    s = np.linspace(1, lowest, min(shape)) ** 2 * 3 if lowest else np.eye(1, min(shape))[0]
    found = singular_values(matrix_with(s, shape), stored)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, s, rtol=0, atol=PROMISED[stored] * s[0])


def test_the_gram_matrix_is_trusted_only_where_it_is_good() -> None:
    """The error grows as σ falls, and with how many do: it is largest just before the full decomposition takes over."""
    for share in np.logspace(-7, -1, 600):
        for shape, seed in (((2, 4), 4), ((12, 9), 5), ((32, 32), 6)):
            k = min(shape)
            matrix = matrix_with(np.where(np.arange(k) < k / 2, 1, share), shape, seed)
            found = singular_values(matrix, "float32")
            promised = 1e-9 if share >= decompose.GRAM_LIMIT else 1e-14
            np.testing.assert_allclose(found, scipy.linalg.svdvals(matrix), rtol=0, atol=promised)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("k", [1, 2, 7])
def test_repeated_values_stay_apart_from_the_others(stored: str, k: int) -> None:
    s = np.array([5.0] * k + [2.0] * (8 - k))
    np.testing.assert_allclose(singular_values(matrix_with(s, (8, 11)), stored), s, rtol=1e-12)


def test_every_narrow_type_is_told_from_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    narrow = decompose._narrow
    monkeypatch.setattr(decompose, "_narrow", lambda batch: taken.append(1) or narrow(batch))
    for stored in ("float64", "float128", "int64", "bool"):
        singular_values(np.eye(3), stored)
    assert not taken
    eights = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    for stored in ("float32", "float16", "bfloat16", *eights):
        singular_values(np.eye(3), stored)
    assert len(taken) == 7


def test_every_float_that_torch_stores_in_less_than_float32_is_taken_as_it_is() -> None:
    for stored in MANTISSA_BITS:
        weights = torch.tensor([[3.0, 0, 0], [0, -2, 0]]).to(getattr(torch, stored))
        np.testing.assert_array_equal(singular_values(weights, stored), [3, 2])


@pytest.mark.parametrize("scale", [3e38, 1e-38, 1e-45])
def test_float32_weights_of_any_size_keep_their_values(scale: float) -> None:
    signs = scipy.linalg.hadamard(8)[:, :5] * np.float32(scale)
    expected = np.full(5, float(np.float32(scale)) * 8**0.5)
    np.testing.assert_allclose(singular_values(signs.astype(np.float32), "float32"), expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e300, 1e-300])
def test_float64_weights_of_any_size_keep_their_values(scale: float) -> None:
    s = np.array([4.0, 1.0, 1e-9])
    np.testing.assert_allclose(singular_values(matrix_with(s, (5, 3)) * scale, "float64") / scale, s, atol=1e-14)


@pytest.mark.parametrize("stored", STORED)
def test_a_batch_is_its_members_and_zero_and_nan_disturb_nobody(stored: str) -> None:
    batch = np.random.default_rng(1).standard_normal((5, 6, 4))
    batch[1] = 0
    batch[3, 2, 2] = np.inf
    batch[4] = matrix_with(np.array([1, 1e-3, 1e-8, 0]), (6, 4))
    found = singular_values(batch, stored)
    assert (found[1] == 0).all()
    assert np.isnan(found[3]).all()
    for i in (0, 2, 4):
        np.testing.assert_allclose(found[i], scipy.linalg.svdvals(batch[i]), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("stored", STORED)
def test_a_spectrum_does_not_depend_on_who_else_is_asked_for(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    shapes = [(1, 1), (6, 4), (4, 6), (1, 1), (33, 20), (6, 4), (4, 6), (1, 1), (33, 20), (6, 4)]
    matrices = [rng.standard_normal(shape) * np.logspace(0, -7 * (i % 2), shape[1]) for i, shape in enumerate(shapes)]
    matrices[5][2, 2], matrices[8][:] = np.nan, 0
    alone = [singular_values(matrix, stored) for matrix in matrices]
    for limit in (1, 30, decompose.AT_ONCE):
        monkeypatch.setattr(decompose, "AT_ONCE", limit)
        for given_as in (np.asarray, torch.from_numpy):
            found = spectra(map(given_as, matrices), stored)
            assert [s.shape for s in found] == [(min(shape),) for shape in shapes]
            for together, single in zip(found, alone, strict=True):
                np.testing.assert_array_equal(together, single)
    assert spectra([], stored) == []


def test_large_matrices_are_taken_one_at_a_time() -> None:
    """The peak stays a few matrices whatever their number."""
    started = []

    def matrices() -> Iterator[NDArray[Any]]:
        for _ in range(4):
            started.append(len(decomposed))
            yield np.ones((1024, 256))

    decomposed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        by_shape = decompose._by_shape
        patch.setattr(decompose, "_by_shape", lambda some, stored: decomposed.extend(some) or by_shape(some, stored))
        spectra(matrices(), "float32")
    assert started == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_tensors_give_what_their_numpy_twins_give(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    twin = tensor.to(torch.float64).numpy()
    name = str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(singular_values(tensor, name), singular_values(twin, name))


def test_weights_are_neither_changed_nor_required_to_be_writable() -> None:
    weights = np.arange(12.0).reshape(3, 4)
    weights.flags.writeable = False
    for stored in STORED:
        singular_values(weights, stored)
    np.testing.assert_array_equal(weights, np.arange(12.0).reshape(3, 4))


def test_a_small_update_is_not_rounded() -> None:
    initial = np.ones((4, 4), dtype=np.float32)
    step = np.float32(2.0**-23)
    weights = initial + np.diag([step, 2 * step, 3 * step, 0]).astype(np.float32)
    found = singular_values(difference(weights, initial), "float32")
    np.testing.assert_allclose(found, np.array([3, 2, 1, 0]) * 2.0**-23, rtol=1e-12)
    coarse, fine = np.ones((1, 1), dtype=np.float32), np.full((1, 1), 1e-9, dtype=np.float32)
    assert singular_values(difference(coarse, fine), "float32")[0] == 1 - float(np.float32(1e-9))


def test_svd_gives_thin_factors_that_multiply_to_the_matrix() -> None:
    for shape in SHAPES:
        weight = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        for given_as in (weight, torch.from_numpy(weight)):
            u, s, vt = svd(given_as)
            k = min(shape)
            assert (u.shape, s.shape, vt.shape) == ((shape[0], k), (k,), (k, shape[1]))
            assert {u.dtype, s.dtype, vt.dtype} == {np.dtype(np.float64)}
            np.testing.assert_allclose((u * s) @ vt, weight, atol=1e-13)
            np.testing.assert_allclose(u.T @ u, np.eye(k), atol=1e-13)


def failing(*_: Any, **__: Any) -> Any:
    raise np.linalg.LinAlgError("did not converge")


@pytest.mark.parametrize("stored", STORED)
def test_f24_where_the_fast_driver_fails_the_slow_one_answers(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eigvalsh", "svdvals", "svd"):
        monkeypatch.setattr(np.linalg, name, failing)
    s = np.array([3.0, 2.0, 1e-3])
    batch = np.stack([matrix_with(s, (5, 3)), matrix_with(2 * s, (5, 3), seed=1)])
    np.testing.assert_allclose(singular_values(batch, stored), [s, 2 * s], atol=1e-14)
    np.testing.assert_allclose(svd(batch[0])[1], s, atol=1e-14)
    monkeypatch.setattr(scipy.linalg, "svd", failing)
    for call in (lambda: singular_values(batch, stored), lambda: svd(batch[0])):
        with pytest.raises(JobFailed, match="5×3"):
            call()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.floats(-16, 0), st.sampled_from(STORED))
def test_both_ways_agree_with_scipy_and_know_no_transpose(m: int, n: int, seed: int, low: float, stored: str) -> None:
    matrix = matrix_with(np.logspace(0, low, min(m, n)), (m, n), seed)
    found = singular_values(matrix, stored)
    promised = PROMISED[stored] * found[0]
    np.testing.assert_allclose(found, scipy.linalg.svdvals(matrix), rtol=0, atol=promised)
    np.testing.assert_allclose(singular_values(matrix.T, stored), found, rtol=0, atol=promised)
    assert (np.diff(found) <= 0).all()
    assert (found >= 0).all()
