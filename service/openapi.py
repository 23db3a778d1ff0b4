"""The OpenAPI document: what FastAPI makes of the routes, and every problem that each operation may answer with.

What follows from how a route is made (it takes a body, an id, a key) is added here; what else it raises stands on the
route, as `raises(…)`. `x-problems` lists the slugs of an operation.
"""

from collections import defaultdict
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from service import errors
from service.access import is_open
from service.errors import RankscopeError
from service.http import Only
from service.problems import BY_SLUG, PROBLEMS, Problem

Document = dict[str, Any]
Responses = dict[int | str, dict[str, Any]]
ALWAYS = (errors.MalformedRequest, errors.HostNotAllowed, errors.BadRequestValue, errors.RankscopeError)
GUARDED = (errors.Unauthorized, errors.RateLimited, errors.DatabaseUnavailable)
BODY = (errors.RequestTimeout, errors.BodyTooLarge, errors.UnsupportedContentEncoding)
JSON_BODY = (errors.MalformedJson, errors.UnsupportedMediaType)
KEYED = (
    errors.IdempotencyKeyInvalid,
    errors.IdempotencyInProgress,
    errors.IdempotencyKeyReused,
    errors.MalformedJson,
    errors.NotFound,  # What the key has made may be deleted.
)
CREATES = (errors.QueueFull, errors.StorageFull)
UPLOADS = tuple(errors.UploadError.__subclasses__())
KEY = "Authorization"


class ProblemDetails(BaseModel):
    """RFC 9457; some types have members of their own."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="/problems/<slug>, where it is explained")
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[dict[str, Any]] = Field([], description="each refused field or parameter, its value and its limit")


def raises(*kinds: type[RankscopeError]) -> Document:
    """For `openapi_extra`: the problems of a route that do not follow from how it is made."""
    return {"x-problems": [PROBLEMS[kind].slug for kind in kinds]}


def takes(model: type[BaseModel], *examples: Document) -> Document:
    """For `openapi_extra`: a JSON body that our own strict parser reads."""
    media: Document = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if examples:
        media["examples"] = {one["summary"]: one for one in examples}
    return {"requestBody": {"required": True, "content": {"application/json": media}}}


def header(name: str, description: str, **schema: Any) -> Document:
    """For `openapi_extra`: a header that a route reads."""
    one = {"name": name, "in": "header", "required": False, "description": description}
    return {"parameters": [{**one, "schema": {"type": "string", **schema}}]}


PREFER = header("Prefer", "wait=N: seconds to wait for the end, 30 at most; or respond-async (RFC 7240)")
IF_MATCH = header("If-Match", "change nothing unless the ETag is this one")
DELETES = {**raises(errors.InvalidState, errors.PreconditionFailed), **IF_MATCH}
NOT_MODIFIED: Responses = {304: {"description": "The client's copy, named by If-None-Match, is the current one"}}
PARTIAL: Responses = {206: {"description": "The part that Range asked for", "content": {"*/*": {}}}}


def operation_id(route: APIRoute) -> str:
    """`<file>_<function>` of the route: it stays when paths change."""
    return f"{route.endpoint.__module__.rpartition('.')[2]}_{route.endpoint.__name__}"


def document_of(app: FastAPI, routes: list[APIRoute], models: tuple[type[BaseModel], ...]) -> Document:
    """The whole document; `models` are those of bodies that FastAPI does not see. It takes half a second."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = document["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    every: tuple[type[BaseModel], ...] = (*models, ProblemDetails)
    for model in every:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"] |= {**schema.pop("$defs", {}), model.__name__: schema}
    components["securitySchemes"] = {
        KEY: {"type": "http", "scheme": "bearer", "description": "an API key, if any is set"}
    }
    for route in routes:
        if route.include_in_schema:
            for method in route.methods or ():
                _finish(document["paths"][route.path_format][method.lower()], route)
    return document


def _finish(operation: Document, route: APIRoute) -> None:
    slugs = {*operation.pop("x-problems", []), *(PROBLEMS[kind].slug for kind in _implied(operation, route))}
    operation["x-problems"] = sorted(slugs)
    by_status: dict[int, list[Problem]] = defaultdict(list)
    for slug in sorted(slugs):
        by_status[BY_SLUG[slug].status].append(BY_SLUG[slug])
    if route.path == "/readyz":
        by_status[503] += by_status.pop(507) + by_status[500]  # It answers 503 whatever the reason.
    for status, found in by_status.items():
        operation["responses"][str(status)] = _response(status, found)
    operation["responses"] = dict(sorted(operation["responses"].items()))
    if not is_open(route.path):
        operation["security"] = [{}, {KEY: []}]


def _implied(operation: Document, route: APIRoute) -> list[type[RankscopeError]]:
    """The problems that follow from what the operation takes."""
    kinds = list(ALWAYS)
    parameters = {(one["in"], one["name"]) for one in operation.get("parameters", [])}
    if not is_open(route.path):
        kinds += GUARDED
    if any(place == "path" for place, _ in parameters):
        kinds.append(errors.NotFound)
    if any(isinstance(dependency.dependency, Only) for dependency in route.dependencies):
        kinds.append(errors.NotAcceptable)
    if ("header", "Idempotency-Key") in parameters:
        kinds += KEYED
    if "requestBody" in operation:
        kinds += BODY
        kinds += JSON_BODY if "application/json" in operation["requestBody"]["content"] else ()
    return kinds


def _response(status: int, found: list[Problem]) -> Document:
    examples = {
        problem.slug: {
            "value": {
                "type": f"/problems/{problem.slug}",
                "title": problem.title,
                "status": status,
                "detail": problem.advice,
                "request_id": "019ab0c4-5d6e-7f80-9123-456789abcdef",
            }
        }
        for problem in found
    }
    media = {"schema": {"$ref": "#/components/schemas/ProblemDetails"}, "examples": examples}
    return {
        "description": "; ".join(f"{problem.slug}: {problem.title}" for problem in found),
        "content": {"application/problem+json": media},
    }
