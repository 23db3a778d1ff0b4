"""The memo's data set, against the textbook's construction."""

import numpy as np
import pytest
from sklearn.datasets import make_regression

from tests.worker.reference import spec_of
from worker.datasets import make_dataset


def linear(n: int, features: int, informative: int, targets: int, seed: int):
    return make_regression(n, features, n_informative=informative, n_targets=targets, random_state=seed)


def test_the_memos_numbers_are_the_textbooks() -> None:
    x, z = linear(1000, 20, 5, 4, 3)
    data = make_dataset(spec_of(seed=3, data={"n_samples": 1000, "n_features": 20, "n_informative": 5, "n_targets": 4}))
    np.testing.assert_array_equal(data.x_train, x[:800].astype(np.float32))
    np.testing.assert_array_equal(data.x_validation, x[800:].astype(np.float32))
    y = np.tanh((z / z.std(axis=0)).astype(np.float32))
    np.testing.assert_allclose(data.y_train, y[:800], rtol=3e-6, atol=1e-7)
    np.testing.assert_allclose(data.y_validation, y[800:], rtol=3e-6, atol=1e-7)


def test_each_target_has_unit_deviation_over_all_samples() -> None:
    data = make_dataset(spec_of(data={"target": "identity"}), "float64")
    y = np.concatenate([data.y_train, data.y_validation])
    np.testing.assert_allclose(y.std(axis=0), 1, rtol=1e-12)
    assert abs(data.y_train.std(axis=0) - 1).max() > 1e-3


def test_one_target_is_a_column() -> None:
    data = make_dataset(spec_of(data={"n_targets": 1, "target": "identity", "standardize": False}), "float64")
    assert (data.y_train.shape, data.y_validation.shape) == ((33, 1), (8, 1))
    np.testing.assert_array_equal(data.y_train[:, 0], linear(41, 6, 3, 1, 0)[1][:33])


@pytest.mark.parametrize(
    ("target", "function"), [("tanh", np.tanh), ("relu", lambda z: z * (z > 0)), ("identity", lambda z: z)]
)
def test_targets_are_functions_of_the_linear_map(target: str, function) -> None:
    data = make_dataset(spec_of(data={"target": target, "standardize": False}), "float64")
    np.testing.assert_array_equal(data.y_train, function(linear(41, 6, 3, 3, 0)[1])[:33])


def test_a_constant_target_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    z = np.stack([np.full(41, 2.5), np.arange(41.0), np.arange(41.0)], axis=1)
    monkeypatch.setattr("worker.datasets.make_regression", lambda *_, **__: (np.zeros((41, 6)), z))
    data = make_dataset(spec_of(data={"target": "identity"}), "float64")
    assert (data.y_train[:, 0] == 2.5).all()


def test_the_seed_is_the_datas_own() -> None:
    one, other = spec_of(seed=1, data={"seed": 5}), spec_of(seed=2, data={"seed": 5})
    np.testing.assert_array_equal(make_dataset(one).x_train, make_dataset(other).x_train)
    assert not np.array_equal(make_dataset(one).x_train, make_dataset(spec_of(seed=1)).x_train)


def test_noise_is_what_a_linear_fit_leaves() -> None:
    spec = spec_of(data={"n_samples": 1000, "noise": 3.0, "target": "identity", "standardize": False})
    data = make_dataset(spec, "float64")
    fitted = data.x_train @ np.linalg.lstsq(data.x_train, data.y_train)[0]
    assert np.std(data.y_train - fitted) == pytest.approx(3.0, rel=0.1)
