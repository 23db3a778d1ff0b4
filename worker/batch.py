"""What a job of kind `batch` does: train members of a sweep together, each recorded as the experiment that it is."""

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from service import store
from service.errors import Diverged
from service.schemas import ExperimentSpec
from service.settings import Settings
from service.store import MemberEpochs, Token
from worker import experiment
from worker.devices import choose_device, environment
from worker.recorder import Canceled, Recorder
from worker.resume import Checkpoints
from worker.trainer import Snapshot, Trainer


@dataclass(frozen=True)
class _Batch:
    """The members' rights to write and specifications, by place."""

    tokens: list[Token]
    specs: list[ExperimentSpec]

    @property
    def recorded_epochs(self) -> frozenset[int]:
        """The epochs that all members record."""
        return frozenset(self.specs[0].recorded_epochs)

    def found(self, snapshot: Snapshot, initial: list[Any], alive: list[int], failed: list[int]) -> MemberEpochs:
        """What a snapshot adds to the members that live, and why those that have just diverged fail."""
        epochs = experiment.epochs({member: self.specs[member] for member in alive}, snapshot, initial)
        return MemberEpochs(
            snapshot.epoch,
            {self.tokens[member].job_id: epoch for member, epoch in epochs.items()},
            {
                self.tokens[member].job_id: Diverged(experiment.advice(snapshot, self.specs[member], member)).told
                for member in failed
            },
        )


def run(settings: Settings, recorder: Recorder, stored: dict[str, Any]) -> None:
    """Train the members. One that diverges fails alone, one that is canceled or has failed is no longer recorded.

    Where an attempt was before, from its last checkpoint. Raises Canceled, Drained, LostJob.
    """
    device = choose_device(stored["device"], settings.device_names)
    recorder.start(environment(device), store.start_members)
    rows = recorder.read(lambda session: store.batch_members(session, recorder.token.job_id))
    # All of them: who else is in a batch changes nothing for a member, and a checkpoint is of all.
    over = np.array([row.status in store.TERMINAL for row in rows], dtype=bool)
    if over.all():
        raise Canceled
    batch = _Batch(
        [Token(row.id, recorder.token.attempt) for row in rows],
        [ExperimentSpec.model_validate(row.spec) for row in rows],
    )
    recorder.at_once = len(rows)
    trainer = Trainer(batch.specs, device)
    initial = trainer.copy_weights()
    for member in np.flatnonzero(~over).tolist():
        experiment.keep_weights(settings, recorder, batch.tokens[member], "initial", trainer, member)
    checkpoints = Checkpoints(settings, recorder)
    checkpoints.resume(trainer)
    for snapshot in trainer.train(lambda: checkpoints.offer(trainer.checkpoint)):
        failed = np.flatnonzero(snapshot.diverged & ~over)
        over |= snapshot.diverged
        # One that was only taken because a member has diverged adds nothing to the others.
        alive = np.flatnonzero(~over) if snapshot.epoch in batch.recorded_epochs else np.array([], int)
        recorder.add(batch.found(snapshot, initial, alive.tolist(), failed.tolist()), snapshot.epoch)
    _finish(settings, recorder, batch, trainer, np.flatnonzero(~over).tolist())


def _finish(settings: Settings, recorder: Recorder, batch: _Batch, trainer: Trainer, left: list[int]) -> None:
    cuts = {}
    for member in left:
        token, spec = batch.tokens[member], batch.specs[member]
        # A member that was canceled may have been deleted since, and its folder with it.
        with contextlib.suppress(FileNotFoundError):
            experiment.keep_weights(settings, recorder, token, "final", trainer, member)
        cuts[token.job_id] = experiment.cuts(spec, trainer, member)
        recorder.progress(spec.training.epochs)
    recorder.end("succeeded", write=lambda session, token: store.add_member_cuts(session, token, cuts))
