"""Experiments: post, read, list, rename, cancel, delete."""

from typing import Annotated, Any

from anyio import from_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import Field

from service import jobs, listing, openapi, store, views, webhooks
from service.context import JSON_ONLY, Body, Context, Here
from service.errors import BudgetExceeded, PreconditionFailed
from service.idempotency import Once, OnceOnly
from service.openapi import DELETES, IF_MATCH, NOT_MODIFIED, PREFER, raises, takes
from service.schemas import ExperimentSpec, Name, Strict, Tags, resolve
from service.store import TERMINAL, JobRow

router = APIRouter(prefix="/experiments", tags=["experiments"])
KIND = "experiment"
EXAMPLES: tuple[dict[str, Any], ...] = (
    {"summary": "the memo's experiment", "value": {}},
    {
        "summary": "AdamW on a wider network",
        "value": {
            "preset": "memo-adamw",
            "name": "wide",
            "tags": {"study": "width"},
            "seed": 1,
            "network": {"hidden": [96, 96]},
            "record": {"every": 5, "layers": ["W2"]},
        },
    },
)
RENAMED = {"summary": "a new name and a tag", "value": {"name": "the best run", "tags": {"kept": "yes"}}}


class LabelChanges(Strict):
    """What may change after the post; a field that is left out stays."""

    name: Name | None = None
    tags: Tags = Field(default_factory=dict)


@router.post(
    "",
    status_code=202,
    response_model=views.Experiment,
    responses={200: {"model": views.Experiment, "description": "It was over in the time that `Prefer: wait=` gave"}},
    openapi_extra={**takes(ExperimentSpec, *EXAMPLES), **raises(*openapi.CREATES, BudgetExceeded), **PREFER},
    dependencies=JSON_ONLY,
)
async def create(here: Here, once: OnceOnly, request: Request, body: Body) -> Response:
    """Queue a training run; `{}` is the memo's experiment. `Prefer: wait=` waits for its end, and is answered 200 then.

    Sent again with its Idempotency-Key, it answers with the same experiment as it is now.
    """
    row = await run_in_threadpool(_queue, here, once, body)
    seconds, applied = jobs.preference(request, 0)
    row = await jobs.wait(here, request, row, seconds)
    headers = {"location": f"/experiments/{row.id}", **applied, **once.headers}
    status = 200 if seconds and row.status in TERMINAL else 202
    return jobs.answer(row, views.experiment(row), status=status, headers=headers)


def _queue(here: Context, once: Once, body: dict[str, Any]) -> JobRow:
    if (earlier := once.earlier(body)) is not None:
        return jobs.read(here, KIND, earlier)
    spec = resolve(body)
    jobs.check_device(here, spec.device)
    from_thread.run(webhooks.check, here.settings, spec.webhook)
    jobs.check_disk(here)
    job = {
        "kind": KIND,
        "owner": here.owner,
        "name": spec.name,
        "tags": spec.tags,
        "spec": spec.model_dump(),
        "priority": spec.priority,
        "total": spec.training.epochs,
    }
    with here.database.write.begin() as session:
        row = store.create_job(session, job, here.settings.queue_limit)
        once.record(session, row.id)
    return row


@router.get("", response_model=views.ExperimentList, dependencies=JSON_ONLY)
def index(here: Here, request: Request, query: Annotated[listing.ListQuery, Query()]) -> Response:
    """A page of experiments, newest first unless `order=asc`."""
    return listing.answer(here, request, KIND, query, views.experiment)


@router.get("/{experiment_id}", response_model=views.Experiment, responses=NOT_MODIFIED, dependencies=JSON_ONLY)
def read(here: Here, request: Request, experiment_id: str) -> Response:
    """One experiment: its status, progress and specification."""
    row = jobs.read(here, KIND, experiment_id)
    return jobs.unchanged(request, row) or jobs.answer(row, views.experiment(row))


@router.patch(
    "/{experiment_id}",
    response_model=views.Experiment,
    openapi_extra={**takes(LabelChanges, RENAMED), **raises(PreconditionFailed), **IF_MATCH},
    dependencies=JSON_ONLY,
)
def rename(here: Here, request: Request, experiment_id: str, body: Body) -> Response:
    """Change name and tags, nothing else; with If-Match only if nobody was faster."""
    changes = LabelChanges.model_validate(body).model_dump(exclude_unset=True)
    with here.database.write.begin() as session:
        row = store.get_job(session, KIND, here.owner, experiment_id)
        jobs.expect(request, row)
        row = store.rename_job(session, experiment_id, changes)
    return jobs.answer(row, views.experiment(row))


@router.post(
    "/{experiment_id}/cancel",
    response_model=views.Experiment,
    responses={202: {"model": views.Experiment}},
    dependencies=JSON_ONLY,
)
def cancel(here: Here, once: OnceOnly, experiment_id: str) -> Response:
    """Stop a queued or running experiment; what it has recorded stays. Calling it again changes nothing."""
    row = jobs.cancel(here, once, KIND, experiment_id)
    return jobs.cancel_answer(row, views.experiment(row), once)


@router.delete("/{experiment_id}", status_code=204, openapi_extra=DELETES)
def remove(here: Here, request: Request, experiment_id: str) -> Response:
    """Delete an experiment that does not run, with all it recorded; with If-Match only if nobody has changed it."""
    return jobs.remove(here, request, KIND, experiment_id)
