"""A job's row as the JSON that clients see."""

from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic import BaseModel, Field

from service.http import etag
from service.schemas import ExperimentSpec
from service.store import TERMINAL, JobRow, Status

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Progress(BaseModel):
    """Epochs trained, of all."""

    done: int
    total: int


class JobError(BaseModel):
    """Why a job failed; clients match on `type`."""

    type: str
    title: str
    detail: str


class Experiment(BaseModel):
    """One training run."""

    id: str = Field(description="UUIDv7")
    object: str = "experiment"
    status: Status
    name: str | None
    tags: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    progress: Progress
    error: JobError | None
    seed: int
    device: str | None = Field(description="where it ran; null until it has started")
    versions: dict[str, str] | None = Field(description="of the libraries it ran with")
    spec: ExperimentSpec = Field(description="resolved: preset, then the fields posted")


class ExperimentList(BaseModel):
    """A page of experiments; `next` is the cursor for `after`."""

    object: str = "list"
    data: list[Experiment]
    has_more: bool
    next: str | None


def experiment(row: JobRow) -> dict[str, Any]:
    """The row as an Experiment, ready for JSON."""
    environment = row.environment or {}
    return {
        "id": row.id,
        "object": row.kind,
        "status": row.status,
        "name": row.name,
        "tags": row.tags,
        "created_at": timestamp(row.created_at),
        "started_at": timestamp(row.started_at),
        "finished_at": timestamp(row.finished_at),
        "attempt": row.attempt,
        "progress": {"done": row.done, "total": row.total},
        "error": row.error,
        "seed": row.spec["seed"],
        "device": environment.get("device"),
        "versions": environment.get("versions"),
        "spec": row.spec,
    }


def timestamp(microseconds: int | None) -> str | None:
    """RFC 3339 in UTC."""
    if microseconds is None:
        return None
    moment = EPOCH + timedelta(microseconds=microseconds)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def validators(row: JobRow, *parts: object) -> dict[str, str]:
    """ETag and caching of a view of what a job has recorded; `parts` are what the view depends on besides the job.

    Computed without reading the recording, which can only grow while the job is not over.
    """
    over = row.status in TERMINAL
    return {
        "etag": etag(row.id, row.attempt, row.status, *parts),
        "vary": "Accept",
        "cache-control": "private, max-age=31536000, immutable" if over else "private, no-cache",
    }
