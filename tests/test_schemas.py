"""The specification: presets, overrides, and what the derived numbers are."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from service.errors import BadRequestValue, BudgetExceeded
from service.schemas import PRESETS, ExperimentSpec, resolve

EPOCHS, HIDDEN = st.integers(1, 1000), st.lists(st.integers(1, 50), min_size=1, max_size=15)
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "preset": st.sampled_from(list(PRESETS)),
        "seed": st.integers(0, 2**32 - 1),
        "training": st.fixed_dictionaries({}, optional={"epochs": EPOCHS, "lr": st.floats(1e-6, 10)}),
        "network": st.fixed_dictionaries({}, optional={"hidden": HIDDEN}),
        "record": st.fixed_dictionaries({}, optional={"every": st.integers(1, 2000)}),
        "data": st.fixed_dictionaries({}, optional={"seed": st.none() | st.integers(0, 9)}),
    },
)


@given(BODIES)
def test_a_resolved_specification_resolves_to_itself_and_keeps_every_field_given(body: dict[str, Any]) -> None:
    spec = resolve(body)
    assert resolve(spec.model_dump()) == spec
    assert ExperimentSpec.model_validate_json(spec.model_dump_json()) == spec
    shown = spec.model_dump()
    for part in ("training", "network", "record"):
        assert body.get(part, {}).items() <= shown[part].items()
    given_seed = body.get("data", {}).get("seed")
    assert spec.data.seed == (spec.seed if given_seed is None else given_seed)


@given(BODIES)
def test_first_and_last_epoch_are_always_recorded_in_order(body: dict[str, Any]) -> None:
    spec = resolve(body)
    epochs = spec.recorded_epochs
    assert spec.n_recorded == len(epochs)
    assert (epochs[0], epochs[-1]) == (0, spec.training.epochs)
    assert epochs == sorted(set(epochs))
    assert all(epoch % spec.record.every == 0 for epoch in epochs[:-1])


@given(BODIES)
def test_shapes_and_parameters_are_those_of_the_torch_network(body: dict[str, Any]) -> None:
    spec = resolve(body)
    layers = [nn.Linear(n, m, device="meta") for n, m in zip(spec.widths, spec.widths[1:], strict=False)]
    assert list(spec.shapes.values()) == [tuple(layer.weight.shape) for layer in layers]
    assert spec.parameters == sum(parameter.numel() for layer in layers for parameter in layer.parameters())


def test_a_field_overrides_its_preset_and_leaves_the_rest() -> None:
    spec = resolve({"preset": "raw-relu", "training": {"epochs": 3}, "network": {"hidden": [7]}})
    assert (spec.training.epochs, spec.training.batch_size, spec.training.optimizer) == (3, 128, "adam")
    assert (spec.network.hidden, spec.network.activation) == ([7], "relu")


@pytest.mark.parametrize(("n", "fraction", "training"), [(1000, 0.2, 800), (10, 0.25, 8), (5, 0.0, 5), (3, 0.5, 1)])
def test_the_split_is_whole(n: int, fraction: float, training: int) -> None:
    data = {"n_samples": n, "validation_fraction": fraction}
    spec = resolve({"data": data, "training": {"batch_size": 2}})
    assert (spec.n_training, spec.n_validation) == (training, n - training)
    assert spec.steps_per_epoch == -(-training // 2)


def test_the_parameter_budget_is_exact() -> None:
    limit = {"data": {"n_features": 1, "n_informative": 1, "n_targets": 1}}
    with pytest.raises(BudgetExceeded, match="parameters"):
        resolve({**limit, "network": {"hidden": [4096, 4096, 4096, 4096]}})
    assert resolve({**limit, "network": {"hidden": [4096, 4096, 4000]}}).parameters < 5 * 10**7


def test_rules_between_fields_name_the_field() -> None:
    with pytest.raises(BadRequestValue, match="/training/batch_size"):
        resolve({"data": {"n_samples": 10}})
