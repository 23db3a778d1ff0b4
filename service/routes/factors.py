"""Factors of an analysis: a job that writes a file, its manifest, and the file."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy.orm import Session

from service import files, jobs, openapi, plans, reports, store, views
from service.context import JSON_ONLY, Body, Context, Here
from service.downloads import download
from service.errors import BudgetExceeded, InvalidState, NotAcceptable, NotFound, RangeNotSatisfiable
from service.http import choose_format, etag
from service.idempotency import Once, OnceOnly
from service.openapi import DELETES, NOT_MODIFIED, PARTIAL, raises, takes
from service.routes import analyses
from service.schemas import FactorsSpec
from service.store import JobRow

router = APIRouter(prefix="/analyses/{analysis_id}/factors", tags=["analyses"])
KIND = "factors"
EXAMPLES: tuple[dict[str, Any], ...] = (
    {"summary": "99 % of the energy of every layer", "value": {}},
    {
        "summary": "half the parameters of the model",
        "value": {"rule": "global_budget", "fraction": 0.5, "format": "npz"},
    },
)


class FactorsQuery(BaseModel):
    """The job with its manifest, or the file."""

    model_config = ConfigDict(extra="forbid")

    format: str | None = None


@router.post(
    "",
    status_code=202,
    response_model=views.Factors,
    openapi_extra={**takes(FactorsSpec, *EXAMPLES), **raises(InvalidState, BudgetExceeded, *openapi.CREATES)},
    dependencies=JSON_ONLY,
)
def create(here: Here, once: OnceOnly, analysis_id: str, body: Body) -> Response:
    """Write the layers as factors `name.A` (r×n) and `name.B` (m×r), at a rule's ranks, or as an adapter for PEFT."""
    earlier = once.earlier(body)
    row = _queue(here, once, analysis_id, body) if earlier is None else jobs.read(here, KIND, earlier)
    headers = {"location": f"/analyses/{analysis_id}/factors/{row.id}", **once.headers}
    return jobs.answer(row, _view(here, row), status=202, headers=headers)


def _view(here: Context, row: JobRow) -> dict[str, Any]:
    with here.database.read.begin() as session:
        return views.factors(row, store.manifest(session, row.id))


def _queue(here: Context, once: Once, analysis_id: str, body: dict[str, Any]) -> JobRow:
    spec = FactorsSpec.model_validate(body)
    with here.database.read.begin() as session:
        analysis = store.get_job(session, analyses.KIND, here.owner, analysis_id)
        rows = store.tensors(session, analysis.id)
    if analysis.status != "succeeded" or not reports.analysed(rows):
        raise InvalidState(f"the analysis {analysis.status}, with {len(reports.analysed(rows))} tensors analysed")
    plans.choices_for(rows, spec)
    jobs.check_disk(here, analysis.spec["source"]["bytes"])
    with here.database.write.begin() as session:
        store.get_job(session, analyses.KIND, here.owner, analysis_id)  # It may have been deleted meanwhile.
        row = store.create_job(session, _job(spec, analysis), here.settings.queue_limit)
        once.record(session, row.id)
    return row


def _job(spec: FactorsSpec, analysis: JobRow) -> dict[str, Any]:
    return {
        "kind": KIND,
        "owner": analysis.owner,
        "name": spec.name,
        "tags": {},
        "priority": spec.priority,
        "total": analysis.total,
        "parent": analysis.id,
        "spec": {"device": "cpu", "request": spec.model_dump()},
    }


def _factors(session: Session, owner: str, analysis_id: str, factors_id: str) -> JobRow:
    row = store.get_job(session, KIND, owner, factors_id)
    if row.parent != analysis_id:
        raise NotFound(f"no factors {factors_id[:40]!r} of this analysis")
    return row


@router.get("", response_model=views.FactorsList, dependencies=JSON_ONLY)
def index(here: Here, analysis_id: str) -> dict[str, Any]:
    """All factors made of the analysis, oldest first."""
    with here.database.read.begin() as session:
        store.get_job(session, analyses.KIND, here.owner, analysis_id)
        made = [views.factors(row, None) for row in store.children(session, analysis_id)]
    return {"object": "list", "data": made, "has_more": False, "next": None}


@router.get(
    "/{factors_id}",
    response_model=views.Factors,
    responses={200: {"content": {"application/octet-stream": {}}}, **PARTIAL, **NOT_MODIFIED},
    openapi_extra=raises(NotAcceptable, InvalidState, RangeNotSatisfiable),
)
def read(
    here: Here, request: Request, analysis_id: str, factors_id: str, query: Annotated[FactorsQuery, Query()]
) -> Response:
    """The job, with the manifest once it has succeeded; `format=` that of the file sends the file, and takes Range."""
    with here.database.read.begin() as session:
        row = _factors(session, here.owner, analysis_id, factors_id)
        manifest = store.manifest(session, row.id)
    made = row.spec["request"]["format"]
    form = query.format or choose_format(None, request.headers.get("accept"), {"json": "application/json"})
    if form == "json":
        return jobs.unchanged(request, row) or jobs.answer(row, views.factors(row, manifest))
    if form != made:
        raise NotAcceptable(f"these factors were made as {made}; available are json, {made}", available=["json", made])
    if manifest is None:
        raise InvalidState(f"the job is {row.status}: there is no file")
    path = files.factors_path(here.settings.data, row.id, row.attempt, made)
    headers = {"etag": etag(manifest["sha256"]), "cache-control": "private, max-age=31536000, immutable"}
    return download(request, path, f"{row.id}{path.suffix}", headers)


@router.post(
    "/{factors_id}/cancel",
    response_model=views.Factors,
    responses={202: {"model": views.Factors}},
    dependencies=JSON_ONLY,
)
def cancel(here: Here, once: OnceOnly, analysis_id: str, factors_id: str) -> Response:
    """Stop the job; no file is left."""
    with here.database.read.begin() as session:
        _factors(session, here.owner, analysis_id, factors_id)
    row = jobs.cancel(here, once, KIND, factors_id)
    return jobs.cancel_answer(row, _view(here, row), once)


@router.delete("/{factors_id}", status_code=204, openapi_extra=DELETES)
def remove(here: Here, request: Request, analysis_id: str, factors_id: str) -> Response:
    """Delete the factors and their file; the analysis stays."""
    with here.database.read.begin() as session:
        _factors(session, here.owner, analysis_id, factors_id)
    return jobs.remove(here, request, KIND, factors_id)
