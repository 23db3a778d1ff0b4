"""A job's own process: set up, do what its kind asks, and end it in the database, whatever happens."""

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from threadpoolctl import ThreadpoolController

from service import store
from service.errors import JobFailed, LostJob
from service.processes import end_with_parent
from service.settings import Settings
from service.store import Database, Token
from worker import analysis, batch, experiment, factors
from worker.memory import limit_memory, wanted
from worker.recorder import Canceled, Drained, Recorder, Save

log = logging.getLogger("worker.job")
BLAS = ThreadpoolController()  # Here, in the fork server: to find the libraries takes each job 10 ms.
KINDS: dict[str, tuple[Callable[[Settings, Recorder, dict[str, Any]], None], Save]] = {
    "experiment": (experiment.run, store.add_epochs),
    "batch": (batch.run, store.record_members),
    "analysis": (analysis.run, store.record_found),
    "factors": (factors.run, store.record_found),
}


def run(settings: Settings, token: Token, kind: str, spec: dict[str, Any]) -> None:
    """Run one job to its end. The process exits afterwards; nothing is raised."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the worker decides.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(settings.threads)
    if settings.job_memory:
        limit_memory(settings.job_memory)
    database = store.connect(settings)
    try:
        with BLAS.limit(limits=settings.threads):
            _work(settings, database, token, kind, spec)
    except LostJob as error:
        log.warning("%s; this attempt stops", error)
    finally:
        database.engine.dispose()


def _work(settings: Settings, database: Database, token: Token, kind: str, spec: dict[str, Any]) -> None:
    run_kind, save = KINDS.get(kind, (_unknown, store.record_found))
    recorder = Recorder(database, token, save)

    def drain(_number: int, _frame: FrameType | None) -> None:
        recorder.draining = True

    signal.signal(signal.SIGTERM, drain)
    try:
        run_kind(settings, recorder, spec)
    except Drained:
        log.info("the job is back in line")
    except Canceled:
        recorder.end("canceled")
    except JobFailed as error:
        recorder.end("failed", error.told)
    except LostJob:
        raise
    except Exception as error:
        problem = problem_of(error)
        is_unexpected = problem["type"] == JobFailed.kind
        log.error("job %s failed: %s", recorder.token.job_id, problem["type"], exc_info=is_unexpected)
        recorder.end("failed", problem)


def _unknown(_settings: Settings, recorder: Recorder, _spec: dict[str, Any]) -> None:
    raise JobFailed(f"this worker is older than the service: it does not know the kind of job {recorder.token.job_id}")


# What torch's allocator on the CPU, the CUDA driver and CUDA's libraries say in a bare RuntimeError.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def problem_of(error: Exception) -> dict[str, str]:
    """An unexpected error for the client: its kind, never its trace."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        needed = f"an allocation of {size}" if (size := wanted(error)) else "an allocation"
        detail = f"{needed} failed; take a smaller network or matrix, or give the worker more memory"
        return {"type": "out-of-memory", "title": "Out of memory", "detail": detail}
    detail = f"an unexpected {type(error).__name__}; the worker's log has it under the job's id"
    return {"type": JobFailed.kind, "title": JobFailed.title, "detail": detail}
