"""What has happened to a job as clients see it: events with a number, a name and data."""

from collections import defaultdict
from typing import Any, NamedTuple

from fastapi.sse import format_sse_event
from sqlalchemy.orm import Session

from service import store
from service.lowrank.ranks import Array, entropy_rank, stable_rank
from service.representations import to_json
from service.store import EpochRow, EventRow, JobRow
from service.views import timestamp

PAGE = 100
TOP = 8  # singular values of each layer


class Event(NamedTuple):
    """One event; `sequence` is its number among those of the job, and None where it is of the stream alone."""

    sequence: int | None
    name: str
    data: dict[str, Any]

    @property
    def frame(self) -> bytes:
        """The event as it is sent: name, data, id."""
        number = None if self.sequence is None else str(self.sequence)
        return format_sse_event(data_str=to_json(self.data).decode(), event=self.name, id=number)


def read(session: Session, job_id: str, after: int, limit: int = PAGE) -> list[Event]:
    """The first `limit` events of the job with larger numbers, in order."""
    rows = store.events_after(session, job_id, after, limit)
    layers = _layers(session, job_id, [row.epoch for row in rows if isinstance(row, EpochRow)])
    return [
        _epoch(row, layers[row.epoch]) if isinstance(row, EpochRow) else _status(row, session.get_one(JobRow, job_id))
        for row in rows
    ]


def _layers(session: Session, job_id: str, epochs: list[int]) -> dict[int, list[dict[str, Any]]]:
    """Epoch → its layers in the network's order."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    if epochs:
        for epoch, name, s in store.spectra_of_layers(session, job_id, epochs):
            found[epoch].append(_layer(name, s))
    for layers in found.values():
        layers.sort(key=lambda layer: int(layer["name"][1:]))
    return found


def _layer(name: str, s: Array) -> dict[str, Any]:
    ranks = {"entropy_rank": entropy_rank(s).item(), "stable_rank": stable_rank(s).item()}
    return {"name": name, **ranks, "top": s[:TOP].tolist()}


def _epoch(row: EpochRow, layers: list[dict[str, Any]]) -> Event:
    losses = {"train_loss": row.train_loss, "validation_loss": row.validation_loss}
    return Event(row.sequence, "epoch", {"epoch": row.epoch, **losses, "layers": layers})


def _status(row: EventRow, job: JobRow) -> Event:
    if row.name == "error":
        return Event(row.sequence, row.name, job.error or {})
    return Event(row.sequence, row.name, {"status": row.status, "attempt": row.attempt, "at": timestamp(row.at)})
