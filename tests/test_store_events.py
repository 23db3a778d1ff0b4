"""The order of a job's events, and what webhooks are owed, on both databases."""

import threading
from typing import Any

import pytest
from sqlalchemy import text, update

from service import store
from service.settings import Settings
from service.store import Database, EpochRow, EventRow
from service.store.deliveries import LONGEST_S, SECOND
from service.store.tables import DeliveryRow, JobRow
from tests.test_store import claim, create, downgrade, epoch, read

WEBHOOK = {"webhook": {"url": "https://example.org/", "events": ["succeeded", "failed"]}}


def told(database: Database, job: str, after: int = 0, limit: int = 1000) -> list[tuple[int, str, object]]:
    """Number, name, and status or epoch of the job's events."""
    with database.read.begin() as session:
        rows = store.events_after(session, job, after, limit)
    return [
        (row.sequence, "epoch", row.epoch) if isinstance(row, EpochRow) else (row.sequence, row.name, row.status)
        for row in rows
    ]


def owed(database: Database, job: str) -> list[DeliveryRow]:
    with database.read.begin() as session:
        return store.deliveries(session, job)


def add(database: Database, token: store.Token, *numbers: int) -> None:
    with database.write.begin() as session:
        store.record_progress(session, token, done=numbers[-1])
        store.add_epochs(session, token, [epoch(number) for number in numbers])


def finish(database: Database, token: store.Token, status: store.Status, error: dict[str, str] | None = None) -> None:
    with database.write.begin() as session:
        store.end(session, token, status, error)


def test_statuses_and_epochs_are_numbered_in_the_order_in_which_they_came(database: Database) -> None:
    job = create(database)
    token = claim(database)
    add(database, token, 0, 1)
    add(database, token, 2)
    finish(database, token, "succeeded")
    expected = [
        (1, "status", "queued"), (2, "status", "running"), (3, "epoch", 0), (4, "epoch", 1), (5, "epoch", 2),
        (6, "completed", "succeeded"),
    ]  # fmt: skip
    assert told(database, job) == expected
    assert read(database, job).sequence == 6
    for after in range(7):
        assert told(database, job, after, limit=2) == expected[after : after + 2]
    with database.read.begin() as session:
        assert store.last_numbers(session, [job, "none"]) == {job: 6}


def test_an_epoch_that_is_recorded_again_keeps_its_number(database: Database) -> None:
    job = create(database)
    token = claim(database)
    add(database, token, 0, 1)
    with database.write.begin() as session:
        store.record_crash(session, token, "killed", max_attempts=3)
    add(database, claim(database), 0, 1, 2)
    assert told(database, job, after=2) == [
        (3, "epoch", 0), (4, "epoch", 1), (5, "status", "queued"), (6, "status", "running"), (7, "epoch", 2),
    ]  # fmt: skip


def end_by_success(database: Database, job: str) -> None:
    finish(database, claim(database), "succeeded")


def end_by_failure(database: Database, job: str) -> None:
    finish(database, claim(database), "failed", {"type": "diverged", "title": "", "detail": ""})


def end_by_crash(database: Database, job: str) -> None:
    token = claim(database)
    with database.write.begin() as session:
        store.record_crash(session, token, "killed", max_attempts=1)


def end_in_the_queue(database: Database, job: str) -> None:
    with database.write.begin() as session:
        store.cancel_job(session, job)


def end_by_release(database: Database, job: str) -> None:
    token = claim(database)
    end_in_the_queue(database, job)
    with database.write.begin() as session:
        store.release(session, token)


ENDS = {
    end_by_success: "succeeded",
    end_by_failure: "failed",
    end_by_crash: "failed",
    end_in_the_queue: "canceled",
    end_by_release: "canceled",
}


@pytest.mark.parametrize("way", ENDS)
def test_whatever_ends_a_job_completes_its_events_and_owes_its_webhook(database: Database, way: Any) -> None:
    hooks = {"webhook": {"url": "https://example.org/", "events": ["succeeded", "failed", "canceled"]}}
    job, quiet = create(database, spec=hooks, priority="high"), create(database)
    way(database, job)
    end = [name for _, name, status in told(database, job) if status == ENDS[way]]
    assert end == (["error", "completed"] if ENDS[way] == "failed" else ["completed"])
    assert [(row.event, row.state, row.attempts) for row in owed(database, job)] == [(ENDS[way], "pending", 0)]
    assert owed(database, quiet) == []


def test_only_the_ends_that_were_asked_for_are_owed_and_none_twice(database: Database) -> None:
    job = create(database, spec=WEBHOOK)
    for _ in range(2):
        end_in_the_queue(database, job)
    assert owed(database, job) == []
    assert [name for _, name, _ in told(database, job)] == ["status", "completed"]


def test_many_senders_take_each_delivery_once_and_again_only_after_the_lease(database: Database) -> None:
    for _ in range(20):
        create(database, spec=WEBHOOK)
        end_by_success(database, "")
    taken: list[str] = []
    start = threading.Barrier(4)

    def send() -> None:
        start.wait()
        while True:
            with database.write.begin() as session:
                claimed = store.claim_delivery(session, lease_s=60)
            if claimed is None:
                return
            taken.append(claimed.delivery.id)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(set(taken))) == (20, 20)
    with database.read.begin() as session:
        assert not store.any_due(session)


def test_a_sender_that_lost_its_lease_writes_nothing(database: Database) -> None:
    job = create(database, spec=WEBHOOK)
    end_by_success(database, job)
    first, second = (take(database) for _ in range(2))
    assert first.id == second.id
    with database.write.begin() as session:
        assert not store.settle(session, first, {"status": 500}, "failed")
        assert store.settle(session, second, {"status": 204}, "delivered")
    (row,) = owed(database, job)
    assert (row.state, row.attempts, row.log) == ("delivered", 2, [{"status": 204}])


def take(database: Database) -> DeliveryRow:
    """Take what is owed, with a lease that has run out already."""
    with database.write.begin() as session:
        claimed = store.claim_delivery(session, lease_s=-1)
    assert claimed is not None
    return claimed.delivery


@pytest.mark.parametrize(("ahead_s", "due"), [(-1, True), (3600, False), (LONGEST_S + 3600, True)])
def test_a_wait_longer_than_any_is_of_a_clock_that_was_put_back(database: Database, ahead_s: int, due: bool) -> None:
    job = create(database, spec=WEBHOOK)
    end_by_success(database, job)
    with database.write.begin() as session:
        session.execute(update(DeliveryRow).values(next_at=DeliveryRow.next_at + ahead_s * SECOND))
    with database.read.begin() as session:
        assert store.any_due(session) == due


def test_a_deleted_job_takes_its_events_and_deliveries_along(database: Database) -> None:
    job = create(database, spec=WEBHOOK)
    end_by_success(database, job)
    with database.write.begin() as session:
        store.delete_job(session, job)
    assert (told(database, job), owed(database, job)) == ([], [])


def test_jobs_from_before_there_were_events_get_those_that_their_rows_tell_of(
    database: Database, settings: Settings
) -> None:
    done, failed, waits = (create(database) for _ in range(3))
    token = claim(database)
    add(database, token, 0, 5)
    finish(database, token, "succeeded")
    end_by_failure(database, failed)
    downgrade(database, "0004")
    store.migrate(database, settings)
    kinds = [(name, what) for _, name, what in told(database, done)]
    assert kinds == [
        ("status", "queued"), ("status", "running"), ("epoch", 0), ("epoch", 5), ("completed", "succeeded"),
    ]  # fmt: skip
    assert [name for _, name, _ in told(database, failed)] == ["status", "status", "error", "completed"]
    with database.write.begin() as session:
        store.cancel_job(session, waits)
    for job in (done, failed, waits):
        assert read(database, job).sequence == told(database, job)[-1][0]
    assert [name for _, name, _ in told(database, waits)] == ["status", "completed"]
    with database.read.begin() as session:
        assert session.scalar(text("SELECT count(*) FROM events")) == session.query(EventRow).count() == 9
        assert session.query(JobRow).count() == 3
