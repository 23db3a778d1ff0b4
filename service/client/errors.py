"""What a call can end in besides an answer.

ClientError
├── Unsendable           no request can carry it: an address, an API key, an id or a value; a ValueError, too
├── Unreachable          no answer came: nobody listens, or the connection broke
├── Unreadable           an answer came that this version of the client does not understand
└── Refused              the server answered with a problem (RFC 9457); a subclass for each status that
    │                     the methods meet
    ├── BadRequest 400, Unauthorized 401, NotFound 404, NotAcceptable 406, RequestTimeout 408, Conflict 409,
    │   PreconditionFailed 412, TooLarge 413, UnsupportedMediaType 415, Unprocessable 422, TooManyRequests 429
    └── ServerError      any 5xx
        └── Unavailable 503, StorageFull 507
"""

import email.utils
import time
from typing import Any

import httpx

LONGEST_PAUSE_S = 60.0
PASSING = {429, 502, 503, 504}
PASSING_SLUG = "idempotency-in-progress"


class ClientError(Exception):
    """Base of every error of the client."""


class Unsendable(ClientError, ValueError):
    """No request can carry what was given: the server's address, the API key, an id or a value."""


class Unreachable(ClientError):
    """No answer came, or not a whole one."""


class Unreadable(ClientError):
    """The server is of a version whose answers this client does not understand."""


class Refused(ClientError):
    """The server answered with a problem document.

    `slug` is its type (`queue-full`, …), `problem` the whole document, `retry_after_s` what the server asks to wait.
    """

    def __init__(self, status: int, problem: dict[str, Any], retry_after_s: float | None) -> None:
        self.status = status
        self.problem = problem
        self.retry_after_s = retry_after_s
        self.slug = str(problem.get("type", "")).rpartition("/")[2]
        self.title = str(problem.get("title", ""))
        self.detail = str(problem.get("detail", ""))
        self.request_id = problem.get("request_id")
        super().__init__(f"{self.title}: {self.detail}" if self.detail else self.title)

    @property
    def passes(self) -> bool:
        """Whether the same request may be taken later, and no later than after LONGEST_PAUSE_S."""
        return (self.status in PASSING or self.slug == PASSING_SLUG) and (self.retry_after_s or 0) <= LONGEST_PAUSE_S


class BadRequest(Refused):
    """400: malformed bytes, a bad Idempotency-Key, a host that is not served."""


class Unauthorized(Refused):
    """401: no API key, or none that is known."""


class NotFound(Refused):
    """404: there is no such thing, or it is another key's."""


class NotAcceptable(Refused):
    """406: not in that format."""


class RequestTimeout(Refused):
    """408: the request did not come whole in time."""


class Conflict(Refused):
    """409: the job's status forbids it, nothing is recorded yet, or the first request with the key is not done."""


class PreconditionFailed(Refused):
    """412: somebody else was faster."""


class TooLarge(Refused):
    """413: a body, an array or an archive passes its limit."""


class UnsupportedMediaType(Refused):
    """415: the body is of a type that is not taken."""


class Unprocessable(Refused):
    """422: a value, a file or a budget is refused; `problem["errors"]` names the fields."""


class TooManyRequests(Refused):
    """429: the queue is full, or the caller asks too often."""


class ServerError(Refused):
    """5xx: the server could not do it."""


class Unavailable(ServerError):
    """503: the database does not answer, or the server is stopping."""


class StorageFull(ServerError):
    """507: the server's disk is full."""


BY_STATUS: dict[int, type[Refused]] = {
    400: BadRequest,
    401: Unauthorized,
    404: NotFound,
    406: NotAcceptable,
    408: RequestTimeout,
    409: Conflict,
    412: PreconditionFailed,
    413: TooLarge,
    415: UnsupportedMediaType,
    422: Unprocessable,
    429: TooManyRequests,
    503: Unavailable,
    507: StorageFull,
}


def refusal(answer: httpx.Response) -> Refused:
    """The error that stands for an answer; one that is no problem document, a proxy's perhaps, is shown as text."""
    try:
        problem = answer.json() if "json" in answer.headers.get("content-type", "") else None
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"title": f"{answer.status_code} {answer.reason_phrase}", "detail": answer.text[:200]}
    fallback = ServerError if answer.status_code >= 500 else Refused
    kind = BY_STATUS.get(answer.status_code, fallback)
    return kind(answer.status_code, problem, _seconds(answer.headers.get("retry-after")))


def _seconds(retry_after: str | None) -> float | None:
    """What Retry-After says: seconds, or the time of day that proxies prefer."""
    if retry_after is None or retry_after.isdecimal():
        return None if retry_after is None else float(retry_after)
    moment = email.utils.parsedate_tz(retry_after)
    return None if moment is None else max(0.0, email.utils.mktime_tz(moment) - time.time())
