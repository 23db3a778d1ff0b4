"""What a job of kind `experiment` does: train, record the spectra, keep the weights, price every cut."""

import math
from typing import Any

from safetensors.numpy import save

from service import files, store
from service.errors import Diverged
from service.lowrank.ranks import Array
from service.schemas import WEIGHT_DTYPE, ExperimentSpec
from service.settings import Settings
from service.store import Epoch
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
    recorder.start(environment(device))
    trainer = Trainer([spec], device)
    initial = trainer.copy_weights()
    _keep_weights(settings, recorder, "initial", trainer)
    checkpoints = Checkpoints(settings, recorder)
    if (saved := checkpoints.load()) is not None:
        trainer.restore(saved)
    for snapshot in trainer.train(lambda: checkpoints.offer(trainer.checkpoint)):
        if snapshot.diverged[0]:
            raise Diverged(_advice(snapshot, spec))
        recorder.add(_epoch(spec, snapshot, initial), snapshot.epoch)
    _keep_weights(settings, recorder, "final", trainer)
    cuts = _cuts(spec, trainer)
    recorder.end("succeeded", write=lambda session, token: store.add_cuts(session, token, cuts))


def _keep_weights(settings: Settings, recorder: Recorder, at: files.At, trainer: Trainer) -> None:
    token = recorder.token
    path = files.weights_path(settings.data, token.job_id, token.attempt, at)
    recorder.write_file(path, save(trainer.state(member=0)))


def _epoch(spec: ExperimentSpec, snapshot: Snapshot, initial: list[Any]) -> Epoch:
    layers = zip(spec.shapes, snapshot.weights, initial, strict=True)
    recorded = [(name, w[0], w0[0]) for name, w, w0 in layers if name in spec.recorded_layers]
    # Lazily: of large layers only one update exists at a time.
    found = spectra((matrix for _, w, w0 in recorded for matrix in (w, difference(w, w0))), WEIGHT_DTYPE)
    names = [name for name, _, _ in recorded]
    return Epoch(
        snapshot.epoch,
        float(snapshot.train_loss[0]),
        _or_none(snapshot.validation_loss),
        _or_none(snapshot.train_r2),
        _or_none(snapshot.validation_r2),
        dict(zip(names, zip(found[::2], found[1::2], strict=True), strict=True)),
    )


def _cuts(spec: ExperimentSpec, trainer: Trainer) -> dict[str, tuple[Array, Array]]:
    """Validation loss and R² by rank of every recorded layer, in float64 whatever the training's dtype."""
    data, arrays = make_dataset(spec, "float64"), Arrays(trainer.xp, trainer.device, "float64")
    x, y = (arrays.stack([values])[0] for values in (data.x_validation, data.y_validation))
    return cut_curves(trainer.network.member(0), spec.network.activation, x, y, spec.recorded_layers)


def _or_none(values: Array) -> float | None:
    return None if math.isnan(values[0]) else float(values[0])


def _advice(snapshot: Snapshot, spec: ExperimentSpec) -> str:
    """What stopped being finite, when, and what to change."""
    losses = {"training loss": snapshot.train_loss[0]}
    if spec.n_validation:
        losses["validation loss"] = snapshot.validation_loss[0]
    found = next(
        (f"the {name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)), "a weight is inf"
    )
    training = spec.training
    advice = f"at epoch {snapshot.epoch} {found}; take a smaller learning rate than {training.lr:g}"
    if training.lr * training.weight_decay > 2:
        advice += f", or a weight decay below {2 / training.lr:g}"
    return advice
