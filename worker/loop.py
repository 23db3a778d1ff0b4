"""The worker's own process: claim jobs, run each in a child, keep its lease, see it end.

It never loads torch: all it does is look at the database and at its children.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import FrameType

from service import files, logs, store
from service.errors import LostJob
from service.settings import Settings
from service.store import Token
from worker import engines
from worker.monitoring import WorkerMetrics

log = logging.getLogger("worker")
CANCEL_GRACE_S = 0.4  # A child looks for a cancel at every commit; one inside a long step is ended from outside.
OBEY_S = 0.1  # Between two looks at the database while jobs run, who need the CPU more, and while it is away.
EXIT_GRACE_S = 5.0  # For a last checkpoint.
KILLED_S = 1.0  # Of a job whose fork server has stopped nobody ever hears that it has ended.
TITLES = {"timed-out": "The job took too long", "out-of-memory": "Out of memory"}


@dataclass
class Running:
    """A child and the job it has."""

    process: engines.Job
    started: float
    suspect: bool  # It may have killed a worker before: nothing else runs beside it.
    cancel_seen: float | None = None


class Supervisor:
    """One worker: at most `settings.jobs` children at a time."""

    def __init__(self, settings: Settings, *, tied: bool = False) -> None:
        self.settings = settings
        self.engine = engines.engine_of(settings)
        self.database = store.connect(settings)
        self.name = f"{socket.gethostname()[:40]}-{os.getpid()}-{secrets.token_hex(4)}"
        self.running: dict[Token, Running] = {}
        self.leases: dict[Token, tuple[int, float]] = {}
        self.last_beat = 0.0
        started = time.monotonic()
        self.metrics = WorkerMetrics(
            heartbeat_age=lambda: time.monotonic() - max(self.last_beat, started), running=lambda: len(self.running)
        )
        self.stopping = self.is_away = False
        self.wake, self._woken = socket.socketpair()
        self.watched = [self._woken, *([sys.stdin.fileno()] if tied else [])]

    def run(self) -> None:
        """Work until a signal comes; then give back what runs and return."""
        logs.bind(worker=self.name)
        self._listen_to_signals()
        store.migrate(self.database, self.settings)
        self.engine.open()
        try:
            with self.metrics.shown(self.settings):
                self._loop()
        finally:
            self._give_back()
            self.engine.close()
        log.info("the worker has stopped")

    def _loop(self) -> None:
        log.info("the worker is ready")
        while not self.stopping:
            sentinels = [job.process.sentinel for job in self.running.values()]
            pause = max(self.settings.poll_s, OBEY_S) if self.running or self.is_away else self.settings.poll_s
            ready = wait([*self.watched, *sentinels], timeout=pause)
            self.stopping |= any(watched in ready for watched in self.watched)
            if not self.stopping:
                self._look()

    def _listen_to_signals(self) -> None:
        self.wake.setblocking(False)
        signal.set_wakeup_fd(self.wake.fileno())

        def stop(_number: int, _frame: FrameType | None) -> None:
            if self.stopping:
                os._exit(1)  # Asked twice: at once. The leases run out and others take over.
            self.stopping = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    def _look(self) -> None:
        """One turn: the database may be away for a while; the children go on without it."""
        try:
            self._collect()
            self._obey()
            if time.monotonic() - self.last_beat >= self.settings.heartbeat_s:
                self._beat()
            self._claim()
        except store.UNAVAILABLE as error:
            if not self.is_away:
                log.warning("the database does not answer: %s", store.reason_of(error))
            self.is_away = True
            self.leases.clear()  # Nobody could renew one.
        else:
            if self.is_away:
                log.info("the database answers again")
            self.is_away = False

    def _collect(self) -> None:
        """Take note of children that have ended; one that ended its job itself has left nothing to do."""
        for token, job in list(self.running.items()):
            if (exit_code := job.process.exitcode) is None:
                continue
            if exit_code == -signal.SIGXCPU:
                # A limit that the job had set itself: it would pass it again.
                self._fail(token, "timed-out", "it used more CPU time than reading its file may take")
            elif exit_code == engines.NOT_RUN:
                with self.database.write.begin() as session:
                    store.release(session, token)
            elif exit_code == engines.OUT_OF_MEMORY:
                had = f"it had {job.process.peak} bytes when last looked at"
                self._fail(token, "out-of-memory", f"the kernel ended the job for want of memory; {had}")
            else:
                with self.database.write.begin() as session:
                    reason = f"its process ended with exit code {exit_code}"
                    store.record_crash(session, token, reason, self.settings.max_attempts)
            self._tidy(token, time.monotonic() - job.started)
            self._forget(token)

    def _tidy(self, token: Token, seconds: float | None = None) -> None:
        """What is left to do once an attempt has ended."""
        with self.database.read.begin() as session:
            outcome = store.outcome(session, token)
        if outcome is not None and seconds is not None:
            self.metrics.job_ended(*outcome, seconds)
        if outcome is None or outcome[1] in store.TERMINAL:
            files.remove_checkpoints(self.settings.data, token.job_id)

    def _forget(self, token: Token) -> None:
        job = self.running.pop(token)
        job.process.join()
        job.process.close()

    def _obey(self) -> None:
        """End children whose jobs were canceled, taken over by others, or have run for too long."""
        if not self.running:
            return
        with self.database.read.begin() as session:
            held = store.held_jobs(session)
        now = time.monotonic()
        for token, job in self.running.items():
            if token not in held:
                # Over or taken over: a child that has just ended its job needs a moment to exit.
                job.cancel_seen = job.cancel_seen or now
            elif held[token].status == "canceling":
                job.cancel_seen = job.cancel_seen or now
            elif now - job.started > self.settings.job_limit_s:
                self._fail(token, "timed-out", f"it ran longer than {self.settings.job_limit_s:g} s")
                job.process.kill()
            if job.cancel_seen is not None and now - job.cancel_seen > CANCEL_GRACE_S:
                job.process.kill()

    def _fail(self, token: Token, kind: str, detail: str) -> None:
        error = {"type": kind, "title": TITLES[kind], "detail": detail}
        # It may have ended in this very moment.
        with contextlib.suppress(LostJob), self.database.write.begin() as session:
            store.end(session, token, "failed", error)

    def _beat(self) -> None:
        """Renew our leases and take note of those of others; one unchanged for too long is broken.

        Every worker measures on its own monotonic clock how long it has seen a counter stand still.
        """
        now = time.monotonic()
        if now - self.last_beat > self.settings.lease_s / 2:
            self.leases.clear()  # Counters that nobody looked at have not been seen to stand still.
        self.last_beat = now
        if self.settings.alive_file is not None:
            self.settings.alive_file.touch()
        if self.running:
            with self.database.write.begin() as session:
                store.heartbeat(session, list(self.running))
        with self.database.read.begin() as session:
            held = store.held_jobs(session)
        foreign = {token: lease for token, lease in held.items() if token not in self.running}
        self.leases = {token: self._seen(token, lease.beat, now) for token, lease in foreign.items()}
        silent = {
            foreign[token].worker for token, (_, since) in self.leases.items() if now - since > self.settings.lease_s
        }
        for worker in silent - {self.name}:
            self._take_over(worker)
        for token in (token for token, lease in foreign.items() if lease.worker == self.name):
            # A claim of which we never heard: the connection broke at the commit.
            with self.database.write.begin() as session:
                store.release(session, token)

    def _seen(self, token: Token, beat: int, now: float) -> tuple[int, float]:
        known = self.leases.get(token)
        return known if known is not None and known[0] == beat else (beat, now)

    def _take_over(self, worker: str) -> None:
        began = time.monotonic()
        with self.database.write.begin() as session:
            session.connection()
            if time.monotonic() - began > self.settings.heartbeat_s:
                self.leases.clear()  # Whatever kept us from writing may have kept the other one from it.
                return
            tokens = store.take_over(session, worker, self.settings.max_attempts, blame=self.engine.shares_fate)
        for token in tokens:
            log.warning("took over %s from %s, which has gone silent", token, worker)
            self._tidy(token)

    def _claim(self) -> None:
        while (room := self.engine.room([job.process for job in self.running.values()])) != "none":
            if any(job.suspect for job in self.running.values()):
                return
            with self.database.read.begin() as session:
                if not store.anything_queued(session, cpu_only=room == "cpu"):
                    return
            with self.database.write.begin() as session:
                row = store.claim_next(session, self.name, alone=not self.running, cpu_only=room == "cpu")
            if row is None:
                return
            token = Token(row.id, row.attempt)
            log.info("starting %s %s, attempt %d", row.kind, row.id, row.attempt)
            process = self.engine.start(token, row.kind, row.spec, row.total)
            self.running[token] = Running(process, time.monotonic(), row.suspect)

    def _give_back(self) -> None:
        """Let the children keep where they are and put their jobs back in line: a deploy is no failed attempt."""
        for job in self.running.values():
            job.process.terminate()
        deadline = time.monotonic() + EXIT_GRACE_S
        for token, job in list(self.running.items()):
            job.process.join(max(0.0, deadline - time.monotonic()))
            if job.process.exitcode is None:
                job.process.kill()
            try:
                with self.database.write.begin() as session:
                    store.release(session, token)
            except store.UNAVAILABLE as error:
                log.warning("%s stays leased until that runs out: %s", token, store.reason_of(error))
            job.process.join(KILLED_S)
        self.database.engine.dispose()
