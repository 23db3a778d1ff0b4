"""The summary of a sweep: a row for each member as JSON or CSV, and its pictures."""

from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from pydantic import ConfigDict, Field

from service import representations, store, summary
from service.context import Context, Here
from service.errors import BadRequestValue, BudgetExceeded, Draining, NotAcceptable, SpectrumNotReady, StorageFull
from service.http import choose_format, unchanged, validators
from service.lowrank.ranks import Array
from service.openapi import NOT_MODIFIED, raises
from service.pictures import SweepChart
from service.representations import MEDIA_TYPES
from service.routes.drawn import PICTURES, AnimationQuery, Prepared, Task, View, answer
from service.store import JobRow

router = APIRouter(prefix="/sweeps", tags=["sweeps"])
FORMATS = {name: MEDIA_TYPES[name] for name in ("json", "csv", "png", "gif")}
Kind = Literal["line", "heatmap", "overlay", "animation"]
PICTURE_VALUES = 2 * 10**7
Found = tuple[list[JobRow], dict[str, store.Outcome]]


class SummaryQuery(AnimationQuery):
    """Which layer, and what is drawn of it."""

    model_config = ConfigDict(extra="forbid")

    format: str | None = Field(None, description="beats the Accept header")
    layer: str = Field("W2", pattern=r"^W([1-9]|1[0-6])$")
    kind: Kind | None = Field(None, description="of a picture: animation for gif, line (or another) for png")
    x: str | None = Field(None, max_length=40, description="a varied field, the first if left out; or tau")
    y: str | None = Field(None, max_length=40, description="of a heat map: another varied field, the next if left out")
    metric: str = Field("entropy_rank", max_length=40, description="a number of the rows")
    scale: Literal["log", "linear"] = "linear"


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
    return await answer(here, form, lambda: _prepare(here, request, sweep_id, query, form))


def _prepare(here: Context, request: Request, sweep_id: str, query: SummaryQuery, form: str) -> Prepared:
    with here.database.read.begin() as session:
        row = store.get_job(session, "sweep", here.owner, sweep_id)
        state = store.count_members(session, [row.id]).get(row.id)
        headers = validators(request, row, row.revision, state, form, query.model_dump_json())
        # Members of a sweep that is over can still be deleted.
        headers["cache-control"] = "private, no-cache"
        if unchanged(request, headers):
            return Response(status_code=304, headers=headers)
        _check(query, list(row.spec["grid"]), form)
        view = View(here, row, form, headers)
        if (kept := view.kept()) is not None:
            return kept
        members, outcomes = store.members(session, row.id), store.outcomes(session, row.id, query.layer)
    return view.made(_build(here, row, query, form, (members, outcomes)))


def _check(query: SummaryQuery, fields: list[str], form: str) -> None:
    """Raise BadRequestValue for what no picture of the sweep could be drawn with, whatever is asked for."""
    if query.metric not in summary.METRICS:
        raise BadRequestValue("metric", query.metric, f"must be one of {', '.join(summary.METRICS)}")
    if query.kind is not None and form not in PICTURES:
        raise BadRequestValue("kind", query.kind, f"is of a picture, not of {form}: ask for format=png or gif")
    for name, given in (("x", query.x), ("y", query.y)):
        _field(name, given, fields, "tau")


def _build(here: Context, sweep: JobRow, query: SummaryQuery, form: str, found: Found) -> bytes | Task:
    fields, (members, outcomes) = list(sweep.spec["grid"]), found
    rows = [summary.row_of(member, fields, query.layer, outcomes.get(member.id)) for member in members]
    if form == "csv":
        return representations.table_csv(rows)
    if form == "json":
        head = {"sweep_id": sweep.id, "status": sweep.status, "layer": query.layer, "varied": fields}
        return representations.to_json({**head, "members": rows})
    if not any(row["entropy_rank"] is not None for row in rows):
        raise SpectrumNotReady(f"the sweep is {sweep.status}, and no member has recorded {query.layer}")
    if _kind(query.kind, form) in {"line", "heatmap"}:
        return (*_chart(sweep.name or "sweep", fields, query, rows), query.size)
    finals = {member: one.last for member, one in outcomes.items() if one.last is not None}
    if form == "gif":
        return _animation(here, sweep, query, rows, finals)
    return _overlay(sweep, query, rows, finals, max(outcomes[member].losses["epoch"] for member in finals))


def _chart(title: str, fields: list[str], query: SummaryQuery, rows: list[summary.Row]) -> Task:
    """A metric over one field or two."""
    if query.kind != "heatmap":
        x = _field("x", query.x, fields, "tau")
        return ("sweep_lines_png", summary.lines(title, rows, fields, x, query.metric))
    x = _field("x", query.x, fields)
    rest = [field for field in fields if field != x]
    if not rest:
        raise BadRequestValue("kind", query.kind, f"needs two varied fields, and only {x} varies; take line or overlay")
    y = _field("y", query.y, rest)
    return ("sweep_heat_png", summary.heat(title, rows, x, y, query.metric))


def _overlay(sweep: JobRow, query: SummaryQuery, rows: list[summary.Row], finals: dict[str, Array], last: int) -> Task:
    """All members' spectra at their ends."""
    histories = {member: {last: spectrum} for member, spectrum in finals.items()}
    return ("sweep_overlay_png", summary.spectra(_spectra(sweep, query), rows, histories, [last]), query.size)


def _animation(
    here: Context, sweep: JobRow, query: SummaryQuery, rows: list[summary.Row], finals: dict[str, Array]
) -> Task:
    """All members' spectra over the epochs."""
    with here.database.read.begin() as session:
        every = store.all_epochs(session, sweep.id)
        places = np.linspace(0, len(every) - 1, min(len(every), query.frames)).round().astype(int)
        epochs = [every[place] for place in places]
        values = len(epochs) * len(finals) * max(map(len, finals.values()))
        if values > PICTURE_VALUES:
            raise BudgetExceeded("values in the picture", values, PICTURE_VALUES, "take fewer frames")
        found = store.histories(session, sweep.id, query.layer, epochs)
    return ("sweep_gif", summary.spectra(_spectra(sweep, query), rows, found, epochs), query.size, query.fps)


def _spectra(sweep: JobRow, query: SummaryQuery) -> SweepChart:
    return SweepChart(sweep.name or "sweep", query.layer, _field("x", query.x, list(sweep.spec["grid"])), query.scale)


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
