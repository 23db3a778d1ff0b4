"""The compression report against its oracles and against matrices that were really cut."""

from typing import Any

import numpy as np
import pytest

from service.errors import BadRequestValue
from service.lowrank.compression import Rule, RuleName, break_even_rank, choose_rank, curve, report

S = np.array([4.0, 2.0, 1.0, 1.0])
SHAPE = (30, 4)  # Break-even is 3.
RULES: list[Rule] = [
    Rule("rank", rank=1),
    Rule("energy", threshold=0.99),
    Rule("error", threshold=0.1),
    Rule("budget", fraction=0.5),
    Rule("entropy_rank"),
    Rule("optimal"),
    Rule("spikes"),
]


def matrix(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape) @ np.diag(np.geomspace(1, 1e-3, shape[1]))


def chosen(rule: Rule, s: np.ndarray = S, shape: tuple[int, int] = SHAPE) -> int:
    return choose_rank(s, shape, "float32", rule)[0]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1024, 1024), 511), ((784, 300), 216), ((300, 100), 74), ((64, 1024), 60), ((10, 1), 0), ((1, 1), 0)],
)
def test_break_even_is_the_largest_rank_that_saves(shape: tuple[int, int], expected: int) -> None:
    m, n = shape
    assert break_even_rank(shape) == break_even_rank((n, m)) == expected
    assert expected * (m + n) < m * n <= (expected + 1) * (m + n)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
def test_the_curve_is_that_of_matrices_really_cut(shape: tuple[int, int]) -> None:
    w = matrix(shape)
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    columns = curve(s, shape)
    scale = np.linalg.norm(w)
    for i, r in enumerate(columns["rank"]):
        rest = w - (u[:, :r] * s[:r]) @ vt[:r]
        assert columns["parameters_after"][i] == u[:, :r].size + vt[:r].size
        assert columns["relative_frobenius_error"][i] == pytest.approx(np.linalg.norm(rest) / scale, abs=1e-10)
        assert columns["spectral_error"][i] == pytest.approx(np.linalg.norm(rest, 2), abs=1e-10 * scale)
        assert columns["energy_kept"][i] == pytest.approx(1 - (np.linalg.norm(rest) / scale) ** 2, abs=1e-10)
    np.testing.assert_array_equal(columns["kept_fraction"], columns["parameters_after"] / w.size)
    np.testing.assert_array_equal(columns["rank"], np.arange(1, min(shape) + 1))


@pytest.mark.parametrize("tail", [1e-9, 1e-17, 1e-170, 1e-300])
def test_tiny_tails_keep_their_error(tail: float) -> None:
    errors = curve(np.array([1.0, 3 * tail, 4 * tail]), (9, 3))["relative_frobenius_error"]
    np.testing.assert_allclose(errors, [5 * tail, 4 * tail, 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_scale_moves_the_spectral_error_alone(scale: float) -> None:
    plain, scaled = curve(S, SHAPE), curve(S * scale, SHAPE)
    np.testing.assert_allclose(scaled.pop("spectral_error"), plain.pop("spectral_error") * scale, rtol=1e-12)
    for name, values in plain.items():
        np.testing.assert_allclose(scaled[name], values, rtol=1e-12, atol=0, err_msg=name)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("rank", rank=3), 3),
        (Rule("energy", threshold=16 / 22), 1),
        (Rule("energy", threshold=0.73), 2),
        (Rule("energy", threshold=0.95), 3),
        (Rule("energy", threshold=1.0), 4),
        (Rule("error", threshold=(6 / 22) ** 0.5), 1),
        (Rule("error", threshold=0.52), 2),
        (Rule("error", threshold=0.22), 3),
        (Rule("error", threshold=0.0), 4),
        (Rule("budget", fraction=68 / 120), 2),
        (Rule("budget", fraction=0.566), 1),
        (Rule("budget", fraction=1.0), 3),
        (Rule("entropy_rank"), 4),
        (Rule("optimal"), 1),
        (Rule("spikes"), 1),
    ],
)
def test_each_rule_chooses_its_rank(rule: Rule, expected: int) -> None:
    assert chosen(rule) == expected


def test_the_entropy_rank_is_rounded_up_but_not_past_itself() -> None:
    for rank in range(1, 100):
        assert chosen(Rule("entropy_rank"), np.array([*[1.0] * rank, 0.0]), (rank + 1, rank + 1)) == rank
    assert chosen(Rule("entropy_rank"), np.array([1.0, 1, 0, 0])) == 2
    assert chosen(Rule("entropy_rank"), np.array([1.0, 1, 1e-3, 0])) == 3


def test_energy_and_error_are_two_words_for_one_cut() -> None:
    s = np.linalg.svd(matrix((40, 12)), compute_uv=False)
    for error in (0.5, 0.1, 0.01, 0.002):
        by_error, by_energy = Rule("error", threshold=error), Rule("energy", threshold=1 - error**2)
        assert chosen(by_error, s, (40, 12)) == chosen(by_energy, s, (40, 12))


@pytest.mark.parametrize(
    ("rule", "s", "shape"),
    [
        (Rule("optimal"), np.ones(4), (4, 4)),
        (Rule("spikes"), np.ones(4), (4, 4)),
        (Rule("optimal"), np.ones(1), (1, 4)),
        (Rule("spikes"), np.ones(1), (4, 1)),
    ],
)
def test_a_nonzero_matrix_is_raised_to_rank_one_and_told(rule: Rule, s: np.ndarray, shape: tuple[int, int]) -> None:
    rank, why = choose_rank(s, shape, "float64", rule)
    assert rank == 1
    assert "raised to 1" in why
    assert ("single singular value" in why) == (len(s) == 1)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (Rule("rank"), "rank"),
        (Rule("rank", rank=0), "rank"),
        (Rule("rank", rank=5), "rank"),
        (Rule("energy"), "threshold"),
        (Rule("energy", threshold=0.0), "threshold"),
        (Rule("energy", threshold=1.01), "threshold"),
        (Rule("energy", threshold=float("nan")), "threshold"),
        (Rule("error"), "threshold"),
        (Rule("error", threshold=-0.1), "threshold"),
        (Rule("error", threshold=1.0), "threshold"),
        (Rule("budget"), "fraction"),
        (Rule("budget", fraction=0.0), "fraction"),
        (Rule("budget", fraction=1.1), "fraction"),
        (Rule("budget", fraction=33.9 / 120), "fraction"),
    ],
)
def test_parameters_out_of_bounds_are_refused_by_name(rule: Rule, field: str) -> None:
    with pytest.raises(BadRequestValue, match=f"^{field}: "):
        chosen(rule)


@pytest.mark.parametrize("shape", [(64, 300), (784, 300), (16384, 3000), (7, 3)])
def test_the_fraction_that_a_refusal_names_is_taken(shape: tuple[int, int]) -> None:
    s = np.ones(min(shape))
    with pytest.raises(BadRequestValue) as caught:
        chosen(Rule("budget", fraction=1e-5), s, shape)
    named = float(caught.value.detail.split("at least ")[1].split()[0])
    assert chosen(Rule("budget", fraction=named), s, shape) == 1
    with pytest.raises(BadRequestValue):
        chosen(Rule("budget", fraction=named - 2e-6), s, shape)


@pytest.mark.parametrize("shape", [(30, 4), (64, 64), (37, 91)])
def test_the_fraction_of_exactly_r_ranks_gives_r(shape: tuple[int, int]) -> None:
    m, n = shape
    s = np.ones(min(shape))
    for rank in range(1, break_even_rank(shape) + 1):
        assert chosen(Rule("budget", fraction=rank * (m + n) / (m * n)), s, shape) == rank


def test_no_fraction_is_named_where_none_is_enough() -> None:
    with pytest.raises(BadRequestValue, match="even factors of rank 1"):
        chosen(Rule("budget", fraction=1.0), np.ones(1), (10, 1))


def test_the_report_of_a_square_layer_cut_to_an_eighth() -> None:
    s = np.sqrt(np.array([*[10.0] * 8, *[1.0] * 56]))
    assert report(s, (64, 64), "bfloat16", Rule("rank", rank=8)) == {
        "rule": "rank",
        "chosen_by": "given",
        "rank": 8,
        "break_even_rank": 31,
        "verdict": "compress",
        "parameters_before": 4096,
        "parameters_after": 1024,
        "kept_fraction": 0.25,
        "removed_fraction": 0.75,
        "times_smaller": 4.0,
        "relative_frobenius_error": pytest.approx((56 / 136) ** 0.5, rel=1e-12),
        "spectral_error": 1.0,
        "energy_kept": pytest.approx(80 / 136, rel=1e-12),
        "flops_before": 8192,
        "flops_after": 2048,
        "bytes_before": 8192,
        "bytes_after": 2048,
    }


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float64", 8),
        ("float32", 4),
        ("float16", 2),
        ("bfloat16", 2),
        ("float8_e4m3fn", 1),
        ("float8_e4m3fnuz", 1),
        ("float8_e5m2", 1),
        ("float8_e5m2fnuz", 1),
        ("int8", 1),
        ("bool", 1),
    ],
)
def test_bytes_are_those_of_the_stored_dtype(dtype: str, size: int) -> None:
    fields = report(S, SHAPE, dtype, Rule("rank", rank=2))
    assert (fields["bytes_before"], fields["bytes_after"]) == (120 * size, 68 * size)


@pytest.mark.parametrize("rank", [3, 4])
def test_a_layer_kept_dense_loses_and_saves_nothing(rank: int) -> None:
    fields = report(S, (5, 5), "float32", Rule("rank", rank=rank))
    dense = {
        "verdict": "keep_dense",
        "rank": rank,
        "parameters_after": 25,
        "kept_fraction": 1.0,
        "removed_fraction": 0.0,
        "times_smaller": 1.0,
        "relative_frobenius_error": 0.0,
        "spectral_error": 0.0,
        "energy_kept": 1.0,
        "flops_after": 50,
        "bytes_after": 100,
    }
    assert {name: fields[name] for name in dense} == dense


@pytest.mark.parametrize(("rank", "verdict"), [(2, "compress"), (3, "keep_dense")])
def test_the_verdict_turns_just_past_break_even(rank: int, verdict: str) -> None:
    assert break_even_rank((5, 5)) == 2
    assert report(np.ones(5), (5, 5), "float32", Rule("rank", rank=rank))["verdict"] == verdict


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_zero_matrix_is_kept_as_nothing(rule: Rule) -> None:
    fields: dict[str, Any] = report(np.zeros(4), SHAPE, "float32", rule)
    assert (fields["rank"], fields["parameters_after"], fields["times_smaller"]) == (0, 0, None)
    assert (fields["relative_frobenius_error"], fields["spectral_error"], fields["energy_kept"]) == (0.0, 0.0, 1.0)
    assert "zero" in fields["chosen_by"]


@pytest.mark.parametrize(
    ("rule", "parameters"),
    [
        (Rule("energy", threshold=0.9), {"threshold": 0.9}),
        (Rule("budget", fraction=0.5), {"fraction": 0.5}),
        (Rule("spikes"), {}),
    ],
)
def test_a_report_shows_the_parameter_of_its_rule(rule: Rule, parameters: dict[str, float]) -> None:
    fields = report(S, SHAPE, "float32", rule)
    assert {name: fields[name] for name in ("threshold", "fraction") if name in fields} == parameters


def test_every_rule_of_the_contract_is_tried_here() -> None:
    assert {rule.name for rule in RULES} == set(RuleName.__args__)
