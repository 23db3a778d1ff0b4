"""Where jobs run: `local`, in child processes on this machine; `ray`, the same children on the nodes of a Ray cluster.

The loop knows neither: it asks an engine for room, has it start a job, and treats what it gets as a child process.
"""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Any, Literal, Protocol

from service import logs
from service.processes import die_with_parent
from service.settings import Settings
from service.store import Token

PRELOAD = ["worker.preload"]
NOT_RUN = os.EX_TEMPFAIL  # Exit code of a job that never began: put it back in line, it is nobody's crash.
Room = Literal["none", "cpu", "any"]


class Job(Protocol):
    """A job that runs somewhere, as `multiprocessing` shows a child of this process."""

    @property
    def exitcode(self) -> int | None:
        """None while it runs; below zero the signal that ended it."""

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
    """A place where jobs run."""

    def open(self) -> None:
        """Get ready. Raises EngineUnusable, ClusterLost."""

    def room(self, running: Sequence[Any]) -> Room:
        """Whether one job more could start at once: none, one that asks for the CPU, or any. Raises ClusterLost."""

    def start(self, token: Token, kind: str, spec: dict[str, Any]) -> Job:
        """Start a job for which there was room."""

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


class LocalEngine:
    """Child processes of this one.

    They come from a fork server that has imported torch and started no thread: milliseconds instead of seconds.
    CUDA does not survive a fork, not even one from a server that never used it in earnest, so it gets fresh processes.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
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

    def start(self, token: Token, kind: str, spec: dict[str, Any]) -> BaseProcess:
        """Start the job in a child process."""
        fresh = uses_cuda(self._settings, spec)
        context = multiprocessing.get_context("spawn") if fresh else self._fork_server
        process: BaseProcess = context.Process(
            target=_run, args=(self._settings, token, kind, spec, logs.bound()), name=f"{kind}-{token.job_id}"
        )
        process.start()
        return process

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
