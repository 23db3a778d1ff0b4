"""Cut curves against networks whose weight was truncated by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import r2_score

from tests.worker.reference import spec_of
from worker import cuts
from worker.cuts import cut_curves
from worker.networks import Network, initial_parameters

ACTIVATE = {
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "identity": lambda z: z,
}
HIDDEN = {1: [7], 2: [7, 5], 4: [5, 9, 4, 6]}


def example(activation: str = "tanh", hidden: int = 2, bias: bool = True) -> tuple[Network, NDArray[Any], NDArray[Any]]:
    """A network with weights twice PyTorch's, inputs, and targets that follow its answers loosely."""
    spec = spec_of(network={"hidden": HIDDEN[hidden], "activation": activation, "bias": bias, "init_scale": 2.0})
    network = Network.of(initial_parameters(spec)[None], spec)[0]
    rng = np.random.default_rng(hidden)
    x = rng.standard_normal((37, 6)).astype(np.float32)
    y = answer(network, activation, x) + 0.1 * rng.standard_normal((37, 3))
    return network, x, y.astype(np.float32)


def answer(network: Network, activation: str, x: NDArray[Any], cut: int = -1, rank: int = 0) -> NDArray[Any]:
    """The network's answer in float64, with one layer truncated."""
    h = x.astype(np.float64)
    for i, weight in enumerate(network.weights):
        w = weight.astype(np.float64)
        if i == cut:
            u, s, vt = np.linalg.svd(w, full_matrices=False)
            w = (u[:, :rank] * s[:rank]) @ vt[:rank]
        h = h @ w.T
        if network.bias:
            h = h + network.biases[i]
        if i < len(network.weights) - 1:
            h = ACTIVATE[activation](h)
    return h


@pytest.mark.parametrize("activation", ACTIVATE)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("bias", [True, False])
def test_cut_curves_are_those_of_truncated_networks(activation: str, hidden: int, bias: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(cuts, "CHUNK", 100)  # several chunks, the last one short
    network, x, y = example(activation, hidden, bias)
    curves = cut_curves(network, activation, x, y)
    assert list(curves) == [f"W{i + 1}" for i in range(hidden + 1)]
    for layer, (losses, r2) in enumerate(curves.values()):
        k = min(network.weights[layer].shape)
        assert losses.shape == r2.shape == (k,)
        for rank in range(1, k + 1):
            cut = answer(network, activation, x, layer, rank)
            assert losses[rank - 1] == pytest.approx(((cut - y) ** 2).mean(), rel=1e-9)
            assert r2[rank - 1] == pytest.approx(r2_score(y, cut), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("activation", ACTIVATE)
def test_torch_tensors_give_the_same_curves(activation: str) -> None:
    network, x, y = example(activation)
    twin = Network([torch.from_numpy(layer) for layer in network.layers], network.bias)
    ours, theirs = cut_curves(network, activation, x, y), cut_curves(twin, activation, torch.tensor(x), torch.tensor(y))
    for name, (losses, r2) in ours.items():
        np.testing.assert_allclose(theirs[name][0], losses, rtol=1e-10)
        np.testing.assert_allclose(theirs[name][1], r2, rtol=1e-10)
        assert isinstance(theirs[name][0], np.ndarray)


def test_the_last_point_is_the_uncut_network() -> None:
    network, x, y = example(hidden=4)
    expected = ((answer(network, "tanh", x) - y) ** 2).mean()
    for losses, _ in cut_curves(network, "tanh", x, y).values():
        assert losses[-1] == pytest.approx(expected, rel=1e-9)
        assert losses[0] > 2 * expected


def test_only_the_layers_asked_for_are_cut() -> None:
    network, x, y = example()
    all_curves = cut_curves(network, "tanh", x, y)
    (only,) = cut_curves(network, "tanh", x, y, ["W2"]).items()
    assert only[0] == "W2"
    np.testing.assert_array_equal(only[1], all_curves["W2"])


def test_without_validation_samples_the_curves_are_nan() -> None:
    network, x, y = example()
    for name, curve in cut_curves(network, "tanh", x[:0], y[:0]).items():
        for values in curve:
            assert values.shape == (min(network.weights[int(name[1:]) - 1].shape),)
            assert np.isnan(values).all()


def test_a_target_that_does_not_vary_has_a_loss_but_no_r2() -> None:
    network, x, y = example()
    y[:, 1] = 0.1
    losses, r2 = cut_curves(network, "tanh", x, y, ["W1"])["W1"]
    assert np.isfinite(losses).all()
    assert np.isnan(r2).all()


def test_nothing_that_was_passed_is_changed() -> None:
    network, x, y = example()
    arrays = [*network.weights, *(network.biases or []), x, y]
    before = [array.copy() for array in arrays]
    cut_curves(network, "tanh", x, y)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_a_layer_of_zeros_costs_the_same_at_every_rank() -> None:
    network, x, y = example()
    network.weights[1][:] = 0
    losses, _ = cut_curves(network, "tanh", x, y, ["W2"])["W2"]
    np.testing.assert_allclose(losses, ((answer(network, "tanh", x) - y) ** 2).mean(), rtol=1e-12)
