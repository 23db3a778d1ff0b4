"""A sweep's family: the sweep, its batches, and its members, which are experiments that a batch trains.

Workers claim batches only. Members follow their batch, and the sweep is what its children make it. Locks are always
taken in the order batch, members, sweep, so that no two transactions wait for each other.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, and_, func, insert, not_, select, update
from sqlalchemy.orm import Session, aliased

from service.schemas import TERMINAL, Status
from service.store.events import change, record_status
from service.store.tables import JobRow

MEMBER = JobRow.batch.is_not(None)
CLAIMABLE = and_(JobRow.batch.is_(None), JobRow.kind != "sweep")  # what a worker takes and holds
WAITS = and_(JobRow.status == "queued", JobRow.batch.is_(None), JobRow.kind != "batch")  # a sweep waits once
OPEN = not_(JobRow.status.in_(TERMINAL))
FOLLOWED = ("status", "attempt", "started_at", "finished_at", "done", "error", "environment", "worker")


def add_children(session: Session, sweep: JobRow, jobs: Sequence[dict[str, Any]]) -> None:
    """Queue a sweep's batches and then its members; each holds id, kind, name, spec, total and, if a member, batch."""
    shared = {
        "owner": sweep.owner,
        "tags": sweep.tags,
        "priority": sweep.priority,
        "submission": sweep.id,
        "suspect": False,
        "parent": sweep.id,
        "created_at": sweep.created_at,
        "status": "queued",
        **dict.fromkeys(("attempt", "crashes", "heartbeat", "done", "revision", "sequence"), 0),
    }
    session.execute(insert(JobRow), [{"batch": None, **shared, **job} for job in jobs])
    for member in members(session, sweep.id):
        record_status(session, member)


def members(session: Session, sweep_id: str) -> list[JobRow]:
    """The sweep's experiments, in the order of its grid."""
    query = select(JobRow).where(JobRow.parent == sweep_id, MEMBER).order_by(JobRow.created_at, JobRow.id)
    return list(session.scalars(query))


def count_members(session: Session, sweep_ids: Sequence[str]) -> dict[str, tuple[Counter[str], int]]:
    """Of each sweep that has members: how many have which status, and the epochs that they have done together."""
    query = select(JobRow.parent, JobRow.status, func.count(), func.sum(JobRow.done))
    query = query.where(JobRow.parent.in_(sweep_ids), MEMBER).group_by(JobRow.parent, JobRow.status)
    found: dict[str, tuple[Counter[str], int]] = {}
    for sweep_id, status, number, done in session.execute(query):
        assert sweep_id is not None  # noqa: S101 - it is one of those asked for
        counts, total = found.get(sweep_id, (Counter(), 0))
        found[sweep_id] = (counts + Counter({status: number}), total + int(done))
    return found


def follow(session: Session, batch_id: str) -> None:
    """Bring the members of a batch that are not over to the batch's own state; other jobs have nobody to bring."""
    batch = session.get(JobRow, batch_id, populate_existing=True)
    if batch is None or batch.kind != "batch":
        return
    values = {name: getattr(batch, name) for name in FOLLOWED}
    theirs = update(JobRow).where(JobRow.batch == batch_id, OPEN)
    session.execute(theirs.where(JobRow.status == batch.status).values(**values, **_bump()))
    change(session, theirs.where(JobRow.status != batch.status).values(**values, **_bump()))
    settle(session, batch.parent)


def lock_batches(session: Session, job: JobRow) -> None:
    """Wait for whoever writes to the batches that a sweep or a member has, before anything of the family is changed."""
    if job.kind != "sweep" and job.batch is None:
        return
    of_family = and_(JobRow.parent == job.id, JobRow.kind == "batch")
    query = select(JobRow.id).where(of_family if job.batch is None else JobRow.id == job.batch)
    session.execute(query.order_by(JobRow.id).with_for_update()).all()


def idle(batch_id: str) -> list[ColumnElement[bool]]:
    """The conditions on a batch that has no member left to train."""
    member = aliased(JobRow)
    left = select(member.id).where(member.batch == batch_id, member.status.not_in(TERMINAL))
    return [JobRow.id == batch_id, not_(left.exists())]


def settle(session: Session, sweep_id: str | None) -> None:
    """Make the sweep what its children are: its times, its revision, its status.

    Over once all of them are: succeeded if a member has, failed if some have failed and none succeeded.
    """
    # The lock: of two batches that end at once, the second must see the first.
    sweep = session.get(JobRow, sweep_id, with_for_update=True, populate_existing=True) if sweep_id else None
    if sweep is None:
        return
    query = select(JobRow.kind, JobRow.status, func.min(JobRow.started_at), func.max(JobRow.finished_at))
    rows = session.execute(query.where(JobRow.parent == sweep_id).group_by(JobRow.kind, JobRow.status)).all()
    sweep.status = _status(sweep.status, {(kind, status) for kind, status, _, _ in rows})
    sweep.started_at = min((started for _, _, started, _ in rows if started is not None), default=None)
    ends = [end for _, _, _, end in rows if end is not None]
    sweep.finished_at = max(ends, default=sweep.finished_at) if sweep.status in TERMINAL else None
    sweep.revision += 1
    session.flush()


def _status(now: Status, children: set[tuple[str, Status]]) -> Status:
    if now in TERMINAL:
        return now
    found = {status for _, status in children}
    if not found <= TERMINAL:
        running: Status = "running" if found - {"queued", "canceled"} else "queued"
        return "canceling" if now == "canceling" else running
    outcomes = {status for kind, status in children if kind == "experiment"}
    if now == "canceling" or outcomes <= {"canceled"}:
        return "canceled"
    return "succeeded" if "succeeded" in outcomes else "failed"


def _bump() -> dict[str, Any]:
    return {"revision": JobRow.revision + 1}
