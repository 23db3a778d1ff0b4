"""A file as an answer: whole, in ranges, or not at all where the client has it."""

from pathlib import Path

from fastapi import Request, Response
from fastapi.responses import FileResponse

from service.http import unchanged, usable_range


def download(request: Request, path: Path, name: str, headers: dict[str, str]) -> Response:
    """The file under a name, honouring Range and If-None-Match; `headers` hold its etag. Raises RangeNotSatisfiable."""
    if unchanged(request, headers):
        return Response(status_code=304, headers=headers)
    wanted = usable_range(request.headers.get("range"), path.stat().st_size)
    # FileResponse reads the header itself, and would answer a bad one in plain text.
    others = [header for header in request.scope["headers"] if header[0] != b"range"]
    request.scope["headers"] = others + ([(b"range", wanted.encode())] if wanted else [])
    return FileResponse(path, headers=headers, media_type="application/octet-stream", filename=name)
