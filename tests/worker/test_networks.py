"""Initial parameters, their names and their views."""

import numpy as np
import torch
from torch import nn

from tests.worker.reference import in_torchs_order, network_of, spec_of
from worker.networks import Network, forward, initial_parameters, named_parameters


def textbook_network(seed: int, scale: float = 1.0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
    for parameter in network.parameters():
        parameter.data *= scale
    return network


def test_initial_parameters_are_pytorchs_for_the_seed() -> None:
    for scale in (1.0, 0.1, 0.0):
        expected = nn.utils.parameters_to_vector(textbook_network(11, scale).parameters()).detach().numpy()
        spec = spec_of(seed=11, network={"init_scale": scale})
        found = initial_parameters(spec)
        np.testing.assert_array_equal(in_torchs_order(spec, found[None])[0], expected)
        assert found.dtype == np.float32


def test_without_bias_pytorch_draws_the_weights_alone() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        layers = [nn.Linear(6, 7, bias=False), nn.Linear(7, 5, bias=False), nn.Linear(5, 3, bias=False)]
    expected = np.concatenate([layer.weight.detach().numpy().ravel() for layer in layers])
    np.testing.assert_array_equal(initial_parameters(spec_of(seed=4, network={"bias": False})), expected)


def test_global_random_streams_are_untouched() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    initial_parameters(spec_of(seed=9))
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


def test_named_parameters_are_copies_under_pytorchs_names() -> None:
    spec = spec_of()
    flat = np.stack([initial_parameters(spec), 2 * initial_parameters(spec)])
    named = named_parameters(Network.of(flat, spec), 1)
    assert list(named) == ["W1.weight", "W1.bias", "W2.weight", "W2.bias", "W3.weight", "W3.bias"]
    for found, parameter in zip(named.values(), textbook_network(0, 2.0).parameters(), strict=True):
        np.testing.assert_array_equal(found, parameter.detach().numpy())
    named["W1.weight"][:] = 0
    assert flat.all()


def test_forward_is_pytorchs_for_every_activation_and_namespace() -> None:
    x = np.random.default_rng(0).standard_normal((9, 6))
    for activation in ("tanh", "relu", "sigmoid", "identity"):
        for bias in (True, False):
            spec = spec_of(network={"activation": activation, "bias": bias})
            flat = initial_parameters(spec).astype(np.float64)
            expected = network_of(spec, flat)(torch.from_numpy(x)).detach().numpy()
            for one, inputs in ((flat, x), (torch.from_numpy(flat), torch.from_numpy(x))):
                found = forward(Network.of(one[None], spec), activation, inputs[None])
                np.testing.assert_allclose(np.asarray(found[0]), expected, rtol=1e-13, atol=1e-14)
