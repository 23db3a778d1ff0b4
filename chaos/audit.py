"""Who wrote which epoch, and in which order: the database itself keeps the record."""

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

COLUMNS = "job_id VARCHAR(36), epoch INTEGER, attempt INTEGER"
NOTE = (
    "INSERT INTO audit (job_id, epoch, attempt) SELECT NEW.job_id, NEW.epoch, attempt FROM jobs WHERE id = NEW.job_id"
)
STATEMENTS = {
    "sqlite": [
        f"CREATE TABLE audit (number INTEGER PRIMARY KEY AUTOINCREMENT, {COLUMNS})",
        f"CREATE TRIGGER audit_epochs AFTER INSERT ON epochs BEGIN {NOTE}; END",
    ],
    "postgresql": [
        f"CREATE TABLE audit (number BIGSERIAL PRIMARY KEY, {COLUMNS})",
        f"CREATE FUNCTION audit_epoch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {NOTE}; RETURN NULL; END $$",
        "CREATE TRIGGER audit_epochs AFTER INSERT ON epochs FOR EACH ROW EXECUTE FUNCTION audit_epoch()",
    ],
}


def install_audit(url: str) -> None:
    """Note from now on, beside every epoch, the attempt that held the job when it was written."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in STATEMENTS[engine.dialect.name]:
            connection.exec_driver_sql(statement)
    engine.dispose()


def commits(url: str) -> int | None:
    """How often any job has been written to so far; None while the database is locked.

    A worker that was stopped in mid-commit holds SQLite's lock: whoever is to wake it must not wait for that.
    """
    engine = create_engine(url, connect_args={"timeout": 0.1} if url.startswith("sqlite") else {})
    try:
        with engine.connect() as connection:
            return int(connection.scalar(text("SELECT coalesce(sum(revision), 0) FROM jobs")) or 0)
    except OperationalError as error:
        if "database is locked" not in str(error.orig):
            raise
        return None
    finally:
        engine.dispose()


def overlaps(url: str) -> list[tuple[str, int, int]]:
    """Job, attempt and epoch of every write after a later attempt's, or after a later epoch of its own."""
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT job_id, attempt, epoch FROM audit ORDER BY job_id, number")).all()
    engine.dispose()
    wrong, last = [], ("", 0, 0)
    for job_id, attempt, epoch in rows:
        if job_id == last[0] and (attempt, epoch) <= last[1:]:
            wrong.append((job_id, attempt, epoch))
        last = (job_id, attempt, epoch)
    return wrong
