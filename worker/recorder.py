"""From a running job to the database: what it finds is gathered and committed about ten times a second.

The database may be away for as long as it likes. A job goes on without it until too much waits to be written, or until
it needs an answer; then it waits, and its worker ends it when it is told to stop or when the job's time is over.
"""

import errno
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.orm import Session, sessionmaker

from service import files, store
from service.store import Database, Status, Token

log = logging.getLogger("worker.recorder")
COMMIT_S = 0.1
WAITING_LIMIT = 256  # Findings, or epochs of networks, held for a database that is away; one may be a megabyte.
LONGEST_PAUSE_S = 2.0
Written = TypeVar("Written")
Write = Callable[[Session, Token], None]
Save = Callable[[Session, Token, Sequence[Any]], None]


class Canceled(Exception):
    """The job was asked to stop."""


class Drained(Exception):
    """The worker was asked to stop: the job is back in line, for another to go on with."""


class Recorder:
    """Holds what `save` has not stored yet. Every commit proves the token first, and learns of a cancel."""

    def __init__(self, database: Database, token: Token, save: Save) -> None:
        self.token = token
        self.draining = False  # Set from a signal handler; `stop_if_draining` heeds it.
        self.at_once = 1  # Networks that one finding is of.
        self._database = database
        self._save = save
        self._waiting: list[Any] = []
        self._noted: dict[str, Any] = {}
        self._done: int | None = None  # Where `save` counts, nothing is said here.
        self._added = time.monotonic()
        self._committed = -math.inf  # The first finding is for everybody at once.

    def read(self, query: Callable[[Session], Written]) -> Written:
        """What the job has to know from the database."""
        return self._insist(query, self._database.read)

    def start(self, environment: dict[str, Any], write: Write | None = None) -> None:
        """Begin the attempt. Raises LostJob, Canceled."""
        self._stop_if(self._insist(lambda session: self._proved(session, write, environment=environment)))

    def note(self, **columns: Any) -> None:
        """Say more of the job with the next commit, where the first finding is too near for one of its own."""
        self._noted |= columns

    def write(self, write: Write) -> None:
        """Store what the rest of the job builds on. Raises LostJob, Canceled."""
        self._stop_if(self._insist(lambda session: self._proved(session, write)))

    def _proved(self, session: Session, write: Write | None = None, **columns: Any) -> Status:
        if self._done is not None:
            columns["done"] = self._done
        status = store.record_progress(session, self.token, **self._noted, **columns)
        if write is not None:
            write(session, self.token)
        return status

    def add(self, item: Any, done: int | None = None) -> None:
        """Record a finding; it is committed now if the next one would come too late. Raises LostJob, Canceled."""
        self._waiting.append(item)
        self.progress(done)

    def progress(self, done: int | None) -> None:
        """Say how far the job is, unless `save` does; the same holds for the commit."""
        self._done = done
        now = time.monotonic()
        took, self._added = now - self._added, now
        if len(self._waiting) * self.at_once >= WAITING_LIMIT:
            self.flush()
        elif now + took - self._committed >= COMMIT_S:
            self._try_commit()

    def flush(self) -> None:
        """Commit all that waits. Raises LostJob, Canceled."""
        self._settle(self._insist(self._save_waiting))

    def keep(self, checkpoint: str) -> bool:
        """Commit all that waits, with the name of the file to go on from; the answer is whether that was possible."""
        return self._try_commit(checkpoint=checkpoint)

    def stop_if_draining(self) -> None:
        """Give the job back if the worker is to stop; what waits is committed. Raises Drained, LostJob."""
        if not self.draining:
            return

        def give_back(session: Session) -> None:
            self._save_waiting(session)
            store.release(session, self.token)

        self._insist(give_back)
        raise Drained

    def _try_commit(self, **columns: Any) -> bool:
        try:
            with self._database.write.begin() as session:
                status = self._save_waiting(session, **columns)
        except store.UNAVAILABLE as error:
            log.warning("%d findings wait for the database: %s", len(self._waiting), store.reason_of(error))
            return False
        finally:
            self._committed = time.monotonic()
        self._settle(status)
        return True

    def _settle(self, status: Status) -> None:
        self._waiting.clear()
        self._noted.clear()
        self._stop_if(status)

    def _save_waiting(self, session: Session, **columns: Any) -> Status:
        status = self._proved(session, **columns)
        self._save(session, self.token, self._waiting)
        return status

    def end(self, status: Status, error: dict[str, str] | None = None, write: Write | None = None) -> None:
        """Commit all that waits and finish the job, in one transaction. Raises LostJob."""

        def finish(session: Session) -> None:
            self._proved(session, write)
            self._save(session, self.token, self._waiting)
            store.end(session, self.token, status, error)

        self._insist(finish)
        log.info("the job has %s%s", status, f": {error['type']}" if error else "")

    def write_file(self, path: Path, content: bytes) -> None:
        """Write a file that the job cannot do without, in a folder that is there; wait while the disk is full."""
        patiently(lambda: files.write(path, content))

    def _insist(self, ask: Callable[[Session], Written], way: sessionmaker[Session] | None = None) -> Written:
        """Read or commit what the job cannot go on without, and wait while the database is away."""

        def try_once() -> Written:
            with (way or self._database.write).begin() as session:
                return ask(session)

        return patiently(try_once)

    def _stop_if(self, status: Status) -> None:
        if status == "canceling":
            raise Canceled


def patiently(action: Callable[[], Written]) -> Written:
    """Do it, and again until neither the database nor a full disk is in the way."""
    pause = COMMIT_S
    while True:
        try:
            return action()
        except store.UNAVAILABLE as error:
            log.warning("waiting for the database: %s", store.reason_of(error))
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            log.warning("waiting for room on the disk: %s", error.strerror)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)
