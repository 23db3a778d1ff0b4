"""Verbs of whoever runs jobs: claim, heartbeat, record, end.

A claim gives a token (job, attempt). Every write carries it and is refused once another attempt owns the job, so
that a worker that slept through its lease can do no harm when it wakes.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, Update, func, select, update
from sqlalchemy.orm import Session, aliased

from service.errors import LostJob
from service.schemas import TERMINAL, Status
from service.store import sweeps
from service.store.clock import now
from service.store.events import change
from service.store.tables import JobRow

HELD: tuple[Status, ...] = ("running", "canceling")


@dataclass(frozen=True)
class Token:
    """The right to write to a job."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class Lease:
    """What others see of a job that a worker holds; `beat` grows as long as that worker lives."""

    beat: int
    status: Status
    worker: str


def _waiting(*, cpu_only: bool) -> Select[str]:
    query = select(JobRow.id).where(JobRow.status == "queued", sweeps.CLAIMABLE).limit(1)
    return query.where(JobRow.spec["device"].as_string() == "cpu") if cpu_only else query


def _next_in_line(*, cpu_only: bool) -> Select[str]:
    """By priority; within one the groups of submissions take turns, and within a group it is first in, first out."""
    other = aliased(JobRow)
    last_turn = select(func.coalesce(func.max(other.turn), 0)).where(other.submission == JobRow.submission)
    line = (JobRow.priority.desc(), last_turn.scalar_subquery(), JobRow.created_at, JobRow.id)
    return _waiting(cpu_only=cpu_only).order_by(*line)


def anything_queued(session: Session, *, cpu_only: bool = False) -> bool:
    """Whether a claim may succeed: a read, so that idle workers take no write lock."""
    return session.scalar(_waiting(cpu_only=cpu_only)) is not None


def claim_next(session: Session, worker: str, *, alone: bool = True, cpu_only: bool = False) -> JobRow | None:
    """Take the next job in line, or the next that asks for the CPU: exactly one of many callers gets it.

    A suspect is only for a worker that runs nothing else, `alone`; others leave it at the head of the line.
    """
    chosen = _next_in_line(cpu_only=cpu_only).with_for_update(skip_locked=True, of=JobRow).scalar_subquery()
    turns = aliased(JobRow)
    claim = (
        update(JobRow)
        .where(JobRow.id == chosen, JobRow.status == "queued", *([] if alone else [~JobRow.suspect]))
        .values(
            turn=select(func.coalesce(func.max(turns.turn), 0) + 1).scalar_subquery(),
            status="running",
            worker=worker,
            attempt=JobRow.attempt + 1,
            heartbeat=JobRow.heartbeat + 1,
            revision=JobRow.revision + 1,
            started_at=now(),
        )
    )
    return next(iter(change(session, claim)), None)


def _held(token: Token) -> Update:
    mine = (JobRow.id == token.job_id, JobRow.attempt == token.attempt, JobRow.status.in_(HELD))
    return update(JobRow).where(*mine)


def heartbeat(session: Session, tokens: list[Token]) -> dict[Token, Status]:
    """Renew the leases; the answer has the status of each job still held: a missing one is lost."""
    beats = {}
    for token in tokens:
        beat = _held(token).values(heartbeat=JobRow.heartbeat + 1).returning(JobRow.status)
        if (status := session.scalar(beat)) is not None:
            beats[token] = status
    return beats


def held_jobs(session: Session) -> dict[Token, Lease]:
    """Every job that some worker holds."""
    columns = (JobRow.id, JobRow.attempt, JobRow.heartbeat, JobRow.status, JobRow.worker)
    rows = session.execute(select(*columns).where(JobRow.status.in_(HELD), sweeps.CLAIMABLE))
    return {Token(job_id, attempt): Lease(beat, status, worker or "") for job_id, attempt, beat, status, worker in rows}


def record_progress(session: Session, token: Token, **columns: Any) -> Status:
    """Say how far the job is, `done`, or what else is new; the answer tells a runner that it shall stop.

    Raises LostJob.
    """
    values: dict[str, Any] = {"revision": JobRow.revision + 1, **columns}
    status: Status | None = session.scalar(_held(token).values(values).returning(JobRow.status))
    if status is None:
        raise LostJob(f"{token} no longer holds the job")
    return status


def checkpoint_of(session: Session, job_id: str) -> str | None:
    """The name of the file that the job goes on from; None: it starts anew."""
    return session.scalar(select(JobRow.checkpoint).where(JobRow.id == job_id))


def end(session: Session, token: Token, status: Status, error: dict[str, str] | None = None) -> None:
    """Finish the job. A success stands even when a cancel came in between. Raises LostJob."""
    values = {"status": status, "error": error, "finished_at": now(), "revision": JobRow.revision + 1}
    if not change(session, _held(token).values(values)):
        raise LostJob(f"{token} no longer holds the job")
    sweeps.follow(session, token.job_id)


def release(session: Session, token: Token) -> None:
    """Put the job back in line, as a worker does that is told to stop; one that was to be canceled is over."""
    bump = {"revision": JobRow.revision + 1}
    canceled = {"status": "canceled", "finished_at": now(), **bump}
    change(session, _held(token).where(JobRow.status == "canceling").values(canceled))
    back = {"status": "queued", "worker": None, **bump}
    change(session, _held(token).where(JobRow.status == "running").values(back))
    sweeps.follow(session, token.job_id)


def outcome(session: Session, token: Token) -> tuple[str, str] | None:
    """Kind of the job and how the attempt ended: a terminal status, or `lost` where it is tried again."""
    row = session.get(JobRow, token.job_id)
    if row is None:
        return None
    return row.kind, row.status if row.attempt == token.attempt and row.status in TERMINAL else "lost"


def record_crash(session: Session, token: Token, reason: str, max_attempts: int, *, alone: bool = True) -> None:
    """The attempt died without a word: try again, or after `max_attempts` crashes fail the job.

    Where others died with it, not `alone`, nobody knows whose fault it was: it is a suspect from now on, and fails
    only by a crash that is its own.
    """
    counted = {"crashes": JobRow.crashes + 1, "suspect": JobRow.suspect | (not alone)}
    crash = _held(token).values(counted).returning(JobRow.crashes, JobRow.status)
    if (row := session.execute(crash).one_or_none()) is None:
        return  # Another attempt owns the job, or it ended: there is nothing to put right.
    crashes, status = row
    if crashes < max_attempts or not alone or status == "canceling":
        release(session, token)
        return
    detail = f"{reason}; that was crash {crashes}, and {max_attempts} are allowed"
    error = {"type": "worker-crashed", "title": "The process that ran the job died", "detail": detail}
    end(session, token, "failed", error)


def take_over(session: Session, worker: str, max_attempts: int, *, blame: bool = True) -> list[Token]:
    """Put back in line all that a worker held which has gone silent; the answer names it.

    Jobs that ran elsewhere are not to `blame` for its end.
    """
    held = select(JobRow.id, JobRow.attempt).where(JobRow.worker == worker, JobRow.status.in_(HELD), sweeps.CLAIMABLE)
    tokens = [Token(*row) for row in session.execute(held.with_for_update())]
    for token in tokens:
        if blame:
            record_crash(session, token, "its worker went silent", max_attempts, alone=len(tokens) == 1)
        else:
            release(session, token)
    return tokens
