"""The tensors of an uploaded file and what an analysis finds in them, and the manifests of factors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sqlalchemy import delete, exists, func, insert, literal, select, update
from sqlalchemy.orm import Session

from service.errors import ArrayTooLarge, JobFailed
from service.lowrank.ranks import Array
from service.store.queue import Token
from service.store.recordings import FLOAT64, to_blob
from service.store.tables import JobRow, ManifestRow, TensorRow
from service.uploads import Tensor


class Found(NamedTuple):
    """What the job found in one tensor: σ/2^exponent, (k,), or the refusal that leaves it out."""

    position: int
    spectrum: Array | None = None
    exponent: int = 0
    notes: tuple[str, ...] = ()
    refusal: JobFailed | None = None


def add_tensors(session: Session, job_id: str, tensors: Sequence[Tensor]) -> None:
    """List the tensors of a file, in its order: pending, or skipped for what their headers say."""
    rows = [
        {
            "job_id": job_id,
            "position": position,
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": None if tensor.shape is None else list(tensor.shape),
            "notes": [],
            "exponent": 0,
            "work": tensor.work,
            **_standing(tensor.refusal, "pending"),
        }
        for position, tensor in enumerate(tensors)
    ]
    if rows:
        session.execute(insert(TensorRow), rows)


def _standing(refusal: JobFailed | None, otherwise: str) -> dict[str, Any]:
    if refusal is None:
        return {"status": otherwise, "reason": None, "detail": None}
    return {"status": "skipped", "reason": refusal.kind, "detail": refusal.detail}


def list_tensors(session: Session, token: Token, tensors: Sequence[Tensor]) -> None:
    """List the tensors that only the job could find, and say how much work they are; once."""
    if session.scalar(select(TensorRow.position).where(TensorRow.job_id == token.job_id).limit(1)) is None:
        add_tensors(session, token.job_id, tensors)
        total = sum(tensor.work for tensor in tensors)
        session.execute(update(JobRow).where(JobRow.id == token.job_id).values(total=total))


def adopt_twin(session: Session, token: Token) -> None:
    """Take over all that a finished analysis has found which is of the same bytes and read in the same way."""
    if (source := _twin(session, token.job_id)) is None:
        return
    columns = [column for column in TensorRow.__table__.columns if column.name != "job_id"]
    copied = select(literal(token.job_id), *columns).where(TensorRow.job_id == source.id)
    session.execute(delete(TensorRow).where(TensorRow.job_id == token.job_id))
    session.execute(insert(TensorRow).from_select(["job_id", *(column.name for column in columns)], copied))
    # The numbers come from where and what the other one ran with.
    adopted = {"total": source.total, "done": source.total, "environment": source.environment}
    session.execute(update(JobRow).where(JobRow.id == token.job_id).values(adopted))


def record_found(session: Session, token: Token, found: Sequence[Found]) -> None:
    """Store what was found, and how much that makes; the caller has just proved its token in the same transaction."""
    for one in found:
        here = (TensorRow.job_id == token.job_id, TensorRow.position == one.position)
        values = {
            "spectrum": None if one.spectrum is None else to_blob(one.spectrum),
            "exponent": one.exponent,
            "notes": list(one.notes),
            **_standing(one.refusal, "analysed"),
        }
        session.execute(update(TensorRow).where(*here).values(values))
    if found:
        mine = select(func.sum(TensorRow.work)).where(TensorRow.job_id == token.job_id, TensorRow.status != "pending")
        session.execute(update(JobRow).where(JobRow.id == token.job_id).values(done=mine.scalar_subquery()))


def tensors(session: Session, job_id: str) -> list[TensorRow]:
    """All tensors of a file, in its order."""
    query = select(TensorRow).where(TensorRow.job_id == job_id).order_by(TensorRow.position)
    return list(session.scalars(query))


def pending(session: Session, job_id: str) -> set[int]:
    """Positions of the tensors that are still to be analysed."""
    query = select(TensorRow.position).where(TensorRow.job_id == job_id, TensorRow.status == "pending")
    return set(session.scalars(query))


def source_of(session: Session, job_id: str) -> tuple[JobRow, list[TensorRow]]:
    """The analysis that a job was made of, and its tensors."""
    analysis = session.get_one(JobRow, session.get_one(JobRow, job_id).parent)
    return analysis, tensors(session, analysis.id)


def spectrum_of(row: TensorRow) -> Array:
    """σ/2^exponent of an analysed tensor, (k,), largest first."""
    return np.frombuffer(row.spectrum or b"", FLOAT64)


def _twin(session: Session, job_id: str) -> JobRow | None:
    """A finished analysis of the same bytes by the same owner, by this version of the program."""
    own = session.get_one(JobRow, job_id)
    query = select(JobRow).where(
        JobRow.upload == own.upload, JobRow.owner == own.owner, JobRow.kind == own.kind, JobRow.status == "succeeded"
    )

    def signs(row: JobRow) -> tuple[Any, ...]:
        return (row.spec["matricize"], row.spec["base_sha256"], (row.environment or {}).get("versions"))

    # What was too large for it may not be so any more.
    within_limits = ~exists().where(TensorRow.job_id == JobRow.id, TensorRow.reason == ArrayTooLarge.kind)
    rows = session.scalars(query.where(within_limits).order_by(JobRow.created_at))
    return next((row for row in rows if signs(row) == signs(own)), None)


def add_manifest(session: Session, token: Token, manifest: dict[str, Any]) -> None:
    """Say what is in the file that the attempt has written."""
    session.execute(insert(ManifestRow), {"job_id": token.job_id, "manifest": manifest})


def manifest(session: Session, job_id: str) -> dict[str, Any] | None:
    """The manifest; None before the job has succeeded."""
    row = session.get(ManifestRow, job_id)
    return None if row is None else row.manifest
