"""What a job of kind `experiment` does: train, record the spectra, keep the weights, price every cut."""

import importlib.metadata
import math
import platform
from typing import Any

import torch
from safetensors.numpy import save

from service import files
from service.errors import DeviceUnavailable, Diverged
from service.lowrank.ranks import Array
from service.schemas import WEIGHT_DTYPE, ExperimentSpec
from service.settings import Settings
from service.store import Epoch
from worker.cuts import cut_curves
from worker.datasets import make_dataset
from worker.decompose import difference, singular_values
from worker.networks import Arrays
from worker.recorder import Recorder
from worker.trainer import Snapshot, Trainer

LIBRARIES = ("numpy", "rankscope", "scikit-learn", "scipy", "torch")


def run(settings: Settings, recorder: Recorder, stored: dict[str, Any]) -> None:
    """Run the experiment to its end, recording as it goes.

    Raises Diverged, Canceled, LostJob; what was recorded until then stays.
    """
    spec = ExperimentSpec.model_validate(stored)
    device = choose_device(spec.device, settings.device_names)
    recorder.start(_environment(device))
    trainer = Trainer([spec], device)
    initial = trainer.copy_weights()
    _keep_weights(settings, recorder, "initial", trainer)
    for snapshot in trainer.train():
        if snapshot.diverged[0]:
            raise Diverged(_advice(snapshot, spec))
        recorder.add(_epoch(spec, snapshot, initial))
    _keep_weights(settings, recorder, "final", trainer)
    recorder.end("succeeded", cuts=_cuts(spec, trainer))


def choose_device(wanted: str, offered: list[str]) -> str:
    """The device to train on. Raises DeviceUnavailable where the one asked for is not there after all."""
    if wanted in {"auto", "cuda"}:
        wanted = next((name for name in offered if name.startswith("cuda")), "cpu" if wanted == "auto" else wanted)
    if wanted != "cpu" and (torch.device(wanted).index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"the deployment offers {wanted}, but this worker finds no such device")
    return wanted


def _environment(device: str) -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"device": device, "versions": {"python": platform.python_version(), **versions}}


def _keep_weights(settings: Settings, recorder: Recorder, at: files.At, trainer: Trainer) -> None:
    token = recorder.token
    path = files.weights_path(settings.data, token.job_id, token.attempt, at)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, save(trainer.state(member=0)))


def _epoch(spec: ExperimentSpec, snapshot: Snapshot, initial: list[Any]) -> Epoch:
    layers = zip(spec.shapes, snapshot.weights, initial, strict=True)
    spectra = {
        name: (singular_values(w, WEIGHT_DTYPE)[0], singular_values(difference(w, w0), WEIGHT_DTYPE)[0])
        for name, w, w0 in layers
        if name in spec.recorded_layers
    }
    return Epoch(
        snapshot.epoch,
        float(snapshot.train_loss[0]),
        _or_none(snapshot.validation_loss),
        _or_none(snapshot.train_r2),
        _or_none(snapshot.validation_r2),
        spectra,
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
