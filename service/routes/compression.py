"""What cutting a layer to a lower rank saves and costs, from the stored spectrum."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from service import representations, store, views
from service.context import JSON_ONLY, OWNER, Here
from service.errors import BadRequestValue, SpectrumNotReady
from service.http import unchanged
from service.lowrank import compression
from service.lowrank.compression import Rule
from service.lowrank.ranks import Array
from service.routes.spectrum import chosen_layers
from service.schemas import WEIGHT_DTYPE, ExperimentSpec

router = APIRouter(prefix="/experiments", tags=["experiments"])
RuleName = compression.RuleName | Literal["all"]
PARAMETERS: dict[str, str] = {"rank": "rank", "energy": "threshold", "error": "threshold", "budget": "fraction"}
DEFAULTS: dict[str, Rule] = {
    "energy": Rule("energy", threshold=0.99),
    "error": Rule("error", threshold=0.1),
    "budget": Rule("budget", fraction=0.5),
    "entropy_rank": Rule("entropy_rank"),
    "optimal": Rule("optimal"),
    "spikes": Rule("spikes"),
}


class CompressionQuery(BaseModel):
    """Which layer, and by which rule its rank is chosen."""

    model_config = ConfigDict(extra="forbid")

    layer: str | None = Field(None, max_length=3, description="W1, W2, …; W2 if left out")
    rule: RuleName = "energy"
    rank: int | None = Field(None, ge=1, le=4096, description="for rule=rank")
    threshold: float | None = Field(None, ge=0, le=1, description="for rule=energy (0.99) and error (0.1)")
    fraction: float | None = Field(None, gt=0, le=1, description="for rule=budget (0.5): of the parameters kept")


@router.get("/{experiment_id}/compression", dependencies=JSON_ONLY)
def report(here: Here, request: Request, experiment_id: str, query: Annotated[CompressionQuery, Query()]) -> Response:
    """The report for one layer at the last recorded epoch: a rule's rank, and errors, loss and R² for every rank."""
    rules = _rules(query)
    with here.database.read.begin() as session:
        row = store.get_job(session, "experiment", OWNER, experiment_id)
        last = store.last_epoch(session, row.id)
        headers = views.validators(row, last, query.model_dump_json())
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
        body = {**head, "rule": "all", "rules": [_report_or_reason(s, shape, rule) for rule in rules]}
    else:
        body = {**head, **compression.report(s, shape, WEIGHT_DTYPE, rules[0])}
    return Response(
        representations.to_json({**body, "curve": _curve(s, shape, cuts)}),
        headers=headers,
        media_type="application/json",
    )


def _rules(query: CompressionQuery) -> list[Rule]:
    """The rule asked for with its parameter. Raises BadRequestValue for a parameter of another rule."""
    wanted = PARAMETERS.get(query.rule)
    for name in ("rank", "threshold", "fraction"):
        if name != wanted and (value := getattr(query, name)) is not None:
            raise BadRequestValue(name, value, f"does not belong to rule={query.rule}")
    if query.rule == "all":
        return list(DEFAULTS.values())
    if wanted is None or (value := getattr(query, wanted)) is None:
        if query.rule == "rank":
            raise BadRequestValue("rank", None, "must be given for rule=rank")
        return [DEFAULTS[query.rule]]
    return [Rule(query.rule, **{wanted: value})]


def _report_or_reason(s: Array, shape: tuple[int, int], rule: Rule) -> dict[str, Any]:
    """A rule's report; nobody asked for its default parameter, so one that does not suit the layer is no error."""
    try:
        return compression.report(s, shape, WEIGHT_DTYPE, rule)
    except BadRequestValue as error:
        return {"rule": rule.name, "fraction": rule.fraction, "rank": None, "chosen_by": error.detail}


def _one_layer(spec: ExperimentSpec, layer: str | None) -> list[str]:
    if layer == "all":
        raise BadRequestValue("layer", layer, "must name one layer; a report is of one")
    return chosen_layers(spec, layer, "W2")


def _curve(s: Array, shape: tuple[int, int], cuts: tuple[Array, Array] | None) -> list[dict[str, Any]]:
    columns = {name: values.tolist() for name, values in compression.curve(s, shape).items()}
    losses, r2 = (values.tolist() for values in cuts) if cuts else ([None] * len(s), [None] * len(s))
    columns |= {"validation_loss": losses, "validation_r2": r2}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
