"""What an experiment records, and how it is read back: arrays in, arrays out."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import ColumnElement, func, insert, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.lowrank.ranks import Array
from service.store.events import reserve
from service.store.queue import Token
from service.store.tables import CutRow, EpochRow, SpectrumRow

FLOAT64 = np.dtype("<f8")
LOSSES = ("epoch", "train_loss", "validation_loss", "train_r2", "validation_r2")


class Epoch(NamedTuple):
    """One recorded epoch: losses and R² (null where they do not exist), σ of W and of W − W₀ by layer."""

    epoch: int
    train_loss: float
    validation_loss: float | None
    train_r2: float | None
    validation_r2: float | None
    spectra: dict[str, tuple[Array, Array]]


@dataclass(frozen=True)
class EpochRange:
    """The epochs from `first` to `last`, every `stride`-th of those recorded counted from the first in range."""

    first: int = 0
    last: int | None = None
    stride: int = 1

    def holds(self, column: InstrumentedAttribute[int]) -> list[ColumnElement[bool]]:
        """The range as conditions on a column of epochs; the stride is left to the caller."""
        return [column >= self.first, *([column <= self.last] if self.last is not None else [])]


def add_epochs(session: Session, token: Token, epochs: Sequence[Epoch]) -> None:
    """Store recorded epochs; the caller has just proved its token in the same transaction."""
    insert_epochs(session, [(token.job_id, epoch) for epoch in epochs])


def insert_epochs(session: Session, recorded: Sequence[tuple[str, Epoch]]) -> None:
    """Store epochs of one or many experiments, in order, each with its id.

    What is stored already stays as it is, and its number too: it was recorded by an earlier attempt, or by a commit of
    which nobody knew whether it had come through.
    """
    new = _not_stored(session, recorded)
    if not new:
        return
    numbers = reserve(session, Counter(job_id for job_id, _ in new))
    numbered = [{"job_id": job_id, "sequence": next(numbers[job_id]), **_losses(epoch)} for job_id, epoch in new]
    session.execute(insert(EpochRow), numbered)
    rows = [
        {
            "job_id": job_id,
            "layer": layer,
            "epoch": epoch.epoch,
            "weights": to_blob(weights),
            "updates": to_blob(updates),
        }
        for job_id, epoch in new
        for layer, (weights, updates) in epoch.spectra.items()
    ]
    session.execute(insert(SpectrumRow), rows)


def _not_stored(session: Session, recorded: Sequence[tuple[str, Epoch]]) -> list[tuple[str, Epoch]]:
    if not recorded:
        return []
    first, last = (choose(epoch.epoch for _, epoch in recorded) for choose in (min, max))
    inside = (EpochRow.job_id.in_({job_id for job_id, _ in recorded}), *EpochRange(first, last).holds(EpochRow.epoch))
    stored = {tuple(row) for row in session.execute(select(EpochRow.job_id, EpochRow.epoch).where(*inside))}
    return [(job_id, epoch) for job_id, epoch in recorded if (job_id, epoch.epoch) not in stored]


def _losses(epoch: Epoch) -> dict[str, Any]:
    return {name: value for name, value in epoch._asdict().items() if name != "spectra"}


def add_cuts(session: Session, token: Token, cuts: dict[str, tuple[Array, Array]]) -> None:
    """Store validation loss and R² after cutting each layer to rank 1…k, arrays of shape (k,)."""
    rows = [
        {"job_id": token.job_id, "layer": layer, "losses": to_blob(losses), "r2": to_blob(r2)}
        for layer, (losses, r2) in cuts.items()
    ]
    session.execute(insert(CutRow), rows)


def last_epoch(session: Session, job_id: str) -> int | None:
    """The last epoch recorded so far."""
    return session.scalar(select(func.max(EpochRow.epoch)).where(EpochRow.job_id == job_id))


def recorded_epochs(session: Session, job_id: str, epochs: EpochRange) -> list[int]:
    """The recorded epochs in the range, in order."""
    inside = (EpochRow.job_id == job_id, *epochs.holds(EpochRow.epoch))
    return list(session.scalars(select(EpochRow.epoch).where(*inside).order_by(EpochRow.epoch)))[:: epochs.stride]


def losses(session: Session, job_id: str, epochs: Sequence[int]) -> list[dict[str, Any]]:
    """Epoch, losses and R² of the epochs, in their order."""
    query = select(*(getattr(EpochRow, name) for name in LOSSES))
    query = query.where(EpochRow.job_id == job_id, *_among(EpochRow.epoch, epochs)).order_by(EpochRow.epoch)
    wanted = set(epochs)
    return [dict(zip(LOSSES, row, strict=True)) for row in session.execute(query) if row[0] in wanted]


def spectra(session: Session, job_id: str, layer: str, k: int, epochs: Sequence[int], *, of: str) -> Array:
    """Singular values of shape (len(epochs), k) of `of`, which is "weights" or "update"; epochs in order."""
    column = SpectrumRow.weights if of == "weights" else SpectrumRow.updates
    here = (SpectrumRow.job_id == job_id, SpectrumRow.layer == layer, *_among(SpectrumRow.epoch, epochs))
    query = select(SpectrumRow.epoch, column).where(*here).order_by(SpectrumRow.epoch)
    wanted = set(epochs)
    blobs = [blob for epoch, blob in session.execute(query) if epoch in wanted]
    return np.frombuffer(b"".join(blobs), FLOAT64).reshape(len(epochs), k)


def spectra_of_layers(session: Session, job_id: str, epochs: Sequence[int]) -> Iterator[tuple[int, str, Array]]:
    """(epoch, layer, σ of W) of all layers at the epochs, one after the other: all together may be large."""
    here = (SpectrumRow.job_id == job_id, *_among(SpectrumRow.epoch, epochs))
    query = select(SpectrumRow.epoch, SpectrumRow.layer, SpectrumRow.weights).where(*here)
    for epoch, layer, blob in session.execute(query, execution_options={"yield_per": 16}):
        yield epoch, layer, np.frombuffer(blob, FLOAT64)


def cuts(session: Session, job_id: str, layer: str) -> tuple[Array, Array] | None:
    """Validation losses and R² by rank, each of shape (k,); None before the run has succeeded."""
    row = session.get(CutRow, (job_id, layer))
    return None if row is None else (np.frombuffer(row.losses, FLOAT64), np.frombuffer(row.r2, FLOAT64))


def _among(column: InstrumentedAttribute[int], epochs: Sequence[int]) -> list[ColumnElement[bool]]:
    if len(epochs) <= 500:
        return [column.in_(epochs)]
    # A statement has room for so many variables: beyond them the bounds, and the caller filters.
    return [column >= epochs[0], column <= epochs[-1]]


def to_blob(values: Array) -> bytes:
    """An array as it is stored: little-endian float64, C order."""
    return np.ascontiguousarray(values, FLOAT64).tobytes()
