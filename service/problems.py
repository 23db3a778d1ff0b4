"""Error → RFC 9457 problem document: the one table of statuses and slugs, and the handlers that use it."""

import errno
import logging
import math
from typing import Any, NamedTuple

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from service import errors, store

log = logging.getLogger(__name__)


class Problem(NamedTuple):
    """One type of problem: its URI is `/problems/<slug>`."""

    slug: str
    status: int
    title: str
    advice: str


class ValidationFailed(errors.RankscopeError):
    """Stands for pydantic's refusals in the table; `errors` has an entry for each."""


UPLOADS: tuple[tuple[type[errors.UploadError], int, str], ...] = (
    (errors.MalformedArray, 400, "Save it again; `detail` names what is wrong."),
    (errors.MalformedArchive, 400, "Save it again; `detail` names what is wrong."),
    (errors.ArrayTooLarge, 413, "`GET /limits` tells how large a matrix may be."),
    (errors.ArchiveTooLarge, 413, "`GET /limits` tells how much an archive may hold."),
    (errors.PickleForbidden, 422, "Save numbers, not Python objects."),
    (errors.UnsafeCheckpoint, 422, "Save a plain state dict, or safetensors."),
    (errors.UnsupportedDtype, 422, "Save real numbers; bfloat16 and float8 as safetensors."),
    (errors.UnsupportedShape, 422, "Send a non-empty array of 2 to 64 dimensions."),
    (errors.NonFiniteValues, 422, "Look where the first one comes from."),
    (errors.NotInBase, 422, "Compare files of the same model: tensors are matched by name and shape."),
    (errors.NoMatrices, 422, "`skipped`, or the tensors of the analysis, tell why."),
)
PROBLEMS: dict[type[errors.RankscopeError], Problem] = {
    **{kind: Problem(kind.kind, status, kind.title, advice) for kind, status, advice in UPLOADS},
    errors.MalformedRequest: Problem(
        "malformed-request", 400, "The bytes are not HTTP", "Send HTTP/1.1, without control characters in its head."
    ),
    errors.MalformedJson: Problem(
        "malformed-json",
        400,
        "The body is not strict JSON",
        "Send UTF-8 JSON without duplicate keys, NaN or Infinity.",
    ),
    errors.MalformedMultipart: Problem(
        "malformed-multipart", 400, "The multipart body is malformed", "Send one file part, or the bytes as the body."
    ),
    errors.IdempotencyKeyInvalid: Problem(
        "idempotency-key-invalid",
        400,
        "The Idempotency-Key is not valid",
        "Send 1 to 255 visible ASCII characters, a UUID for example.",
    ),
    errors.HostNotAllowed: Problem(
        "host-not-allowed", 400, "This server does not answer to that host", "Add the name to RANKSCOPE_HOSTS."
    ),
    errors.Unauthorized: Problem(
        "unauthorized", 401, "An API key is needed", "Send Authorization: Bearer <key>; the operator makes keys."
    ),
    errors.NotFound: Problem("not-found", 404, "There is no such thing", "Check the path and the id."),
    errors.MethodNotAllowed: Problem(
        "method-not-allowed", 405, "The path does not take this method", "The Allow header lists those that it takes."
    ),
    errors.NotAcceptable: Problem(
        "not-acceptable", 406, "None of the representations asked for exists", "Pick one out of `available`."
    ),
    errors.RequestTimeout: Problem(
        "request-timeout", 408, "The request did not come whole in time", "Send it again, without long pauses."
    ),
    errors.InvalidState: Problem(
        "invalid-state", 409, "The job's status forbids this", "Read the job; cancel or wait, then try again."
    ),
    errors.SpectrumNotReady: Problem(
        "spectrum-not-ready", 409, "Nothing is recorded yet", "Wait for epoch 0: follow `progress` of the job."
    ),
    errors.IdempotencyInProgress: Problem(
        "idempotency-in-progress",
        409,
        "A request with this key is not done yet",
        "Wait as Retry-After says, then send it again.",
    ),
    errors.PreconditionFailed: Problem(
        "precondition-failed", 412, "The resource has changed", "Read it again and send its new ETag in If-Match."
    ),
    errors.BodyTooLarge: Problem(
        "body-too-large", 413, "The body is too large", "`GET /limits` tells how large it may be."
    ),
    errors.UnsupportedMediaType: Problem(
        "unsupported-media-type",
        415,
        "The body's media type is not taken here",
        "Send application/json, or a file of a format that is read.",
    ),
    errors.UnsupportedContentEncoding: Problem(
        "unsupported-content-encoding", 415, "Compressed bodies are not taken", "Send the body as it is."
    ),
    errors.TorchDisabled: Problem(
        "torch-disabled",
        415,
        "PyTorch checkpoints are not taken here",
        "Save as safetensors, or set RANKSCOPE_TORCH_FILES=true.",
    ),
    errors.RangeNotSatisfiable: Problem(
        "range-not-satisfiable", 416, "The range holds no bytes", "The Content-Range header tells the size."
    ),
    ValidationFailed: Problem(
        "validation-error", 422, "The request was refused", "`errors` names each field, its value and its limit."
    ),
    errors.BadRequestValue: Problem(
        "validation-error", 422, "The request was refused", "`errors` names each field, its value and its limit."
    ),
    errors.BudgetExceeded: Problem(
        "budget-exceeded", 422, "All together this asks too much", "`figure` and `limit` tell by how much."
    ),
    errors.IdempotencyKeyReused: Problem(
        "idempotency-key-reused",
        422,
        "The Idempotency-Key belongs to another request",
        "Send a new key with a new request, and an old one only with the same body.",
    ),
    errors.QueueFull: Problem("queue-full", 429, "The queue is full", "Wait as Retry-After says."),
    errors.RateLimited: Problem("rate-limited", 429, "Too many requests", "Wait as Retry-After says."),
    errors.TooManyStreams: Problem(
        "too-many-streams",
        429,
        "Too many event streams are open",
        "Close one, wait as Retry-After says, or read pages of JSON.",
    ),
    errors.RankscopeError: Problem(
        "internal-error", 500, "Something unexpected happened", "Report it with the request id; it is in our log."
    ),
    errors.DatabaseUnavailable: Problem(
        "database-unavailable", 503, "The database does not answer", "Wait as Retry-After says."
    ),
    errors.Draining: Problem("draining", 503, "The server is stopping", "Try again when it is back."),
    errors.StorageFull: Problem("storage-full", 507, "The disk is full", "Delete old experiments, or add space."),
}
BY_SLUG = {problem.slug: problem for problem in PROBLEMS.values()}
POSTGRES_DISK_FULL = "53100"
LONGEST_TEXT = 1000  # Characters: what was sent is not sent back at length.
RETRY_AFTER_S = {
    "idempotency-in-progress": 1,
    "queue-full": 10,
    "too-many-streams": 1,
    "database-unavailable": 5,
    "draining": 5,
}
HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


def install(app: FastAPI) -> None:
    """Give every error of the application the one body."""
    app.add_exception_handler(errors.RankscopeError, _handle)
    app.add_exception_handler(RequestValidationError, _handle)
    app.add_exception_handler(ValidationError, _handle)
    app.add_exception_handler(DBAPIError, _handle)
    app.add_exception_handler(PoolTimeout, _handle)
    app.add_exception_handler(HTTPException, _handle)
    app.add_exception_handler(Exception, _handle)


def _handle(request: Request, error: Exception) -> Response:
    translated = translate(error)
    headers = {"allow": _allowed(request)} if isinstance(translated, errors.MethodNotAllowed) else {}
    if type(translated) is errors.RankscopeError:
        headers["connection"] = "close"  # The server will do so, and the next request on it would be lost.
        log.error("the request failed", exc_info=error)
    elif isinstance(error, DBAPIError | PoolTimeout | OSError):
        log.warning("%s: %s", translated.detail, store.reason_of(error))
    return problem_response(request, translated, headers=headers)


def _allowed(request: Request) -> str:
    """The methods of all routes on a path; the router itself names those of the first one only."""
    path = request.scope["path"]
    methods = {name for pattern, names in request.app.state.methods if pattern.match(path) for name in names}
    return ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))


def translate(error: Exception) -> errors.RankscopeError:
    """Any exception as one of ours; what is not known stays nameless to the client."""
    match error:
        case errors.RankscopeError():
            return error
        case RequestValidationError() | ValidationError():
            return _validation_failed(list(error.errors()))
        case HTTPException():
            return _http_error(error)
        case OSError(errno=errno.ENOSPC):
            return errors.StorageFull("the disk is full")
        case _ if isinstance(error, store.UNAVAILABLE):
            return _database_error(error)
    return errors.RankscopeError("the request met an unexpected error")


def _database_error(error: Exception) -> errors.RankscopeError:
    origin = getattr(error, "orig", None)
    if "is full" in str(origin) or getattr(origin, "sqlstate", None) == POSTGRES_DISK_FULL:
        return errors.StorageFull("the disk of the database is full")
    return errors.DatabaseUnavailable("the database is locked or cannot be reached")


def _http_error(error: HTTPException) -> errors.RankscopeError:
    match error.status_code:
        case 404:
            return errors.NotFound("no such path")
        case 405:
            return errors.MethodNotAllowed("the path does not take this method")
    return errors.RankscopeError(str(error.detail))


def _validation_failed(found: list[Any]) -> errors.RankscopeError:
    entries = [_entry(item) for item in found[:20]]
    first = entries[0]
    place = first.get("pointer", first.get("parameter"))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return ValidationFailed(f"{place}: {first['detail']}{more}", errors=entries)


def _entry(item: dict[str, Any]) -> dict[str, Any]:
    """One refusal: where (a JSON pointer into the body, or a parameter), what value, and why."""
    places = [str(part) for part in item["loc"]]
    if places and places[0] in {"query", "path", "header"}:
        entry: dict[str, Any] = {"parameter": ".".join(places[1:])}
    else:
        pointer = [place.replace("~", "~0").replace("/", "~1") for place in places if place != "body"]
        entry = {"pointer": "".join(f"/{place}" for place in pointer)[:200]}
    entry |= {"detail": item["msg"], "type": item["type"]}
    if item["type"] != "missing" and isinstance(item["input"], str | int | float | bool | None):
        entry["value"] = showable(item["input"])
    return entry


def showable(value: object) -> object:
    """A value as JSON can carry it in an error: short, and never NaN or an endless integer."""
    match value:
        case bool() | None:
            return value
        case int() if abs(value) < 2**53:
            return value
        case float() if math.isfinite(value):
            return value
        case int():
            return f"{value:.3e}" if abs(value) < 10**300 else "an integer of more than 300 digits"
    text = _unicode(str(value))
    return text if len(text) <= 100 else text[:100] + "…"


def problem_response(
    request: Request,
    error: errors.RankscopeError,
    *,
    status: int | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """The problem document of an error, with the headers that every answer has."""
    problem = next(PROBLEMS[kind] for kind in type(error).__mro__ if kind in PROBLEMS)
    body = {
        "type": f"/problems/{problem.slug}",
        "title": problem.title,
        "status": status or problem.status,
        "detail": _tidy(error.detail),
        "request_id": request_id(request),
        **{key: _tidy(value) for key, value in error.extra.items() if key != "headers"},
    }
    retry = {"retry-after": str(RETRY_AFTER_S[problem.slug])} if problem.slug in RETRY_AFTER_S else {}
    head = {**HEADERS, "cache-control": "no-store", "x-request-id": request_id(request), **retry}
    return Response(
        orjson.dumps(body),
        status or problem.status,
        {**head, **error.extra.get("headers", {}), **(headers or {})},
        "application/problem+json",
    )


def _tidy(value: Any) -> Any:
    if isinstance(value, list):
        return [_tidy(item) for item in value[:20]]
    if isinstance(value, dict):
        return {key: _tidy(item) for key, item in value.items()}
    if isinstance(value, str):
        text = _unicode(value)
        return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
    return showable(value)


def _unicode(text: str) -> str:
    """The text with a question mark for every lone surrogate, which JSON can escape and UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode()


def request_id(request: Request) -> str:
    """The id that the edge gave the request."""
    return str(getattr(request.state, "request_id", "-"))
