"""The trainer against plain PyTorch, numpy against torch, a batch of members against each alone."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import r2_score

from service.schemas import ExperimentSpec, resolve
from tests.worker import reference
from tests.worker.reference import spec_of
from worker import scores
from worker.datasets import make_dataset
from worker.networks import as_numpy, forward
from worker.trainer import Snapshot, Trainer, shuffled_order

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.1},
    "momentum": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9},
    "adam": {"optimizer": "adam", "lr": 1e-2},
    "adamw": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1},
    "undecayed": {"optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.0},
}
DEPTHS = {1: [7], 2: [7, 5], 5: [6, 5, 7, 4, 6], 15: [5] * 15}


def trained(members: Sequence[ExperimentSpec], dtype: str = "float64", xp: Any = np) -> NDArray[Any]:
    """All members' parameters (M, P) at the end."""
    trainer = Trainer(members, dtype=dtype, xp=xp)
    for _ in trainer.train():
        pass
    return reference.in_torchs_order(members[0], as_numpy(trainer.parameters))


def snapshots(*members: ExperimentSpec, **options: Any) -> list[Snapshot]:
    return list(Trainer(members, **options).train())


# Against PyTorch


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity"])
def test_two_hundred_steps_are_pytorchs(optimizer: str, activation: str) -> None:
    training = {"epochs": 40, **OPTIMIZERS[optimizer]}
    spec = spec_of(network={"activation": activation}, training=training)
    assert spec.steps_per_epoch * spec.training.epochs == 200
    np.testing.assert_allclose(trained([spec])[0], reference.train(spec, "float64"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_depth_is_pytorchs(optimizer: str, depth: int, bias: bool) -> None:
    network = {"hidden": DEPTHS[depth], "bias": bias, "init_scale": 1.5}
    spec = spec_of(seed=depth, network=network, training=OPTIMIZERS[optimizer])
    np.testing.assert_allclose(trained([spec])[0], reference.train(spec, "float64"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_size", [1, 8, 11, 32, 33, 41])
def test_every_batch_size_is_pytorchs(batch_size: int) -> None:
    spec = spec_of(training={"batch_size": batch_size})
    np.testing.assert_allclose(trained([spec])[0], reference.train(spec, "float64"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("features", "targets", "hidden"), [(1, 1, [1]), (1, 3, [4, 1]), (6, 1, [1, 5]), (3, 9, [2])])
def test_narrow_networks_are_pytorchs(features: int, targets: int, hidden: list[int]) -> None:
    data = {"n_features": features, "n_informative": 1, "n_targets": targets}
    spec = spec_of(data=data, network={"hidden": hidden, "activation": "sigmoid"})
    np.testing.assert_allclose(trained([spec])[0], reference.train(spec, "float64"), rtol=1e-10, atol=1e-10)


def test_the_memos_float32_weights_are_pytorchs() -> None:
    spec = resolve({"training": {"epochs": 4}})
    found = trained([spec], "float32")[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference.train(spec, "float32"), atol=1e-5)


# One set of formulas, and members that do not know of each other


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "identity"])
def test_numpy_and_torch_agree(optimizer: str, activation: str) -> None:
    members = [
        spec_of(seed=seed, network={"activation": activation}, training=OPTIMIZERS[optimizer]) for seed in (0, 1)
    ]
    on_torch = Trainer(members, dtype="float64", xp=torch)
    assert isinstance(on_torch.parameters, torch.Tensor)
    for ours, theirs in zip(snapshots(*members, dtype="float64"), on_torch.train(), strict=True):
        for name in ("train_loss", "validation_loss", "train_r2", "validation_r2"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=1e-10)
            assert isinstance(getattr(theirs, name), np.ndarray)
    np.testing.assert_allclose(trained(members), trained(members, xp=torch), rtol=1e-10, atol=1e-10)


def three_members(optimizer: str) -> list[ExperimentSpec]:
    base = OPTIMIZERS[optimizer]
    changes: list[dict[str, Any]] = [{}, {"lr": base["lr"] / 3, "weight_decay": 0.0}, {"weight_decay": 0.3}]
    if optimizer == "momentum":
        changes[1]["momentum"] = 0.0
    return [
        spec_of(seed=seed, data={"seed": 7 - seed, "noise": float(seed)}, training={**base, **change})
        for seed, change in enumerate(changes)
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("xp", [np, torch])
def test_members_become_what_they_are_alone(optimizer: str, xp: Any) -> None:
    members = three_members(optimizer)
    together = trained(members, xp=xp)
    alone = np.concatenate([trained([member], xp=xp) for member in members])
    np.testing.assert_allclose(together, alone, rtol=1e-10, atol=1e-10)
    assert abs(together[0] - together[1]).max() > 1e-3


def test_a_permutation_of_members_permutes_their_snapshots() -> None:
    members = three_members("sgd")
    order = [2, 0, 1]
    straight = snapshots(*members, dtype="float64")[-1]
    permuted = snapshots(*(members[i] for i in order), dtype="float64")[-1]
    np.testing.assert_allclose(permuted.train_loss, straight.train_loss[order], rtol=1e-12)
    np.testing.assert_allclose(permuted.validation_r2, straight.validation_r2[order], rtol=1e-12)
    assert len(set(straight.train_loss)) == 3


def test_training_repeats_to_the_bit_and_leaves_the_global_streams_alone() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    spec = resolve({"training": {"epochs": 2}})
    assert trained([spec], "float32").tobytes() == trained([spec], "float32").tobytes()
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"network": {"hidden": [7, 6]}}, "widths"),
        ({"network": {"activation": "relu"}}, "activation"),
        ({"network": {"bias": False}}, "bias"),
        ({"training": {"optimizer": "adam"}}, "optimizer"),
        ({"training": {"batch_size": 9}}, "batch_size"),
        ({"training": {"epochs": 5}}, "epochs"),
        ({"record": {"every": 2}}, "record.every"),
        ({"data": {"n_samples": 42}}, "n_training"),
    ],
)
def test_members_must_share_shapes_and_schedule(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is .* for member 1"):
        Trainer([spec_of(), spec_of(**change)])


def test_a_batch_needs_a_member() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Trainer([])


# The shuffle


def test_the_shuffle_is_a_permutation_that_epoch_and_seed_change() -> None:
    seeds = np.array([[0], [1], [2**32 - 1]])
    one, other = shuffled_order(np, seeds, 1, 1000), shuffled_order(np, seeds, 2, 1000)
    np.testing.assert_array_equal(np.sort(one, axis=1), np.tile(np.arange(1000), (3, 1)))
    orders = np.concatenate([one, other])
    for i, order in enumerate(orders):
        for later in orders[i + 1 :]:
            assert (order == later).sum() < 10


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood's finaliser, in Python's own integers."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_the_shuffle_sorts_by_splitmix64() -> None:
    for seed, epoch in ((0, 1), (5, 3), (2**32 - 1, 100_000)):
        start = splitmix64(splitmix64(seed) ^ epoch)
        hashes = [splitmix64(start + i * 0x9E3779B97F4A7C15) for i in range(300)]
        signed = [h - 2**64 if h >= 2**63 else h for h in hashes]
        assert shuffled_order(np, np.array([[seed]]), epoch, 300)[0].tolist() == list(np.argsort(signed))


def test_no_seed_has_another_seeds_epochs() -> None:
    seeds = np.arange(30)[:, None]
    orders = {tuple(order) for epoch in range(1, 31) for order in shuffled_order(np, seeds, epoch, 30).tolist()}
    assert len(orders) == 900


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4), st.integers(1, 100_000), st.integers(1, 200))
def test_the_shuffle_is_the_same_on_numpy_and_torch(seeds: list[int], epoch: int, n: int) -> None:
    column = np.array(seeds)[:, None]
    ours, theirs = shuffled_order(np, column, epoch, n), shuffled_order(torch, torch.from_numpy(column), epoch, n)
    np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(np.sort(ours, axis=1), np.tile(np.arange(n), (len(seeds), 1)))


@pytest.mark.parametrize("over", ["epochs", "seeds"])
def test_every_sample_is_as_often_at_every_place(over: str) -> None:
    """χ² of 20 × 20 counts over 4000 orders has 361 degrees of freedom, standard deviation 27; also for neighbours."""
    n, trials = 20, 4000
    if over == "epochs":
        orders = np.concatenate([shuffled_order(np, np.array([[3]]), epoch, n) for epoch in range(1, trials + 1)])
    else:
        orders = shuffled_order(np, np.arange(trials)[:, None], 1, n)
    places = np.zeros((n, n))
    np.add.at(places, (orders, np.arange(n)), 1)
    assert ((places - trials / n) ** 2).sum() / (trials / n) == pytest.approx(361, abs=5 * 27)
    follows = np.zeros((n, n))
    np.add.at(follows, (orders[:, :-1], orders[:, 1:]), 1)
    expected = trials / n
    pairs = ~np.eye(n, dtype=bool)
    assert ((follows - expected)[pairs] ** 2).sum() / expected == pytest.approx(361, abs=6 * 27)


@pytest.mark.parametrize("xp", [np, torch])
def test_shuffled_inputs_keep_their_targets(xp: Any) -> None:
    members = three_members("sgd")
    trainer = Trainer(members, dtype="float64", xp=xp)
    trainer._shuffle(1)
    inputs, targets = (as_numpy(part) for part in trainer._split(trainer._shuffled_rows))
    np.testing.assert_array_equal(inputs[..., -1], 1)
    for i, member in enumerate(members):
        data = make_dataset(member, "float64")
        order = shuffled_order(np, np.array([[member.seed]]), 1, 33)[0]
        np.testing.assert_array_equal(inputs[i, :, :-1], data.x_train[order])
        np.testing.assert_array_equal(targets[i], data.y_train[order])


# What is recorded


def test_snapshots_come_at_the_recorded_epochs() -> None:
    spec = spec_of(record={"every": 3}, training={"epochs": 7})
    assert [snapshot.epoch for snapshot in Trainer([spec]).train()] == [0, 3, 6, 7]


@pytest.mark.parametrize("xp", [np, torch])
def test_losses_and_r2_are_scikit_learns(xp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "CHUNK", 100)  # several chunks, the last one short
    members = three_members("adam")
    trainer = Trainer(members, dtype="float64", xp=xp)
    for snapshot in trainer.train():
        for i, member in enumerate(members):
            data, network = make_dataset(member, "float64"), trainer.network[i]
            for part, x, y in (
                ("train", data.x_train, data.y_train),
                ("validation", data.x_validation, data.y_validation),
            ):
                answer = np.asarray(forward(network, "tanh", xp.asarray(np.ascontiguousarray(x))))
                loss, r2 = getattr(snapshot, f"{part}_loss")[i], getattr(snapshot, f"{part}_r2")[i]
                assert loss == pytest.approx(((answer - y) ** 2).mean(), rel=1e-12)
                assert r2 == pytest.approx(r2_score(y, answer), rel=1e-10, abs=1e-10)


def test_the_memo_learns() -> None:
    first, *_, last = snapshots(resolve({}))
    assert last.validation_r2[0] >= 0.97
    assert first.validation_r2[0] < 0.2
    assert last.train_loss[0] < 0.05 * first.train_loss[0]


def test_without_validation_samples_there_are_no_validation_numbers() -> None:
    for snapshot in snapshots(spec_of(data={"validation_fraction": 0.0})):
        assert np.isnan(snapshot.validation_loss).all()
        assert np.isnan(snapshot.validation_r2).all()
        assert np.isfinite([snapshot.train_loss, snapshot.train_r2]).all()
        assert not snapshot.diverged.any()


def test_a_target_that_does_not_vary_has_no_r2() -> None:
    """0.1 three times has a computed mean that is not 0.1."""
    assert scores.squares_about_mean(np.full((3, 1), 0.1)) == 0
    assert scores.squares_about_mean(np.array([[1.0, 5.0], [3.0, 5.0]])).tolist() == [2, 0]
    loss, r2 = scores.loss_and_r2(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([2.0, 0.0]), 2)
    assert loss.tolist() == [0.75, 1.75]
    assert np.isnan(r2).all()
    snapshot = snapshots(spec_of(data={"validation_fraction": 0.03}))[0]  # a single sample
    assert math.isnan(snapshot.validation_r2[0])
    assert np.isfinite(snapshot.validation_loss[0])


def test_weights_are_live_and_copies_are_not() -> None:
    for xp in (np, torch):
        trainer = Trainer([spec_of()], xp=xp)
        initial, state = trainer.copy_weights(), trainer.state(0)
        run = trainer.train()
        first, second = next(run), next(run)
        assert first.weights[0] is second.weights[0]
        assert not np.array_equal(initial[0], second.weights[0])
        np.testing.assert_array_equal(state["W1.weight"], initial[0][0])
        np.testing.assert_array_equal(trainer.state(0)["W1.weight"], second.weights[0][0])


# Overflow is a result


@pytest.mark.parametrize("xp", [np, torch])
@pytest.mark.parametrize(("lr", "dtype"), [(1e300, "float32"), (1e300, "float64"), (1e4, "float32")])
def test_a_member_that_diverges_is_named_and_the_others_go_on(lr: float, dtype: str, xp: Any) -> None:
    network, record = {"activation": "identity"}, {"every": 3}
    good = [spec_of(seed=seed, network=network, record=record, training={"epochs": 7}) for seed in (0, 1)]
    bad = spec_of(seed=2, network=network, record=record, training={"epochs": 7, "lr": lr})
    run = snapshots(good[0], bad, good[1], dtype=dtype, xp=xp)
    assert [snapshot.epoch for snapshot in run] == [0, 1, 3, 6, 7]
    for snapshot in run:
        assert snapshot.diverged.tolist() == [False, snapshot.epoch > 0, False]
    alone = snapshots(*good, dtype=dtype, xp=xp)
    assert [snapshot.epoch for snapshot in alone] == [0, 3, 6, 7]
    tolerance = 1e-5 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(run[-1].train_loss[[0, 2]], alone[-1].train_loss, rtol=tolerance)


def test_training_ends_once_all_members_have_diverged() -> None:
    bad = spec_of(network={"activation": "identity"}, training={"lr": 1e300, "epochs": 1000})
    assert [snapshot.epoch for snapshot in snapshots(bad, bad)] == [0, 1]


def test_a_tanh_network_survives_a_rate_of_ten_only_as_long_as_it_is_finite() -> None:
    spec = resolve({"training": {"lr": 10.0, "weight_decay": 1.0, "epochs": 60}})
    run = snapshots(spec)
    assert run[-1].diverged.tolist() == [True]
    assert all(np.isfinite(snapshot.train_loss).all() and not snapshot.diverged[0] for snapshot in run[:-1])


def test_an_infinite_loss_of_finite_weights_is_divergence() -> None:
    network = {"hidden": [5] * 15, "activation": "identity", "init_scale": 1000.0}
    snapshot = snapshots(spec_of(network=network, data={"standardize": False}))[0]
    assert all(np.isfinite(weight).all() for weight in snapshot.weights)
    assert snapshot.diverged.tolist() == [True]


@pytest.mark.parametrize("score", ["_train_score", "_validation_score"])
def test_a_loss_that_was_infinite_once_is_not_forgiven(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer([spec_of(seed=0), spec_of(seed=1)])
    measured, calls = getattr(trainer, score), []

    def infinite_at_first() -> Any:
        loss, r2 = measured()
        calls.append(loss)
        return loss + np.array([0, np.inf if len(calls) == 1 else 0]), r2

    monkeypatch.setattr(trainer, score, infinite_at_first)
    for snapshot in trainer.train():
        assert snapshot.diverged.tolist() == [False, True]
    assert len(calls) == 5


def test_overflow_is_silent_only_inside_the_trainer() -> None:
    bad = spec_of(network={"activation": "identity"}, training={"lr": 1e300})
    for _ in Trainer([bad], dtype="float64").train():
        assert np.geterr()["over"] == "warn"
        assert np.geterr()["invalid"] == "warn"


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "adamw"])
def test_the_smallest_rate_changes_nothing(optimizer: str) -> None:
    spec = spec_of(training={**OPTIMIZERS[optimizer], "lr": 5e-324})
    for dtype in ("float32", "float64"):
        trainer = Trainer([spec], dtype=dtype)
        before = trainer.parameters.copy()
        run = list(trainer.train())
        np.testing.assert_array_equal(trainer.parameters, before)
        assert run[0].train_loss == run[-1].train_loss


def test_a_network_of_zeros_stays_finite() -> None:
    for activation in ("relu", "tanh", "identity"):
        spec = spec_of(network={"init_scale": 0.0, "activation": activation}, training={"optimizer": "adam"})
        assert not snapshots(spec)[-1].diverged.any()
        np.testing.assert_allclose(trained([spec])[0], reference.train(spec, "float64"), rtol=1e-10, atol=1e-10)
