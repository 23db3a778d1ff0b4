"""What a job of kind `factors` does: write an analysis's layers as factors, at the ranks that a rule gives them."""

from dataclasses import replace
from typing import Any

from service import files, plans, store
from service.errors import UploadError, refusal_of
from service.schemas import FactorsSpec
from service.settings import Settings
from service.store import TensorRow
from service.uploads import Tensor
from worker.devices import environment
from worker.factor_files import write_factors
from worker.factor_layout import Planned
from worker.recorder import Recorder
from worker.source import Source


def run(settings: Settings, recorder: Recorder, stored: dict[str, Any]) -> None:
    """Write the file and its manifest. Raises CannotFactor, UploadError, Canceled, Drained, LostJob."""
    spec = FactorsSpec.model_validate(stored["request"])
    recorder.start(environment("cpu"))
    analysis, rows = recorder.read(lambda session: store.source_of(session, recorder.token.job_id))
    source = Source.of(settings, analysis.id, analysis.spec)
    choices = plans.choices_for(rows, spec)
    planned = [_planned(tensor, row, choices) for tensor, row in zip(source.tensors, rows, strict=True)]
    done = 0

    def tick(work: int) -> None:
        nonlocal done
        done += work
        recorder.progress(done)
        recorder.stop_if_draining()

    token = recorder.token
    path = files.factors_path(settings.data, token.job_id, token.attempt, spec.format)
    manifest = write_factors(path, planned, source, spec, tick)
    recorder.end("succeeded", write=lambda session, token: store.add_manifest(session, token, manifest))


def _planned(tensor: Tensor, row: TensorRow, choices: dict[int, plans.Choice]) -> Planned:
    """What the analysis found decides: a matrix without a spectrum is not factored."""
    if row.status == "analysed":
        choice = choices[row.position]
        return Planned(tensor, choice.rank, choice.reason)
    why = row.detail or "it was not analysed"
    refusal = tensor.refusal or refusal_of(row.reason or "", why) or UploadError(why)
    return Planned(replace(tensor, refusal=refusal), None, why)
