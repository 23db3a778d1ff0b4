"""Sweeps: post, read, list, cancel, delete. A member is an experiment: it is read, renamed and deleted as one."""

from typing import Annotated, Any

from anyio import from_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from service import jobs, listing, openapi, store, sweeps, views, webhooks
from service.context import JSON_ONLY, Body, Context, Here
from service.errors import BudgetExceeded
from service.idempotency import Once, OnceOnly
from service.openapi import DELETES, NOT_MODIFIED, PREFER, raises, takes
from service.store import TERMINAL, JobRow
from service.sweeps import Member, SweepSpec

router = APIRouter(prefix="/sweeps", tags=["sweeps"])
KIND = "sweep"
EXAMPLES: tuple[dict[str, Any], ...] = (
    {
        "summary": "weight decay and learning rate, two seeds each",
        "value": {
            "base": {"name": "decay", "training": {"epochs": 2}},
            "grid": {
                "training.weight_decay": [0, 0.005],
                "training.lr": {"log": [0.05, 0.2, 2]},
                "seed": {"range": [0, 2]},
            },
        },
    },
)


@router.post(
    "",
    status_code=202,
    response_model=views.Sweep,
    responses={200: {"model": views.Sweep, "description": "It was over in the time that `Prefer: wait=` gave"}},
    openapi_extra={**takes(SweepSpec, *EXAMPLES), **raises(*openapi.CREATES, BudgetExceeded), **PREFER},
    dependencies=JSON_ONLY,
)
async def create(here: Here, once: OnceOnly, request: Request, body: Body) -> Response:
    """Queue a training run for every combination of the grid's values over the base; those alike train as one batch.

    A field of the grid replaces that of the base. Each member is an experiment with an id of its own.
    """
    row = await run_in_threadpool(_queue, here, once, body)
    seconds, applied = jobs.preference(request, 0)
    row = await jobs.wait(here, request, row, seconds)
    headers = {"location": f"/sweeps/{row.id}", **applied, **once.headers}
    status = 200 if seconds and row.status in TERMINAL else 202
    with jobs.stored_at(headers["location"]):
        return await run_in_threadpool(_answer, here, row, status, headers)


def _queue(here: Context, once: Once, body: dict[str, Any]) -> JobRow:
    if (earlier := once.earlier(body)) is not None:
        return jobs.read(here, KIND, earlier)
    members = sweeps.expand(body)
    first = members[0].spec
    jobs.check_device(here, first.device)
    from_thread.run(webhooks.check, here.settings, first.webhook, "/base/webhook")
    jobs.check_disk(here)
    groups = sweeps.batches([member.spec for member in members], here.settings.sweep_batches)
    shared = [{"members": group, **sweeps.shared(members[group[0]].spec)} for group in groups]
    job = {
        "kind": KIND,
        "owner": here.owner,
        "name": first.name,
        "tags": first.tags,
        "spec": {"base": body.get("base", {}), "grid": body["grid"], "batches": shared},
        "priority": first.priority,
        "total": sum(member.spec.training.epochs for member in members),
    }
    with here.database.write.begin() as session:
        row = store.create_job(session, job, here.settings.queue_limit)
        store.add_children(session, row, _children(members, groups))
        once.record(session, row.id)
    return row


def _children(members: list[Member], groups: list[list[int]]) -> list[dict[str, Any]]:
    """The batches, and then the members in the order of the grid: ids rise."""
    batch_of: dict[int, str] = {}
    batches = []
    for group in groups:
        spec, batch = members[group[0]].spec, store.new_id()
        batch_of |= dict.fromkeys(group, batch)
        job = {"id": batch, "kind": "batch", "name": None, "total": spec.training.epochs}
        batches.append({**job, "spec": {"device": spec.device}, "batch": None})
    return batches + [
        {
            "id": store.new_id(),
            "kind": "experiment",
            "name": spec.name,
            "spec": spec.model_dump(),
            "total": spec.training.epochs,
            "batch": batch_of[place],
        }
        for place, spec in enumerate(map(sweeps.named, members))
    ]


@router.get("", response_model=views.SweepList, dependencies=JSON_ONLY)
def index(here: Here, request: Request, query: Annotated[listing.ListQuery, Query()]) -> Response:
    """A page of sweeps without their members, newest first unless `order=asc`."""
    rows = listing.rows(here, KIND, query)
    with here.database.read.begin() as session:
        counts = store.count_members(session, [row.id for row in rows])
    return listing.page(request, query, rows, lambda row: views.sweep(row, *counts.get(row.id, ({}, 0))))


@router.get("/{sweep_id}", response_model=views.Sweep, responses=NOT_MODIFIED, dependencies=JSON_ONLY)
def read(here: Here, request: Request, sweep_id: str) -> Response:
    """One sweep: how many members have which status, which are trained together, and every member's id and values."""
    row, body = _load(here, sweep_id)
    parts = _parts(body)
    return jobs.unchanged(request, row, *parts) or jobs.answer(row, body, *parts)


@router.post(
    "/{sweep_id}/cancel",
    response_model=views.Sweep,
    responses={202: {"model": views.Sweep}},
    dependencies=JSON_ONLY,
)
def cancel(here: Here, once: OnceOnly, sweep_id: str) -> Response:
    """Stop all members that are not over; what they have recorded stays. Calling it again changes nothing."""
    row = jobs.cancel(here, once, KIND, sweep_id)
    return _answer(here, row, 202 if row.status == "canceling" else 200, once.headers)


@router.delete("/{sweep_id}", status_code=204, openapi_extra=DELETES)
def remove(here: Here, request: Request, sweep_id: str) -> Response:
    """Delete a sweep that does not run, with all its members and all that they recorded."""
    return jobs.remove(here, request, KIND, sweep_id, lambda session, row: _parts(_summary(session, row)))


def _answer(here: Context, row: JobRow, status: int, headers: dict[str, str]) -> Response:
    row, body = _load(here, row.id)
    return jobs.answer(row, body, *_parts(body), status=status, headers=headers)


def _load(here: Context, sweep_id: str) -> tuple[JobRow, dict[str, Any]]:
    """The sweep as it is now, as row and as JSON."""
    with here.database.read.begin() as session:
        row = store.get_job(session, KIND, here.owner, sweep_id)
        summary, members = _summary(session, row), store.members(session, row.id)
    return row, {**summary, "members": [views.member(member, row.spec["grid"]) for member in members]}


def _summary(session: Session, row: JobRow) -> dict[str, Any]:
    counts, done = store.count_members(session, [row.id]).get(row.id, ({}, 0))
    return views.sweep(row, dict(counts), done)


def _parts(summary: dict[str, Any]) -> tuple[object, ...]:
    """What a sweep's ETag depends on besides its row."""
    return summary["counts"], summary["progress"]
