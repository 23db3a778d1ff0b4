"""The textbook's training, in plain torch.nn and torch.optim, with the trainer's batches: what it must agree with."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from service.schemas import ExperimentSpec, resolve
from worker.datasets import make_dataset
from worker.networks import Network, initial_parameters, named_parameters
from worker.trainer import shuffled_order

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "sigmoid": nn.Sigmoid, "identity": nn.Identity}


def spec_of(**body: Any) -> ExperimentSpec:
    """A small experiment: 41 samples, 33 of them for training, in batches of 8, so that the last batch is short."""
    base: dict[str, Any] = {
        "data": {"n_samples": 41, "n_features": 6, "n_informative": 3, "n_targets": 3},
        "network": {"hidden": [7, 5]},
        "training": {"batch_size": 8, "epochs": 4, "weight_decay": 1e-2, "lr": 0.05},
    }
    merged = {
        key: {**base[key], **body.get(key, {})} if key in base else body[key] for key in dict.fromkeys([*base, *body])
    }
    return resolve(merged)


def in_torchs_order(spec: ExperimentSpec, parameters: NDArray[Any]) -> NDArray[Any]:
    """Members' parameters (M, P) as torch would put them one after the other: W1, b1, W2, b2, …"""
    network = Network.of(parameters, spec)
    named = [named_parameters(network, member) for member in range(len(parameters))]
    return np.stack([np.concatenate([values.ravel() for values in one.values()]) for one in named])


def network_of(spec: ExperimentSpec, flat: NDArray[Any]) -> nn.Sequential:
    """The torch network with a member's parameters (P,)."""
    modules: list[nn.Module] = []
    for n_inputs, n_outputs in pairwise(spec.widths):
        modules += [nn.Linear(n_inputs, n_outputs, bias=spec.network.bias), ACTIVATIONS[spec.network.activation]()]
    network = nn.Sequential(*modules[:-1]).to(torch.from_numpy(flat).dtype)
    nn.utils.vector_to_parameters(torch.from_numpy(in_torchs_order(spec, flat[None])[0]), network.parameters())
    return network


def optimizer_of(spec: ExperimentSpec, network: nn.Module) -> torch.optim.Optimizer:
    """The torch optimizer that the specification names."""
    training, parameters = spec.training, list(network.parameters())
    common: dict[str, Any] = {"lr": training.lr, "weight_decay": training.weight_decay}
    if training.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=training.momentum, **common)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimizer]
    return kind(parameters, **common)


def train(spec: ExperimentSpec, dtype: str) -> NDArray[Any]:
    """All parameters at the end as one vector in torch's order."""
    data = make_dataset(spec, dtype)
    x, y = torch.from_numpy(data.x_train.copy()), torch.from_numpy(data.y_train.copy())
    with torch.random.fork_rng(devices=[]):
        network = network_of(spec, initial_parameters(spec).astype(dtype))
    optimizer = optimizer_of(spec, network)
    for epoch in range(1, spec.training.epochs + 1):
        order = torch.from_numpy(shuffled_order(np, np.array([[spec.seed]]), epoch, len(x))[0])
        for batch in order.split(spec.training.batch_size):
            optimizer.zero_grad()
            nn.functional.mse_loss(network(x[batch]), y[batch]).backward()
            optimizer.step()
    return nn.utils.parameters_to_vector(network.parameters()).detach().numpy()
