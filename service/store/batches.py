"""Verbs of whoever trains a batch: every write proves the batch's token first, and touches open members only."""

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.lowrank.ranks import Array
from service.store.clock import now
from service.store.events import change
from service.store.queue import Token
from service.store.recordings import Epoch, add_cuts, insert_epochs
from service.store.sweeps import OPEN, follow
from service.store.tables import JobRow


class MemberEpochs(NamedTuple):
    """An epoch of a batch: what the members have recorded, and the errors of those that have failed, by their ids."""

    epoch: int
    recorded: dict[str, Epoch]
    failed: dict[str, dict[str, str]]


def start_members(session: Session, token: Token) -> None:
    """The members start with their batch."""
    follow(session, token.job_id)


def batch_members(session: Session, batch_id: str) -> list[JobRow]:
    """All members, in the order of the grid; some may be over."""
    return list(session.scalars(select(JobRow).where(JobRow.batch == batch_id).order_by(JobRow.id)))


def record_members(session: Session, token: Token, found: Sequence[MemberEpochs]) -> None:
    """Store the epochs of the members that are still open; the caller has just proved its token."""
    if not found:
        return
    progress = {"done": found[-1].epoch, "revision": JobRow.revision + 1}
    still_open = update(JobRow).where(JobRow.batch == token.job_id, OPEN)
    ids = set(session.scalars(still_open.values(progress).returning(JobRow.id)))
    recorded = [(member, epoch) for one in found for member, epoch in one.recorded.items() if member in ids]
    insert_epochs(session, recorded)
    last = {member: epoch.epoch for member, epoch in recorded}
    for member, error in [failure for one in found for failure in one.failed.items() if failure[0] in ids]:
        values = {"status": "failed", "error": error, "finished_at": now()}
        done = {"done": last[member]} if member in last else {}
        change(session, update(JobRow).where(JobRow.id == member).values(**values, **done))


def add_member_cuts(session: Session, token: Token, cuts: dict[str, dict[str, tuple[Array, Array]]]) -> None:
    """Store what cuts cost each member that is still open; member's id → layer → loss and R² by rank."""
    ids = set(session.scalars(select(JobRow.id).where(JobRow.batch == token.job_id, OPEN).with_for_update()))
    for member in ids & cuts.keys():
        add_cuts(session, Token(member, token.attempt), cuts[member])
