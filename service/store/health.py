"""Questions of whoever operates the service: how many jobs, how large, how sound. They change nothing."""

from pathlib import Path

from sqlalchemy import func, select, text
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
