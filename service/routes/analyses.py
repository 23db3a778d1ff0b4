"""Analyses of uploaded weight files: post, read, list, cancel, delete."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from service import files, intake, jobs, listing, openapi, reports, store, views
from service.context import JSON_ONLY, Context, Here
from service.errors import (
    BadRequestValue,
    BudgetExceeded,
    MalformedMultipart,
    NotFound,
    TorchDisabled,
    UnsupportedMediaType,
    refusal_of,
)
from service.idempotency import Once, OnceOnly
from service.intake import Received
from service.openapi import DELETES, NOT_MODIFIED, PREFER, raises
from service.problems import problem_response
from service.representations import ANSWER_LIMIT
from service.schemas import Name, Priority
from service.store import JobRow, TensorRow
from service.uploads import Matricize, Upload, inspect

router = APIRouter(tags=["analyses"])
KIND = "analysis"
WAIT_S = 10
TENSOR_VALUES = 70  # What is said of each tensor besides its singular values: ranks and norms, a report, a table.
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


class ReportQuery(BaseModel):
    """How much of each spectrum the answer holds."""

    model_config = ConfigDict(extra="forbid")

    top_k: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="singular values of each tensor; 512, or fewer in a file of very many, if left out",
    )


class AnalyzeQuery(ReportQuery):
    """What to do with the file."""

    base: str | None = Field(None, max_length=100, description="id of an analysis: analyse the differences to its file")
    matricize: Matricize = Field("auto", description="auto: read more than two axes as (first, all others)")
    name: Name | None = None
    priority: Priority = "normal"
    reuse: bool = Field(True, description="take over what an earlier analysis of the same bytes found")


@router.post(
    "/analyze",
    status_code=200,
    response_model=views.Analysis,
    responses={202: {"model": views.Analysis}},
    openapi_extra={
        **BODY,
        **PREFER,
        **raises(
            *openapi.UPLOADS, *openapi.CREATES, MalformedMultipart, UnsupportedMediaType, TorchDisabled, BudgetExceeded
        ),
    },
    dependencies=JSON_ONLY,
)
async def analyze(here: Here, once: OnceOnly, request: Request, query: Annotated[AnalyzeQuery, Query()]) -> Response:
    """Analyse a weight file: .npy, .npz, .safetensors, or .pt where allowed; the body is the file, or multipart.

    The answer waits for the report as long as `Prefer: wait=` says (10 s if nothing is said), and is 202 after that.
    """
    async with intake.received(here, request) as upload:
        row = await run_in_threadpool(_create, here, once, upload, query)
    seconds, applied = jobs.preference(request, WAIT_S)
    row = await jobs.wait(here, request, row, seconds)
    headers = {"location": f"/analyses/{row.id}", **applied, **once.headers}
    with jobs.stored_at(headers["location"]):
        return await run_in_threadpool(_answer, here, request, row, query.top_k, headers)


def _create(here: Context, once: Once, upload: Received, query: AnalyzeQuery) -> JobRow:
    """Check the file's headers, shapes and sizes, keep it and queue the job. Raises UploadError and others."""
    if (earlier := once.earlier([upload.sha256, query.model_dump()])) is not None:
        return jobs.read(here, KIND, earlier)
    found = inspect(upload.file, upload.size, here.settings.upload_limits(query.matricize))
    data, job_id = here.settings.data, store.new_id()
    files.expect(data, job_id)
    try:
        with here.database.write.begin() as session:
            base = _base(session, here.owner, query.base)
            job = {**_job(upload, found, query, base), "owner": here.owner}
            row = store.create_job(session, job, here.settings.queue_limit, job_id)
            once.record(session, job_id)
            store.add_tensors(session, job_id, found.tensors)
            files.keep(upload.file, files.upload_path(data, job_id))
            if base is not None:
                files.share(files.upload_path(data, base.id), files.base_path(data, job_id))
    except BaseException:
        files.remove_job(data, job_id)
        raise
    files.arrived(data, job_id)
    return row


def _base(session: Session, owner: str, base_id: str | None) -> JobRow | None:
    if base_id is None:
        return None
    try:
        return store.get_job(session, KIND, owner, base_id)
    except NotFound as error:
        raise BadRequestValue("base", base_id, "is no analysis") from error


def _job(upload: Received, found: Upload, query: AnalyzeQuery, base: JobRow | None) -> dict[str, Any]:
    return {
        "kind": KIND,
        "name": query.name,
        "tags": {},
        "priority": query.priority,
        "total": sum(tensor.work for tensor in found.tensors),
        "upload": upload.sha256,
        "spec": {
            "device": "auto",
            "matricize": query.matricize,
            "reuse": query.reuse,
            "base": query.base,
            "base_sha256": None if base is None else base.upload,
            "source": {"format": found.format, "bytes": upload.size, "sha256": upload.sha256},
        },
    }


def _answer(here: Context, request: Request, row: JobRow, top_k: int | None, headers: dict[str, str]) -> Response:
    """The report, 202 while it is not whole; a refusal that only the job could find is the problem all the same."""
    if row.error is not None and (refusal := refusal_of(row.error["type"], row.error["detail"])) is not None:
        return problem_response(request, refusal, headers=headers)
    with here.database.read.begin() as session:
        rows = store.tensors(session, row.id)
    status = 200 if row.status in store.TERMINAL else 202
    return jobs.answer(row, _report(row, rows, top_k), top_k, status=status, headers=headers)


def _report(row: JobRow, rows: list[TensorRow], top_k: int | None) -> dict[str, Any]:
    fields = reports.fields_of(rows)
    shown = _shown(rows, top_k)
    tables = {tensor.position: reports.table_of(tensor) for tensor in reports.analysed(rows)}
    listed = [reports.tensor(one, fields.get(one.position), tables.get(one.position), shown) for one in rows]
    sums = reports.totals(rows, {position: table[0] for position, table in tables.items()})
    return {**views.analysis(row), "top_k": shown, "tensors": listed, "totals": sums}


def _shown(rows: list[TensorRow], top_k: int | None) -> int:
    """How many singular values of each tensor are sent. Raises BudgetExceeded where more were asked for than fit."""
    lengths = [min(reports.matrix_shape(row)) for row in reports.analysed(rows)]

    def figure(most: int) -> int:
        return sum(TENSOR_VALUES + min(most, length) for length in lengths)

    if top_k is not None:
        if figure(top_k) > ANSWER_LIMIT:
            raise BudgetExceeded("values in the answer", figure(top_k), ANSWER_LIMIT, "take a smaller top_k, or npz")
        return top_k
    return next((most for most in (reports.TOP_K, 128, 32, 8) if figure(most) <= ANSWER_LIMIT), 1)


@router.get("/analyses", response_model=views.AnalysisList, dependencies=JSON_ONLY)
def index(here: Here, request: Request, query: Annotated[listing.ListQuery, Query()]) -> Response:
    """A page of analyses without their tensors, newest first unless `order=asc`."""
    return listing.answer(here, request, KIND, query, views.analysis)


@router.get(
    "/analyses/{analysis_id}",
    response_model=views.Analysis,
    responses=NOT_MODIFIED,
    openapi_extra=raises(BudgetExceeded),
    dependencies=JSON_ONLY,
)
def read(here: Here, request: Request, analysis_id: str, query: Annotated[ReportQuery, Query()]) -> Response:
    """The report: every tensor analysed, or skipped with the reason; it fills while the job runs."""
    with here.database.read.begin() as session:
        row = store.get_job(session, KIND, here.owner, analysis_id)
        if (same := jobs.unchanged(request, row, query.top_k)) is not None:
            return same
        rows = store.tensors(session, row.id)
    return jobs.answer(row, _report(row, rows, query.top_k), query.top_k)


@router.post(
    "/analyses/{analysis_id}/cancel",
    response_model=views.AnalysisSummary,
    responses={202: {"model": views.AnalysisSummary}},
    dependencies=JSON_ONLY,
)
def cancel(here: Here, once: OnceOnly, analysis_id: str) -> Response:
    """Stop a queued or running analysis; the tensors that it has analysed stay."""
    row = jobs.cancel(here, once, KIND, analysis_id)
    return jobs.cancel_answer(row, views.analysis(row), once)


@router.delete("/analyses/{analysis_id}", status_code=204, openapi_extra=DELETES)
def remove(here: Here, request: Request, analysis_id: str) -> Response:
    """Delete an analysis that does not run, with its file, its spectra and the factors made of it.

    With If-Match: the ETag of the whole report, without `top_k`.
    """
    return jobs.remove(here, request, KIND, analysis_id, lambda *_: (None,))
