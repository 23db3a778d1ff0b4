"""From a running job to the database: what it finds is gathered and committed about ten times a second."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service import store
from service.store import Database, Status, Token

log = logging.getLogger("worker.recorder")
COMMIT_S = 0.1
PATIENCE_S = 300.0  # How long a finished job waits for a database that is locked or full.
Written = TypeVar("Written")
Write = Callable[[Session, Token], None]
Save = Callable[[Session, Token, Sequence[Any]], None]


class Canceled(Exception):
    """The job was asked to stop."""


class Recorder:
    """Holds what `save` has not stored yet. Every commit proves the token first, and learns of a cancel."""

    def __init__(self, database: Database, token: Token, save: Save) -> None:
        self.token = token
        self._database = database
        self._save = save
        self._waiting: list[Any] = []
        self._done = 0
        self._committed = self._added = time.monotonic()

    def read(self, query: Callable[[Session], Written]) -> Written:
        """What the job has to know from the database."""
        with self._database.read.begin() as session:
            return query(session)

    def start(self, environment: dict[str, Any], write: Write | None = None) -> None:
        """Begin the attempt. Raises LostJob, Canceled."""
        self._stop_if(self._insist(lambda session: self._proved(session, write, environment)))

    def write(self, write: Write) -> None:
        """Store what the rest of the job builds on. Raises LostJob, Canceled."""
        self._stop_if(self._insist(lambda session: self._proved(session, write)))

    def _proved(self, session: Session, write: Write | None, environment: dict[str, Any] | None = None) -> Status:
        status = store.record_progress(session, self.token, self._done, environment)
        if write is not None:
            write(session, self.token)
        return status

    def add(self, item: Any, done: int) -> None:
        """Record a finding; it is committed now if the next one would come too late. Raises LostJob, Canceled."""
        self._waiting.append(item)
        self.progress(done)

    def progress(self, done: int) -> None:
        """Say how far the job is; the same holds for the commit."""
        self._done = done
        now = time.monotonic()
        took, self._added = now - self._added, now
        if now + took - self._committed >= COMMIT_S:
            try:
                self._commit()
            except OperationalError as error:
                log.warning("%d findings wait for the database: %s", len(self._waiting), error.orig)
            self._committed = time.monotonic()

    def _commit(self) -> None:
        with self._database.write.begin() as session:
            status = store.record_progress(session, self.token, self._done)
            self._save(session, self.token, self._waiting)
        self._waiting.clear()
        self._stop_if(status)

    def end(self, status: Status, error: dict[str, str] | None = None, write: Write | None = None) -> None:
        """Commit all that waits and finish the job, in one transaction. Raises LostJob."""

        def finish(session: Session) -> None:
            self._proved(session, write)
            self._save(session, self.token, self._waiting)
            store.end(session, self.token, status, error)

        self._insist(finish)
        log.info("the job has %s%s", status, f": {error['type']}" if error else "")

    def _insist(self, write: Callable[[Session], Written]) -> Written:
        """Commit what the job cannot go on without, and wait while the database is away."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                with self._database.write.begin() as session:
                    return write(session)
            except OperationalError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("waiting for the database: %s", error.orig)
                time.sleep(COMMIT_S)

    def _stop_if(self, status: Status) -> None:
        if status == "canceling":
            raise Canceled
