"""The tables. A row of `jobs` is the job: its specification, its place in the queue and its state.

Times are integer microseconds of the Unix epoch (for people and for order, never for deciding who is alive).
Arrays are BLOBs of little-endian float64, because a NaN in a REAL column comes back as NULL.
"""

from typing import Any, Literal

import uuid6
from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from service.schemas import LONGEST_LABEL, DeliveryState, Status

TensorStatus = Literal["pending", "analysed", "skipped"]
EventName = Literal["status", "error", "completed"]
Count = BigInteger().with_variant(Integer, "sqlite")  # SQLite's integers have 64 bits anyway.


def new_id() -> str:
    """A UUIDv7."""
    return str(uuid6.uuid7())


class Base(DeclarativeBase):
    """Base of every table."""


class JobRow(Base):
    """One job of any kind; `attempt` grows with every claim and guards every write of whoever runs it."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_by_owner", "owner", "kind", "created_at", "id"),
        Index("jobs_in_line", "status", "priority", "created_at", "id"),
        Index("jobs_by_upload", "upload"),
        Index("jobs_by_parent", "parent"),
        Index("jobs_by_turn", "turn"),
        Index("jobs_by_submission", "submission", "turn"),
        Index("jobs_by_batch", "batch"),
    )

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    owner: Mapped[str] = mapped_column(String(64))
    name: Mapped[str | None] = mapped_column(String(LONGEST_LABEL))
    tags: Mapped[dict[str, str]] = mapped_column(JSON)
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    priority: Mapped[int] = mapped_column(Integer)
    submission: Mapped[str] = mapped_column(String(64))  # Groups take turns: a sweep is one, the rest of an owner one.
    turn: Mapped[int | None] = mapped_column(BigInteger)  # Grows with every claim of any job.
    status: Mapped[Status] = mapped_column(String(12))
    attempt: Mapped[int] = mapped_column(Integer)
    crashes: Mapped[int] = mapped_column(Integer)
    suspect: Mapped[bool]  # Its worker died while it ran among others: which one did it shows when each runs alone.
    heartbeat: Mapped[int] = mapped_column(BigInteger)
    worker: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[int] = mapped_column(BigInteger)
    started_at: Mapped[int | None] = mapped_column(BigInteger)
    finished_at: Mapped[int | None] = mapped_column(BigInteger)
    done: Mapped[int] = mapped_column(Count)
    total: Mapped[int] = mapped_column(Count)
    checkpoint: Mapped[str | None] = mapped_column(String(64))  # The file to go on from, in a folder of the job's own.
    error: Mapped[dict[str, str] | None] = mapped_column(JSON(none_as_null=True))
    environment: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    revision: Mapped[int] = mapped_column(Integer)
    sequence: Mapped[int] = mapped_column(BigInteger)  # number of the last event
    upload: Mapped[str | None] = mapped_column(String(64))  # SHA-256 of the file that an analysis is of
    parent: Mapped[str | None] = mapped_column(String(36), ForeignKey("jobs.id"))
    batch: Mapped[str | None] = mapped_column(String(36), ForeignKey("jobs.id"))  # the job that trains this experiment


def _job_key() -> Mapped[str]:
    return mapped_column(String(36), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


class EpochRow(Base):
    """Losses and R² of one recorded epoch; null where there is no validation set or a target is constant."""

    __tablename__ = "epochs"
    __table_args__ = (Index("epochs_in_order", "job_id", "sequence"),)

    job_id: Mapped[str] = _job_key()
    epoch: Mapped[int] = mapped_column(Integer, primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger)  # among the job's events
    train_loss: Mapped[float]
    validation_loss: Mapped[float | None]
    train_r2: Mapped[float | None]
    validation_r2: Mapped[float | None]


class SpectrumRow(Base):
    """Singular values, largest first, of one layer's weight W and of its update W − W₀ at one epoch."""

    __tablename__ = "spectra"

    job_id: Mapped[str] = _job_key()
    layer: Mapped[str] = mapped_column(String(8), primary_key=True)
    epoch: Mapped[int] = mapped_column(Integer, primary_key=True)
    weights: Mapped[bytes] = mapped_column(LargeBinary)
    updates: Mapped[bytes] = mapped_column(LargeBinary)


class CutRow(Base):
    """Validation loss and R² of the trained network with one layer cut to rank 1, 2, …, k."""

    __tablename__ = "cuts"

    job_id: Mapped[str] = _job_key()
    layer: Mapped[str] = mapped_column(String(8), primary_key=True)
    losses: Mapped[bytes] = mapped_column(LargeBinary)
    r2: Mapped[bytes] = mapped_column(LargeBinary)


class TensorRow(Base):
    """One tensor of an uploaded file, in the file's order: singular values, largest first, or why there are none.

    The singular values are `spectrum`·2^`exponent`: as they stand they might not be float64 numbers.
    """

    __tablename__ = "tensors"

    job_id: Mapped[str] = _job_key()
    position: Mapped[int] = mapped_column(Integer, primary_key=True)
    name: Mapped[str] = mapped_column(Text)
    dtype: Mapped[str] = mapped_column(String(16))
    shape: Mapped[list[int] | None] = mapped_column(JSON(none_as_null=True))
    status: Mapped[TensorStatus] = mapped_column(String(8))
    reason: Mapped[str | None] = mapped_column(String(32))
    detail: Mapped[str | None] = mapped_column(Text)
    notes: Mapped[list[str]] = mapped_column(JSON)
    exponent: Mapped[int] = mapped_column(Integer)
    spectrum: Mapped[bytes | None] = mapped_column(LargeBinary)
    work: Mapped[int] = mapped_column(BigInteger, server_default="0")


class IdempotencyRow(Base):
    """What was made under one Idempotency-Key; `scope` and `content` are SHA-256 digests.

    Not a foreign key: a job that was deleted is not made again.
    """

    __tablename__ = "idempotency"
    __table_args__ = (Index("idempotency_by_age", "created_at"),)

    scope: Mapped[str] = mapped_column(String(64), primary_key=True)
    content: Mapped[str] = mapped_column(String(64))
    made: Mapped[str] = mapped_column(String(36))
    created_at: Mapped[int] = mapped_column(BigInteger)


class ManifestRow(Base):
    """What a job of kind `factors` has written to its file."""

    __tablename__ = "manifests"

    job_id: Mapped[str] = _job_key()
    manifest: Mapped[dict[str, Any]] = mapped_column(JSON)


class EventRow(Base):
    """A change of a job's status; what else there is to say of it is on the job."""

    __tablename__ = "events"

    job_id: Mapped[str] = _job_key()
    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[EventName] = mapped_column(String(12))
    at: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[Status] = mapped_column(String(12))
    attempt: Mapped[int] = mapped_column(Integer)


class DeliveryRow(Base):
    """One message to the webhook of a job: not before `next_at`, and how each attempt went in `log`."""

    __tablename__ = "deliveries"
    __table_args__ = (Index("deliveries_due", "state", "next_at"), Index("deliveries_by_job", "job_id"))

    id: Mapped[str] = mapped_column(String(36), primary_key=True)
    job_id: Mapped[str] = mapped_column(String(36), ForeignKey("jobs.id", ondelete="CASCADE"))
    event: Mapped[Status] = mapped_column(String(12))
    state: Mapped[DeliveryState] = mapped_column(String(10))
    attempts: Mapped[int] = mapped_column(Integer)
    created_at: Mapped[int] = mapped_column(BigInteger)
    next_at: Mapped[int] = mapped_column(BigInteger)
    log: Mapped[list[dict[str, Any]]] = mapped_column(JSON)
