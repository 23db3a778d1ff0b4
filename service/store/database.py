"""Engines and migrations: how SQLite is set up, and the one way to a current schema."""

import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event, inspect, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, configure_mappers, sessionmaker

from service.errors import DatabaseUnusable
from service.settings import Settings
from service.store.health import try_to_write

log = logging.getLogger(__name__)
BUSY_S = 5  # How long a caller waits for a lock, an answer or a connection of the pool before it is told.
JOURNAL_LIMIT = 64 << 20  # Bytes.
UNAVAILABLE = (OperationalError, InterfaceError, PoolTimeout)  # What passes when the database is back.
MIGRATIONS = Path(__file__).parent / "migrations"  # Its files begin with their revisions, in order.
MIGRATION_LOCK = 0x72616E6B  # any number nobody else locks: "rank" in ASCII


@dataclass(frozen=True)
class Database:
    """Two ways in: `read.begin()` never takes a write lock, `write.begin()` takes it at once."""

    engine: Engine
    read: sessionmaker[Session]
    write: sessionmaker[Session]


def connect(settings: Settings) -> Database:
    """Open the database of the settings; nothing is read or written yet. Raises DatabaseUnusable.

    A write transaction begins IMMEDIATE on SQLite: one that starts by reading and then writes is refused with
    SQLITE_BUSY_SNAPSHOT, which no timeout waits out.
    """
    try:
        engine = _engine(settings.url)
    except (ArgumentError, ImportError, TypeError) as error:
        raise DatabaseUnusable(f"cannot use RANKSCOPE_DATABASE_URL: {error}") from error
    reading, writing = _views(engine)
    writers = _InTurn if engine.dialect.name == "sqlite" else sessionmaker[Session]
    return Database(engine, sessionmaker(reading, expire_on_commit=False), writers(writing, expire_on_commit=False))


def prepare() -> None:
    """Load what the first use of a database would; a fork server does, so that none of its children has to."""
    configure_mappers()
    for url in ("sqlite:///unopened", "postgresql+psycopg:///unopened"):
        with contextlib.suppress(ImportError):
            _engine(url)


class _InTurn(sessionmaker[Session]):
    """Transactions that write to SQLite, of this process one at a time.

    Whoever waits for SQLite's lock only looks now and then whether it is free: of many threads that do, those who come
    are faster than those who have long slept, and some are refused. This lock wakes the next when it becomes free.
    """

    def __init__(self, bind: Engine, *, expire_on_commit: bool) -> None:
        super().__init__(bind, expire_on_commit=expire_on_commit)
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def begin(self) -> Iterator[Session]:
        begun = time.monotonic()
        if not self._turn.acquire(timeout=BUSY_S):
            raise PoolTimeout(f"others of this process have been writing for {BUSY_S} s")
        try:
            with super().begin() as session:
                # For its turn and for SQLite's lock together nobody waits longer than for either.
                session.connection(execution_options={"busy_s": max(0.0, BUSY_S - (time.monotonic() - begun))})
                yield session
        finally:
            self._turn.release()


def reason_of(error: Exception) -> str:
    """What the database says, for a log: one line, without the statement."""
    return str(getattr(error, "orig", error)).partition("\n")[0]


def _engine(url: str) -> Engine:
    # Parameters are what clients sent: no error may carry them to the log.
    shared: dict[str, Any] = {"hide_parameters": True, "pool_timeout": BUSY_S}
    if not url.startswith("postgresql"):
        engine = create_engine(url, connect_args={"timeout": BUSY_S}, **shared)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin)
        return engine
    # A server that has gone silent is given up on; one that was restarted is noticed before a connection is used.
    limits = {"connect_timeout": BUSY_S, "tcp_user_timeout": BUSY_S * 1000, "options": f"-c lock_timeout={BUSY_S}s"}
    engine = create_engine(url, pool_pre_ping=True, connect_args=limits, **shared)
    event.listen(engine, "handle_error", _hide_detail)
    return engine


def _hide_detail(context: ExceptionContext) -> None:
    """PostgreSQL tells the values of the row that it refused, in lines after the first."""
    for error in (context.original_exception, context.sqlalchemy_exception):
        if error is not None:
            error.args = (str(error.args[0]).partition("\n")[0], *error.args[1:]) if error.args else ()


def _views(engine: Engine) -> tuple[Engine, Engine]:
    """The engine for reading and for writing: what is read in one transaction is of one moment on both databases."""
    if engine.dialect.name == "sqlite":
        return engine, engine.execution_options(write=True)
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True), engine


def journal_mode() -> str:
    """WAL where this SQLite is free of the WAL-reset bug (fixed in 3.51.3; backported to 3.50.7 and 3.44.6)."""
    version = sqlite3.sqlite_version_info
    safe = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return "WAL" if safe else "DELETE"


def _set_up_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # The driver must not begin transactions of its own: `_begin` does.
    # The time comes first: to change the journal's mode takes a lock.
    busy, journal = f"busy_timeout={BUSY_S * 1000}", f"journal_mode={journal_mode()}"
    # A write-ahead log that has grown while somebody read for long is cut when it begins anew.
    for pragma in (busy, journal, f"journal_size_limit={JOURNAL_LIMIT}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    options = connection.get_execution_options()
    connection.exec_driver_sql(f"PRAGMA busy_timeout={round(1000 * options.get('busy_s', BUSY_S))}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("write", False) else "BEGIN")


def migrate(database: Database, settings: Settings) -> str:
    """Make the data folder and bring the schema up to date, one process at a time; the answer is its version.

    Raises DatabaseUnusable where the file is damaged, read-only, or of a newer program; it is then left as it is.
    """
    try:
        settings.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseUnusable(f"cannot use the data folder {str(settings.data)!r}: {error.strerror}") from error
    with _refusals(database), _one_at_a_time(database, settings) as connection:
        current, head = _versions(connection)
        if current == head:
            try_to_write(connection)
        else:
            _upgrade(connection)
            log.info("the database's schema was %s and is %s now", current or "empty", head)
    return head


def schema(database: Database) -> tuple[str | None, str]:
    """The schema's version in the database, None where it is empty, and this program's. Raises DatabaseUnusable."""
    with _refusals(database), database.engine.connect() as connection:
        return _versions(connection)


def _versions(connection: Connection) -> tuple[str | None, str]:
    known = sorted(file.name.partition("_")[0] for file in (MIGRATIONS / "versions").glob("[0-9]*.py"))
    current: str | None = None
    if inspect(connection).has_table("alembic_version"):
        current = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if current is not None and current not in known:
        raise DatabaseUnusable(f"the database has schema {current}, newer than this program knows")
    return current, known[-1]


def _upgrade(connection: Connection) -> None:
    # Here, because it takes a third of a second and ten megabytes that a current database has no need of.
    from alembic import command  # noqa: PLC0415
    from alembic.config import Config  # noqa: PLC0415

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    command.upgrade(config, "head")


@contextlib.contextmanager
def _refusals(database: Database) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, OSError) as error:
        reason = error.orig if isinstance(error, DBAPIError) else error
        raise DatabaseUnusable(f"cannot use the database {database.engine.url!r}: {reason}") from error


@contextlib.contextmanager
def _one_at_a_time(database: Database, settings: Settings) -> Iterator[Connection]:
    """A transaction that two servers starting together cannot both be in: both would create the tables."""
    sqlite = database.engine.dialect.name == "sqlite"
    with (
        FileLock(settings.data / "migrate.lock", timeout=60) if sqlite else contextlib.nullcontext(),
        database.engine.execution_options(write=True).begin() as connection,
    ):
        if not sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        yield connection
