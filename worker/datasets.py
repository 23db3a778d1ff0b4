"""The memo's data: Y = target(Z) with Z = AX linear, from scikit-learn's make_regression."""

from typing import Any, NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import make_regression

from service.lowrank.ranks import Array
from service.schemas import ExperimentSpec, Target

Floats = NDArray[np.floating[Any]]


class Dataset(NamedTuple):
    """Inputs (n, features) and targets (n, targets); the first samples train, the last ones validate."""

    x_train: Floats
    y_train: Floats
    x_validation: Floats
    y_validation: Floats


def make_dataset(spec: ExperimentSpec, dtype: str = "float32") -> Dataset:
    """The data of an experiment, a function of `data` and its seed alone; computed in float64, rounded to `dtype`."""
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
    x, y = x.astype(dtype), _apply(data.target, z).astype(dtype)
    n = spec.n_training
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
