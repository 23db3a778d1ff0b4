"""A sweep's family in the database: who is claimed, who follows whom, whose writes are refused."""

from typing import Any

import numpy as np
import pytest

from service import store
from service.errors import InvalidState, LostJob, QueueFull
from service.store import Database, JobRow, MemberEpochs, Token
from tests.test_store import JOB, claim, create, epoch

BROKE = {"type": "diverged", "title": "The training diverged", "detail": "at epoch 1"}


@pytest.fixture
def family(database: Database) -> tuple[str, list[str], list[str]]:
    """A sweep with two batches of two members each, queued: the ids of all."""
    batches, members = ([store.new_id() for _ in range(count)] for count in (2, 4))
    shared = {"name": None, "total": 3}
    jobs: list[dict[str, Any]] = [{**shared, "id": one, "kind": "batch", "spec": {}} for one in batches]
    for place, one in enumerate(members):
        jobs.append({**shared, "id": one, "kind": "experiment", "spec": {"seed": place}, "batch": batches[place // 2]})
    with database.write.begin() as session:
        sweep = store.create_job(session, {**JOB, "kind": "sweep", "total": 12}, 1)
        store.add_children(session, sweep, [{"batch": None, **job} for job in jobs])
    return sweep.id, batches, members


def states(database: Database, *ids: str) -> list[str]:
    with database.read.begin() as session:
        return [session.get_one(JobRow, one).status for one in ids]


def start(database: Database) -> Token:
    token = claim(database)
    with database.write.begin() as session:
        store.record_progress(session, token, environment={"device": "cpu"})
        store.start_members(session, token)
    return token


def record(database: Database, token: Token, *found: MemberEpochs) -> None:
    with database.write.begin() as session:
        store.record_progress(session, token, done=found[-1].epoch)
        store.record_members(session, token, found)


def all_of(number: int, *members: str, failed: dict[str, dict[str, str]] | None = None) -> MemberEpochs:
    return MemberEpochs(number, {member: epoch(number) for member in members}, failed or {})


def end(database: Database, token: Token, status: Any = "succeeded") -> None:
    with database.write.begin() as session:
        store.end(session, token, status, None if status != "failed" else BROKE)


def epochs_of(database: Database, member: str) -> list[int]:
    with database.read.begin() as session:
        return store.recorded_epochs(session, member, store.EpochRange())


def cancel(database: Database, job_id: str) -> None:
    with database.write.begin() as session:
        store.cancel_job(session, job_id)


Family = tuple[str, list[str], list[str]]


def test_batches_are_claimed_and_nothing_else_of_a_sweep(database: Database, family: Family) -> None:
    _, batches, _ = family
    assert [claim(database).job_id for _ in range(2)] == batches
    with database.write.begin() as session:
        assert store.claim_next(session, "w") is None
        assert not store.anything_queued(session)
        assert {token.job_id for token in store.held_jobs(session)} == set(batches)


def test_a_sweep_takes_one_place_in_the_queue(database: Database, family: Family) -> None:
    with database.write.begin() as session:
        assert store.count_waiting(session) == 1
        store.create_job(session, JOB, 2)
        with pytest.raises(QueueFull):
            store.create_job(session, JOB, 2)


def test_members_follow_their_batch_and_the_sweep_its_children(database: Database, family: Family) -> None:
    sweep, _, members = family
    first = start(database)
    assert states(database, sweep, *members) == ["running", "running", "running", "queued", "queued"]
    record(database, first, all_of(0, *members[:2]), all_of(1, members[0], failed={members[1]: BROKE}))
    end(database, first)
    assert states(database, sweep, *members) == ["running", "succeeded", "failed", "queued", "queued"]
    second = start(database)
    record(database, second, all_of(0, *members[2:]))
    end(database, second, "failed")
    assert states(database, sweep, *members) == ["succeeded", "succeeded", "failed", "failed", "failed"]
    with database.read.begin() as session:
        rows = [session.get_one(JobRow, one) for one in (sweep, *members)]
        assert [row.error for row in rows] == [None, None, BROKE, BROKE, BROKE]
        assert [(row.attempt, row.done, row.environment) for row in rows[1:3]] == [
            (1, 1, {"device": "cpu"}),
            (1, 0, {"device": "cpu"}),
        ]
        assert rows[0].finished_at == max(row.finished_at or 0 for row in rows[1:])
        assert store.count_members(session, [sweep]) == {sweep: ({"succeeded": 1, "failed": 3}, 1)}


def test_a_late_attempt_is_refused_and_the_next_goes_on(database: Database, family: Family) -> None:
    sweep, _, members = family
    late = start(database)
    record(database, late, all_of(0, *members[:2]), all_of(1, members[0], failed={members[1]: BROKE}))
    with database.write.begin() as session:
        store.record_crash(session, late, "gone", 3)
    assert states(database, sweep, *members[:2]) == ["running", "queued", "failed"]
    again = start(database)
    assert (again.job_id, again.attempt) == (late.job_id, 2)
    assert epochs_of(database, members[0]) == [0, 1]
    assert epochs_of(database, members[1]) == [0]
    with database.read.begin() as session:
        assert [row.id for row in store.batch_members(session, again.job_id)] == members[:2]
    with pytest.raises(LostJob):
        record(database, late, all_of(2, members[0]))
    with pytest.raises(LostJob):
        end(database, late)
    record(database, again, all_of(0, *members[:2]), all_of(1, *members[:2]), all_of(2, *members[:2]))
    assert epochs_of(database, members[0]) == [0, 1, 2]
    assert epochs_of(database, members[1]) == [0]


def test_a_batch_that_crashes_too_often_fails_its_members(database: Database, family: Family) -> None:
    sweep, _, members = family
    with database.write.begin() as session:
        store.record_crash(session, claim_in(session), "gone", 1)
    assert states(database, sweep, *members) == ["running", "failed", "failed", "queued", "queued"]


def claim_in(session: Any) -> Token:
    row = store.claim_next(session, "w")
    assert row is not None
    return Token(row.id, row.attempt)


def test_a_canceled_member_is_over_and_its_batch_goes_on(database: Database, family: Family) -> None:
    sweep, batches, members = family
    token = start(database)
    cancel(database, members[0])
    record(database, token, all_of(0, *members[:2]))
    assert states(database, members[0], members[1], batches[0]) == ["canceled", "running", "running"]
    assert (epochs_of(database, members[0]), epochs_of(database, members[1])) == ([], [0])
    with database.write.begin() as session:
        cuts = {"W1": (np.ones(3), np.ones(3))}
        store.add_member_cuts(session, token, dict.fromkeys(members[:2], cuts))
        assert [store.cuts(session, member, "W1") is None for member in members[:2]] == [True, False]
        assert store.delete_job(session, members[0]) == [members[0]]
        with pytest.raises(InvalidState):
            store.delete_job(session, members[1])
    cancel(database, members[1])
    assert states(database, batches[0], sweep) == ["canceling", "running"]
    cancel(database, members[2])
    with database.write.begin() as session:
        store.delete_job(session, members[3])
    assert states(database, batches[1], sweep) == ["canceled", "running"]
    end(database, token, "canceled")
    assert states(database, sweep) == ["canceled"]


def test_a_canceled_sweep_is_over_once_its_batches_are(database: Database, family: Family) -> None:
    sweep, batches, members = family
    token = start(database)
    cancel(database, sweep)
    assert states(database, sweep, *batches, *members) == ["canceling", "canceling", "canceled", *["canceled"] * 4]
    with pytest.raises(InvalidState), database.write.begin() as session:
        store.delete_job(session, sweep)
    end(database, token, "canceled")
    assert states(database, sweep) == ["canceled"]
    with database.write.begin() as session:
        assert set(store.delete_job(session, sweep)) == {sweep, *batches, *members}


def test_a_queued_sweep_is_canceled_at_once_and_can_be_deleted(database: Database, family: Family) -> None:
    sweep, batches, members = family
    other = create(database)
    cancel(database, sweep)
    assert set(states(database, sweep, *batches, *members)) == {"canceled"}
    assert states(database, other) == ["queued"]
    with database.write.begin() as session:
        store.delete_job(session, sweep)
        assert store.missing(session, [sweep, *batches, *members, other]) == {sweep, *batches, *members}
