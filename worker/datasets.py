"""The memo's data: Y = target(Z) with Z = AX linear, from scikit-learn's make_regression."""

from typing import NamedTuple, assert_never

import numpy as np
from sklearn.datasets import make_regression

from service.lowrank.ranks import Array
from service.schemas import ExperimentSpec, Target


class Dataset(NamedTuple):
    """Inputs (n, features) and targets (n, targets), float64; the first samples train, the last ones validate."""

    x_train: Array
    y_train: Array
    x_validation: Array
    y_validation: Array


def make(spec: ExperimentSpec) -> Dataset:
    """The data of an experiment, a function of `data` and its seed alone."""
    data = spec.data
    x, z = make_regression(
        data.n_samples,
        data.n_features,
        n_informative=data.n_informative,
        n_targets=data.n_targets,
        noise=data.noise,
        random_state=spec.seed if data.seed is None else data.seed,
    )
    z = z.reshape(data.n_samples, data.n_targets)  # One target comes back as a vector.
    if data.standardize:
        z = _standardized(z)
    y, n = _apply(data.target, z), spec.n_training
    return Dataset(x[:n], y[:n], x[n:], y[n:])


def _standardized(z: Array) -> Array:
    """Each column divided by its standard deviation over all samples."""
    # Raw targets have a standard deviation near 100·√(n_informative/3), which tanh would make ±1.
    deviation = z.std(axis=0)
    # A constant column has nothing to scale, and dividing it by 0 would turn it into NaN.
    return np.asarray(z / np.where(deviation > 0, deviation, 1))


def _apply(target: Target, z: Array) -> Array:
    match target:
        case "tanh":
            return np.tanh(z)
        case "relu":
            return np.maximum(z, 0)
        case "identity":
            return z
        case _:
            assert_never(target)
