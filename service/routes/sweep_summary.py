"""The summary of a sweep: a row for each member as JSON or CSV, and its pictures."""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from service import files, representations, store, summary
from service.context import Context, Here
from service.errors import BadRequestValue, BudgetExceeded, Draining, NotAcceptable, SpectrumNotReady, StorageFull
from service.http import choose_format, unchanged, validators
from service.openapi import NOT_MODIFIED, raises
from service.pictures import Size, SweepChart
from service.representations import MEDIA_TYPES
from service.store import JobRow

router = APIRouter(prefix="/sweeps", tags=["sweeps"])
FORMATS = {name: MEDIA_TYPES[name] for name in ("json", "csv", "png", "gif")}
Kind = Literal["line", "heatmap", "overlay", "animation"]
PICTURE_VALUES = 2 * 10**7


class SummaryQuery(BaseModel):
    """Which layer, and what is drawn of it."""

    model_config = ConfigDict(extra="forbid")

    format: str | None = Field(None, description="beats the Accept header")
    layer: str = Field("W2", pattern=r"^W([1-9]|1[0-6])$")
    kind: Kind | None = Field(None, description="of a picture: animation for gif, line (or another) for png")
    x: str | None = Field(None, max_length=40, description="a varied field, the first if left out; or tau")
    y: str | None = Field(None, max_length=40, description="of a heat map: another varied field, the next if left out")
    metric: str = Field("entropy_rank", max_length=40, description="a number of the rows")
    scale: Literal["log", "linear"] = "linear"
    width: int = Field(640, ge=160, le=2000, description="pixels")
    height: int = Field(400, ge=120, le=2000, description="pixels")
    dpi: int = Field(100, ge=50, le=200)
    frames: int = Field(200, ge=1, le=200, description="at most so many frames, evenly thinned")
    fps: int = Field(10, ge=1, le=25)


@router.get(
    "/{sweep_id}/summary",
    responses={200: {"content": {kind: {} for kind in FORMATS.values()}}, **NOT_MODIFIED},
    openapi_extra=raises(NotAcceptable, SpectrumNotReady, BudgetExceeded, Draining, StorageFull),
)
async def summarize(here: Here, request: Request, sweep_id: str, query: Annotated[SummaryQuery, Query()]) -> Response:
    """A row for each member: varied fields, τ, losses, R² and final ranks; or a picture of them.

    `rank_within_r2` is the least rank that loses at most 0.01 of the validation R².
    """
    form = choose_format(query.format, request.headers.get("accept"), FORMATS)
    prepared = await run_in_threadpool(_prepare, here, request, sweep_id, query, form)
    if isinstance(prepared, Response):
        return prepared
    headers, task = prepared
    return Response(await here.drawing.draw(*task), headers=headers, media_type=FORMATS[form])


def _prepare(
    here: Context, request: Request, sweep_id: str, query: SummaryQuery, form: str
) -> Response | tuple[dict[str, str], tuple[Any, ...]]:
    """The answer; or for a picture its headers and what to draw."""
    with here.database.read.begin() as session:
        row = store.get_job(session, "sweep", here.owner, sweep_id)
        state = store.count_members(session, [row.id]).get(row.id)
        headers = validators(request, row, row.revision, state, form, query.model_dump_json())
        # Members of a sweep that is over can still be deleted.
        headers["cache-control"] = "private, no-cache"
        if unchanged(request, headers):
            return Response(status_code=304, headers=headers)
        task = _task(session, row, query, form)
    if isinstance(task, bytes):
        return Response(task, headers=headers, media_type=FORMATS[form])
    path = files.picture_path(here.settings.data, row.id, headers["etag"].strip('"'), form)
    if (cached := files.read_cached(path)) is not None:
        return Response(cached, headers=headers, media_type=FORMATS[form])
    return headers, (path, *task)


def _task(session: Session, sweep: JobRow, query: SummaryQuery, form: str) -> bytes | tuple[Any, ...]:
    """The bytes of a text, or what `Drawing.draw` is to draw."""
    fields = list(sweep.spec["grid"])
    outcomes = store.outcomes(session, sweep.id, query.layer)
    members = store.members(session, sweep.id)
    rows = [summary.row_of(member, fields, query.layer, outcomes.get(member.id)) for member in members]
    if form == "csv":
        return representations.table_csv(rows)
    if form == "json":
        head = {"sweep_id": sweep.id, "status": sweep.status, "layer": query.layer, "varied": fields}
        return representations.to_json({**head, "members": rows})
    if not any(row["entropy_rank"] is not None for row in rows):
        raise SpectrumNotReady(f"the sweep is {sweep.status}, and no member has recorded {query.layer}")
    if _kind(query.kind, form) in {"line", "heatmap"}:
        return (*_chart(sweep.name or "sweep", fields, query, rows), _size(query))
    return _spectra(session, sweep, query, form, rows, outcomes)


def _chart(title: str, fields: list[str], query: SummaryQuery, rows: list[summary.Row]) -> tuple[Any, ...]:
    """A metric over one field or two."""
    if query.metric not in summary.METRICS:
        raise BadRequestValue("metric", query.metric, f"must be one of {', '.join(summary.METRICS)}")
    if query.kind != "heatmap":
        x = _field("x", query.x, fields, "tau")
        return ("sweep_lines_png", summary.lines(title, rows, fields, x, query.metric))
    x = _field("x", query.x, fields)
    rest = [field for field in fields if field != x]
    if not rest:
        raise BadRequestValue("kind", query.kind, f"needs two varied fields, and only {x} varies; take line or overlay")
    y = _field("y", query.y, rest)
    return ("sweep_heat_png", summary.heat(title, rows, x, y, query.metric))


def _spectra(
    session: Session,
    sweep: JobRow,
    query: SummaryQuery,
    form: str,
    rows: list[summary.Row],
    outcomes: dict[str, store.Outcome],
) -> tuple[Any, ...]:
    """All members' spectra: at their ends, or over the epochs."""
    chart = SweepChart(sweep.name or "sweep", query.layer, _field("x", query.x, list(sweep.spec["grid"])), query.scale)
    finals = {member: one.last for member, one in outcomes.items() if one.last is not None}
    epochs = [max(outcomes[member].losses["epoch"] for member in finals)]
    if form == "png":
        histories = {member: {epochs[0]: last} for member, last in finals.items()}
        return ("sweep_overlay_png", summary.spectra(chart, rows, histories, epochs), _size(query))
    every = store.all_epochs(session, sweep.id)
    places = np.linspace(0, len(every) - 1, min(len(every), query.frames)).round().astype(int)
    epochs = [every[place] for place in places]
    values = len(epochs) * len(finals) * max(map(len, finals.values()))
    if values > PICTURE_VALUES:
        raise BudgetExceeded("values in the picture", values, PICTURE_VALUES, "take fewer frames")
    found = store.histories(session, sweep.id, query.layer, epochs)
    return ("sweep_gif", summary.spectra(chart, rows, found, epochs), _size(query), query.fps)


def _size(query: SummaryQuery) -> Size:
    return Size(query.width, query.height, query.dpi)


def _kind(kind: Kind | None, form: str) -> Kind:
    if kind is not None and (kind == "animation") != (form == "gif"):
        raise BadRequestValue("kind", kind, f"is no picture of format={form}: animation is a gif, the others are png")
    return kind or ("animation" if form == "gif" else "line")


def _field(name: str, given: str | None, fields: list[str], *extra: str) -> str:
    """The field that an axis or the colours stand for: the first that is no seed, unless another is given."""
    known = (*fields, *extra)
    if given is not None and given not in known:
        raise BadRequestValue(name, given, f"must be one of {', '.join(known)}")
    return given or next((field for field in fields if field not in summary.SEEDS), fields[0])
