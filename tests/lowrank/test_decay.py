"""τ against steps of decay done one by one, and where no law is asserted."""

import math

import numpy as np
import pytest

from service.lowrank.decay import decay_law, decay_time, measured_shrinkage


def test_sgd_shrinks_by_the_law_what_gets_no_gradient() -> None:
    w = 1.0
    for _ in range(700):
        w -= 0.2 * 5e-3 * w
    assert math.exp(-(decay_time(700, 0.2, 5e-3, 0.0, "sgd") or 0)) == pytest.approx(w, rel=1e-10)


def test_momentum_multiplies_the_rate_of_sgd_and_not_of_adamw() -> None:
    assert decay_time(10, 0.1, 0.1, 0.9, "sgd") == pytest.approx(-10 * math.log(0.9), rel=1e-12)
    assert decay_time(10, 0.1, 0.1, 0.9, "adamw") == pytest.approx(-10 * math.log(0.99), rel=1e-12)


def test_momentum_decays_at_that_rate_to_first_order() -> None:
    w, velocity = 1.0, 0.0
    for _ in range(5000):
        velocity = 0.5 * velocity + 1e-3 * w
        w -= 0.1 * velocity
    assert -math.log(w) == pytest.approx(decay_time(5000, 0.1, 1e-3, 0.5, "sgd"), rel=1e-2)


@pytest.mark.parametrize(
    ("lr", "weight_decay", "momentum", "optimizer"),
    [(1e-3, 1e-2, 0.0, "adam"), (1.0, 1.0, 0.0, "sgd"), (2.0, 1.0, 0.0, "adamw"), (0.5, 0.2, 0.9, "sgd")],
)
def test_there_is_no_tau(lr: float, weight_decay: float, momentum: float, optimizer: str) -> None:
    law = decay_law(1000, lr, weight_decay, momentum, optimizer)
    assert (law.tau, law.predicted_shrinkage, law.applies) == (None, None, False)
    assert law.notes


def test_the_law_of_the_memo_applies() -> None:
    law = decay_law(3000, 0.2, 5e-3, 0.0, "sgd")
    assert law.applies
    assert law.notes == []
    assert law.tau == pytest.approx(-3000 * math.log(0.999), rel=1e-12)
    assert law.predicted_shrinkage == pytest.approx(0.999**3000, rel=1e-10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((100, 0.2, 5e-3, 0.0, "sgd"), "τ < 1"),
        ((3000, 0.2, 0.0, 0.0, "sgd"), "weight decay is 0"),
        ((3000, 1e-3, 0.1, 0.0, "adam"), "Adam"),
        ((3000, 1.0, 1.0, 0.0, "sgd"), "1 or more"),
        ((3000, 0.2, 5e-3, 0.5, "sgd"), "momentum"),
    ],
)
def test_a_note_says_what_to_know(arguments: tuple[int, float, float, float, str], said: str) -> None:
    notes = decay_law(*arguments).notes
    assert [note for note in notes if said in note] == notes != []


def test_with_momentum_tau_is_reported_and_nothing_is_predicted() -> None:
    law = decay_law(3000, 0.2, 5e-3, 0.5, "sgd")
    assert (law.tau is None, law.applies) == (False, False)
    assert decay_law(3000, 2e-3, 1.0, 0.9, "adamw").applies


def test_before_the_first_step_tau_is_zero_without_a_sign() -> None:
    for weight_decay in (0.0, 5e-3):
        tau = decay_time(0, 0.2, weight_decay, 0.0, "sgd")
        assert tau == 0
        assert math.copysign(1, tau) == 1


def test_measured_shrinkage_compares_medians() -> None:
    assert measured_shrinkage(np.array([9.0, 6.0, 2.0, 0.0]), np.array([9.0, 1.5, 0.5, 0.5])) == 0.25
    assert math.isnan(measured_shrinkage(np.array([1.0, 0.0, 0.0]), np.ones(3)))
