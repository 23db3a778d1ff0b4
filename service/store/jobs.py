"""Verbs of whoever posts jobs: create, read, list, rename, cancel, delete."""

from collections.abc import Collection
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, func, or_, select, tuple_, update
from sqlalchemy.orm import Session

from service.errors import InvalidState, NotFound, QueueFull
from service.schemas import TERMINAL, Status
from service.store import sweeps
from service.store.clock import now
from service.store.database import UNAVAILABLE, Database
from service.store.events import change, record_status
from service.store.tables import JobRow, new_id

PRIORITIES = {"low": 0, "normal": 1, "high": 2}


def create_job(session: Session, job: dict[str, Any], queue_limit: int, job_id: str | None = None) -> JobRow:
    """Queue a job; `job` holds kind, owner, name, tags, spec, priority and total, and perhaps upload and parent.

    Jobs of one `submission` take turns with all others'; without one it is the owner's. Raises QueueFull.
    """
    if (waiting := count_waiting(session)) >= queue_limit:
        raise QueueFull(f"{waiting} jobs wait, the limit is {queue_limit}; try again when some have run")
    row = JobRow(
        **{"submission": job["owner"], **job, "priority": PRIORITIES[job["priority"]]},
        id=job_id or new_id(),
        status="queued",
        created_at=now(),
        attempt=0,
        crashes=0,
        suspect=False,
        heartbeat=0,
        done=0,
        revision=0,
        sequence=0,
    )
    session.add(row)
    session.flush()
    record_status(session, row)
    return row


def count_waiting(session: Session) -> int:
    """Jobs in the queue: a sweep, with all that belongs to it, is one."""
    return session.scalar(select(func.count()).where(sweeps.WAITS)) or 0


def get_job(session: Session, kind: str, owner: str, job_id: str) -> JobRow:
    """The job; another owner's is not found. Raises NotFound."""
    row = session.get(JobRow, job_id) if len(job_id) == 36 and "\0" not in job_id else None
    if row is None or row.kind != kind or row.owner != owner:
        raise NotFound(f"no {kind} {job_id[:40]!r}")
    return row


REVISION = {
    "sqlite": "SELECT revision FROM jobs WHERE id = ?",
    "postgresql": "SELECT revision FROM jobs WHERE id = %s",
}


def revision_of(database: Database, job_id: str) -> int | None:
    """The job's revision; None once it is deleted, and where the database does not answer.

    Asked of the driver itself: SQLAlchemy's part would cost four times as much, and a session's ten times.
    """
    dialect = database.engine.dialect
    try:
        with closing(database.engine.raw_connection()) as connection, closing(connection.cursor()) as cursor:
            cursor.execute(REVISION[dialect.name], (job_id,))
            row = cursor.fetchone()
    except (*UNAVAILABLE, dialect.loaded_dbapi.Error):
        return None
    return None if row is None else int(row[0])


def missing(session: Session, ids: Collection[str]) -> set[str]:
    """Those of the ids that no job has."""
    return {one for one in ids if session.get(JobRow, one) is None}


def over(session: Session, ids: Collection[str]) -> set[str]:
    """Those of the ids whose job has ended, or is gone."""
    rows = {one: session.get(JobRow, one) for one in ids}
    return {one for one, row in rows.items() if row is None or row.status in TERMINAL}


@dataclass(frozen=True)
class Page:
    """Which jobs to list; every filter that is None lets all through."""

    limit: int = 20
    newest_first: bool = True
    after: tuple[int, str] | None = None
    status: Status | None = None
    tag: tuple[str, str | None] | None = None
    name_prefix: str | None = None
    created_after: int | None = None
    created_before: int | None = None


def list_jobs(session: Session, kind: str, owner: str, page: Page) -> list[JobRow]:
    """At most `limit` + 1 rows after the cursor (created_at, id); the extra one says that there are more."""
    query = _filtered(select(JobRow).where(JobRow.owner == owner, JobRow.kind == kind), page)
    key = tuple_(JobRow.created_at, JobRow.id)
    if page.after is not None:
        query = query.where(key < page.after if page.newest_first else key > page.after)
    order = (JobRow.created_at, JobRow.id)
    query = query.order_by(*((column.desc() for column in order) if page.newest_first else order))
    return list(session.scalars(query.limit(page.limit + 1)))


def _filtered(query: Select[JobRow], page: Page) -> Select[JobRow]:
    if page.status is not None:
        query = query.where(JobRow.status == page.status)
    if page.name_prefix is not None:
        # Not LIKE: SQLite's ignores the case of ASCII letters, PostgreSQL's does not.
        query = query.where(func.substr(JobRow.name, 1, len(page.name_prefix)) == page.name_prefix)
    if page.tag is not None:
        key, value = page.tag
        stored = JobRow.tags[key].as_string()
        query = query.where(stored.is_not(None) if value is None else stored == value)
    if page.created_after is not None:
        query = query.where(JobRow.created_at > page.created_after)
    if page.created_before is not None:
        query = query.where(JobRow.created_at < page.created_before)
    return query


def rename_job(session: Session, job_id: str, changes: dict[str, Any]) -> JobRow:
    """Set name and tags, in the row and in the specification that it answers with."""
    row = session.get_one(JobRow, job_id)
    row.name, row.tags = changes.get("name", row.name), changes.get("tags", row.tags)
    row.spec = {**row.spec, "name": row.name, "tags": row.tags}
    row.revision += 1
    session.flush()
    return row


def cancel_job(session: Session, job_id: str) -> JobRow:
    """A queued job is canceled at once, a running one asked to stop; one that is over stays as it is.

    A sweep takes its children along. A member is over at once: its batch goes on without it, or stops with the last.
    """
    job = session.get_one(JobRow, job_id)
    sweep_id = job.id if job.kind == "sweep" else job.parent if job.batch else None
    sweeps.lock_batches(session, job)
    family = or_(JobRow.id == job_id, JobRow.parent == job_id) if job.kind == "sweep" else JobRow.id == job_id
    _stop(session, family)
    if sweep_id is not None:
        _settle(session, job, sweep_id)
    return session.get_one(JobRow, job_id, populate_existing=True)


def _settle(session: Session, job: JobRow, sweep_id: str) -> None:
    if job.batch is not None:
        _stop(session, *sweeps.idle(job.batch))
    sweeps.settle(session, sweep_id)


def _stop(session: Session, *which: ColumnElement[bool]) -> None:
    these = update(JobRow).where(*which)
    bump = {"revision": JobRow.revision + 1}
    at_once = or_(JobRow.status == "queued", and_(sweeps.MEMBER, JobRow.status == "running"))
    change(session, these.where(at_once).values(status="canceled", finished_at=now(), **bump))
    change(session, these.where(JobRow.status == "running").values(status="canceling", **bump))


def children(session: Session, job_id: str) -> list[JobRow]:
    """The jobs that were made of this one, oldest first."""
    query = select(JobRow).where(JobRow.parent == job_id).order_by(JobRow.created_at, JobRow.id)
    return list(session.scalars(query))


def delete_job(session: Session, job_id: str) -> list[str]:
    """Remove the job, all it recorded and its children; the answer has the ids of all that went.

    Raises InvalidState while one of them runs.
    """
    job = session.get_one(JobRow, job_id)
    sweeps.lock_batches(session, job)
    family = [job_id, *(child.id for child in children(session, job_id))]
    for member in reversed(family):
        idle = JobRow.status.in_([*TERMINAL, "queued"])
        if session.scalar(delete(JobRow).where(JobRow.id == member, idle).returning(JobRow.id)) is None:
            raise InvalidState(f"{member} is running; cancel it first")
    if job.batch is not None and job.parent is not None:
        _settle(session, job, job.parent)
    return family
