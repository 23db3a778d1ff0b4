"""Pages of jobs: the parameters of every list, the cursor, and the answer."""

import base64
import binascii
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Literal

from fastapi import Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from service import store, views
from service.context import Context
from service.errors import BadRequestValue
from service.representations import to_json
from service.schemas import TAG_KEY, Name


class ListQuery(BaseModel):
    """Which jobs to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, max_length=200, description="the `next` of the page before")
    order: Literal["asc", "desc"] = Field("desc", description="by the time of creation")
    status: store.Status | None = None
    tag: str | None = Field(None, max_length=300, description="`key` or `key:value`")
    name_prefix: Name | None = None
    created_after: AwareDatetime | None = None
    created_before: AwareDatetime | None = None


def answer(
    here: Context, request: Request, kind: str, query: ListQuery, view: Callable[[store.JobRow], dict[str, Any]]
) -> Response:
    """A page of the jobs of one kind, each shown by `view`, with the cursor of the next page and a Link to it."""
    return page(request, query, rows(here, kind, query), view)


def rows(here: Context, kind: str, query: ListQuery) -> list[store.JobRow]:
    """The page's jobs, and one more where there are more."""
    with here.database.read.begin() as session:
        return store.list_jobs(session, kind, here.owner, _page(query))


def page(
    request: Request, query: ListQuery, rows: list[store.JobRow], view: Callable[[store.JobRow], dict[str, Any]]
) -> Response:
    """The answer for the rows of a page."""
    shown = rows[: query.limit]
    more = len(rows) > query.limit
    cursor = _cursor(shown[-1]) if more else None
    body = {"object": "list", "data": [view(row) for row in shown], "has_more": more, "next": cursor}
    link = {"link": f'<{request.url.include_query_params(after=cursor)}>; rel="next"'} if more else {}
    return Response(to_json(body), headers={**link, "cache-control": "no-cache"}, media_type="application/json")


def _page(query: ListQuery) -> store.Page:
    return store.Page(
        limit=query.limit,
        newest_first=query.order == "desc",
        after=_read_cursor(query.after),
        status=query.status,
        tag=_read_tag(query.tag),
        name_prefix=query.name_prefix,
        created_after=_microseconds(query.created_after),
        created_before=_microseconds(query.created_before),
    )


def _cursor(row: store.JobRow) -> str:
    return base64.urlsafe_b64encode(f"{row.created_at}:{row.id}".encode()).decode().rstrip("=")


def _read_cursor(cursor: str | None) -> tuple[int, str] | None:
    if cursor is None:
        return None
    try:
        text = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    if (found := re.fullmatch(r"(\d{1,17}):([0-9a-f-]{36})", text)) is None:
        raise BadRequestValue("after", cursor, "is no cursor; take the `next` of a page as it is")
    return int(found[1]), found[2]


def _read_tag(tag: str | None) -> tuple[str, str | None] | None:
    if tag is None:
        return None
    key, colon, value = tag.partition(":")
    if not re.fullmatch(TAG_KEY, key):
        raise BadRequestValue("tag", tag, "must be `key` or `key:value`")
    return key, value if colon else None


def _microseconds(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    return (moment - views.EPOCH) // timedelta(microseconds=1)
