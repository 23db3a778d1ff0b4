"""What was made under an Idempotency-Key: one record each, written in the transaction that makes it."""

from sqlalchemy import delete
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.errors import IdempotencyInProgress
from service.store.clock import now
from service.store.tables import IdempotencyRow

KEPT = 24 * 60 * 60 * 10**6  # microseconds


def remembered(session: Session, scope: str) -> IdempotencyRow | None:
    """The record of a scope; None once it is a day old."""
    row = session.get(IdempotencyRow, scope)
    return None if row is None or row.created_at < now() - KEPT else row


def remember(session: Session, scope: str, content: str, made: str) -> None:
    """Record the id of what was made, and drop records that are a day old.

    Raises IdempotencyInProgress where another request has recorded the scope meanwhile.
    """
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < now() - KEPT))
    session.add(IdempotencyRow(scope=scope, content=content, made=made, created_at=now()))
    try:
        session.flush()
    except IntegrityError as error:
        raise IdempotencyInProgress("another request with this key has just been answered; send it again") from error
