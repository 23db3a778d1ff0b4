"""What cutting a layer to a lower rank saves and costs, from the stored spectrum."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import Field

from service import representations, store
from service.context import JSON_ONLY, Here
from service.errors import BadRequestValue, SpectrumNotReady
from service.http import unchanged, validators
from service.lowrank import compression
from service.lowrank.ranks import Array
from service.openapi import NOT_MODIFIED, raises
from service.routes.spectrum import chosen_layers
from service.rules import DEFAULTS, check_parameters, report_or_reason, rule_of
from service.schemas import WEIGHT_DTYPE, ExperimentSpec, RuleOrAll, RuleParameters

router = APIRouter(prefix="/experiments", tags=["experiments"])


class CompressionQuery(RuleParameters):
    """Which layer, and by which rule its rank is chosen."""

    layer: str | None = Field(None, max_length=3, description="W1, W2, …; W2 if left out")
    rule: RuleOrAll = "energy"


@router.get(
    "/{experiment_id}/compression",
    responses=NOT_MODIFIED,
    openapi_extra=raises(SpectrumNotReady),
    dependencies=JSON_ONLY,
)
def report(here: Here, request: Request, experiment_id: str, query: Annotated[CompressionQuery, Query()]) -> Response:
    """The report for one layer at the last recorded epoch: a rule's rank, and errors, loss and R² for every rank."""
    check_parameters(query.rule, query)
    with here.database.read.begin() as session:
        row = store.get_job(session, "experiment", here.owner, experiment_id)
        last = store.last_epoch(session, row.id)
        headers = validators(request, row, last, query.model_dump_json())
        if unchanged(request, headers):
            return Response(status_code=304, headers=headers)
        spec = ExperimentSpec.model_validate(row.spec)
        (layer,) = _one_layer(spec, query.layer)
        if last is None:
            raise SpectrumNotReady(f"the experiment is {row.status}, and epoch 0 is not recorded")
        s = store.spectra(session, row.id, layer, min(spec.shapes[layer]), [last], of="weights")[0]
        cuts = store.cuts(session, row.id, layer)
    shape = spec.shapes[layer]
    head = {"experiment_id": row.id, "layer": layer, "epoch": last, "shape": shape, "dtype": WEIGHT_DTYPE}
    if query.rule == "all":
        rules = [report_or_reason(s, shape, WEIGHT_DTYPE, rule) for rule in DEFAULTS.values()]
        body = {**head, "rule": "all", "rules": rules}
    else:
        body = {**head, **compression.report(s, shape, WEIGHT_DTYPE, rule_of(query.rule, query))}
    return Response(
        representations.to_json({**body, "curve": _curve(s, shape, cuts)}),
        headers=headers,
        media_type="application/json",
    )


def _one_layer(spec: ExperimentSpec, layer: str | None) -> list[str]:
    if layer is not None and layer not in spec.recorded_layers:
        raise BadRequestValue("layer", layer, f"must be one of {', '.join(spec.recorded_layers)}: a report is of one")
    return chosen_layers(spec, layer, "W2")


def _curve(s: Array, shape: tuple[int, int], cuts: tuple[Array, Array] | None) -> list[dict[str, Any]]:
    losses, r2 = cuts if cuts else (np.full(len(s), np.nan), np.full(len(s), np.nan))
    return representations.rows_of({**compression.curve(s, shape), "validation_loss": losses, "validation_r2": r2})
