"""A job's row as the JSON that clients see. The client reads it by the same models, and needs no database for that."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from service.schemas import DeliveryState, ExperimentSpec, FactorsSpec, Status
from service.sweeps import value_of
from service.uploads import Format, Matricize

if TYPE_CHECKING:
    from service.store import DeliveryRow, JobRow

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Progress(BaseModel):
    """How much of the work is done: epochs of a training, multiplications of an analysis."""

    done: int
    total: int


class JobError(BaseModel):
    """Why a job failed; clients match on `type`."""

    type: str
    title: str
    detail: str


class Job(BaseModel):
    """What jobs of all kinds show."""

    id: str = Field(description="UUIDv7")
    object: str
    status: Status
    name: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    progress: Progress
    error: JobError | None
    device: str | None = Field(description="where it ran; null until it has started")
    versions: dict[str, str] | None = Field(description="of the libraries it ran with")


class Experiment(Job):
    """One training run."""

    tags: dict[str, str]
    seed: int
    spec: ExperimentSpec = Field(description="resolved: preset, then the fields posted")
    sweep: str | None = Field(description="id of the sweep that it is a member of")


class SweepSummary(Job):
    """A sweep without its members; progress counts the epochs of all of them."""

    tags: dict[str, str]
    base: dict[str, Any] = Field(description="as posted")
    grid: dict[str, Any] = Field(description="as posted: dotted field → its values")
    counts: dict[str, int] = Field(description="members by status")
    batches: list[dict[str, Any]] = Field(description="members that are trained together, and what they share")
    links: dict[str, str]


class Sweep(SweepSummary):
    """A sweep with its members, which are experiments, in the order of the grid: the last field varies fastest."""

    members: list[dict[str, Any]]


class Source(BaseModel):
    """The uploaded file."""

    format: Format
    bytes: int
    sha256: str


class AnalysisSummary(Job):
    """An analysis of an uploaded file, without what it found."""

    source: Source
    base: str | None = Field(description="the analysis whose file was subtracted")
    matricize: Matricize


class Analysis(AnalysisSummary):
    """An analysis with every tensor of the file, in its order."""

    top_k: int = Field(description="how many singular values of each tensor are shown")
    tensors: list[dict[str, Any]]
    totals: dict[str, Any]


class Factors(Job):
    """Factors made of an analysis; the manifest is there once their file is."""

    analysis: str = Field(description="id of the analysis")
    request: FactorsSpec
    manifest: dict[str, Any] | None


class FactorsList(BaseModel):
    """All factors of one analysis, without their manifests."""

    object: str = "list"
    data: list[Factors]
    has_more: bool
    next: str | None


class Event(BaseModel):
    """Something that has happened to a job; its number only grows."""

    id: int = Field(description="for `after` and Last-Event-ID")
    event: Literal["status", "epoch", "error", "completed"]
    data: dict[str, Any]


class EventList(BaseModel):
    """A page of events; `next` is the number for `after`."""

    object: str = "list"
    data: list[Event]
    has_more: bool
    next: str | None


class Attempt(BaseModel):
    """One try to deliver: the status of the answer, or why there was none."""

    at: datetime
    status: int | None
    error: str | None
    seconds: float


class Delivery(BaseModel):
    """One message to a webhook; `id` is its `webhook-id`."""

    id: str
    type: str = Field(description="<kind of the job>.<status that it ended with>")
    state: DeliveryState
    attempts: int
    created_at: datetime
    next_at: datetime | None = Field(description="when it is sent again; null unless it is pending")
    log: list[Attempt]


class DeliveryList(BaseModel):
    """All messages to the webhook of one job."""

    object: str = "list"
    data: list[Delivery]
    has_more: bool
    next: str | None


class ExperimentList(BaseModel):
    """A page of experiments; `next` is the cursor for `after`."""

    object: str = "list"
    data: list[Experiment]
    has_more: bool
    next: str | None


class SweepList(BaseModel):
    """A page of sweeps; `next` is the cursor for `after`."""

    object: str = "list"
    data: list[SweepSummary]
    has_more: bool
    next: str | None


class AnalysisList(BaseModel):
    """A page of analyses; `next` is the cursor for `after`."""

    object: str = "list"
    data: list[AnalysisSummary]
    has_more: bool
    next: str | None


def job(row: "JobRow") -> dict[str, Any]:
    """The row as a Job, ready for JSON."""
    environment = row.environment or {}
    return {
        "id": row.id,
        "object": row.kind,
        "status": row.status,
        "name": row.name,
        "created_at": timestamp(row.created_at),
        "started_at": timestamp(row.started_at),
        "finished_at": timestamp(row.finished_at),
        "attempt": row.attempt,
        "progress": {"done": row.done, "total": row.total},
        "error": row.error,
        "device": environment.get("device"),
        "versions": environment.get("versions"),
    }


def experiment(row: "JobRow") -> dict[str, Any]:
    """The row as an Experiment, ready for JSON."""
    return {**job(row), "tags": row.tags, "seed": row.spec["seed"], "spec": row.spec, "sweep": row.parent}


def sweep(row: "JobRow", counts: dict[str, int], done: int) -> dict[str, Any]:
    """The row as a SweepSummary, ready for JSON."""
    links = {"self": f"/sweeps/{row.id}", "summary": f"/sweeps/{row.id}/summary"}
    shown = {name: row.spec[name] for name in ("base", "grid", "batches")}
    progress = {"done": done, "total": row.total}
    return {**job(row), "progress": progress, "tags": row.tags, **shown, "counts": counts, "links": links}


def member(row: "JobRow", fields: Iterable[str]) -> dict[str, Any]:
    """A member of a sweep in short: its id, status and varied fields."""
    varied = {field: value_of(row.spec, field) for field in fields}
    return {"id": row.id, "status": row.status, "varied": varied, "href": f"/experiments/{row.id}"}


def analysis(row: "JobRow") -> dict[str, Any]:
    """The row as an AnalysisSummary, ready for JSON."""
    return {**job(row), **{name: row.spec[name] for name in ("source", "base", "matricize")}}


def factors(row: "JobRow", manifest: dict[str, Any] | None) -> dict[str, Any]:
    """The row as Factors, ready for JSON."""
    return {**job(row), "analysis": row.parent, "request": row.spec["request"], "manifest": manifest}


def delivery(row: "JobRow", owed: "DeliveryRow") -> dict[str, Any]:
    """What a job's webhook was or is owed as a Delivery, ready for JSON."""
    return {
        "id": owed.id,
        "type": f"{row.kind}.{owed.event}",
        "state": owed.state,
        "attempts": owed.attempts,
        "created_at": timestamp(owed.created_at),
        "next_at": timestamp(owed.next_at) if owed.state == "pending" else None,
        "log": owed.log,
    }


def timestamp(microseconds: int | None) -> str | None:
    """RFC 3339 in UTC."""
    if microseconds is None:
        return None
    moment = EPOCH + timedelta(microseconds=microseconds)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
