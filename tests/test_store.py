"""The queue and the recordings on a real database file."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from service import store
from service.errors import DatabaseUnusable, InvalidState, LostJob, NotFound, QueueFull, UnsupportedShape
from service.settings import Settings
from service.store import Database, Epoch, EpochRange, JobRow, Page, Token
from service.store.tables import Base
from service.uploads import Tensor

JOB: dict[str, Any] = {
    "kind": "experiment", "owner": "public", "name": None, "tags": {}, "spec": {}, "priority": "normal", "total": 3,
}  # fmt: skip


def create(database: Database, **changes: Any) -> str:
    with database.write.begin() as session:
        return store.create_job(session, {**JOB, **changes}, queue_limit=1000).id


def claim(database: Database, worker: str = "w") -> Token:
    with database.write.begin() as session:
        row = store.claim_next(session, worker)
    assert row is not None
    return Token(row.id, row.attempt)


def read(database: Database, job_id: str) -> JobRow:
    with database.read.begin() as session:
        return store.get_job(session, "experiment", "public", job_id)


def epoch(number: int, k: int = 3) -> Epoch:
    s = np.linspace(1, 0.5, k) + number
    return Epoch(number, 0.5, None, 0.25, None, {"W1": (s, s / 2), "W2": (s[:2], s[:2] * 0)})


def test_f10_eight_threads_claim_two_hundred_jobs_each_exactly_once(database: Database) -> None:
    jobs = {create(database) for _ in range(200)}
    claimed: list[str] = []
    start = threading.Barrier(8)

    def work(name: str) -> None:
        start.wait()
        while True:
            with database.write.begin() as session:
                row = store.claim_next(session, name)
            if row is None:
                return
            claimed.append(row.id)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == 200
    assert set(claimed) == jobs


def test_where_no_gpu_is_free_the_next_job_for_the_cpu_is_taken(database: Database) -> None:
    first, second = (create(database, spec={"device": device}) for device in ("cuda:0", "cpu"))
    create(database, spec={"device": "auto"})
    with database.write.begin() as session:
        row = store.claim_next(session, "w", cpu_only=True)
        assert row is not None
        assert row.id == second
        assert not store.anything_queued(session, cpu_only=True)
        assert store.claim_next(session, "w", cpu_only=True) is None
    assert claim(database).job_id == first


def test_the_line_is_by_priority_and_then_first_in_first_out(database: Database) -> None:
    low, first, second, high = (create(database, priority=p) for p in ("low", "normal", "normal", "high"))
    assert [claim(database).job_id for _ in range(4)] == [high, first, second, low]


def test_f11_writes_of_an_attempt_that_lost_its_job_are_refused(database: Database) -> None:
    job = create(database)
    late = claim(database)
    with database.write.begin() as session:
        store.release(session, late)
    current = claim(database)
    assert (current.job_id, current.attempt) == (job, late.attempt + 1)
    for write in (
        lambda session: store.record_progress(session, late, done=1),
        lambda session: store.end(session, late, "succeeded"),
    ):
        with pytest.raises(LostJob), database.write.begin() as session:
            write(session)
    with database.write.begin() as session:
        store.record_crash(session, late, "too late", max_attempts=1)
        assert store.heartbeat(session, [late, current]) == {current: "running"}
    assert read(database, job).status == "running"


def test_a_job_that_crashes_too_often_fails_and_says_so(database: Database) -> None:
    job = create(database)
    for expected in ("queued", "queued", "failed"):
        token = claim(database)
        with database.write.begin() as session:
            store.record_crash(session, token, "its process died", max_attempts=3)
        assert read(database, job).status == expected
    error = read(database, job).error
    assert error is not None
    assert error["type"] == "worker-crashed"
    assert "its process died" in error["detail"]


def test_a_released_job_has_not_crashed(database: Database) -> None:
    job = create(database)
    for _ in range(5):
        token = claim(database)
        with database.write.begin() as session:
            store.release(session, token)
    assert (read(database, job).status, read(database, job).crashes) == ("queued", 0)


@pytest.mark.parametrize("max_attempts", [1, 3])
def test_a_crash_while_canceling_is_a_cancel_even_on_the_last_attempt(database: Database, max_attempts: int) -> None:
    job = create(database)
    token = claim(database)
    with database.write.begin() as session:
        assert store.cancel_job(session, job).status == "canceling"
    with database.write.begin() as session:
        store.record_crash(session, token, "killed", max_attempts)
    row = read(database, job)
    assert (row.status, row.error) == ("canceled", None)
    assert row.finished_at is not None


def test_releasing_a_job_that_another_attempt_owns_changes_nothing(database: Database) -> None:
    job = create(database)
    late = claim(database)
    with database.write.begin() as session:
        store.release(session, late)
    claim(database)
    with database.write.begin() as session:
        store.cancel_job(session, job)
        store.release(session, late)
    assert read(database, job).status == "canceling"


def test_cancel_of_a_queued_job_is_immediate_and_of_a_finished_one_changes_nothing(database: Database) -> None:
    job = create(database)
    for _ in range(2):
        with database.write.begin() as session:
            assert store.cancel_job(session, job).status == "canceled"
    revision = read(database, job).revision
    with database.write.begin() as session:
        store.cancel_job(session, job)
    assert read(database, job).revision == revision


def test_a_running_job_cannot_be_deleted_and_a_deleted_one_leaves_nothing(database: Database) -> None:
    job = create(database)
    token = claim(database)
    with database.write.begin() as session:
        store.add_epochs(session, token, [epoch(0)])
    with pytest.raises(InvalidState), database.write.begin() as session:
        store.delete_job(session, job)
    with database.write.begin() as session:
        store.end(session, token, "succeeded")
        store.delete_job(session, job)
    with pytest.raises(NotFound):
        read(database, job)
    with database.read.begin() as session:
        assert store.last_epoch(session, job) is None
        assert store.spectra(session, job, "W1", 3, [], of="weights").shape == (0, 3)


def test_the_queue_has_an_end(database: Database) -> None:
    create(database)
    with database.write.begin() as session, pytest.raises(QueueFull, match="limit is 1"):
        store.create_job(session, JOB, queue_limit=1)


def test_what_is_recorded_comes_back_bit_for_bit(database: Database) -> None:
    job = create(database)
    token = claim(database)
    with database.write.begin() as session:
        store.add_epochs(session, token, [epoch(n) for n in range(0, 1200, 2)])
    with database.read.begin() as session:
        epochs = store.recorded_epochs(session, job, EpochRange(first=3, last=1000, stride=3))
        assert epochs == list(range(4, 1001, 6))
        s = store.spectra(session, job, "W1", 3, epochs, of="weights")
        np.testing.assert_array_equal(s, [epoch(n).spectra["W1"][0] for n in epochs])
        updates = store.spectra(session, job, "W2", 2, list(range(0, 1200, 2)), of="update")
        assert updates.shape == (600, 2)
        assert not updates.any()
        losses = store.losses(session, job, epochs[:2])
        assert losses[1] == {
            "epoch": 10, "train_loss": 0.5, "validation_loss": None, "train_r2": 0.25, "validation_r2": None,
        }  # fmt: skip


def test_epochs_that_are_recorded_again_are_there_once_with_all_others(database: Database) -> None:
    job = create(database)
    token = claim(database)
    with database.write.begin() as session:
        store.add_epochs(session, token, [epoch(n) for n in range(6)])
        store.add_epochs(session, token, [epoch(n) for n in range(4, 8)])
        store.add_epochs(session, token, [epoch(7)])
        store.add_epochs(session, token, [])
    with database.read.begin() as session:
        assert store.recorded_epochs(session, job, EpochRange()) == list(range(8))
        found = store.spectra(session, job, "W1", 3, range(8), of="weights")
    np.testing.assert_array_equal(found, [epoch(n).spectra["W1"][0] for n in range(8)])


def test_a_job_goes_on_from_the_checkpoint_that_its_attempt_named_last(database: Database) -> None:
    job = create(database)
    late = claim(database)
    with database.write.begin() as session:
        store.record_progress(session, late, done=1, checkpoint="1-1")
        store.record_crash(session, late, "killed", max_attempts=3)
    token = claim(database)
    with pytest.raises(LostJob), database.write.begin() as session:
        store.record_progress(session, late, done=2, checkpoint="1-2")
    with database.read.begin() as session:
        assert store.checkpoint_of(session, job) == "1-1"
    assert (read(database, job).done, token.attempt) == (1, 2)


def test_groups_of_submissions_take_turns_and_each_is_first_in_first_out(database: Database) -> None:
    sweep = [create(database, submission="sweep", name=f"sweep{i}") for i in range(4)]
    alone = [create(database, name=f"alone{i}") for i in range(2)]
    other = create(database, owner="somebody")
    urgent = create(database, priority="high", submission="sweep")
    order = [claim(database).job_id for _ in range(8)]
    assert order[0] == urgent  # Priority before turns: that was the sweep's.
    assert order[1:] == [alone[0], other, sweep[0], alone[1], sweep[1], sweep[2], sweep[3]]


def test_who_died_among_others_runs_alone_and_fails_only_by_its_own_crashes(database: Database) -> None:
    innocent, poison = create(database), create(database)
    for _ in range(2):
        claim(database, "shared")
    with database.write.begin() as session:
        assert len(store.take_over(session, "shared", max_attempts=1)) == 2  # Even one crash would be too many.
    assert {read(database, job).status for job in (innocent, poison)} == {"queued"}
    with database.write.begin() as session:
        assert store.claim_next(session, "busy", alone=False) is None
    token = claim(database, "idle")
    with database.write.begin() as session:
        store.end(session, token, "succeeded")
    claim(database, "idle")
    with database.write.begin() as session:
        store.take_over(session, "idle", max_attempts=1)
    states = [read(database, job) for job in (innocent, poison)]
    assert [state.status for state in states] == ["succeeded", "failed"]
    assert states[1].error is not None
    assert states[1].error["type"] == "worker-crashed"


def test_two_that_take_over_together_count_one_crash(database: Database) -> None:
    jobs = [create(database) for _ in range(6)]
    for _ in jobs:
        claim(database, "dead")
    start = threading.Barrier(4)
    taken: list[Token] = []

    def take() -> None:
        start.wait()
        with database.write.begin() as session:
            taken.extend(store.take_over(session, "dead", max_attempts=3))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 6
    assert {(read(database, job).status, read(database, job).crashes) for job in jobs} == {("queued", 1)}


def test_counts_go_beyond_32_bits(database: Database) -> None:
    job = create(database, total=2**40)
    token = claim(database)
    with database.write.begin() as session:
        store.record_progress(session, token, done=2**33)
    assert (read(database, job).done, read(database, job).total) == (2**33, 2**40)


def test_pages_are_whole_and_in_order_whatever_the_filter(database: Database) -> None:
    jobs = [create(database, name=f"{'Ab' if i % 2 else 'ab'}{i}", tags={"even": str(i % 2 == 0)}) for i in range(7)]

    def pages(**filters: Any) -> list[str]:
        seen: list[str] = []
        after = None
        while True:
            with database.read.begin() as session:
                rows = store.list_jobs(session, "experiment", "public", Page(limit=2, after=after, **filters))
            seen += [row.id for row in rows[:2]]
            if len(rows) < 3:
                return seen
            after = (rows[1].created_at, rows[1].id)

    assert pages(newest_first=False) == jobs
    assert pages() == jobs[::-1]
    assert pages(newest_first=False, tag=("even", "True")) == jobs[::2]
    assert pages(tag=("odd", None)) == []
    assert pages(newest_first=False, name_prefix="Ab") == jobs[1::2]
    assert pages(status="running") == []
    middle = read(database, jobs[3]).created_at
    assert pages(newest_first=False, created_after=middle) == jobs[4:]
    assert pages(newest_first=False, created_before=middle) == jobs[:3]


def test_jobs_of_others_and_of_other_kinds_are_not_found(database: Database) -> None:
    job = create(database, owner="somebody")
    with database.read.begin() as session:
        for kind, owner in (("experiment", "public"), ("analysis", "somebody")):
            with pytest.raises(NotFound):
                store.get_job(session, kind, owner, job)
        assert store.list_jobs(session, "experiment", "public", Page()) == []


def test_f12_two_that_start_together_migrate_once(settings: Settings) -> None:
    start, failures = threading.Barrier(4), []

    def open_database() -> None:
        database = store.connect(settings)
        start.wait()
        try:
            store.migrate(database, settings)
        except Exception as error:
            failures.append(error)
        database.engine.dispose()

    threads = [threading.Thread(target=open_database) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def downgrade(database: Database, revision: str) -> None:
    """Take the schema back to an earlier revision."""
    config = Config()
    config.set_main_option("script_location", "service/store/migrations")
    with database.engine.execution_options(write=True).begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_analyses_from_before_tensors_had_their_work_know_it(database: Database, settings: Settings) -> None:
    job = create(database, kind="analysis")
    tensors = [
        Tensor("a", "float32", (768, 2304)),
        Tensor("b", "float32", (4, 3, 2)),
        Tensor("c", "float32", (7,), refusal=UnsupportedShape("it has one axis")),
    ]
    with database.write.begin() as session:
        store.add_tensors(session, job, tensors)
    downgrade(database, "0006")
    store.migrate(database, settings)
    with database.read.begin() as session:
        assert [row.work for row in store.tensors(session, job)] == [tensor.work for tensor in tensors] == [135, 1, 0]


def test_the_migrations_build_exactly_the_tables_of_the_code(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert store.schema(database) == (context.get_current_revision(),) * 2
        assert compare_metadata(context, Base.metadata) == []


def test_a_damaged_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    settings, path = Settings(data=tmp_path), tmp_path / "rankscope.sqlite3"
    path.write_bytes(b"this is no database, it is a letter" * 100)
    before = path.read_bytes()
    with pytest.raises(DatabaseUnusable, match="not a database"):
        store.migrate(store.connect(settings), settings)
    assert path.read_bytes() == before


def test_a_database_of_a_newer_program_is_refused(database: Database, settings: Settings) -> None:
    with database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(DatabaseUnusable, match="newer"):
        store.migrate(database, settings)
