"""`rankscope doctor`: what is wrong with a deployment, and what to do about it. It changes nothing.

A finding is `ok`, a `fault` that keeps some of the work from being done, or `unusable`: nothing can be served from that
database. The exit code is that of the worst.
"""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from service import files, store
from service.errors import DatabaseUnusable
from service.settings import Settings, environment
from service.store import Database

EXIT = {"ok": 0, "fault": 1, "unusable": 5}
WORST = ("unusable", "fault", "ok")
COLOURS = {"ok": "green", "fault": "yellow", "unusable": "red"}
DEVICES_S = 120  # torch may be read from a slow disk
LOOK_S = 0.1
CHECK_S = store.BUSY_S - 2  # Writers wait for as long as the database is read, and shall not be refused.


class Finding(NamedTuple):
    """One thing looked at: how it is, and what to do about it."""

    check: str
    verdict: Literal["ok", "fault", "unusable"]
    detail: str
    advice: str = ""


def run(settings: Settings, *, as_json: bool) -> int:
    """Look at everything and print it; the answer is the exit code."""
    findings = list(examine(settings))
    if as_json:
        print(orjson.dumps([one._asdict() for one in findings], option=orjson.OPT_INDENT_2).decode())  # noqa: T201
    else:
        # A file or a pipe has no width: there a line a finding serves better than a fold.
        console = Console(highlight=False)
        (console if console.is_terminal else Console(width=240, highlight=False)).print(_table(findings))
    worst = next(verdict for verdict in WORST if any(one.verdict == verdict for one in findings))
    return EXIT[worst]


def examine(settings: Settings) -> Generator[Finding]:
    """Every finding, in the order in which to put things right."""
    yield _data_folder(settings)
    if settings.data.is_dir():
        yield _disk(settings)
    yield from _database(settings)
    if settings.alive_file is not None:
        yield _alive_file(settings.alive_file, settings.lease_s)
    yield from _worker_extra(settings)


def _table(findings: list[Finding]) -> Table:
    table = Table("check", "verdict", "what was found", "what to do")
    for one in findings:
        table.add_row(one.check, Text(one.verdict, COLOURS[one.verdict]), Text(one.detail), Text(one.advice))
    return table


def _data_folder(settings: Settings) -> Finding:
    check, folder = "data folder", settings.data.absolute()
    try:
        if not folder.exists():
            advice = "`rankscope migrate` makes it, or set RANKSCOPE_DATA"
            return Finding(check, "fault", f"{folder} does not exist", advice)
        with files.nameless(folder) as file:
            file.write(bytes(4096))
            files.settle(file)
    except OSError as error:
        advice = f"let user {os.getuid()} write there, or set RANKSCOPE_DATA"
        return Finding(check, "fault", f"cannot write to {folder}: {error.strerror}", advice)
    return Finding(check, "ok", f"{folder} can be written to")


def _disk(settings: Settings) -> Finding:
    free, reserve = files.free_bytes(settings.data), settings.free_disk
    detail = f"{free} bytes are free, {reserve} are kept in reserve"
    if free < reserve:
        return Finding("disk", "fault", f"{detail}: new jobs are refused with 507", "delete old jobs, or add space")
    return Finding("disk", "ok", detail)


def _database(settings: Settings) -> Iterator[Finding]:
    """The database, as far as it can be used: what follows from a finding is not found again."""
    absent = _absent(settings)
    if absent is not None:
        yield absent
        return
    database = None
    try:
        database = store.connect(settings)
        yield from _inside(settings, database)
    except DatabaseUnusable as error:
        yield _unusable(error.detail)
    except DBAPIError as error:  # It was there a moment ago.
        yield _unusable(str(error.orig))
    finally:
        if database is not None:
            database.engine.dispose()


def _unusable(reason: str) -> Finding:
    if "locked" in reason:
        return _locked("database")
    advice = "put right what it says; where the file is damaged, restore a backup"
    return Finding("database", "unusable", reason.partition("\n")[0], advice)


def _locked(check: str) -> Finding:
    advice = "end the process that holds the lock: requests are answered with 503 meanwhile"
    return Finding(check, "fault", f"another process has kept the database locked for {store.BUSY_S} s", advice)


def _absent(settings: Settings) -> Finding | None:
    """Why there is no database file to open: opening one would create it."""
    try:
        url = make_url(settings.url)
    except ArgumentError as error:
        return Finding("database", "unusable", f"RANKSCOPE_DATABASE_URL: {error}", "write it as SQLAlchemy's URLs are")
    if url.get_backend_name() != "sqlite" or not url.database or Path(url.database).exists():
        return None
    file = Path(url.database)
    if file.parent.is_dir() or file.parent == settings.data.absolute():
        return Finding("database", "fault", f"{file} does not exist yet", "`rankscope migrate` makes it")
    return Finding(
        "database", "unusable", f"there is no folder {file.parent}", "make it, or set RANKSCOPE_DATABASE_URL"
    )


def _inside(settings: Settings, database: Database) -> Iterator[Finding]:
    """What a database tells that can be opened. Raises DatabaseUnusable."""
    current, head = store.schema(database)
    yield Finding("database", "ok", f"{database.engine.url!r} answers")
    if current == head:
        yield Finding("schema", "ok", f"{current}, as this program knows it")
    else:
        detail = f"{current or 'empty'}, this program's is {head}"
        yield Finding("schema", "fault", detail, "`rankscope migrate` brings it up to date")
    if current is not None:
        yield _writable(database)
    yield _journal(database)
    yield _integrity(database)
    if current == head:
        yield _workers(settings, database)


def _writable(database: Database) -> Finding:
    advice = "give this user the right to write"
    try:
        with database.write() as session:
            store.try_to_write(session.connection())
            session.rollback()
    except DBAPIError as error:
        if "locked" in str(error.orig):
            return _locked("writes")
        return Finding("writes", "unusable", f"cannot write: {error.orig}", advice)
    return Finding("writes", "ok", "what is written is taken")


def _journal(database: Database) -> Finding:
    if database.engine.dialect.name != "sqlite":
        return Finding("journal", "ok", database.engine.dialect.name)
    version, mode = store.sqlite_version(), store.journal_mode()
    why = "" if mode == "WAL" else ": its WAL mode has a bug that was mended in 3.51.3, 3.50.7 and 3.44.6"
    return Finding("journal", "ok", f"{mode} with SQLite {version}{why}")


def _integrity(database: Database) -> Finding:
    try:
        with database.read.begin() as session:
            found = store.quick_check(session, CHECK_S)
    except DBAPIError as error:
        found = [str(error.orig)]
    if found is None:
        advice = "for the whole, run `PRAGMA integrity_check` on a backup"
        return Finding("integrity", "ok", f"no damage found in the part read in {CHECK_S} s", advice)
    if found:
        advice = "stop everything and restore a backup"
        return Finding("integrity", "unusable", f"the database is damaged: {found[0]}", advice)
    return Finding("integrity", "ok", "no damage found")


def _workers(settings: Settings, database: Database) -> Finding:
    """Whether somebody works: heartbeats move where jobs run, and jobs that wait are taken."""
    check, limit = "workers", 3 * settings.heartbeat_s + 1
    first, deadline = _held(database), time.monotonic() + limit
    while True:
        waiting, held = _waiting(database), _held(database)
        silent = [token for token, beat in first.items() if held.get(token) == beat]
        if not silent and (held or not waiting):
            break
        if time.monotonic() > deadline:
            return _nobody_works(waiting, len(silent), limit)
        time.sleep(LOOK_S)
    if not held:
        return Finding(check, "ok", "no job runs or waits: workers show only when there is work")
    return Finding(check, "ok", f"{len(held)} jobs run and their heartbeats move; {waiting} wait")


def _nobody_works(waiting: int, silent: int, seconds: float) -> Finding:
    advice = "start a worker: `rankscope work`, or `rankscope serve --workers 1`"
    if silent:
        detail = f"{silent} running jobs had no heartbeat for {seconds:g} s"
        return Finding("workers", "fault", detail, f"any live worker takes them over within the lease; else {advice}")
    return Finding("workers", "fault", f"{waiting} jobs wait and none was taken in {seconds:g} s", advice)


def _held(database: Database) -> dict[store.Token, int]:
    with database.read.begin() as session:
        return {token: lease.beat for token, lease in store.held_jobs(session).items()}


def _waiting(database: Database) -> int:
    with database.read.begin() as session:
        counts = store.count_jobs(session)
    return sum(number for (_, status), number in counts.items() if status == "queued")


def _worker_extra(settings: Settings) -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("worker") is None:
        yield Finding("worker extra", "ok", "not installed: this machine can serve with --workers 0, and run no jobs")
        return
    yield Finding("worker extra", "ok", "installed")
    command = [sys.executable, "-m", "worker", "--devices"]
    given = {**os.environ, **environment(settings)}
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=DEVICES_S, env=given)  # noqa: S603
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        detail = said[-1] if said else str(error)
        yield Finding("devices", "fault", f"the worker cannot tell: {detail}", "install rankscope[worker] again")
        return
    found = orjson.loads(done.stdout)
    if missing := [name for name in settings.device_names if name not in found]:
        detail = f"{', '.join(missing)} offered, but not among those found: {', '.join(found)}"
        yield Finding("devices", "fault", detail, "change RANKSCOPE_DEVICES, or see why torch does not find it")
    else:
        yield Finding("devices", "ok", f"offered: {', '.join(settings.device_names)}; found: {', '.join(found)}")


def _alive_file(path: Path, lease_s: float) -> Finding:
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return Finding("alive file", "fault", f"{path} does not exist", "start a worker with RANKSCOPE_ALIVE_FILE")
    verdict: Literal["ok", "fault"] = "ok" if age <= lease_s else "fault"
    return Finding(
        "alive file", verdict, f"{path} was touched {age:.0f} s ago", "" if verdict == "ok" else "see the worker"
    )
