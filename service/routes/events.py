"""What happens to a job, as it happens: server-sent events that can be resumed, or pages of JSON."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel, ConfigDict, Field

from service import events, jobs, views
from service.context import Context, Here
from service.errors import Draining, NotAcceptable, TooManyStreams
from service.events import PAGE
from service.http import choose_format
from service.openapi import NOT_MODIFIED, raises
from service.representations import to_json
from service.routes import analyses, experiments
from service.store import TERMINAL, JobRow
from service.streams import HEADERS, EventStream

router = APIRouter(tags=["events"])
FORMATS = {"sse": "text/event-stream", "json": "application/json"}
LARGEST = 2**63 - 1
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": views.EventList, "content": {"text/event-stream": {}}},
    204: {"description": "The job is over and Last-Event-ID is its last event: a browser stops asking"},
    **NOT_MODIFIED,
}
PROBLEMS = raises(NotAcceptable, TooManyStreams, Draining)
LastEventId = Annotated[
    int | None,
    Header(alias="Last-Event-ID", ge=0, le=LARGEST, description="go on after this event; beats `after`"),
]


class EventsQuery(BaseModel):
    """Which events, and in what form."""

    model_config = ConfigDict(extra="forbid")

    after: int = Field(0, ge=0, le=LARGEST, description="number of the last event that is known")
    limit: int = Field(PAGE, ge=1, le=PAGE, description="events on a page of JSON; a stream has no end but the job's")
    format: Literal["sse", "json"] | None = Field(None, description="beats Accept")


@router.get("/experiments/{experiment_id}/events", responses=RESPONSES, openapi_extra=PROBLEMS)
async def of_experiment(
    here: Here,
    request: Request,
    experiment_id: str,
    query: Annotated[EventsQuery, Query()],
    last_event_id: LastEventId = None,
) -> Response:
    """Every change of status and every recorded epoch, past and to come, until the end: server-sent events, or JSON."""
    row = await run_in_threadpool(jobs.read, here, experiments.KIND, experiment_id)
    return await _answer(here, request, row, query, last_event_id)


@router.get("/analyses/{analysis_id}/events", responses=RESPONSES, openapi_extra=PROBLEMS)
async def of_analysis(
    here: Here,
    request: Request,
    analysis_id: str,
    query: Annotated[EventsQuery, Query()],
    last_event_id: LastEventId = None,
) -> Response:
    """Every change of status, past and to come, until the end: server-sent events, or JSON."""
    row = await run_in_threadpool(jobs.read, here, analyses.KIND, analysis_id)
    return await _answer(here, request, row, query, last_event_id)


async def _answer(
    here: Context, request: Request, row: JobRow, query: EventsQuery, last_event_id: int | None
) -> Response:
    form = choose_format(query.format, request.headers.get("accept"), FORMATS)
    if form == "json":
        return await run_in_threadpool(_page, here, request, row, query)
    after = min(query.after if last_event_id is None else last_event_id, row.sequence)
    if row.status in TERMINAL and after == row.sequence:
        return Response(status_code=204, headers=HEADERS)
    if request.state.is_head:
        return EventSourceResponse((), headers=HEADERS)
    return EventStream(here.streams, row.id, row.sequence, after)


def _page(here: Context, request: Request, row: JobRow, query: EventsQuery) -> Response:
    if (same := jobs.unchanged(request, row, query.model_dump_json())) is not None:
        return same
    with here.database.read.begin() as session:
        found = events.read(session, row.id, query.after, query.limit + 1)
    shown = [{"id": event.sequence, "event": event.name, "data": event.data} for event in found[: query.limit]]
    more = len(found) > query.limit
    cursor = str(shown[-1]["id"]) if more else None
    body = {"object": "list", "data": shown, "has_more": more, "next": cursor}
    link = {"link": f'<{request.url.include_query_params(after=cursor)}>; rel="next"'} if more else {}
    headers = {"etag": jobs.tag(row, query.model_dump_json()), "cache-control": "private, no-cache", "vary": "Accept"}
    return Response(to_json(body), headers={**headers, **link}, media_type="application/json")
