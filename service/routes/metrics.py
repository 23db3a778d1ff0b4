"""Losses, ranks and norms by epoch and layer, and the law of weight decay beside them."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from service import representations, store
from service.context import Here
from service.errors import BudgetExceeded, NotAcceptable
from service.http import choose_format, unchanged, validators
from service.lowrank import decay, describe
from service.lowrank.ranks import Array
from service.openapi import NOT_MODIFIED, raises
from service.representations import FIELD_COUNT, MEDIA_TYPES, check_size
from service.routes.spectrum import EpochQuery, chosen_layers
from service.schemas import WEIGHT_DTYPE, ExperimentSpec

router = APIRouter(prefix="/experiments", tags=["experiments"])
FORMATS = {name: MEDIA_TYPES[name] for name in ("json", "csv", "jsonl")}


@router.get(
    "/{experiment_id}/metrics",
    responses={200: {"content": {kind: {} for kind in FORMATS.values()}}, **NOT_MODIFIED},
    openapi_extra=raises(NotAcceptable, BudgetExceeded),
)
def metrics(here: Here, request: Request, experiment_id: str, query: Annotated[EpochQuery, Query()]) -> Response:
    """Losses, R², every rank and norm of each layer (all unless `layer` names one), and τ."""
    form = choose_format(query.format, request.headers.get("accept"), FORMATS)
    with here.database.read.begin() as session:
        row = store.get_job(session, "experiment", here.owner, experiment_id)
        headers = validators(request, row, store.last_epoch(session, row.id), form, query.model_dump_json())
        if unchanged(request, headers):
            return Response(status_code=304, headers=headers)
        spec = ExperimentSpec.model_validate(row.spec)
        layers = chosen_layers(spec, query.layer, "all")
        epochs = store.recorded_epochs(session, row.id, query.epochs)
        check_size(len(epochs) * len(layers) * FIELD_COUNT)
        losses = store.losses(session, row.id, epochs)
        spectra = {
            layer: store.spectra(session, row.id, layer, min(spec.shapes[layer]), epochs, of=query.of)
            for layer in layers
        }
        ends = _ends(session, row.id, spec, layers)
    rows = _rows(spec, losses, spectra)
    match form:
        case "csv":
            content = representations.table_csv([
                {**{key: value for key, value in row.items() if key != "layers"}, **layer}
                for row in rows
                for layer in row["layers"]
            ])  # fmt: skip
        case "jsonl":
            content = representations.to_jsonl(rows)
        case _:
            head = {"experiment_id": row.id, "status": row.status, "of": query.of}
            content = representations.to_json({**head, **_decay(spec, ends), "epochs": rows})
    return Response(content, headers=headers, media_type=FORMATS[form])


def _rows(spec: ExperimentSpec, losses: list[dict[str, Any]], spectra: dict[str, Array]) -> list[dict[str, Any]]:
    described = {layer: describe(s, spec.shapes[layer], WEIGHT_DTYPE) for layer, s in spectra.items()}
    return [
        {**loss, "layers": [{"name": layer, **fields[i]} for layer, fields in described.items()]}
        for i, loss in enumerate(losses)
    ]


def _ends(
    session: Session, job_id: str, spec: ExperimentSpec, layers: list[str]
) -> dict[str, tuple[int, Array, Array]]:
    """Last epoch, and σ(W) at epoch 0 and then, of each layer; empty before anything is recorded."""
    if (last := store.last_epoch(session, job_id)) is None:
        return {}
    epochs = sorted({0, last})
    both = {
        layer: store.spectra(session, job_id, layer, min(spec.shapes[layer]), epochs, of="weights") for layer in layers
    }
    return {layer: (last, s[0], s[-1]) for layer, s in both.items()}


def _decay(spec: ExperimentSpec, ends: dict[str, tuple[int, Array, Array]]) -> dict[str, Any]:
    """τ over the epochs recorded so far, and the shrinkage that it predicts and that each layer shows."""
    if not ends:
        return {"tau": None, "notes": ["nothing is recorded yet"], "decay_law": None}
    last = next(iter(ends.values()))[0]
    training = spec.training
    law = decay.decay_law(
        last * spec.steps_per_epoch, training.lr, training.weight_decay, training.momentum, training.optimizer
    )
    measured = [
        {"name": layer, "measured_shrinkage": decay.measured_shrinkage(s0, s1)} for layer, (_, s0, s1) in ends.items()
    ]
    shown = {"predicted_shrinkage": law.predicted_shrinkage, "layers": measured} if law.applies else None
    return {"tau": law.tau, "notes": law.notes, "decay_law": shown}
