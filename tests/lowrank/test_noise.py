"""The Marchenko–Pastur law and the optimal threshold against printed digits, sampled noise and planted signals."""

import math

import numpy as np
import pytest

from service.lowrank import noise

GAVISH_DONOHO = [
    (0.05, 0.98330830, 1.506607, 1.519341),
    (0.10, 0.96656515, 1.581648, 1.608772),
    (0.25, 0.91600407, 1.758029, 1.836866),
    (0.50, 0.83046588, 1.978599, 2.171185),
    (0.75, 0.74294849, 2.156094, 2.501430),
    (1.00, 0.65277594, 2.309401, 2.858362),
]


def spectrum(w: np.ndarray) -> np.ndarray:
    return np.linalg.svd(w, compute_uv=False)


def mass_below(x: float, beta: float) -> float:
    """The law's distribution function by the midpoint rule in y = √(x − a), which shares nothing with ours.

    In y the integrand is smooth, and its features are never narrower than √a, many times the step.
    """
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    step = math.sqrt(x - low) / 400_000
    y2 = ((np.arange(400_000) + 0.5) * step) ** 2
    density = y2 * np.sqrt(high - low - y2) / (math.pi * beta * (low + y2))
    return float(density.sum() * step)


@pytest.mark.parametrize(("beta", "median", "lam", "omega"), GAVISH_DONOHO)
def test_the_printed_constants(beta: float, median: float, lam: float, omega: float) -> None:
    assert noise.median_of_marchenko_pastur(beta) == pytest.approx(median, abs=5.01e-9)
    assert noise.gavish_donoho_lambda(beta) == pytest.approx(lam, abs=5.01e-7)
    assert noise.omega(beta) == pytest.approx(omega, abs=5.01e-7)


def test_the_square_case_is_four_over_root_three() -> None:
    assert noise.gavish_donoho_lambda(1.0) == pytest.approx(4 / math.sqrt(3), rel=1e-15)


@pytest.mark.parametrize("beta", [1e-3, 0.05, 0.3, 0.9, 0.999, 0.9999, 16383 / 16384, 1.0])
def test_half_the_mass_lies_below_the_median(beta: float) -> None:
    assert mass_below(noise.median_of_marchenko_pastur(beta), beta) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize(("m", "n"), [(400, 400), (800, 200), (150, 600)])
def test_sampled_noise_has_that_median(m: int, n: int) -> None:
    w = np.random.default_rng(5).normal(size=(m, n))
    median = float(np.median(spectrum(w) ** 2)) / max(m, n)
    assert median == pytest.approx(noise.median_of_marchenko_pastur(min(m, n) / max(m, n)), rel=0.02)


@pytest.mark.parametrize(("m", "n"), [(300, 300), (400, 100), (100, 400)])
def test_the_edge_of_noise_of_known_strength(m: int, n: int) -> None:
    w = 0.1 * np.random.default_rng(6).normal(size=(m, n))
    edge = float(noise.noise_edge(spectrum(w), (m, n), "float64"))
    assert edge == pytest.approx(0.1 * (math.sqrt(m) + math.sqrt(n)), rel=0.02)


@pytest.mark.parametrize("shape", [(100, 100), (200, 50), (64, 128)])
@pytest.mark.parametrize("seed", range(8))
def test_pure_noise_shows_two_spikes_at_most(shape: tuple[int, int], seed: int) -> None:
    s = spectrum(np.random.default_rng(seed).normal(size=shape))
    assert noise.spikes(s, shape, "float32") <= 2
    assert noise.optimal_rank(s, shape, "float32") == 0


@pytest.mark.parametrize("shape", [(120, 120), (200, 60), (60, 200)])
@pytest.mark.parametrize("n_planted", [1, 4])
def test_planted_spikes_are_counted(shape: tuple[int, int], n_planted: int) -> None:
    generator = np.random.default_rng(8)
    left, right = (np.linalg.qr(generator.normal(size=(side, n_planted)))[0] for side in shape)
    w = generator.normal(size=shape) + 4 * (math.sqrt(shape[0]) + math.sqrt(shape[1])) * left @ right.T
    assert n_planted <= noise.spikes(spectrum(w), shape, "float32") <= n_planted + 2
    assert noise.optimal_rank(spectrum(w), shape, "float32") == n_planted


def test_the_optimal_rank_counts_above_omega_times_the_median_of_an_even_count() -> None:
    def counted(top: float) -> float:
        return float(noise.optimal_rank(np.array([top, 3.0, 1.0, 1.0]), (4, 4), "float64"))

    threshold = noise.omega(1.0) * 2  # The median is the mean of 3 and 1.
    assert counted(threshold * 1.0001) == 1
    assert counted(threshold * 0.9999) == 0
    assert counted(threshold * (1 + 1e-13)) == 0


def test_rounding_of_the_stored_dtype_is_no_spike() -> None:
    s = np.array([1.0, 1e-6, *[1e-12] * 6])
    assert noise.spikes(s, (8, 8), "float64") == noise.optimal_rank(s, (8, 8), "float64") == 2
    assert noise.spikes(s, (8, 8), "bfloat16") == noise.optimal_rank(s, (8, 8), "bfloat16") == 1
    assert noise.noise_edge(s, (8, 8), "bfloat16") == pytest.approx(math.sqrt(8) * 2.0**-8, rel=1e-12)


def test_zero_among_others_in_a_history_has_no_edge() -> None:
    s = np.stack([np.ones(5), np.zeros(5)])
    for values in (noise.noise_edge(s, (5, 5), "float64"), noise.spikes(s, (5, 5), "float64")):
        assert np.isnan(values).tolist() == [False, True]
