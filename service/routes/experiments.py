"""Experiments: post, read, list, rename, cancel, delete."""

import base64
import binascii
import re
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from service import files, store, views
from service.context import JSON_ONLY, OWNER, Body, Context, Here
from service.errors import BadRequestValue, PreconditionFailed, StorageFull
from service.http import etag, matches
from service.representations import to_json
from service.schemas import TAG_KEY, ExperimentSpec, Name, Strict, Tags, resolve

router = APIRouter(prefix="/experiments", tags=["experiments"])
KIND = "experiment"


def _body(model: type[BaseModel]) -> dict[str, Any]:
    # The body is read by our strict parser, so FastAPI has to be told of its schema.
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class LabelChanges(Strict):
    """What may change after the post; a field that is left out stays."""

    name: Name | None = None
    tags: Tags = Field(default_factory=dict)


@router.post(
    "",
    status_code=202,
    response_model=views.Experiment,
    openapi_extra=_body(ExperimentSpec),
    dependencies=JSON_ONLY,
)
def create(here: Here, body: Body) -> Response:
    """Queue a training run; `{}` is the memo's experiment."""
    spec = resolve(body)
    _check_device(spec.device, here.settings.device_names)
    _check_disk(here)
    job = {
        "kind": KIND,
        "owner": OWNER,
        "name": spec.name,
        "tags": spec.tags,
        "spec": spec.model_dump(),
        "priority": spec.priority,
        "total": spec.training.epochs,
    }
    with here.database.write.begin() as session:
        row = store.create_job(session, job, here.settings.queue_limit)
    return _answer(row, 202, {"location": f"/experiments/{row.id}"})


def _check_device(device: str, offered: list[str]) -> None:
    has_cuda = any(name.startswith("cuda") for name in offered)
    if not (device in {"auto", *offered} or (device == "cuda" and has_cuda)):
        raise BadRequestValue("/device", device, f"this deployment offers {', '.join(offered)}")


def _check_disk(here: Context) -> None:
    free, reserve = files.free_bytes(here.settings.data), here.settings.free_disk
    if free < reserve:
        raise StorageFull(f"{free} bytes of disk are free, {reserve} are kept in reserve; delete old experiments")


class ListQuery(BaseModel):
    """Which experiments to list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=100)
    after: str | None = Field(None, max_length=200, description="the `next` of the page before")
    order: Literal["asc", "desc"] = Field("desc", description="by the time of creation")
    status: store.Status | None = None
    tag: str | None = Field(None, max_length=300, description="`key` or `key:value`")
    name_prefix: Name | None = None
    created_after: AwareDatetime | None = None
    created_before: AwareDatetime | None = None


@router.get("", response_model=views.ExperimentList, dependencies=JSON_ONLY)
def index(here: Here, request: Request, query: Annotated[ListQuery, Query()]) -> Response:
    """A page of experiments, newest first unless `order=asc`."""
    with here.database.read.begin() as session:
        rows = store.list_jobs(session, KIND, OWNER, _page(query))
    shown = rows[: query.limit]
    more = len(rows) > query.limit
    cursor = _cursor(shown[-1]) if more else None
    body = {
        "object": "list",
        "data": [views.experiment(row) for row in shown],
        "has_more": more,
        "next": cursor,
    }
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


@router.get("/{experiment_id}", response_model=views.Experiment, dependencies=JSON_ONLY)
def read(here: Here, request: Request, experiment_id: str) -> Response:
    """One experiment: its status, progress and specification."""
    with here.database.read.begin() as session:
        row = store.get_job(session, KIND, OWNER, experiment_id)
    if matches(request.headers.get("if-none-match"), _tag(row)):
        return Response(status_code=304, headers={"etag": _tag(row), "cache-control": "private, no-cache"})
    return _answer(row)


@router.patch(
    "/{experiment_id}",
    response_model=views.Experiment,
    openapi_extra=_body(LabelChanges),
    dependencies=JSON_ONLY,
)
def rename(here: Here, request: Request, experiment_id: str, body: Body) -> Response:
    """Change name and tags, nothing else; with If-Match only if nobody was faster."""
    changes = LabelChanges.model_validate(body).model_dump(exclude_unset=True)
    expected = request.headers.get("if-match")
    with here.database.write.begin() as session:
        row = store.get_job(session, KIND, OWNER, experiment_id)
        if expected is not None and not matches(expected, _tag(row), weakly=False):
            raise PreconditionFailed(f"the ETag is {_tag(row)} now")
        row = store.rename_job(session, experiment_id, changes)
    return _answer(row)


@router.post("/{experiment_id}/cancel", response_model=views.Experiment, responses={202: {}}, dependencies=JSON_ONLY)
def cancel(here: Here, experiment_id: str) -> Response:
    """Stop a queued or running experiment; what it has recorded stays. Calling it again changes nothing."""
    with here.database.write.begin() as session:
        store.get_job(session, KIND, OWNER, experiment_id)
        row = store.cancel_job(session, experiment_id)
    return _answer(row, 202 if row.status == "canceling" else 200)


@router.delete("/{experiment_id}", status_code=204)
def remove(here: Here, experiment_id: str) -> Response:
    """Delete an experiment that does not run, with all it recorded."""
    with here.database.write.begin() as session:
        store.get_job(session, KIND, OWNER, experiment_id)
        store.delete_job(session, experiment_id)
    files.remove_job(here.settings.data, experiment_id)
    return Response(status_code=204)


def _tag(row: store.JobRow) -> str:
    return etag(row.id, row.revision)


def _answer(row: store.JobRow, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    waiting = {} if row.status in store.TERMINAL else {"retry-after": "1"}
    head = {"etag": _tag(row), "cache-control": "private, no-cache", **waiting, **(headers or {})}
    return Response(to_json(views.experiment(row)), status, head, "application/json")
