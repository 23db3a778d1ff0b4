"""Logs: every logger of a process, the libraries' too, in one form on standard error.

A line is a JSON object, or readable text on a terminal. What is bound with `bind` is on every line logged in that
context: `request_id` in the API, `worker` in a worker, `job_id` and `attempt` besides in a job's process. No line holds
a body, a query, a header, a name that a client chose, or a local variable of a traceback.
"""

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from service.settings import Settings

OURS = ("service", "worker", "uvicorn")
FIELDS = ("method", "route", "status", "duration_s")  # what a call may add with `extra=`; libraries add things too
COLORS = {"warning": "\33[33m", "error": "\33[31m", "critical": "\33[31m"}
_ids: ContextVar[dict[str, Any]] = ContextVar("ids")


class _Json(logging.Formatter):
    """One JSON object to a line."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {"event": record.getMessage(), "logger": record.name, "level": record.levelname.lower()}
        fields |= {**_more(record), "timestamp": _time(record)}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=repr)


class _Readable(logging.Formatter):
    """Time, level, message and what else there is; below it a traceback."""

    def __init__(self, *, colors: bool) -> None:
        super().__init__()
        self._colors = COLORS if colors else {}

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        level = record.levelname.lower()
        more = "".join(f" {name}={value}" for name, value in _more(record).items())
        line = f"{_time(record)} [{level:8}] {record.message} [{record.name}]{more}"
        return f"{self._colors[level]}{line}\33[0m" if level in self._colors else line


def _more(record: logging.LogRecord) -> dict[str, Any]:
    return bound() | {name: value for name, value in vars(record).items() if name in FIELDS}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def configure(settings: Settings) -> None:
    """Set all logging of this process up; called once at its door. Other libraries only warn: they tell of data."""
    terminal = sys.stderr.isatty()
    readable = terminal if settings.log_format == "auto" else settings.log_format == "console"
    handler = logging.StreamHandler()
    handler.setFormatter(_Readable(colors=terminal) if readable else _Json())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in OURS:
        logging.getLogger(name).setLevel(settings.log_level.upper())


def bind(**ids: Any) -> None:
    """Put these ids on every line that this context logs from now on."""
    _ids.set(bound() | ids)


def bound() -> dict[str, Any]:
    """The ids of this context, to be bound again in another process."""
    return _ids.get({})
