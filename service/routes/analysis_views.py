"""Spectra and compression reports of an analysis: every one a function of the stored singular values."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from service import plans, reports, representations, store
from service.context import Context, Here
from service.errors import (
    BadRequestValue,
    BudgetExceeded,
    Draining,
    InvalidState,
    NotAcceptable,
    SpectrumNotReady,
    StorageFull,
)
from service.http import choose_format, unchanged, validators
from service.lowrank import normalized
from service.lowrank.allocation import Weighting
from service.lowrank.compression import RuleName
from service.openapi import NOT_MODIFIED, raises
from service.pictures import ModelSpectra, profile
from service.representations import FIELD_COUNT, MEDIA_TYPES, check_size
from service.routes.analyses import KIND
from service.routes.drawn import PICTURES, Prepared, SizeQuery, Task, View, answer
from service.rules import BUDGET, check_parameters, rule_of
from service.schemas import RuleOrAll, RuleParameters
from service.store import JobRow, TensorRow, spectrum_of

router = APIRouter(prefix="/analyses", tags=["analyses"])
SPECTRUM_FORMATS = {name: MEDIA_TYPES[name] for name in ("json", "jsonl", "csv", "npy", "npz", "png", "svg")}
COMPRESSION_FORMATS = {name: MEDIA_TYPES[name] for name in ("json", "csv", "png", "svg")}
PROBLEMS = raises(NotAcceptable, SpectrumNotReady, InvalidState, BudgetExceeded, Draining, StorageFull)
LAYER = Field(None, max_length=1000, description="a tensor's name, or all; all if left out, unless there is only one")


class PictureQuery(RuleParameters, SizeQuery):
    """Of which layer, in what form, and how a picture of it is drawn."""

    layer: str | None = LAYER
    format: str | None = Field(None, description="beats the Accept header")


class AnalysisSpectrumQuery(PictureQuery):
    """What of the spectra; the rule's rank is marked in the picture of one layer."""

    rule: RuleName = "energy"
    top_k: int | None = Field(None, ge=1, le=65_536, description="only the largest singular values")
    normalize: bool = Field(False, description="add s*_j, the singular values over their sum")
    scale: Literal["log", "linear"] = "linear"


class AnalysisCompressionQuery(PictureQuery):
    """By which rule ranks are chosen, for one layer, for each, or for all with one budget."""

    rule: Literal[RuleOrAll, "global_budget"] = "energy"
    weighting: Weighting = Field("relative", description="global_budget: lost energies over ‖W‖², or as they are")


Build = Callable[[JobRow, list[TensorRow]], bytes | Task]


async def _answer(
    here: Context, request: Request, analysis_id: str, form: tuple[str, BaseModel], build: Build
) -> Response:
    """The representation that `build` makes of what is stored: its bytes, or what is to be drawn."""
    return await answer(here, form[0], lambda: _prepare(here, request, analysis_id, form, build))


def _prepare(here: Context, request: Request, analysis_id: str, form: tuple[str, BaseModel], build: Build) -> Prepared:
    name, query = form
    with here.database.read.begin() as session:
        row = store.get_job(session, KIND, here.owner, analysis_id)
        headers = validators(request, row, row.revision, name, query.model_dump_json())
        if unchanged(request, headers):
            return Response(status_code=304, headers=headers)
        view = View(here, row, name, headers)
        if (kept := view.kept()) is not None:
            return kept
        rows = store.tensors(session, row.id)
    return view.made(build(row, rows))


def _chosen(row: JobRow, rows: list[TensorRow], layer: str | None) -> list[TensorRow]:
    """The analysed tensors that are asked for.

    Raises BadRequestValue for one that has no spectrum, SpectrumNotReady and InvalidState where there is none at all.
    """
    found = reports.analysed(rows)
    if not found:
        if row.status in store.TERMINAL:
            raise InvalidState(f"the analysis {row.status} and has no spectrum")
        raise SpectrumNotReady(f"the analysis is {row.status}, and no tensor is analysed yet")
    if layer in {None, "all"}:
        return found
    if not (named := [one for one in found if one.name == layer]):
        standing = next((f"is {one.status}: {one.detail}" for one in rows if one.name == layer), "is not in the file")
        raise BadRequestValue("layer", layer, f"{standing}; analysed are {', '.join(one.name for one in found[:20])}")
    return named


@router.get(
    "/{analysis_id}/spectrum",
    responses={200: {"content": {kind: {} for kind in SPECTRUM_FORMATS.values()}}, **NOT_MODIFIED},
    openapi_extra=PROBLEMS,
)
async def spectrum(
    here: Here, request: Request, analysis_id: str, query: Annotated[AnalysisSpectrumQuery, Query()]
) -> Response:
    """Singular values of one tensor or of all; a picture of one, or a heat map of the whole model."""
    form = choose_format(query.format, request.headers.get("accept"), SPECTRUM_FORMATS)
    check_parameters(query.rule, query)

    def build(row: JobRow, rows: list[TensorRow]) -> bytes | Task:
        chosen = _chosen(row, rows, query.layer)
        return _picture(row, chosen, query, form) if form in PICTURES else _numbers(row, chosen, query, form)

    return await _answer(here, request, analysis_id, (form, query), build)


def _picture(row: JobRow, chosen: list[TensorRow], query: AnalysisSpectrumQuery, form: str) -> Task:
    """One layer with its marks, or the heat map of a whole model."""
    title, size = _title(row), query.size
    if len(chosen) > 1 or query.layer == "all":
        names = tuple(one.name for one in chosen)
        model = ModelSpectra(title, names, np.stack([profile(spectrum_of(one)) for one in chosen]))
        return (f"heatmap_{form}", model, size)
    rule = rule_of(query.rule, query)
    return (f"layer_{form}", plans.marked_layer(chosen[0], rule, title, query.top_k, query.scale), size)


def _title(row: JobRow) -> str:
    return row.name or f"{row.spec['source']['format']} {row.spec['source']['sha256'][:12]}"


def _numbers(row: JobRow, chosen: list[TensorRow], query: AnalysisSpectrumQuery, form: str) -> bytes:
    top = slice(query.top_k)
    values = {one.name: reports.values_of(one)[top] for one in chosen}
    scaled = {one.name: normalized(spectrum_of(one))[top] for one in chosen} if query.normalize else {}
    if form not in {"npy", "npz"}:
        check_size(sum((1 + query.normalize) * len(s) + (form != "csv") * FIELD_COUNT for s in values.values()))
    match form:
        case "npy":
            if len(chosen) != 1:
                raise BadRequestValue("layer", query.layer, "npy holds one layer; npz, json, jsonl and csv hold all")
            return representations.to_npy(next(iter((scaled or values).values())))
        case "npz":
            extra = {f"{name}_normalized": s for name, s in scaled.items()}
            if taken := values.keys() & extra.keys():
                raise BadRequestValue(
                    "normalize", True, f"the file has a tensor called {min(taken)!r}; take json or csv"
                )
            return representations.to_npz({**values, **extra})
        case "csv":
            return representations.tensors_csv({"value": values, **({"normalized": scaled} if scaled else {})})
    fields = reports.fields_of(chosen)
    tensors = [
        {
            "name": one.name,
            "shape": reports.matrix_shape(one),
            "dtype": one.dtype,
            "singular_values": values[one.name],
            **({"normalized": scaled[one.name]} if scaled else {}),
            **fields[one.position],
        }
        for one in chosen
    ]
    if form == "jsonl":
        return representations.to_jsonl(tensors)
    head = {"analysis_id": row.id, "status": row.status, "complete": row.status == "succeeded"}
    return representations.to_json({**head, "tensors": tensors})


@router.get(
    "/{analysis_id}/compression",
    responses={200: {"content": {kind: {} for kind in COMPRESSION_FORMATS.values()}}, **NOT_MODIFIED},
    openapi_extra=PROBLEMS,
)
async def compression(
    here: Here, request: Request, analysis_id: str, query: Annotated[AnalysisCompressionQuery, Query()]
) -> Response:
    """What a rule makes of one layer (with a curve over all its ranks), of each, or one budget of the whole model."""
    form = choose_format(query.format, request.headers.get("accept"), COMPRESSION_FORMATS)
    check_parameters(query.rule, query)
    if query.rule == "global_budget" and query.layer not in {None, "all"}:
        raise BadRequestValue("layer", query.layer, "global_budget is over all layers")
    if form in PICTURES and query.rule != "global_budget":
        raise BadRequestValue("format", form, "is for rule=global_budget; the spectrum has a picture for the others")

    def build(row: JobRow, rows: list[TensorRow]) -> bytes | Task:
        chosen = _chosen(row, rows, query.layer)
        report = _report(rows, chosen, query)
        if form in PICTURES:
            return (f"budget_{form}", plans.budget_curve(rows, report, _title(row)), query.size)
        if form == "csv":
            return _table(report)
        head = {"analysis_id": row.id, "status": row.status, "complete": row.status == "succeeded"}
        return representations.to_json({**head, **report})

    return await _answer(here, request, analysis_id, (form, query), build)


def _report(rows: list[TensorRow], chosen: list[TensorRow], query: AnalysisCompressionQuery) -> dict[str, Any]:
    if query.rule == "global_budget":
        return plans.budget_report(rows, query.fraction or BUDGET, query.weighting)
    is_one = len(chosen) == 1 and query.layer != "all"
    if query.rule == "all":
        return plans.layer_table(chosen[0]) if is_one else plans.model_table(rows)
    rule = rule_of(query.rule, query)
    return plans.layer_report(chosen[0], rule) if is_one else plans.model_report(rows, rule)


def _table(report: dict[str, Any]) -> bytes:
    """A row a layer; with every rule, a row a layer and rule."""
    rows = [
        {key: value for key, value in {**layer, **rule}.items() if key not in {"rules", "curve", "shape"}}
        for layer in report.get("layers", [report])
        for rule in layer.get("rules", [{}])
    ]
    return representations.table_csv(rows)
