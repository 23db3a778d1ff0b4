"""From a running job to the database: epochs are gathered and committed about ten times a second."""

import time
from typing import Any

from service import store
from service.lowrank.ranks import Array
from service.store import Database, Epoch, Status, Token

COMMIT_S = 0.1


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
        with self._database.write.begin() as session:
            status = store.record_progress(session, self.token, 0, environment)
            store.clear_recording(session, self.token)
        self._stop_if(status)

    def add(self, epoch: Epoch) -> None:
        """Record an epoch; it is committed now if the next one would come too late. Raises LostJob, Canceled."""
        self._waiting.append(epoch)
        self._done = epoch.epoch
        now = time.monotonic()
        took, self._added = now - self._added, now
        if now + took - self._committed >= COMMIT_S:
            with self._database.write.begin() as session:
                status = store.record_progress(session, self.token, self._done)
                self._store_epochs(session)
            self._waiting.clear()
            self._committed = time.monotonic()
            self._stop_if(status)

    def end(
        self,
        status: Status,
        error: dict[str, str] | None = None,
        cuts: dict[str, tuple[Array, Array]] | None = None,
    ) -> None:
        """Commit all that waits and finish the job, in one transaction. Raises LostJob."""
        with self._database.write.begin() as session:
            store.record_progress(session, self.token, self._done)
            self._store_epochs(session)
            if cuts:
                store.add_cuts(session, self.token, cuts)
            store.end(session, self.token, status, error)

    def _store_epochs(self, session: Any) -> None:
        store.add_epochs(session, self.token, self._waiting)

    def _stop_if(self, status: Status) -> None:
        if status == "canceling":
            raise Canceled
