"""From a running job to the database: epochs are gathered and committed about ten times a second."""

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service import store
from service.lowrank.ranks import Array
from service.store import Database, Epoch, Status, Token

log = logging.getLogger("worker.recorder")
COMMIT_S = 0.1
PATIENCE_S = 300.0  # How long a finished job waits for a database that is locked or full.
Written = TypeVar("Written")


class Canceled(Exception):
    """The job was asked to stop."""


class Recorder:
    """Holds what is not committed yet. Every commit proves the token first, and learns of a cancel."""

    def __init__(self, database: Database, token: Token) -> None:
        self.token = token
        self._database = database
        self._waiting: list[Epoch] = []
        self._done = 0
        self._committed = self._added = time.monotonic()

    def start(self, environment: dict[str, Any]) -> None:
        """Begin the attempt: what an earlier one recorded is forgotten. Raises LostJob, Canceled."""

        def write(session: Session) -> Status:
            status = store.record_progress(session, self.token, 0, environment)
            store.clear_recording(session, self.token)
            return status

        self._stop_if(self._insist(write))

    def add(self, epoch: Epoch) -> None:
        """Record an epoch; it is committed now if the next one would come too late. Raises LostJob, Canceled."""
        self._waiting.append(epoch)
        self._done = epoch.epoch
        now = time.monotonic()
        took, self._added = now - self._added, now
        if now + took - self._committed >= COMMIT_S:
            try:
                self._commit_epochs()
            except OperationalError as error:
                log.warning("%d epochs wait for the database: %s", len(self._waiting), error.orig)
            self._committed = time.monotonic()

    def _commit_epochs(self) -> None:
        with self._database.write.begin() as session:
            status = store.record_progress(session, self.token, self._done)
            store.add_epochs(session, self.token, self._waiting)
        self._waiting.clear()
        self._stop_if(status)

    def end(
        self,
        status: Status,
        error: dict[str, str] | None = None,
        cuts: dict[str, tuple[Array, Array]] | None = None,
    ) -> None:
        """Commit all that waits and finish the job, in one transaction. Raises LostJob."""

        def write(session: Session) -> None:
            store.record_progress(session, self.token, self._done)
            store.add_epochs(session, self.token, self._waiting)
            if cuts:
                store.add_cuts(session, self.token, cuts)
            store.end(session, self.token, status, error)

        self._insist(write)

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
