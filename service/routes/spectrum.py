"""The spectra of an experiment in every representation: numbers, arrays and pictures."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from service import representations, store
from service.context import Context, Here
from service.errors import BadRequestValue, BudgetExceeded, Draining, NotAcceptable, SpectrumNotReady, StorageFull
from service.http import choose_format, unchanged, validators
from service.lowrank import describe, normalized
from service.lowrank.ranks import Array
from service.openapi import NOT_MODIFIED, raises
from service.pictures import Chart, Spectrum
from service.representations import FIELD_COUNT, MEDIA_TYPES, check_size
from service.routes.drawn import PICTURES, AnimationQuery, Prepared, Task, View, answer
from service.schemas import WEIGHT_DTYPE, ExperimentSpec
from service.store import EpochRange, JobRow

router = APIRouter(prefix="/experiments", tags=["experiments"])
WIDEST = 4096
TEXT = {"json", "jsonl", "csv"}
ONE_LAYER = {"npy", *PICTURES}


class EpochQuery(BaseModel):
    """Which layers and epochs."""

    model_config = ConfigDict(extra="forbid")

    format: str | None = Field(None, description="beats the Accept header")
    layer: str | None = Field(None, max_length=3, description="W1, W2, …, or all")
    first: int = Field(0, alias="from", ge=0, le=100_000, description="first epoch")
    last: int | None = Field(None, alias="to", ge=0, le=100_000, description="last epoch")
    stride: int = Field(1, ge=1, le=100_000, description="every stride-th of the recorded epochs")
    of: Literal["weights", "update"] = Field("weights", description="W, or W − W₀")

    @property
    def epochs(self) -> EpochRange:
        """The epochs asked for."""
        return EpochRange(self.first, self.last, self.stride)


class SpectrumQuery(EpochQuery, AnimationQuery):
    """And what of their spectra, drawn how."""

    top_k: int | None = Field(None, ge=1, le=4096, description="only the largest singular values")
    normalize: bool = Field(False, description="add s*_j, the singular values over their sum")
    scale: Literal["log", "linear"] = "linear"


@dataclass(frozen=True)
class Recording:
    """What is asked for of what is recorded: epochs, σ of shape (epochs, k) by layer, and losses for pictures."""

    row: JobRow
    spec: ExperimentSpec
    epochs: list[int]
    spectra: dict[str, Array]
    losses: list[dict[str, Any]]


@router.get(
    "/{experiment_id}/spectrum",
    responses={200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}}, **NOT_MODIFIED},
    openapi_extra=raises(NotAcceptable, SpectrumNotReady, BudgetExceeded, Draining, StorageFull),
)
async def spectrum(
    here: Here, request: Request, experiment_id: str, query: Annotated[SpectrumQuery, Query()]
) -> Response:
    """Singular values of one layer (W2 unless `layer` says otherwise), or of all, by epoch."""
    form = choose_format(query.format, request.headers.get("accept"), MEDIA_TYPES)
    return await answer(here, form, lambda: _prepare(here, request, experiment_id, query, form))


def _prepare(here: Context, request: Request, experiment_id: str, query: SpectrumQuery, form: str) -> Prepared:
    with here.database.read.begin() as session:
        row = store.get_job(session, "experiment", here.owner, experiment_id)
        last = store.last_epoch(session, row.id)
        headers = validators(request, row, last, row.name, form, query.model_dump_json())
        if form in PICTURES:
            headers["cache-control"] = "private, no-cache"  # The name is drawn into them, and may still change.
        if unchanged(request, headers):
            return Response(status_code=304, headers=headers)
        if last is None and form not in TEXT:
            raise SpectrumNotReady(f"the experiment is {row.status}, and epoch 0 is not recorded")
        view = View(here, row, form, headers)
        if (kept := view.kept()) is not None:
            return kept
        recording = _load(session, row, query, form)
    return view.made(_picture(recording, query, form) if form in PICTURES else _numbers(recording, query, form, last))


def chosen_layers(spec: ExperimentSpec, layer: str | None, default: str) -> list[str]:
    """The layers that a view shows. Raises BadRequestValue for one that is not recorded."""
    recorded = spec.recorded_layers
    wanted = layer
    if wanted is None:
        wanted = default if default in {"all", *recorded} else recorded[0]
    if wanted == "all":
        return recorded
    if wanted not in recorded:
        raise BadRequestValue("layer", layer, f"must be all or one of {', '.join(recorded)}")
    return [wanted]


def _load(session: Session, row: JobRow, query: SpectrumQuery, form: str) -> Recording:
    spec = ExperimentSpec.model_validate(row.spec)
    layers = chosen_layers(spec, query.layer, "all" if form == "npz" else "W2")
    if form in ONE_LAYER and len(layers) != 1:
        raise BadRequestValue("layer", query.layer, f"{form} holds one layer; npz, json, jsonl and csv hold all")
    epochs = store.recorded_epochs(session, row.id, query.epochs)
    epochs = _shown(epochs, query, form)
    if not epochs and form not in TEXT:
        raise BadRequestValue("from", query.first, "no recorded epoch lies in the range")
    if form in TEXT:
        k = [min(*spec.shapes[layer], query.top_k or WIDEST) for layer in layers]
        fields = 0 if form == "csv" else FIELD_COUNT
        check_size(len(epochs) * sum(fields + (1 + query.normalize) * one for one in k))
    spectra = {
        layer: store.spectra(session, row.id, layer, min(spec.shapes[layer]), epochs, of=query.of) for layer in layers
    }
    losses = store.losses(session, row.id, epochs) if form in PICTURES else []
    return Recording(row, spec, epochs, spectra, losses)


def _shown(epochs: list[int], query: SpectrumQuery, form: str) -> list[int]:
    """The epochs that a representation shows: a still picture the first and the last, a GIF a thinned history."""
    if form in {"png", "svg"} and len(epochs) > 1:
        return [epochs[0], epochs[-1]]
    if form == "gif" and len(epochs) > query.frames:
        places = np.linspace(0, len(epochs) - 1, query.frames).round().astype(int)
        return [epochs[place] for place in places]
    return epochs


def _numbers(recording: Recording, query: SpectrumQuery, form: str, last: int | None) -> bytes:
    top = slice(query.top_k)
    values = {layer: s[:, top] for layer, s in recording.spectra.items()}
    scaled = {layer: normalized(s)[:, top] for layer, s in recording.spectra.items()} if query.normalize else {}
    match form:
        case "npy":
            return representations.to_npy(next(iter((scaled or values).values())))
        case "npz":
            extra = {f"{layer}_normalized": s for layer, s in scaled.items()}
            return representations.to_npz({"epochs": np.array(recording.epochs), **values, **extra})
        case "csv":
            columns = {"value": values, **({"normalized": scaled} if scaled else {})}
            return representations.spectrum_csv(recording.epochs, columns)
    epochs = _epoch_objects(recording, values, scaled)
    if form == "jsonl":
        return representations.to_jsonl(epochs)
    row = recording.row
    shapes = [{"name": layer, "shape": recording.spec.shapes[layer]} for layer in recording.spectra]
    return representations.to_json({
        "experiment_id": row.id,
        "status": row.status,
        "complete": row.status == "succeeded",
        "last_epoch": last,
        "of": query.of,
        "layers": shapes,
        "epochs": epochs,
    })  # fmt: skip


def _epoch_objects(recording: Recording, values: dict[str, Array], scaled: dict[str, Array]) -> list[dict[str, Any]]:
    described = {
        layer: describe(s, recording.spec.shapes[layer], WEIGHT_DTYPE) for layer, s in recording.spectra.items()
    }
    return [
        {
            "epoch": epoch,
            "layers": [
                {
                    "name": layer,
                    "singular_values": values[layer][i],
                    **({"normalized": scaled[layer][i]} if scaled else {}),
                    **described[layer][i],
                }
                for layer in values
            ],
        }
        for i, epoch in enumerate(recording.epochs)
    ]


def _picture(recording: Recording, query: SpectrumQuery, form: str) -> Task:
    """What `Drawing.draw` is to draw."""
    row = recording.row
    ((layer, s),) = recording.spectra.items()
    shares, ranks = normalized(s)[:, : query.top_k], describe(s, recording.spec.shapes[layer], WEIGHT_DTYPE)
    drawn = [
        Spectrum(
            epoch=losses["epoch"],
            values=shares[i],
            train_loss=losses["train_loss"],
            validation_loss=losses["validation_loss"],
            entropy_rank=ranks[i]["entropy_rank"],
            stable_rank=ranks[i]["stable_rank"],
        )
        for i, losses in enumerate(recording.losses)
    ]
    title = row.name or recording.spec.preset
    chart = Chart(title, layer, recording.spec.shapes[layer], query.of, query.scale)
    timing = (query.fps,) if form == "gif" else ()
    return (f"spectrum_{form}", drawn, chart, query.size, *timing)
