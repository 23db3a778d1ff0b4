"""What the members of a sweep have come to: one layer's numbers of all of them, in a few statements."""

from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import Select, and_, func, select
from sqlalchemy.orm import Session

from service.lowrank.ranks import Array
from service.store.recordings import FLOAT64, LOSSES
from service.store.sweeps import MEMBER
from service.store.tables import CutRow, EpochRow, JobRow, SpectrumRow


class Outcome(NamedTuple):
    """The last recorded epoch of a member: its losses and R²; σ at epoch 0 and then, and R² by rank, where kept."""

    losses: dict[str, Any]
    first: Array | None
    last: Array | None
    r2_by_rank: Array | None


def outcomes(session: Session, sweep_id: str, layer: str) -> dict[str, Outcome]:
    """Member's id → its outcome; members that have recorded nothing are not there."""
    of_sweep = (JobRow.parent == sweep_id, MEMBER)
    ids = select(JobRow.id).where(*of_sweep)
    last = select(EpochRow.job_id, func.max(EpochRow.epoch).label("epoch")).where(EpochRow.job_id.in_(ids))
    ends = last.group_by(EpochRow.job_id).subquery()
    at_end = and_(EpochRow.job_id == ends.c.job_id, EpochRow.epoch == ends.c.epoch)
    losses = session.scalars(select(EpochRow).join(ends, at_end)).all()
    of_layer = select(SpectrumRow.job_id, SpectrumRow.weights).where(SpectrumRow.layer == layer)
    spectrum_at_end = and_(SpectrumRow.job_id == ends.c.job_id, SpectrumRow.epoch == ends.c.epoch)
    final = _arrays(session, of_layer.join(ends, spectrum_at_end))
    initial = _arrays(session, of_layer.where(SpectrumRow.job_id.in_(ids), SpectrumRow.epoch == 0))
    cuts = _arrays(session, select(CutRow.job_id, CutRow.r2).where(CutRow.job_id.in_(ids), CutRow.layer == layer))
    return {
        row.job_id: Outcome(
            {name: getattr(row, name) for name in LOSSES},
            *(found.get(row.job_id) for found in (initial, final, cuts)),
        )
        for row in losses
    }


def histories(session: Session, sweep_id: str, layer: str, epochs: list[int]) -> dict[str, dict[int, Array]]:
    """Member's id → epoch → σ of W, of those of the epochs that it has recorded."""
    ids = select(JobRow.id).where(JobRow.parent == sweep_id, MEMBER)
    query = select(SpectrumRow.job_id, SpectrumRow.epoch, SpectrumRow.weights)
    found: dict[str, dict[int, Array]] = {}
    where = (SpectrumRow.job_id.in_(ids), SpectrumRow.layer == layer, SpectrumRow.epoch.in_(epochs))
    for job_id, epoch, blob in session.execute(query.where(*where)):
        found.setdefault(job_id, {})[epoch] = np.frombuffer(blob, FLOAT64)
    return found


def all_epochs(session: Session, sweep_id: str) -> list[int]:
    """Every epoch that some member has recorded, in order."""
    ids = select(JobRow.id).where(JobRow.parent == sweep_id, MEMBER)
    query = select(EpochRow.epoch).where(EpochRow.job_id.in_(ids)).distinct()
    return list(session.scalars(query.order_by(EpochRow.epoch)))


def _arrays(session: Session, query: Select[str, bytes]) -> dict[str, Array]:
    return {job_id: np.frombuffer(blob, FLOAT64) for job_id, blob in session.execute(query)}
