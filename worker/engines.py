"""Where jobs run: `local`, in child processes on this machine; `ray`, the same children on the nodes of a Ray cluster.

The loop knows neither: it asks an engine for room, has it start a job, and treats what it gets as a child process.
"""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol

from service import logs
from service.processes import die_with_parent
from service.settings import Settings
from service.store import Token
from worker.memory import OomKills, count_oom_kills, peak_memory

PRELOAD = ["worker.preload"]
# Exit codes beside those of processes: of a job that never began (put it back in line, it is nobody's crash), and of
# one that the kernel ended for want of memory.
NOT_RUN, OUT_OF_MEMORY = os.EX_TEMPFAIL, os.EX_OSERR
SHARE = "share"  # In the specification of a task that is one of several of its job: its index, and how many they are.
Room = Literal["none", "cpu", "any"]


class Job(Protocol):
    """A job that runs somewhere, as `multiprocessing` shows a child of this process."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs; below zero the signal that ended it."""

    @property
    def peak(self) -> int:
        """The most bytes of memory that it was seen to have; 0 where nobody looked."""

    @property
    def sentinel(self) -> Any:
        """What `multiprocessing.connection.wait` finds ready once the job is over."""

    def terminate(self) -> None:
        """Ask it to end, as SIGTERM does."""

    def kill(self) -> None:
        """End it, as SIGKILL does."""

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""

    def close(self) -> None:
        """Free what stands for it here, once it is over."""


class Engine(Protocol):
    """A place where jobs run; where they `share_fate` with the worker, one of them may be what has killed it."""

    shares_fate: bool

    def open(self) -> None:
        """Get ready. Raises EngineUnusable, ClusterLost."""

    def room(self, running: Sequence[Any]) -> Room:
        """Whether one job more could start at once: none, one that asks for the CPU, or any. Raises ClusterLost."""

    def start(self, token: Token, kind: str, spec: dict[str, Any], total: int) -> Job:
        """Start a job for which there was room; `total` is what its progress counts up to."""

    def close(self) -> None:
        """Leave; what still runs is ended."""


def engine_of(settings: Settings) -> Engine:
    """The engine that the settings name. Raises EngineUnusable."""
    if settings.engine == "local":
        return LocalEngine(settings)
    from worker.ray_engine import RayEngine  # noqa: PLC0415  (Ray is an extra)

    return RayEngine(settings)


def uses_cuda(settings: Settings, spec: dict[str, Any]) -> bool:
    """Whether a job takes a GPU: one that does not ask for the CPU gets one where GPUs are offered."""
    return "cuda" in settings.devices and spec["device"] != "cpu"


class LocalJob:
    """A child process of this one, that tells whether the kernel ended it for want of memory."""

    def __init__(self, process: BaseProcess, oom_kills: OomKills) -> None:
        self.sentinel, self.terminate, self.kill = process.sentinel, process.terminate, process.kill
        self.join, self.close = process.join, process.close
        self.peak = 0
        self._process, self._oom_kills = process, oom_kills
        self._before = count_oom_kills()
        self._exitcode: int | None = None

    @property
    def exitcode(self) -> int | None:
        """None while it runs; below zero the signal that ended it."""
        if self._exitcode is not None:
            return self._exitcode
        if (code := self._process.exitcode) is None:
            self.peak = peak_memory(self._process.pid or 0) or self.peak
        elif code == -signal.SIGKILL and self._oom_kills.is_one(self._before):
            self._exitcode = OUT_OF_MEMORY
        else:
            self._exitcode = code
        return self._exitcode


class LocalEngine:
    """Child processes of this one.

    They come from a fork server that has imported torch and started no thread: milliseconds instead of seconds.
    CUDA does not survive a fork, not even one from a server that never used it in earnest, so it gets fresh processes.
    """

    shares_fate = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._oom_kills = OomKills()
        self._fork_server: Any = multiprocessing.get_context("forkserver")
        self._fork_server.set_forkserver_preload(PRELOAD)

    def open(self) -> None:
        """Start the fork server and let it import what jobs need."""
        process = self._fork_server.Process(target=_nothing)
        process.start()
        process.join()

    def room(self, running: Sequence[Any]) -> Room:
        """As many jobs at a time as the settings say."""
        return "any" if len(running) < self._settings.jobs else "none"

    def start(self, token: Token, kind: str, spec: dict[str, Any], _total: int = 0) -> LocalJob:
        """Start the job in a child process."""
        fresh = uses_cuda(self._settings, spec)
        context = multiprocessing.get_context("spawn") if fresh else self._fork_server
        process: BaseProcess = context.Process(
            target=_run, args=(self._settings, token, kind, spec, logs.bound()), name=f"{kind}-{token.job_id}"
        )
        process.start()
        return LocalJob(process, self._oom_kills)

    def close(self) -> None:
        """The fork server ends with this process."""


def _nothing() -> None:
    """A first job that shows the fork server to be ready."""


def _run(settings: Settings, token: Token, kind: str, spec: dict[str, Any], ids: dict[str, Any]) -> None:
    die_with_parent()
    logs.configure(settings)
    logs.bind(**ids, job_id=token.job_id, attempt=token.attempt)
    from worker.job import run  # noqa: PLC0415  (torch is for the children: the worker itself never loads it)

    run(settings, token, kind, spec)
