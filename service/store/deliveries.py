"""What webhooks are owed: a row each, written in the transaction that ends the job, and taken by one sender at a time.

A sender takes a delivery for a while, by setting the time when others may; if it dies, they do. `attempts` grows with
every taking and guards what the sender writes afterwards. Time is the wall clock's, as these waits outlast processes.
"""

from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, and_, or_, select, update
from sqlalchemy.orm import Session

from service.schemas import TERMINAL, DeliveryState
from service.store.clock import now
from service.store.tables import DeliveryRow, JobRow, new_id

SECOND = 10**6
LONGEST_S = 24 * 60 * 60  # No wait is longer: one that seems to be is of a clock that was put back.


class Claimed(NamedTuple):
    """A delivery that is ours to make, and the job that it tells of."""

    delivery: DeliveryRow
    job: JobRow


def owe(session: Session, job: JobRow) -> None:
    """Note that the job's webhook is to be told of its end, if it has one and asked for that."""
    webhook = job.spec.get("webhook")
    if job.status in TERMINAL and webhook is not None and job.status in webhook["events"]:
        row = DeliveryRow(id=new_id(), job_id=job.id, event=job.status, state="pending", attempts=0, log=[])
        row.created_at = row.next_at = now()
        session.add(row)
        session.flush()


def _due() -> Select[str]:
    moment = now()
    ripe: ColumnElement[bool] = or_(DeliveryRow.next_at <= moment, DeliveryRow.next_at > moment + LONGEST_S * SECOND)
    query = select(DeliveryRow.id).where(and_(DeliveryRow.state == "pending", ripe))
    return query.order_by(DeliveryRow.next_at, DeliveryRow.id).limit(1)


def any_due(session: Session) -> bool:
    """Whether a delivery may be taken: a read, so that idle senders take no write lock."""
    return session.scalar(_due()) is not None


def claim_delivery(session: Session, lease_s: float) -> Claimed | None:
    """Take the delivery that has been due for longest; no other sender takes it while the lease lasts."""
    chosen = _due().with_for_update(skip_locked=True).scalar_subquery()
    claim = (
        update(DeliveryRow)
        .where(DeliveryRow.id == chosen, DeliveryRow.state == "pending")
        .values(attempts=DeliveryRow.attempts + 1, next_at=now() + round(lease_s * SECOND))
        .returning(DeliveryRow)
    )
    row = session.scalars(claim, execution_options={"populate_existing": True}).one_or_none()
    return None if row is None else Claimed(row, session.get_one(JobRow, row.job_id))


def settle(
    session: Session, delivery: DeliveryRow, tried: dict[str, Any], state: DeliveryState, wait_s: float = 0
) -> bool:
    """Record how an attempt went, and what follows; False where another sender has taken the delivery meanwhile."""
    mine = (DeliveryRow.id == delivery.id, DeliveryRow.attempts == delivery.attempts, DeliveryRow.state == "pending")
    values = {"state": state, "log": [*delivery.log, tried], "next_at": now() + round(wait_s * SECOND)}
    written = update(DeliveryRow).where(*mine).values(values).returning(DeliveryRow.id)
    return session.scalar(written.execution_options(synchronize_session=False)) is not None


def deliveries(session: Session, job_id: str) -> list[DeliveryRow]:
    """What the webhook of a job was and is owed, oldest first."""
    query = select(DeliveryRow).where(DeliveryRow.job_id == job_id)
    return list(session.scalars(query.order_by(DeliveryRow.created_at, DeliveryRow.id)))
