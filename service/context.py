"""What a route may use, built once in `create_app` and handed to it as a dependency."""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import Depends, Request

from service.access import PUBLIC
from service.drawing import Drawing
from service.http import Only, json_body
from service.settings import Settings
from service.store import Database
from service.streams import Streams


@dataclass(frozen=True)
class Context:
    """Settings, database, drawing process and event streams of this application, and for whom a request is."""

    settings: Settings
    database: Database
    drawing: Drawing
    streams: Streams
    owner: str = PUBLIC
    in_flight: dict[str, object] = field(default_factory=dict)  # who holds which scope of an Idempotency-Key


async def _context(request: Request) -> Context:
    # Not a plain function: each of those is called in a thread, which costs as much as reading a job.
    context: Context = request.app.state.context
    return replace(context, owner=request.state.owner)


Here = Annotated[Context, Depends(_context)]
Body = Annotated[dict[str, Any], Depends(json_body)]


def only(*media_types: str) -> list[Any]:
    """For `dependencies` of a route that answers with these media types and nothing else."""
    return [Depends(Only(*media_types))]


JSON_ONLY = only("application/json")
