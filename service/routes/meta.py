"""About the service itself: discovery, presets, limits, health, documentation, problem types."""

import html
import importlib.resources
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse
from prometheus_client.exposition import choose_encoder
from sqlalchemy import text

from service import files
from service.context import JSON_ONLY, Context, Here, only
from service.errors import DatabaseUnavailable, NotAcceptable, NotFound, RankscopeError, StorageFull
from service.http import HEAD_LIMIT, choose_format
from service.openapi import raises
from service.problems import BY_SLUG, problem_response, translate
from service.representations import ANSWER_LIMIT, to_json
from service.schemas import (
    DATA_LIMIT,
    PARAMETER_LIMIT,
    PRESET_NOTES,
    PRESETS,
    RECORDED_LIMIT,
    WORK_LIMIT,
    ExperimentSpec,
    resolve,
)
from service.sweeps import MEMBER_LIMIT

router = APIRouter(tags=["service"])
LINKS = {
    "experiments": "/experiments",
    "sweeps": "/sweeps",
    "analyses": "/analyses",
    "presets": "/presets",
    "limits": "/limits",
    "documentation": "/docs",
    "openapi": "/openapi.json",
    "health": "/healthz",
    "ready": "/readyz",
}
METRICS = {media_type: media_type for media_type in ("text/plain", "application/openmetrics-text")}
DOCS_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
DOCS_START = """window.onload = () => SwaggerUIBundle({
  url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null
});"""
DOCS_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>rankscope: API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css"><link rel="icon" href="data:,"></head>
<body><div id="swagger-ui"></div><script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script></body></html>"""


@router.get("/", responses={200: {"content": {"text/html": {}}}}, openapi_extra=raises(NotAcceptable))
def discovery(here: Here, request: Request) -> Response:
    """Where everything is; a page for browsers."""
    wanted = choose_format(None, request.headers.get("accept"), {"json": "application/json", "html": "text/html"})
    headers = {"vary": "Accept"}
    links = {name: path for name, path in LINKS.items() if name != "documentation" or here.settings.docs == "on"}
    if wanted == "json":
        document = {"name": "rankscope", "version": request.app.version, "links": links}
        return Response(to_json(document), headers=headers, media_type="application/json")
    rows = "".join(f'<li><a href="{path}">{html.escape(name)}</a></li>' for name, path in links.items())
    title = f"rankscope {html.escape(request.app.version)}"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<link rel="icon" href="data:,"><style>body{font:16px/1.6 sans-serif;max-width:40rem;margin:3rem auto}</style>'
        f"</head><body><h1>{title}</h1><p>Watch the low-rank bias of neural networks.</p><ul>{rows}</ul></body></html>"
    )
    return HTMLResponse(page, headers=headers)


@router.get("/openapi.json", include_in_schema=False, dependencies=JSON_ONLY)
def openapi(request: Request) -> Response:
    """The OpenAPI document."""
    return Response(to_json(request.app.state.openapi()), media_type="application/json")


@router.get("/presets", dependencies=JSON_ONLY)
def presets() -> dict[str, Any]:
    """The named specifications, resolved."""
    data = [
        {"name": name, "description": PRESET_NOTES[name], "spec": resolve({"preset": name}).model_dump()}
        for name in PRESETS
    ]
    return {"object": "list", "data": data}


@router.get("/limits", dependencies=JSON_ONLY)
def limits(here: Here) -> dict[str, Any]:
    """Every limit that a request can meet; bounds of single fields are in the OpenAPI document too."""
    settings = here.settings
    return {
        "head_bytes": HEAD_LIMIT,
        "body_bytes": settings.body_limit,
        "upload_bytes": settings.upload_limit,
        "matrix_side": settings.side_limit,
        "matrix_entries": settings.entry_limit,
        "npz_members": settings.member_limit,
        "npz_inflated_bytes": settings.inflated_limit,
        "checkpoint_tensors": settings.tensor_limit,
        "torch_files": settings.torch_files,
        "header_seconds": settings.header_s,
        "body_silence_seconds": settings.body_s,
        "answer_stall_seconds": settings.answer_s,
        "requests": settings.rate_limit or None,
        "webhooks": bool(settings.webhook_secrets),
        "webhook_seconds": settings.webhook_s,
        "webhook_attempts": settings.webhook_attempts,
        "queued_jobs": settings.queue_limit,
        "streams": settings.stream_limit,
        "job_seconds": settings.job_limit_s,
        "devices": settings.device_names,
        "sweep_members": MEMBER_LIMIT,
        "parameters": PARAMETER_LIMIT,
        "work": WORK_LIMIT,
        "recorded_values": RECORDED_LIMIT,
        "data_values": DATA_LIMIT,
        "answer_values": ANSWER_LIMIT,
        "fields": _bounds(ExperimentSpec.model_json_schema()),
    }


def _bounds(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted field name → its bounds, as the JSON schema states them."""
    bounds = {}
    for part, reference in schema["properties"].items():
        model = schema["$defs"].get(str(reference.get("$ref", "")).rpartition("/")[2], {})
        for field, rule in model.get("properties", {}).items():
            found = {key: rule[key] for key in rule if key.lower().endswith(("imum", "items"))}
            if found := {key: value for key, value in found.items() if key != "items"}:
                bounds[f"{part}.{field}"] = found
    return bounds


@router.get("/healthz", dependencies=JSON_ONLY)
async def healthz() -> dict[str, str]:
    """The process answers."""
    # Not in a thread of the pool, which other requests may have filled.
    return {"status": "ok"}


@router.get("/readyz", dependencies=JSON_ONLY, openapi_extra=raises(StorageFull, DatabaseUnavailable))
def readyz(here: Here, request: Request) -> Response:
    """The database answers and the disk has room: new work can be taken."""
    try:
        with here.database.read.begin() as session:
            session.execute(text("SELECT 1 FROM jobs LIMIT 1"))
        if files.free_bytes(here.settings.data) < here.settings.free_disk:
            raise StorageFull(f"less than {here.settings.free_disk} bytes of disk are free")
    except Exception as error:
        reason = translate(error)
        known = reason if isinstance(reason, StorageFull | DatabaseUnavailable) else RankscopeError("not ready")
        return problem_response(request, known, status=503)
    return Response(to_json({"status": "ready"}), media_type="application/json")


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"application/openmetrics-text": {"schema": {"type": "string"}}}}},
    openapi_extra=raises(NotFound, NotAcceptable),
)
def metrics(here: Here, request: Request) -> Response:
    """What Prometheus scrapes: requests, jobs, queue depth, sizes. A setting turns it off."""
    if here.settings.metrics == "off":
        raise NotFound("RANKSCOPE_METRICS is off")
    # Not the header itself: a version that is no number is an error there.
    encode, media_type = choose_encoder(choose_format(None, request.headers.get("accept"), METRICS))
    return Response(encode(request.app.state.registry), headers={"content-type": media_type, "vary": "Accept"})


@router.get("/problems/{slug}", dependencies=JSON_ONLY)
def problem_type(slug: str) -> dict[str, Any]:
    """What a problem type means and what to do about it."""
    if (problem := BY_SLUG.get(slug)) is None:
        raise NotFound(f"no problem type {slug[:40]!r}")
    return {"type": f"/problems/{slug}", **problem._asdict()}


@router.get("/docs", include_in_schema=False, dependencies=only("text/html"))
def docs(here: Here) -> HTMLResponse:
    """Swagger UI; its files are served by us, so that it works without a network. A setting turns it off."""
    _check_docs(here)
    return HTMLResponse(DOCS_PAGE)


@router.get("/docs/{name}", include_in_schema=False, dependencies=only("text/javascript", "text/css"))
def docs_file(here: Here, name: str) -> Response:
    """One file of Swagger UI."""
    _check_docs(here)
    if name == "start.js":
        return Response(DOCS_START, media_type="text/javascript")
    if name not in DOCS_FILES:
        raise NotFound(f"no file {name[:40]!r}")
    path = importlib.resources.files("fastapi_offline") / "static" / name
    return FileResponse(str(path), media_type=DOCS_FILES[name], headers={"cache-control": "max-age=86400"})


def _check_docs(here: Context) -> None:
    if here.settings.docs == "off":
        raise NotFound("RANKSCOPE_DOCS is off")
