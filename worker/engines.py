"""Where a job's process runs. `local`: a child of this machine."""

import multiprocessing
from multiprocessing.process import BaseProcess
from typing import Any

from service import logs
from service.settings import Settings
from service.store import Token

PRELOAD = ["worker.preload"]


def start(settings: Settings, token: Token, kind: str, spec: dict[str, Any]) -> BaseProcess:
    """Start the job in a child process.

    Children come from a fork server that has imported torch and started no thread: milliseconds instead of seconds.
    CUDA does not survive a fork, not even one from a server that never used it in earnest, so it gets fresh processes.
    """
    uses_cuda = "cuda" in settings.devices and spec["device"] != "cpu"
    context: Any = multiprocessing.get_context("spawn" if uses_cuda else "forkserver")
    process: BaseProcess = context.Process(
        target=_run, args=(settings, token, kind, spec, logs.bound()), name=f"{kind}-{token.job_id}"
    )
    process.start()
    return process


def warm_up() -> None:
    """Start the fork server and let it import what jobs need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_nothing)
    process.start()
    process.join()


def _nothing() -> None:
    """A first job that shows the fork server to be ready."""


def _run(settings: Settings, token: Token, kind: str, spec: dict[str, Any], ids: dict[str, Any]) -> None:
    logs.configure(settings)
    logs.bind(**ids, job_id=token.job_id, attempt=token.attempt)
    from worker.job import run  # noqa: PLC0415  (torch is for the children: the worker itself never loads it)

    run(settings, token, kind, spec)
