"""Questions of whoever operates the service: how many jobs, how large, how sound. They change nothing."""

import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service.store.tables import JobRow


def count_jobs(session: Session) -> dict[tuple[str, str], int]:
    """(kind, status) → number of jobs."""
    query = select(JobRow.kind, JobRow.status, func.count()).group_by(JobRow.kind, JobRow.status)
    return {(kind, status): number for kind, status, number in session.execute(query)}


def sizes(session: Session) -> dict[str, int]:
    """Bytes of the database: on SQLite of its file and its write-ahead log, on PostgreSQL of all its files."""
    bind = session.get_bind()
    if bind.dialect.name != "sqlite":
        return {"main": session.scalar(text("SELECT pg_database_size(current_database())")) or 0}
    if (path := sqlite_path(session)) is None:
        return {}
    found = {"main": path, "wal": path.with_name(f"{path.name}-wal")}
    return {name: file.stat().st_size if file.exists() else 0 for name, file in found.items()}


def sqlite_path(session: Session) -> Path | None:
    """The file of a SQLite database; None for one in memory, and for other databases."""
    url = session.get_bind().engine.url
    in_file = url.get_backend_name() == "sqlite" and url.database not in {None, "", ":memory:"}
    return Path(url.database or "") if in_file else None


def try_to_write(connection: Connection) -> None:
    """Write what stands there already; the schema must be there. Raises DBAPIError.

    To begin a write transaction proves nothing: SQLite begins one on a file that it may only read, and PostgreSQL on a
    standby.
    """
    connection.execute(text("UPDATE alembic_version SET version_num = version_num"))


def quick_check(session: Session, limit_s: float) -> list[str] | None:
    """The damage that SQLite finds in its file; None where the time did not suffice. PostgreSQL looks after its own.

    The time has a limit because nobody can commit to the file while it is read.
    """
    if session.get_bind().dialect.name != "sqlite":
        return []
    driver: Any = session.connection().connection.driver_connection
    deadline = time.monotonic() + limit_s
    driver.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
    try:
        return [row for row in session.scalars(text("PRAGMA quick_check(10)")) if row != "ok"]
    except OperationalError as error:
        if "interrupted" in str(error.orig):
            return None
        raise
    finally:
        driver.set_progress_handler(None, 0)


def sqlite_version() -> str:
    """The version of the SQLite library, which decides about WAL."""
    return sqlite3.sqlite_version
