"""Checkpoints: training that goes on in another trainer, and files that are damaged, foreign or late."""

import contextlib
import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from service import store
from service.errors import LostJob
from service.settings import Settings
from service.store import Database, Token
from tests.test_store import claim, create
from tests.worker.reference import spec_of
from worker import resume, trainer
from worker.recorder import Drained, Recorder
from worker.resume import Checkpoints
from worker.trainer import Snapshot, Trainer

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9},
    "adam": {"optimizer": "adam", "lr": 1e-2},
    "adamw": {"optimizer": "adamw", "lr": 1e-2},
}


class Stop(Exception):
    """Raised in a pause: what a kill does to the training."""


def numbers(snapshots: list[Snapshot]) -> list[tuple[Any, ...]]:
    """All that a snapshot says, in memory of its own."""
    return [(one.epoch, one.train_loss, one.validation_loss, one.validation_r2, one.diverged) for one in snapshots]


def run(trainer: Trainer, stop_at: int | None = None) -> list[Snapshot]:
    """Train on until a step is reached."""
    found: list[Snapshot] = []

    def pause() -> None:
        if trainer.step == stop_at:
            raise Stop

    with contextlib.suppress(Stop):
        for snapshot in trainer.train(pause):
            found.append(copy.deepcopy(snapshot))
    return found


@settings(deadline=None, max_examples=25)
@given(
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    stop_at=st.integers(1, 20),
    chunk=st.integers(1, 6),
    xp=st.sampled_from([np, torch]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_training_that_stops_anywhere_goes_on_bit_for_bit(
    optimizer: str, stop_at: int, chunk: int, xp: Any, dtype: str
) -> None:
    members = [spec_of(training=OPTIMIZERS[optimizer], seed=seed) for seed in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "CHUNK_STEPS", chunk)
        whole = Trainer(members, dtype=dtype, xp=xp)
        expected = run(whole)
        first = Trainer(members, dtype=dtype, xp=xp)
        before = run(first, stop_at)
        second = Trainer(members, dtype=dtype, xp=xp)
        second.restore(load(save(first.checkpoint())))
        after = run(second)
    np.testing.assert_equal(numbers(before + after), numbers(expected))
    np.testing.assert_equal(second.checkpoint(), whole.checkpoint())


def test_a_checkpoint_of_other_members_is_refused_and_changes_nothing() -> None:
    mine = Trainer([spec_of()])
    before = save(mine.checkpoint())
    for other in (
        [spec_of(), spec_of()],
        [spec_of(network={"hidden": [3]})],
        [spec_of(training={"optimizer": "adam"})],
    ):
        with pytest.raises(ValueError, match="of other members"):
            mine.restore(Trainer(other).checkpoint())
    with pytest.raises(ValueError, match="of other members"):
        mine.restore(Trainer([spec_of()], dtype="float64").checkpoint())
    assert save(mine.checkpoint()) == before


def attempt(database: Database, settings: Settings) -> tuple[Recorder, Checkpoints]:
    token = claim(database)
    recorder = Recorder(database, token, store.add_epochs)
    return recorder, Checkpoints(settings, recorder)


class Reached:
    """Stands for a trainer of any shape: what it would go on from."""

    state: resume.State | None = None

    def restore(self, saved: resume.State) -> None:
        self.state = saved


def reached(checkpoints: Checkpoints) -> resume.State | None:
    trainer: Any = Reached()
    checkpoints.resume(trainer)
    found: resume.State | None = trainer.state
    return found


def state(value: float) -> resume.State:
    return {"parameters": np.full((1, 3), value)}


def test_a_checkpoint_of_another_order_is_refused() -> None:
    """Before a layer was one matrix with its bias, the same numbers lay elsewhere in it, under another name."""
    found = Trainer([spec_of()])
    saved = {name.replace("layers", "parameters"): values for name, values in found.checkpoint().items()}
    with pytest.raises(ValueError, match="other members"):
        found.restore(saved)


def test_a_checkpoint_is_kept_when_it_is_time_and_the_older_go(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database)
    recorder, checkpoints = attempt(database, settings)
    checkpoints.offer(lambda: state(1))  # It is not time yet.
    assert reached(checkpoints) is None
    monkeypatch.setattr(resume, "COST_RATIO", 0)
    settings = settings.model_copy(update={"checkpoint_s": 0.0})
    checkpoints = Checkpoints(settings, recorder)
    for value in (1, 2, 3):
        checkpoints.offer(lambda value=value: state(value))
    np.testing.assert_equal(reached(checkpoints), state(3))
    assert [path.name for path in (settings.data / "checkpoints" / recorder.token.job_id).iterdir()] == ["1-3"]


def test_a_worker_that_stops_leaves_a_checkpoint_and_the_job_in_line(database: Database, settings: Settings) -> None:
    job = create(database)
    recorder, checkpoints = attempt(database, settings)
    recorder.draining = True
    with pytest.raises(Drained):
        checkpoints.offer(lambda: state(4))
    following, checkpoints = attempt(database, settings)
    assert following.token == Token(job, 2)
    np.testing.assert_equal(reached(checkpoints), state(4))


@pytest.mark.parametrize("damage", [b"", b"\0" * 64, None])
def test_a_damaged_checkpoint_means_a_fresh_start(
    database: Database, settings: Settings, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    job = create(database)
    recorder, checkpoints = attempt(database, settings)
    recorder.draining = True
    with pytest.raises(Drained):
        checkpoints.offer(lambda: state(4))
    path = settings.data / "checkpoints" / job / "1-1"
    path.unlink() if damage is None else path.write_bytes(damage)
    _, checkpoints = attempt(database, settings)
    assert reached(checkpoints) is None
    assert "the job starts anew" in caplog.text


def test_a_checkpoint_of_other_members_means_a_fresh_start(
    database: Database, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    create(database)
    recorder, checkpoints = attempt(database, settings)
    recorder.draining = True
    with pytest.raises(Drained):
        checkpoints.offer(Trainer([spec_of(), spec_of()]).checkpoint)
    _, checkpoints = attempt(database, settings)
    fresh = Trainer([spec_of()])
    checkpoints.resume(fresh)
    assert fresh.step == 0
    assert "of other members" in caplog.text


def test_a_late_attempt_does_not_touch_the_files_of_the_next(database: Database, settings: Settings) -> None:
    settings = settings.model_copy(update={"checkpoint_s": 0.0})
    create(database)
    late, late_checkpoints = attempt(database, settings)
    with database.write.begin() as session:
        store.release(session, late.token)
    _, checkpoints = attempt(database, settings)
    checkpoints.offer(lambda: state(5))
    with pytest.raises(LostJob):
        late_checkpoints.offer(lambda: state(1))
    np.testing.assert_equal(reached(checkpoints), state(5))
