"""Random small sweeps: what a member becomes is its own affair; the grid, the grouping and the budget of batches."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service import sweeps
from service.schemas import ExperimentSpec, resolve
from service.sweeps import batches, expand, member_bytes, shared
from tests.worker.reference import in_torchs_order
from worker.trainer import Trainer, check_alike

BASE: dict[str, Any] = {
    "data": {"n_samples": 23, "n_features": 4, "n_informative": 2, "n_targets": 2},
    "network": {"hidden": [5, 4]},
    "training": {"epochs": 2, "batch_size": 8},
}
AXES: dict[str, list[Any]] = {
    "seed": [0, 1, 7],
    "data.seed": [0, 3, 4],
    "training.lr": [0.01, 0.1, 0.3],
    "training.weight_decay": [0, 1e-3, 0.1],
    "training.momentum": [0, 0.5],
    "training.batch_size": [5, 8],
    "network.init_scale": [0.5, 1],
    "network.hidden": [[5, 4], [3]],
    "network.activation": ["tanh", "relu"],
}
GRIDS = st.lists(st.sampled_from(sorted(AXES)), min_size=1, max_size=3, unique=True).flatmap(
    lambda fields: st.fixed_dictionaries({
        field: st.lists(st.sampled_from(AXES[field]), min_size=1, max_size=2, unique_by=repr) for field in fields
    })
)  # fmt: skip


def trained(specs: list[ExperimentSpec]) -> NDArray[Any]:
    trainer = Trainer(specs, dtype="float64")
    for _ in trainer.train():
        pass
    return in_torchs_order(specs[0], trainer.parameters)


def sweep(specs: list[ExperimentSpec]) -> list[NDArray[Any]]:
    """Each member's parameters, trained in the batches of a sweep."""
    found: dict[int, NDArray[Any]] = {}
    for group in batches(specs, at_once=1):
        found |= zip(group, trained([specs[place] for place in group]), strict=True)
    return [found[place] for place in range(len(specs))]


@settings(deadline=None, max_examples=20)
@given(grid=GRIDS, data=st.data())
def test_a_member_does_not_depend_on_the_others(grid: dict[str, list[Any]], data: st.DataObject) -> None:
    specs = [member.spec for member in expand({"base": BASE, "grid": grid})]
    together = sweep(specs)
    for spec, ours in zip(specs, together, strict=True):
        np.testing.assert_allclose(ours, trained([spec])[0], rtol=1e-10, atol=1e-10)
    order = data.draw(st.permutations(range(len(specs))))
    for place, ours in zip(order, sweep([specs[place] for place in order]), strict=True):
        np.testing.assert_allclose(ours, together[place], rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=10)
@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=4), data=st.data())
def test_a_members_data_seed_changes_that_member_only(seeds: list[int], data: st.DataObject) -> None:
    specs = [resolve({**BASE, "seed": 1, "data": {**BASE["data"], "seed": seed}}) for seed in seeds]
    changed = data.draw(st.integers(0, len(seeds) - 1))
    other = specs[changed].model_copy(
        update={"data": specs[changed].data.model_copy(update={"seed": (seeds[changed] + 1) % 2**32})}
    )
    before, after = sweep(specs), sweep([*specs[:changed], other, *specs[changed + 1 :]])
    for place, (one, two) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(one, two) == (place != changed)


@given(grid=GRIDS)
def test_members_are_the_product_of_the_axes_and_groups_are_alike(grid: dict[str, list[Any]]) -> None:
    members = expand({"base": BASE, "grid": grid})
    assert len(members) == math.prod(map(len, grid.values()))
    for member in members:
        for field, value in member.varied.items():
            assert sweeps.value_of(member.spec.model_dump(), field) == value
    specs = [member.spec for member in members]
    groups = batches(specs, at_once=1)
    assert sorted(place for group in groups for place in group) == list(range(len(specs)))
    for group in groups:
        check_alike([specs[place] for place in group])
    assert len({repr(shared(specs[group[0]])) for group in groups}) == len(groups)


def test_axes_hold_the_numbers_that_they_say() -> None:
    grid = {"training.lr": {"log": [0.01, 1, 3]}, "seed": {"range": [5, 7]}}
    varied = [tuple(member.varied.values()) for member in expand({"grid": grid})]
    assert varied == [(0.01, 5), (0.01, 6), (pytest.approx(0.1), 5), (pytest.approx(0.1), 6), (1.0, 5), (1.0, 6)]
    assert varied[-1][0] == 1.0


def test_a_grid_may_mend_what_the_base_alone_could_not_have() -> None:
    (member,) = expand({"base": {"data": {"n_features": 3}}, "grid": {"data.n_informative": [2]}})
    assert (member.spec.data.n_features, member.spec.data.n_informative) == (3, 2)
    assert [one.spec.training.optimizer for one in expand({"grid": {"preset": ["memo", "memo-adamw"]}})] == [
        "sgd", "adamw",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("members", "at_once", "sizes"),
    [(64, 1, [64]), (64, 2, [32, 32]), (64, 16, [8] * 8), (12, 4, [12]), (300, 1, [150, 150]), (1024, 1, [256] * 4)],
)
def test_batches_are_shared_out_and_bounded(members: int, at_once: int, sizes: list[int]) -> None:
    assert [len(group) for group in batches([resolve({})] * members, at_once)] == sizes


def test_batches_fit_memory_and_the_work_of_one_job() -> None:
    wide = resolve({"network": {"hidden": [4096, 1000]}})
    assert max(map(len, batches([wide] * 40, 1))) * member_bytes(wide) <= sweeps.BATCH_BYTES
    long = resolve({"network": {"hidden": [512, 512]}, "training": {"epochs": 10_000}, "record": {"every": 100}})
    assert all(len(group) * long.work <= sweeps.WORK_LIMIT for group in batches([long] * 200, 1))
