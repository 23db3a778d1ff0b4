"""What the API does while its database is locked, full, away, damaged or of another version; rows F of the fault list.

Every fault is a real one: a lock that is held, a limit or a disk that is reached, a PostgreSQL that is killed.
"""

import itertools
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psycopg
import pytest
from sqlalchemy import event, text

from service import store
from service.app import create_app
from service.client import Client
from service.errors import DatabaseUnusable
from service.settings import Settings, environment
from service.store import Database
from tests import postgres as postgresql
from tests.conftest import OBEDIENT, Server, free_port, serving, start_server, stop_server, wait_for

FILE = "rankscope.sqlite3"
POSTS = 24


@dataclass(frozen=True)
class Api:
    """A server without workers, and its database."""

    server: Server
    url: str  # empty: SQLite

    @property
    def client(self) -> httpx.Client:
        return self.server.client

    @property
    def file(self) -> Path:
        return self.server.data / FILE


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Api]:
    """An API for all tests that leave it as it was, on SQLite and on PostgreSQL."""
    url = request.getfixturevalue("postgres").new_database() if request.param == "postgresql" else ""
    running = start_server(tmp_path_factory.mktemp("api") / "data", workers=0, RANKSCOPE_DATABASE_URL=url)
    yield Api(running, url)
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()


@contextmanager
def locked(api: Api) -> Iterator[Callable[[], None]]:
    """Another program that has locked the database against writes, until it is told or this is over."""
    if api.url:
        other: Any = psycopg.connect(api.url)
        other.execute("LOCK TABLE jobs IN EXCLUSIVE MODE")
    else:
        other = sqlite3.connect(api.file, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
    try:
        yield other.rollback
    finally:
        other.close()


def test_f7_a_lock_of_a_second_is_not_noticed(api: Api) -> None:
    with locked(api) as let_go:
        timer = threading.Timer(1, let_go)
        timer.start()
        assert api.client.post("/experiments", json={}).status_code == 202
        timer.join()


def test_f7_a_lock_that_stays_is_told_to_writers_and_not_noticed_by_readers(api: Api) -> None:
    posted = api.server.post({})["id"]
    array = np.lib.format.magic(1, 0) + b"\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), }"
    with locked(api), ThreadPoolExecutor(4) as threads:
        writes = [
            threads.submit(api.client.post, "/experiments", json={}, headers={"idempotency-key": "held"}),
            threads.submit(api.client.post, "/analyze", content=array.ljust(127) + b"\n" + bytes(32)),
            threads.submit(api.client.patch, f"/experiments/{posted}", json={"name": "new"}),
            threads.submit(api.client.delete, f"/experiments/{posted}"),
        ]
        assert api.server.read(posted)["status"] == "queued"
        answers = [write.result() for write in writes]
    for answer in answers:
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/database-unavailable")
        assert int(answer.headers["retry-after"]) > 0
    assert [path for path in (api.server.data / "uploads").rglob("*") if path.is_file()] == []
    again = api.client.post("/experiments", json={}, headers={"idempotency-key": "held"})
    assert (again.status_code, "idempotency-replayed" in again.headers) == (202, False)


@pytest.mark.slow
def test_f7_a_job_that_is_stored_is_told_of_though_it_cannot_be_read(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0)
    array = np.lib.format.magic(1, 0) + b"\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (2, 2), }"
    patient = {"prefer": "wait=30"}
    with ThreadPoolExecutor(2) as threads:
        posts = [
            threads.submit(server.client.post, "/experiments", json={}, headers=patient),
            threads.submit(
                server.client.post, "/analyze", content=array.ljust(127) + b"\n" + bytes(32), headers=patient
            ),
        ]
        for path in ("/experiments", "/analyses"):
            wait_for(lambda path=path: server.client.get(path).json()["data"], "the job to be stored")
        with sqlite3.connect(server.data / FILE, isolation_level=None) as other:
            other.execute("BEGIN EXCLUSIVE")
            experiment, analysis = (post.result() for post in posts)
            other.execute("ROLLBACK")
        other.close()
    assert (experiment.status_code, analysis.status_code) == (202, 503)
    for answer in (experiment, analysis):
        assert server.client.get(answer.headers["location"]).json()["status"] == "queued"
    assert stop_server(server) == 0


def test_f8_writers_that_read_first_do_not_meet_in_a_deadlock(api: Api) -> None:
    def work(number: int) -> list[int]:
        path = f"/experiments/{api.server.post({'name': str(number)})['id']}"
        answers = [
            api.client.patch(path, json={"tags": {"n": str(number)}}),
            api.client.get(path),
            api.client.post(f"{path}/cancel", headers={"idempotency-key": str(number)}),
            api.client.delete(path),
        ]
        return [answer.status_code for answer in answers]

    with ThreadPoolExecutor(8) as threads:
        assert set(map(tuple, threads.map(work, range(POSTS)))) == {(200, 200, 200, 204)}


def test_f8_writers_of_one_process_take_turns_on_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(data=tmp_path / "data")
    database = store.connect(settings)
    store.migrate(database, settings)
    monkeypatch.setattr("service.store.database.BUSY_S", 0.05)
    write = database.write
    # Before it asks SQLite for its lock, the first has the turn already.
    with write.begin() as first, pytest.raises(store.UNAVAILABLE, match="others"), write.begin():
        pass
    assert not first.in_transaction()
    with pytest.raises(ZeroDivisionError), write.begin():
        1 / 0  # noqa: B018
    with write.begin() as second:  # One that fails gives the turn back too.
        assert store.claim_next(second, "a worker") is None
    database.engine.dispose()


def test_f7_waiting_for_the_turn_counts_as_waiting_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data=tmp_path / "data")
    database = store.connect(settings)
    store.migrate(database, settings)
    now = itertools.count(step=4)  # Four of the five seconds pass while the turn is waited for.
    monkeypatch.setattr("service.store.database.time.monotonic", lambda: next(now))
    with database.write.begin() as session:
        assert session.scalar(text("PRAGMA busy_timeout")) == 1000
    with database.read.begin() as session:
        assert session.scalar(text("PRAGMA busy_timeout")) == 5000
    database.engine.dispose()


def test_f6_a_full_database_refuses_new_jobs_and_takes_them_again_without_a_restart(tmp_path: Path) -> None:
    app = create_app(Settings(data=tmp_path / "data"))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        engine = app.state.context.database.engine

        def fill(connection: Any, _record: Any) -> None:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
            connection.execute(f"PRAGMA max_page_count={pages}")

        event.listen(engine, "connect", fill)
        engine.dispose()
        made = 0
        while (answer := client.post("/experiments", json={"name": "x" * 200})).status_code == 202:
            made += 1
            assert made < 99
        assert (answer.status_code, answer.json()["type"]) == (507, "/problems/storage-full")
        assert len(client.get("/experiments").json()["data"]) == min(made, 20)
        event.remove(engine, "connect", fill)
        engine.dispose()
        assert client.post("/experiments", json={}).status_code == 202


def test_f6_a_full_disk_refuses_an_upload_and_keeps_nothing_of_it(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may make a small disk")
    try:
        server = start_server(disk / "data", workers=0, RANKSCOPE_FREE_DISK="0")
        answer = server.client.post("/analyze", content=bytes(8 << 20), headers={"prefer": "wait=0"})
        assert (answer.status_code, answer.json()["type"]) == (507, "/problems/storage-full")
        assert [path for path in (server.data / "uploads").rglob("*") if path.is_file()] == []
        assert server.client.post("/experiments", json={}).status_code == 202
        assert stop_server(server) == 0
        assert "Traceback" not in server.log.read_text()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def refused(settings: Settings, *prefix: str) -> str:
    """The one line that a server ends with where the database cannot be used."""
    command = [*prefix, sys.executable, "-m", "service.cli", "serve", f"--port={free_port()}", "--workers=0"]
    given = {**os.environ, **environment(settings)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=given)
    assert done.returncode == 5, done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line


def test_f9_a_database_of_a_newer_program_is_refused_and_left(settings: Settings, database: Database) -> None:
    with database.write.begin() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    assert "newer" in refused(settings)
    with database.read.begin() as session:
        assert session.scalar(text("SELECT version_num FROM alembic_version")) == "9999"


@pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
def test_f9_a_file_that_is_damaged_or_may_only_be_read_is_refused_and_left(
    settings: Settings, database: Database
) -> None:
    database.engine.dispose()
    file = settings.data / FILE
    for folder_mode, file_mode in ((0o755, 0o444), (0o555, 0o644)):
        before = file.read_bytes()
        file.chmod(file_mode)
        settings.data.chmod(folder_mode)
        assert "readonly" in refused(settings, *OBEDIENT)
        settings.data.chmod(0o755)
        assert file.read_bytes() == before
    file.chmod(0o644)
    damaged = bytes(100) + file.read_bytes()[100:]
    file.write_bytes(damaged)
    assert "not a database" in refused(settings)
    assert file.read_bytes() == damaged


def test_f9_a_database_that_is_not_there_is_refused_without_a_password_in_the_reason(
    tmp_path: Path, postgres: postgresql.Postgres
) -> None:
    for url, words in (
        (f"sqlite:///{tmp_path}/none/database.sqlite3", "unable to open database file"),
        (postgres.url("nobodys"), "does not exist"),
        (f"postgresql://someone:secret@127.0.0.1:{free_port()}/db", "refused"),
    ):
        settings = Settings(data=tmp_path, database_url=url)
        with pytest.raises(DatabaseUnusable, match=words) as told:
            store.migrate(store.connect(settings), settings)
        assert "secret" not in told.value.detail


def test_f12_two_servers_that_start_together_migrate_once_and_both_serve(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda _: start_server(tmp_path / "data", workers=0), "ab")
    posted = first.post({"name": "by the first"})
    assert second.read(posted["id"])["name"] == "by the first"
    assert second.client.get("/readyz").is_success
    assert stop_server(first) == stop_server(second) == 0
    assert first.log.read_text().count("the database's schema was empty") == 1


def test_f12_postgresql_restarted_under_load_loses_nothing_and_makes_nothing_twice(tmp_path: Path) -> None:
    if postgresql.programs() is None:
        pytest.skip(postgresql.MISSING)
    with postgresql.running(free_port()) as database:
        server = start_server(tmp_path / "data", workers=0, RANKSCOPE_DATABASE_URL=database.new_database())
        halfway = threading.Event()
        made: list[str] = []

        def post(number: int) -> int:
            with Client(str(server.client.base_url), retries=20) as client:
                made.append(client.create_experiment({"tags": {"n": str(number)}}).id)
            if number == POSTS // 4:
                halfway.set()
            return number

        with ThreadPoolExecutor(4) as threads:
            posted = [threads.submit(post, number) for number in range(POSTS)]
            assert halfway.wait(60)
            database.control("restart", "-m", "immediate")
            assert sorted(one.result() for one in posted) == list(range(POSTS))
        listed = server.client.get("/experiments", params={"limit": 100}).json()["data"]
        assert sorted(job["tags"]["n"] for job in listed) == sorted(map(str, range(POSTS)))
        assert {job["id"] for job in listed} == set(made)
        database.control("stop", "-m", "immediate")
        away = server.client.post("/experiments", json={})
        assert (away.status_code, away.json()["type"]) == (503, "/problems/database-unavailable")
        assert server.client.get("/readyz").status_code == 503
        assert server.client.get("/healthz").status_code == 200
        database.control("start")
        assert server.client.post("/experiments", json={}).status_code == 202
        assert stop_server(server) == 0
        assert "Traceback" not in server.log.read_text()


def test_f25_a_commit_is_on_the_disk_before_it_is_answered(database: Database) -> None:
    asked, durable = ("SHOW synchronous_commit", "on")
    if database.engine.dialect.name == "sqlite":
        asked, durable = "PRAGMA synchronous", "2"  # FULL
    with database.write.begin() as session:
        assert str(session.scalar(text(asked))) == durable


def test_f26_a_write_ahead_log_that_a_reader_has_made_grow_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On whatever SQLite this is: WAL is chosen where it is safe, and then this holds."""
    monkeypatch.setattr("service.store.database.journal_mode", lambda: "WAL")
    monkeypatch.setattr("service.store.database.JOURNAL_LIMIT", 1 << 20)
    database, log = store.connect(Settings(data=tmp_path)), tmp_path / f"{FILE}-wal"
    store.migrate(database, Settings(data=tmp_path))

    def write(n_bytes: int) -> None:
        with database.write.begin() as session:
            session.execute(text(f"CREATE TABLE IF NOT EXISTS bytes AS SELECT zeroblob({n_bytes}) AS value"))
            session.execute(text("DROP TABLE bytes"))

    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM jobs").fetchall()
        for _ in range(8):
            write(1 << 20)
        with database.read.begin() as session:
            assert store.sizes(session)["wal"] == log.stat().st_size > 8 << 20
    write(1 << 20)
    write(1)
    assert log.stat().st_size <= 1 << 20
    database.engine.dispose()


@pytest.mark.parametrize("api", ["sqlite"], indirect=True)
def test_f27_a_backup_under_load_is_whole(api: Api, tmp_path: Path) -> None:
    before = {api.server.post({"name": "before"})["id"] for _ in range(9)}
    with ThreadPoolExecutor(4) as threads:
        load = [threads.submit(api.client.post, "/experiments", json={}) for _ in range(POSTS)]
        with sqlite3.connect(api.file, timeout=30) as source:
            source.execute("VACUUM INTO ?", (str(tmp_path / FILE),))
        source.close()
        assert {one.result().status_code for one in load} == {202}
    settings = Settings(data=tmp_path)
    restored = store.connect(settings)
    store.migrate(restored, settings)
    with restored.read.begin() as session:
        assert session.scalar(text("PRAGMA integrity_check")) == "ok"
        page = store.Page(limit=100, newest_first=True, name_prefix="before")
        assert {row.id for row in store.list_jobs(session, "experiment", "public", page)} == before
    restored.engine.dispose()


@pytest.mark.parametrize("newest_first", [True, False])
def test_f28_a_page_of_many_jobs_is_read_from_the_index_in_order(database: Database, newest_first: bool) -> None:
    page = store.Page(limit=20, newest_first=newest_first, after=(1, "x"))
    statements: list[tuple[str, Any]] = []

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        statements.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    with database.read.begin() as session:
        store.list_jobs(session, "experiment", "public", page)
    event.remove(database.engine, "before_cursor_execute", note)
    statement, parameters = next(one for one in statements if "FROM jobs" in one[0])
    sqlite = database.engine.dialect.name == "sqlite"
    with database.engine.connect() as connection:
        if not sqlite:  # An empty table is best read whole.
            connection.exec_driver_sql("SET enable_seqscan = off")
            connection.exec_driver_sql("SET enable_bitmapscan = off")
        explain = "EXPLAIN QUERY PLAN" if sqlite else "EXPLAIN"
        plan = str(connection.exec_driver_sql(f"{explain} {statement}", parameters).all())
    assert "jobs_by_owner" in plan
    assert "TEMP B-TREE" not in plan
    assert "Sort" not in plan
