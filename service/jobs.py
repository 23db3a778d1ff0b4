"""What the routes of every kind of job do alike: answer with an ETag, cancel, delete, wait, look for room."""

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import Session

from service import files, store
from service.context import Context
from service.errors import BadRequestValue, DatabaseUnavailable, PreconditionFailed, StorageFull
from service.http import etag, matches, settled
from service.idempotency import Once
from service.representations import to_json
from service.store import TERMINAL, JobRow

log = logging.getLogger(__name__)
Parts = Callable[[Session, JobRow], Sequence[object]]  # What a job's ETag depends on besides its row.
LONGEST_WAIT_S = 30
FIRST_LOOK_S, SLOWEST_LOOK_S = 0.02, 0.1


def tag(row: JobRow, *parts: object) -> str:
    """The entity tag of a job's own representation; `parts` are what it depends on besides the row."""
    return etag(row.id, row.revision, *parts)


def unchanged(request: Request, row: JobRow, *parts: object) -> Response | None:
    """304 where the client already has this representation."""
    settled(request, row)
    current = tag(row, *parts)
    if matches(request.headers.get("if-none-match"), current):
        return Response(status_code=304, headers={"etag": current, "cache-control": "private, no-cache"})
    return None


def answer(
    row: JobRow,
    body: dict[str, Any],
    *parts: object,
    status: int = 200,
    headers: dict[str, str] | None = None,
) -> Response:
    """A job as JSON, with its ETag, and Retry-After while it is not over."""
    waiting = {} if row.status in TERMINAL else {"retry-after": "1"}
    head = {"etag": tag(row, *parts), "cache-control": "private, no-cache", **waiting, **(headers or {})}
    return Response(to_json(body), status, head, "application/json")


def read(here: Context, kind: str, job_id: str) -> JobRow:
    """The job as it is now. Raises NotFound."""
    with here.database.read.begin() as session:
        return store.get_job(session, kind, here.owner, job_id)


def cancel(here: Context, once: Once, kind: str, job_id: str) -> JobRow:
    """Ask a job to stop; one that is over stays as it is. Raises NotFound."""
    if (canceled := once.earlier()) is not None:
        return read(here, kind, canceled)
    with here.database.write.begin() as session:
        store.get_job(session, kind, here.owner, job_id)
        once.record(session, job_id)
        return store.cancel_job(session, job_id)


def cancel_answer(row: JobRow, body: dict[str, Any], once: Once) -> Response:
    """202 while the job is still stopping."""
    return answer(row, body, status=202 if row.status == "canceling" else 200, headers=once.headers)


def expect(request: Request, row: JobRow, *parts: object) -> None:
    """Raise PreconditionFailed where an If-Match header names none but other versions of the job."""
    expected, current = request.headers.get("if-match"), tag(row, *parts)
    if expected is not None and not matches(expected, current, weakly=False):
        raise PreconditionFailed(f"the ETag is {current} now")


def remove(here: Context, request: Request, kind: str, job_id: str, parts: Parts = lambda *_: ()) -> Response:
    """Delete a job that does not run, all it recorded and all that was made of it; its ETag has these parts.

    Raises NotFound, InvalidState, PreconditionFailed.
    """
    with here.database.write.begin() as session:
        row = store.get_job(session, kind, here.owner, job_id)
        if "if-match" in request.headers:
            expect(request, row, *parts(session, row))
        gone = store.delete_job(session, job_id)
    for member in gone:
        files.remove_job(here.settings.data, member)
    return Response(status_code=204)


def check_disk(here: Context, coming: int = 0) -> None:
    """Raise StorageFull where `coming` bytes more would leave less than the reserve."""
    free, reserve = files.free_bytes(here.settings.data) - coming, here.settings.free_disk
    if free < reserve:
        raise StorageFull(f"{max(free, 0)} bytes of disk would be free, {reserve} are kept in reserve; delete old jobs")


def check_device(here: Context, device: str) -> None:
    """Raise BadRequestValue for a device that no worker has."""
    offered = here.settings.device_names
    has_cuda = any(name.startswith("cuda") for name in offered)
    if not (device in {"auto", *offered} or (device == "cuda" and has_cuda)):
        raise BadRequestValue("/device", device, f"this deployment offers {', '.join(offered)}")


def preference(request: Request, default_s: float) -> tuple[float, dict[str, str]]:
    """Seconds that the client wants to wait for a result (RFC 7240), and the header that says so."""
    wanted = ",".join(request.headers.getlist("prefer")).lower()
    if found := re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})\"?\s*(?:$|[,;])", wanted):
        seconds = min(int(found[1]), LONGEST_WAIT_S)
        return seconds, {"preference-applied": f"wait={seconds}"}
    if re.search(r"(?:^|[,;\s])respond-async\s*(?:$|[,;])", wanted):
        return 0, {"preference-applied": "respond-async"}
    return default_s, {}


async def wait(here: Context, request: Request, row: JobRow, seconds: float) -> JobRow:
    """The job once it is over, or as it is when the time is up or the client has gone."""
    deadline, pause = time.monotonic() + seconds, FIRST_LOOK_S
    while row.status not in TERMINAL and time.monotonic() < deadline and not await request.is_disconnected():
        await asyncio.sleep(min(pause, max(deadline - time.monotonic(), 0)))
        pause = min(1.2 * pause, SLOWEST_LOOK_S)
        try:
            row = await run_in_threadpool(read, here, row.kind, row.id)
        except store.UNAVAILABLE as error:
            log.warning("the answer does not wait for %s: %s", row.id, store.reason_of(error))
            break  # The job is stored: whoever were told of an error would post it again.
    return row


@contextlib.contextmanager
def stored_at(location: str) -> Iterator[None]:
    """Say where a job is that is stored, and cannot be read at the moment. Raises DatabaseUnavailable."""
    try:
        yield
    except store.UNAVAILABLE as error:
        raise DatabaseUnavailable(
            f"{location} is stored, and cannot be read now", headers={"location": location}
        ) from error
