"""What the views with pictures share: how large one is drawn, and the way from a request to its bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from service import files
from service.context import Context
from service.pictures import Size
from service.representations import MEDIA_TYPES
from service.store import JobRow

PICTURES = {"png", "svg", "gif"}
Task = tuple[Any, ...]  # What `Drawing.draw` is to draw.
Prepared = Response | tuple[dict[str, str], Path, Task]


class SizeQuery(BaseModel):
    """How large a picture is."""

    width: int = Field(640, ge=160, le=2000, description="pixels")
    height: int = Field(400, ge=120, le=2000, description="pixels")
    dpi: int = Field(100, ge=50, le=200)

    @property
    def size(self) -> Size:
        """The size asked for."""
        return Size(self.width, self.height, self.dpi)


class AnimationQuery(SizeQuery):
    """And how long an animation is, and how fast."""

    frames: int = Field(200, ge=1, le=200, description="at most so many frames, evenly thinned")
    fps: int = Field(10, ge=1, le=25)


class View:
    """A job in one form. Its ETag names all that a picture depends on, and its place in the cache."""

    def __init__(self, here: Context, row: JobRow, form: str, headers: dict[str, str]) -> None:
        self._form, self._headers = form, headers
        self._path = files.picture_path(here.settings.data, row.id, headers["etag"].strip('"'), form)

    def kept(self) -> Response | None:
        """The picture, if it has been drawn before."""
        body = files.read_cached(self._path) if self._form in PICTURES else None
        return None if body is None else self._answer(body)

    def made(self, built: bytes | Task) -> Prepared:
        """The answer, or what is to be drawn and kept."""
        return self._answer(built) if isinstance(built, bytes) else (self._headers, self._path, built)

    def _answer(self, body: bytes) -> Response:
        return Response(body, 200, self._headers, MEDIA_TYPES[self._form])


async def answer(here: Context, form: str, prepare: Callable[[], Prepared]) -> Response:
    """What `prepare` has prepared in a thread. Waiting for a picture takes none of those that other requests need."""
    prepared = await run_in_threadpool(prepare)
    if isinstance(prepared, Response):
        return prepared
    headers, path, task = prepared
    return Response(await here.drawing.draw(path, *task), 200, headers, MEDIA_TYPES[form])
