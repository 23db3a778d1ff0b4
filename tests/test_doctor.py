"""`rankscope doctor` on deployments with one real fault each; it must see the fault and change nothing."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from service import doctor, store
from service.doctor import Finding
from service.settings import Settings, environment
from service.store import Database
from tests.conftest import OBEDIENT, Server, free_port
from tests.postgres import Postgres

QUICK = {"heartbeat_s": 0.05}
JOB: dict[str, Any] = {
    "kind": "experiment", "owner": "public", "name": None, "tags": {}, "spec": {}, "priority": "normal", "total": 1,
}  # fmt: skip


@pytest.fixture
def kept(tmp_path: Path) -> Settings:
    """A deployment on SQLite that has been migrated."""
    settings = Settings(data=tmp_path / "data", **QUICK)
    database = store.connect(settings)
    store.migrate(database, settings)
    database.engine.dispose()
    return settings


def contents(settings: Settings) -> dict[Path, tuple[bytes, int]]:
    """Every file of the data folder: what it holds, and when it was written."""
    files = [path for path in settings.data.rglob("*") if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def finding(settings: Settings, check: str) -> Finding:
    """What the doctor says of one thing; nothing may change by it."""
    before = contents(settings)
    with contextlib.closing(doctor.examine(settings)) as findings:
        found = next(one for one in findings if one.check == check)
    assert contents(settings) == before
    return found


def run(settings: Settings, *prefix: str) -> tuple[int, dict[str, dict[str, str]]]:
    """Exit code and findings of the command itself; nothing may change by it."""
    before = contents(settings)
    command = [*prefix, sys.executable, "-m", "service.cli", "doctor", "--json"]
    given = {**os.environ, **environment(settings)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=given)
    assert contents(settings) == before
    assert not done.stderr, done.stderr
    return done.returncode, {one["check"]: one for one in json.loads(done.stdout)}


def file_of(settings: Settings) -> Path:
    return settings.data / "rankscope.sqlite3"


def test_a_deployment_that_works_is_well(server: Server) -> None:
    job = server.post({"training": {"epochs": 100_000}, "record": {"every": 1000}})["id"]
    server.wait(job, "running")
    command = [sys.executable, "-m", "service.cli", "doctor", f"--data={server.data}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    server.client.post(f"/experiments/{job}/cancel")
    assert server.wait(job)["status"] == "canceled"
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 jobs run and their heartbeats move" in done.stdout
    assert "fault" not in done.stdout


def test_a_missing_data_folder_is_told_and_not_made(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "none" / "data")
    assert finding(settings, "data folder").verdict == "fault"
    assert finding(settings, "database").verdict == "fault"
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_folder_beside_postgresql_is_told_and_not_made(postgres: Postgres, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path / "data", database_url=postgres.new_database())
    assert finding(settings, "data folder").verdict == "fault"
    schema = finding(settings, "schema")
    assert (schema.verdict, schema.detail.partition(",")[0]) == ("fault", "empty")
    assert list(tmp_path.iterdir()) == []
    assert finding(settings, "schema") == schema  # It has made no table.


def test_permissions_that_are_missing_are_told_and_a_database_that_cannot_be_written_is_exit_code_5(
    kept: Settings,
) -> None:
    file_of(kept).chmod(0o444)
    kept.data.chmod(0o555)
    code, found = run(kept, *OBEDIENT)
    kept.data.chmod(0o755)
    assert code == 5
    assert (found["data folder"]["verdict"], found["writes"]["verdict"]) == ("fault", "unusable")
    assert "readonly" in found["writes"]["detail"]


def test_a_disk_below_its_reserve_is_told(kept: Settings) -> None:
    short = finding(kept.model_copy(update={"free_disk": 10**18}), "disk")
    assert short.verdict == "fault"
    assert "507" in short.detail


@pytest.mark.parametrize(("lock", "check"), [("IMMEDIATE", "writes"), ("EXCLUSIVE", "database")])
def test_a_locked_database_is_a_fault_that_passes(kept: Settings, lock: str, check: str) -> None:
    other = sqlite3.connect(file_of(kept), isolation_level=None)
    other.execute(f"BEGIN {lock}")
    found = finding(kept, check)
    other.close()
    assert found.verdict == "fault"
    assert "locked" in found.detail
    assert finding(kept, check).verdict == "ok"


def test_a_file_that_is_no_database_is_exit_code_5(kept: Settings) -> None:
    file_of(kept).write_bytes(b"no database" * 1000)
    code, found = run(kept)
    assert code == 5
    assert "not a database" in found["database"]["detail"]
    assert "schema" not in found


def test_a_damaged_page_is_found(kept: Settings) -> None:
    with sqlite3.connect(file_of(kept)) as database:
        (page,) = database.execute("SELECT rootpage FROM sqlite_master WHERE name = 'jobs'").fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    database.close()
    with file_of(kept).open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    assert finding(kept, "integrity").verdict == "unusable"


def test_a_newer_schema_is_unusable_and_an_older_one_can_be_migrated(settings: Settings, database: Database) -> None:
    for version, check, verdict in (("9999", "database", "unusable"), ("0001", "schema", "fault")):
        with database.write.begin() as session:
            session.connection().execute(text("UPDATE alembic_version SET version_num = :v"), {"v": version})
        found = finding(settings, check)
        assert (found.verdict, version in found.detail) == (verdict, True)


def test_a_postgresql_that_does_not_answer_is_unusable_and_its_password_is_not_told(tmp_path: Path) -> None:
    url = f"postgresql://someone:secret@127.0.0.1:{free_port()}/db"
    found = finding(Settings(data=tmp_path, database_url=url), "database")
    assert found.verdict == "unusable"
    assert "127.0.0.1" in found.detail
    assert "secret" not in str(found)


def test_a_postgresql_that_takes_no_writes_is_unusable(postgres: Postgres, tmp_path: Path) -> None:
    url = postgres.new_database()
    settings = Settings(data=tmp_path, database_url=url)
    database = store.connect(settings)
    store.migrate(database, settings)
    database.engine.dispose()
    assert finding(settings, "writes").verdict == "ok"
    postgres.run_sql(f"ALTER DATABASE {url.rpartition('/')[2]} SET default_transaction_read_only = on")
    assert finding(settings, "writes").verdict == "unusable"


def test_jobs_that_nobody_takes_and_jobs_that_nobody_keeps_alive_are_told(
    settings: Settings, database: Database
) -> None:
    quick = settings.model_copy(update=QUICK)
    assert finding(quick, "workers").verdict == "ok"
    with database.write.begin() as session:
        store.create_job(session, JOB, 9)
    waiting = finding(quick, "workers")
    assert (waiting.verdict, waiting.detail[:6]) == ("fault", "1 jobs")
    with database.write.begin() as session:
        store.claim_next(session, "a worker that has died")
    silent = finding(quick, "workers")
    assert (silent.verdict, "no heartbeat" in silent.detail) == ("fault", True)


def test_a_device_that_is_offered_but_missing_is_exit_code_1(kept: Settings) -> None:
    code, found = run(kept.model_copy(update={"devices": "cpu,cuda:99"}))
    assert code == 1
    assert found["devices"]["verdict"] == "fault"
    assert "cuda:99" in found["devices"]["detail"]


def test_a_worker_that_touches_its_file_no_more_is_told(kept: Settings, tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    watched = kept.model_copy(update={"alive_file": alive, "lease_s": 600})
    assert finding(watched, "alive file").verdict == "fault"
    alive.touch()
    assert finding(watched, "alive file").verdict == "ok"
    os.utime(alive, (0, 0))
    assert finding(watched, "alive file").verdict == "fault"


def test_a_url_that_is_none_and_a_folder_that_is_not_there_are_unusable(tmp_path: Path) -> None:
    for url, words in (("nonsense", "RANKSCOPE_DATABASE_URL"), (f"sqlite:///{tmp_path}/none/db", "no folder")):
        found = finding(Settings(data=tmp_path, database_url=url), "database")
        assert (found.verdict, words in found.detail) == ("unusable", True)
