"""What a job of kind `experiment` does: train, record the spectra, keep the weights, price every cut."""

import math
from collections.abc import Mapping
from typing import Any

from safetensors.numpy import save

from service import files, store
from service.errors import Diverged
from service.lowrank.ranks import Array
from service.schemas import WEIGHT_DTYPE, ExperimentSpec
from service.settings import Settings
from service.store import Epoch, Token
from worker.cuts import cut_curves
from worker.datasets import make_dataset
from worker.decompose import difference, spectra
from worker.devices import choose_device, environment
from worker.networks import Arrays
from worker.recorder import Recorder
from worker.resume import Checkpoints
from worker.trainer import Snapshot, Trainer


def run(settings: Settings, recorder: Recorder, stored: dict[str, Any]) -> None:
    """Run the experiment to its end, recording as it goes; where an attempt was before, from its last checkpoint.

    Raises Diverged, Canceled, Drained, LostJob; what was recorded until then stays.
    """
    spec = ExperimentSpec.model_validate(stored)
    device = choose_device(spec.device, settings.device_names)
    recorder.note(environment=environment(device))
    trainer = Trainer([spec], device)
    initial = trainer.copy_weights()
    keep_weights(settings, recorder, recorder.token, "initial", trainer)
    checkpoints = Checkpoints(settings, recorder)
    checkpoints.resume(trainer)
    for snapshot in trainer.train(lambda: checkpoints.offer(trainer.checkpoint)):
        if snapshot.diverged[0]:
            raise Diverged(advice(snapshot, spec))
        recorder.add(epochs({0: spec}, snapshot, initial)[0], snapshot.epoch)
    keep_weights(settings, recorder, recorder.token, "final", trainer)
    found = cuts(spec, trainer)
    recorder.end("succeeded", write=lambda session, token: store.add_cuts(session, token, found))


def keep_weights(
    settings: Settings, recorder: Recorder, token: Token, at: files.At, trainer: Trainer, member: int = 0
) -> None:
    """Write a member's weights to the files of its experiment, which `token` names."""
    path = files.weights_path(settings.data, token.job_id, token.attempt, at)
    if at == "initial":
        path.parent.mkdir(parents=True, exist_ok=True)
    recorder.write_file(path, save(trainer.state(member)))


def epochs(specs: Mapping[int, ExperimentSpec], snapshot: Snapshot, initial: list[Any]) -> dict[int, Epoch]:
    """What the members named by their places record of a snapshot; all their spectra are one batched decomposition."""
    names = [(member, layer) for member, spec in specs.items() for layer in spec.recorded_layers]
    places = {layer: place for spec in specs.values() for place, layer in enumerate(spec.shapes)}
    pairs = ((snapshot.weights[places[layer]][member], initial[places[layer]][member]) for member, layer in names)
    # Lazily: of large layers only one update exists at a time.
    found = spectra((matrix for w, w0 in pairs for matrix in (w, difference(w, w0))), WEIGHT_DTYPE)
    by_member: dict[int, dict[str, tuple[Array, Array]]] = {member: {} for member in specs}
    for (member, layer), weights, update in zip(names, found[::2], found[1::2], strict=True):
        by_member[member][layer] = (weights, update)
    return {member: _epoch(snapshot, member, recorded) for member, recorded in by_member.items()}


def _epoch(snapshot: Snapshot, member: int, recorded: dict[str, tuple[Array, Array]]) -> Epoch:
    return Epoch(
        snapshot.epoch,
        float(snapshot.train_loss[member]),
        _or_none(snapshot.validation_loss[member]),
        _or_none(snapshot.train_r2[member]),
        _or_none(snapshot.validation_r2[member]),
        recorded,
    )


def cuts(spec: ExperimentSpec, trainer: Trainer, member: int = 0) -> dict[str, tuple[Array, Array]]:
    """Validation loss and R² by rank of every recorded layer, in float64 whatever the training's dtype."""
    data, arrays = make_dataset(spec, "float64"), Arrays(trainer.xp, trainer.device, "float64")
    x, y = (arrays.stack([values])[0] for values in (data.x_validation, data.y_validation))
    return cut_curves(trainer.network[member], spec.network.activation, x, y, spec.recorded_layers)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def advice(snapshot: Snapshot, spec: ExperimentSpec, member: int = 0) -> str:
    """What stopped being finite, when, and what to change."""
    losses = {"training loss": snapshot.train_loss[member]}
    if spec.n_validation:
        losses["validation loss"] = snapshot.validation_loss[member]
    found = next(
        (f"the {name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)), "a weight is inf"
    )
    training = spec.training
    told = f"at epoch {snapshot.epoch} {found}; take a smaller learning rate than {training.lr:g}"
    if training.lr * training.weight_decay > 2:
        told += f", or a weight decay below {2 / training.lr:g}"
    return told
