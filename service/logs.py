"""Logs: every logger of a process, the libraries' too, in one form on standard error.

A line is a JSON object, or readable text on a terminal. What is bound with `bind` is on every line logged in that
context: `request_id` in the API, `worker` in a worker, `job_id` and `attempt` besides in a job's process. No line holds
a body, a query, a header, a name that a client chose, or a local variable of a traceback.
"""

import logging
import sys
from typing import Any

from structlog.contextvars import bind_contextvars, get_contextvars, merge_contextvars
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import JSONRenderer, TimeStamper, format_exc_info
from structlog.stdlib import ExtraAdder, ProcessorFormatter, add_log_level, add_logger_name
from structlog.typing import Processor

from service.settings import Settings

OURS = ("service", "worker", "uvicorn")
FIELDS = ("method", "route", "status", "duration_s")  # what a call may add with `extra=`; libraries add things too


def configure(settings: Settings) -> None:
    """Set all logging of this process up; called once at its door. Other libraries only warn: they tell of data."""
    terminal = sys.stderr.isatty()
    readable = terminal if settings.log_format == "auto" else settings.log_format == "console"
    render: list[Processor] = [format_exc_info, JSONRenderer(ensure_ascii=False)]
    if readable:
        # Not its default, which shows the values of local variables.
        render = [ConsoleRenderer(colors=terminal, exception_formatter=plain_traceback)]
    known: list[Processor] = [
        merge_contextvars,
        add_logger_name,
        add_log_level,
        ExtraAdder(FIELDS),
        TimeStamper(fmt="iso", utc=True),
    ]
    handler = logging.StreamHandler()
    handler.setFormatter(
        ProcessorFormatter(foreign_pre_chain=known, processors=[ProcessorFormatter.remove_processors_meta, *render])
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())


def bind(**ids: Any) -> None:
    """Put these ids on every line that this context logs from now on."""
    bind_contextvars(**ids)


def bound() -> dict[str, Any]:
    """The ids of this context, to be bound again in another process."""
    return get_contextvars()
