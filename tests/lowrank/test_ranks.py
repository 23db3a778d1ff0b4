"""Every rank and norm against the tables of its definition, its closed forms and its invariances."""

import itertools
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.lowrank import describe, ranks

K = 7
TABLE: dict[str, np.ndarray] = {
    "given": np.array([4.0, 2.0, 1.0, 1.0]),
    "identity": np.ones(K),
    "rank one": np.array([3.0, *[0.0] * (K - 1)]),
    "zero": np.zeros(K),
}
EDGE_OVER_MEDIAN = 2 / 0.65277594163357**0.5  # Of a square matrix.
ORACLES: dict[str, tuple[float | None, ...]] = {
    "spectral_norm": (4, 1, 3, 0),
    "frobenius_norm": (4.690415759823430, K**0.5, 3, 0),
    "nuclear_norm": (8, K, 3, 0),
    "condition_number": (4, 1, None, None),
    "stable_rank": (1.375, K, 1, 0),
    "entropy_rank": (3.363585661014858, K, 1, 0),
    "energy_entropy_rank": (2.276321519683230, K, 1, 0),
    "participation_rank": (1.766423357664234, K, 1, 0),
    "energy_rank_90": (2, 7, 1, 0),
    "energy_rank_95": (3, 7, 1, 0),
    "energy_rank_99": (4, 7, 1, 0),
    "numerical_rank": (4, K, 1, 0),
    "top_share_1": (0.5, 1 / K, 1, None),
    "top_share_5": (1, 5 / K, 1, None),
    "noise_edge": (1.5 * EDGE_OVER_MEDIAN, EDGE_OVER_MEDIAN, 3 * K * 2.0**-52, None),
    "spikes": (1, 0, 1, None),
    "optimal_rank": (0, 0, 1, None),
}
CELLS = [(field, column, ORACLES[field][i]) for field in ORACLES for i, column in enumerate(TABLE)]
RANK_FIELDS = [
    field for field in ORACLES if field not in {"spectral_norm", "frobenius_norm", "nuclear_norm", "noise_edge"}
]


def described(s: np.ndarray, shape: tuple[int, int] | None = None, dtype: str = "float64") -> dict[str, Any]:
    return describe(s[None], shape or (len(s), len(s)), dtype)[0]


def of_matrix(w: np.ndarray) -> dict[str, Any]:
    return described(np.linalg.svd(w, compute_uv=False), w.shape)


@pytest.mark.parametrize(("field", "column", "expected"), CELLS)
def test_every_cell_of_the_table(field: str, column: str, expected: float | None) -> None:
    value = described(TABLE[column])[field]
    assert value is None if expected is None else value == pytest.approx(expected, rel=1e-14)


def test_the_fields_are_those_of_the_contract_and_counts_are_integers() -> None:
    fields = described(TABLE["given"])
    assert list(fields) == list(ORACLES)
    counts = {name for name, value in fields.items() if isinstance(value, int)}
    assert counts == {"energy_rank_90", "energy_rank_95", "energy_rank_99", "numerical_rank", "spikes", "optimal_rank"}


@pytest.mark.parametrize("k", [1, 2, 3, 10, 64, 100])
@pytest.mark.parametrize("percent", [90, 95, 99])
def test_energy_rank_of_an_identity_is_the_ceiling(k: int, percent: int) -> None:
    assert ranks.energy_rank(np.ones(k), percent / 100) == -(-percent * k // 100)


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("k", [2, 5, 40])
def test_geometric_spectra_have_closed_forms(q: float, k: int) -> None:
    s = q ** np.arange(k)
    assert ranks.stable_rank(s) == pytest.approx((1 - q ** (2 * k)) / (1 - q**2), rel=1e-12)
    assert ranks.nuclear_norm(s) == pytest.approx((1 - q**k) / (1 - q), rel=1e-12)
    assert ranks.top_share(s, 2) == pytest.approx((1 - q**2) / (1 - q**k), rel=1e-12)


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.floats(-3, 3), st.integers(0, 2**32 - 1))
def test_the_ranks_are_ordered(m: int, n: int, inner: int, spread: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    left, right = generator.normal(size=(m, inner)), generator.normal(size=(inner, n))
    s = np.linalg.svd(left * 10 ** (spread * generator.random(inner)) @ right, compute_uv=False)
    chain = [
        1.0,
        ranks.stable_rank(s),
        ranks.participation_rank(s),
        ranks.energy_entropy_rank(s),
        ranks.entropy_rank(s),
        np.count_nonzero(s),
        len(s),
    ]
    assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(chain))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
def test_transposing_and_orthogonal_factors_change_nothing(shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(3)
    w = generator.normal(size=shape) @ np.diag(np.geomspace(1, 1e-2, shape[1]))
    left, right = (np.linalg.qr(generator.normal(size=(side, side)))[0] for side in shape)
    expected = pytest.approx(of_matrix(w), rel=1e-9)
    assert of_matrix(w.T) == expected
    assert of_matrix(left @ w @ right) == expected


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-3, 1e3, 1e200, 1e300])
@pytest.mark.parametrize("column", ["given", "identity", "rank one"])
def test_ranks_ignore_scale_and_norms_follow_it(column: str, scale: float) -> None:
    plain, large = described(TABLE[column]), described(TABLE[column] * scale)
    for field in RANK_FIELDS:
        same = plain[field] is None and large[field] is None
        assert same or large[field] == pytest.approx(plain[field], rel=1e-12), field
    for field in set(ORACLES) - set(RANK_FIELDS):
        assert large[field] == pytest.approx(plain[field] * scale, rel=1e-12, abs=0), field


@pytest.mark.parametrize("top", [1e308, 1e-320])
def test_the_ends_of_float64_keep_the_ranks_without_a_warning(top: float) -> None:
    fields = described(np.array([1, 0.5, 0.25, 0.25]) * top)
    for field in RANK_FIELDS:
        assert fields[field] == pytest.approx(ORACLES[field][0], rel=1e-3), field
    assert fields["frobenius_norm"] == pytest.approx(top * 1.1726039, rel=1e-3)
    assert (fields["nuclear_norm"] is None) == (top > 1)  # 2e308 is no float64.


def test_no_scale_moves_the_tolerance_even_among_denormals() -> None:
    s = np.array([100.0, 1.0])  # 1 is over bfloat16's √2·2⁻⁸ of 100, and stays so.
    assert ranks.numerical_rank(s, 0.009) == 2
    assert ranks.numerical_rank(s * 5e-324, 0.009) == 2
    assert ranks.numerical_rank(s * 5e-324, 0.011) == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((30, 20), "float64", 30 * 2.0**-52),
        ((20, 30), "float32", 30 * 2.0**-23),
        ((20, 30), "int8", 30 * 2.0**-52),
        ((20, 30), "bool", 30 * 2.0**-52),
        ((16, 30), "float16", 4 * 2.0**-11),
        ((30, 16), "bfloat16", 4 * 2.0**-8),
        ((16, 30), "float8_e4m3fn", 4 * 2.0**-4),
        ((16, 30), "float8_e4m3fnuz", 4 * 2.0**-4),
        ((16, 30), "float8_e5m2", 4 * 2.0**-3),
        ((16, 30), "float8_e5m2fnuz", 4 * 2.0**-3),
        ((64, 80), "float8_e5m2", None),
        ((63, 80), "float8_e5m2", 63**0.5 * 2.0**-3),
    ],
)
def test_the_tolerance_is_that_of_the_stored_dtype(shape: tuple[int, int], dtype: str, expected: float | None) -> None:
    assert ranks.rank_tolerance(shape, dtype) == expected


def test_a_rank_one_matrix_stored_in_float32_has_rank_one() -> None:
    generator = np.random.default_rng(0)
    w = np.outer(generator.normal(size=90), generator.normal(size=60)).astype(np.float32).astype(np.float64)
    s = np.linalg.svd(w, compute_uv=False)
    assert described(s, w.shape, "float32")["numerical_rank"] == 1
    assert described(s, w.shape, "float64")["numerical_rank"] > 1


def test_where_the_dtype_cannot_tell_there_is_no_numerical_rank_and_no_condition() -> None:
    fields = described(np.ones(64), (64, 64), "float8_e5m2")
    assert fields["numerical_rank"] is None
    assert fields["condition_number"] is None


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_one_singular_value(value: float) -> None:
    fields = described(np.array([value]), (1, 9))
    assert [fields[name] for name in ("noise_edge", "spikes", "optimal_rank")] == [None, None, None]
    assert fields["condition_number"] == (1.0 if value else None)
    assert fields["entropy_rank"] == fields["numerical_rank"] == (value > 0)


def test_equality_up_to_rounding_is_equality() -> None:
    s = np.array([1.0, 0.25])
    assert ranks.numerical_rank(s, 0.25 * (1 - 1e-13)) == 1
    assert ranks.numerical_rank(s, 0.25 * (1 - 1e-11)) == 2
    assert ranks.energy_rank(np.array([3.0, 1.0]), 0.9 * (1 + 1e-13)) == 1
    assert ranks.energy_rank(np.array([3.0, 1.0]), 0.9 * (1 + 1e-11)) == 2


def test_normalized_singular_values_sum_to_one_and_those_of_zero_are_zeros() -> None:
    s = np.stack([[4.0, 2.0, 1.0, 1.0], np.zeros(4)])
    np.testing.assert_array_equal(ranks.normalized(s), [[0.5, 0.25, 0.125, 0.125], [0, 0, 0, 0]])


def test_a_history_is_its_epochs_one_by_one() -> None:
    history = np.sort(np.random.default_rng(1).random((5, 6)))[:, ::-1].copy()
    history[3] = 0
    assert describe(history, (6, 9), "float32") == [described(s, (6, 9), "float32") for s in history]
    assert describe(history[:0], (6, 9), "float32") == []


def test_a_long_history_takes_milliseconds() -> None:
    history = np.sort(np.random.default_rng(1).random((1000, 64)))[:, ::-1]
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        describe(history, (64, 64), "float32")
        durations.append(time.perf_counter() - start)
    assert min(durations) < 0.1
