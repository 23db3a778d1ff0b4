"""What has happened to a job, in order: a number for each change of its status and for each recorded epoch.

The numbers of one job only grow, and are taken under the lock on its row: whoever has read one has read all before it.
An epoch that a later attempt records again keeps its number.
"""

from collections.abc import Collection, Iterator, Mapping

from sqlalchemy import Update, insert, select, update
from sqlalchemy.orm import Session

from service.schemas import Status
from service.store.clock import now
from service.store.deliveries import owe
from service.store.tables import EpochRow, EventName, EventRow, JobRow

NAMES: dict[Status, tuple[EventName, ...]] = {
    "succeeded": ("completed",),
    "canceled": ("completed",),
    "failed": ("error", "completed"),
}


def change(session: Session, statement: Update) -> list[JobRow]:
    """Run an UPDATE that changes the status of jobs, and record what follows from it; the answer has those changed."""
    fresh = {"populate_existing": True, "synchronize_session": False}
    rows = list(session.scalars(statement.returning(JobRow), execution_options=fresh))
    for row in rows:
        record_status(session, row)
    return rows


def record_status(session: Session, row: JobRow) -> None:
    """Record the status that a job has just got: its events, and at its end what its webhook is owed."""
    names = NAMES.get(row.status, ("status",))
    numbers = reserve(session, {row.id: len(names)})[row.id]
    event = {"job_id": row.id, "at": now(), "status": row.status, "attempt": row.attempt}
    session.execute(insert(EventRow), [{**event, "sequence": next(numbers), "name": name} for name in names])
    owe(session, row)


def reserve(session: Session, counts: Mapping[str, int]) -> dict[str, Iterator[int]]:
    """Take so many of each job's next numbers."""
    taken: dict[str, Iterator[int]] = {}
    for count in set(counts.values()):
        jobs = [job_id for job_id, wanted in counts.items() if wanted == count]
        take = update(JobRow).where(JobRow.id.in_(jobs)).values(sequence=JobRow.sequence + count)
        after = take.returning(JobRow.id, JobRow.sequence).execution_options(synchronize_session=False)
        taken |= {job_id: iter(range(last - count + 1, last + 1)) for job_id, last in session.execute(after)}
    return taken


def events_after(session: Session, job_id: str, after: int, limit: int) -> list[EventRow | EpochRow]:
    """The first `limit` events with larger numbers, in order."""
    found: list[EventRow | EpochRow] = []
    for table in (EventRow, EpochRow):
        query = select(table).where(table.job_id == job_id, table.sequence > after)
        found += session.scalars(query.order_by(table.sequence).limit(limit))
    return sorted(found, key=lambda row: row.sequence)[:limit]


def last_numbers(session: Session, ids: Collection[str]) -> dict[str, int]:
    """Job → number of its last event, of those jobs that exist."""
    query = select(JobRow.id, JobRow.sequence).where(JobRow.id.in_(ids))
    return dict(session.execute(query).all())
