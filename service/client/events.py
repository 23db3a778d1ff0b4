"""Live events of a job: what stays the same whether one waits for them or not. The stream itself is httpx-sse's.

Each event has an id of its job's own sequence. A stream that breaks, or that the server ends because it is stopping, is
opened again after the last id seen, so that nothing is lost and nothing comes twice.
"""

from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
from httpx_sse import ServerSentEvent

from service.client.errors import Refused, Unreachable, Unreadable, Unsendable, refusal
from service.client.retries import pause_s

LAST = "completed"
RETURNING = "shutdown"  # the server's, not the job's: somebody goes on where it was


@dataclass(frozen=True)
class Event:
    """Something that happened to a job: `status`, `epoch`, `error` or, as the last, `completed`."""

    id: str
    name: str
    data: dict[str, Any]


@dataclass
class Following:
    """Where in a job's events somebody is, and how often in a row the stream broke without bringing any."""

    path: str
    last_id: str | None
    retries: int
    failures: int = 0
    over: bool = False
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._remember(self.last_id)

    def _remember(self, last_id: str | None) -> None:
        self.last_id = last_id or self.last_id
        self.headers = {"last-event-id": self.last_id} if self.last_id else {}

    def take(self, sent: ServerSentEvent) -> Event | None:
        """The event that was sent; None for what only concerns the stream."""
        self._remember(sent.id)
        if not sent.data or sent.event == RETURNING:  # One without data only sets the id, or the time to wait.
            return None
        try:
            event = Event(sent.id, sent.event, orjson.loads(sent.data))
        except orjson.JSONDecodeError as error:
            raise Unreadable(f"{self.path}: the data of event {sent.id} is not JSON: {error}") from error
        self.failures = 0
        self.over = sent.event == LAST
        return event

    def check(self, answer: httpx.Response) -> None:
        """Raise Refused or Unreachable where the answer, read if it is an error, is no stream."""
        if answer.status_code == httpx.codes.NO_CONTENT:
            self.over = True  # How a server says that nothing more will come.
        elif not answer.is_success:
            raise refusal(answer)
        elif not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise Unreachable(f"{self.path} answered with {answer.headers.get('content-type')}, not with events")

    def broken(self, error: Exception | None) -> float:
        """Seconds to wait before the stream is opened again. Raises Unsendable, Unreachable, Refused when in vain."""
        self.failures += 1
        if isinstance(error, UnicodeError):
            raise Unsendable(f"{self.path}: {error}") from error
        if isinstance(error, Refused) and (self.failures > self.retries or not error.passes):
            raise error
        if self.failures > self.retries:
            reason = error or f"it ended {self.failures} times without an event"
            raise Unreachable(f"{self.path}: {reason}") from error
        return pause_s(self.failures, error)
