"""An uploaded file on its way in: the body, plain or multipart, goes to a nameless file as it comes."""

import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import BinaryIO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser
from starlette.requests import ClientDisconnect

from service import files, jobs
from service.context import Context
from service.errors import BodyTooLarge, MalformedArray, MalformedMultipart
from service.http import check_encoding

BUFFER = 1 << 20  # Bytes in memory at a time.
OVERHEAD = 64 << 10  # Bytes that a multipart body may have around its file.
HEADER = 16 << 10  # Bytes of one header of its part: long filenames are no fault.
BOUNDARY = re.compile(r';\s*boundary=(?:"([^"]{1,70})"|([^\s";,]{1,70}))', re.IGNORECASE)


@dataclass(frozen=True)
class Received:
    """A whole upload: a file without a name, its size in bytes and the SHA-256 of its content."""

    file: BinaryIO
    size: int
    sha256: str


@contextlib.asynccontextmanager
async def received(here: Context, request: Request) -> AsyncIterator[Received]:
    """The file in the body; it is gone afterwards unless `files.keep` has named it.

    Raises UnsupportedContentEncoding, BodyTooLarge, MalformedMultipart, StorageFull.
    """
    check_encoding(request)
    limit, declared = here.settings.upload_limit, int(request.headers.get("content-length", "0"))
    if declared > limit + OVERHEAD:
        raise _too_large(limit)
    jobs.check_disk(here, declared)
    with files.nameless(here.settings.data / "uploads") as file:
        digest, size = hashlib.sha256(), 0

        def save(part: bytes) -> None:
            jobs.check_disk(here)
            digest.update(part)
            file.write(part)

        async for part in _gathered(_content(request)):
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            await run_in_threadpool(save, part)
        await run_in_threadpool(files.settle, file)
        yield Received(file, size, digest.hexdigest())


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the file is larger than {limit} bytes", limit=limit)


async def _gathered(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in fewer pieces: each one costs a turn in a thread."""
    buffer = bytearray()
    async for part in parts:
        buffer += part
        if len(buffer) >= BUFFER:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer)


async def _content(request: Request) -> AsyncIterator[bytes]:
    """The bytes of the file: of any type they are the body, in multipart/form-data its one part."""
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() == "multipart/form-data":
        parts = _only_part(request, content_type)
    else:
        parts = request.stream()
    try:
        async for part in parts:
            yield part
    except ClientDisconnect:
        raise MalformedArray("the body broke off") from None


class _OnePart:
    """Callbacks of the parser: keeps the data of one part, and counts the parts."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.n_parts = 0
        self.ended = False

    def on_part_begin(self) -> None:
        self.n_parts += 1
        if self.n_parts > 1:
            raise MalformedMultipart("there is more than one part; send one file")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.data += data[start:end]

    def on_end(self) -> None:
        self.ended = True


async def _only_part(request: Request, content_type: str) -> AsyncIterator[bytes]:
    """The data of the one part; its name, filename and type are labels that decide nothing."""
    if (found := BOUNDARY.search(content_type)) is None:
        raise MalformedMultipart("the content type names no boundary of 1 to 70 characters")
    part = _OnePart()
    total = of_file = 0
    try:
        parser = MultipartParser(
            found[1] or found[2],
            {"on_part_begin": part.on_part_begin, "on_part_data": part.on_part_data, "on_end": part.on_end},
            max_header_size=HEADER,
        )
        async for chunk in request.stream():
            parser.write(chunk)
            total, of_file = total + len(chunk), of_file + len(part.data)
            if total - of_file > OVERHEAD:
                raise MalformedMultipart(f"more than {OVERHEAD} bytes are not of the file")
            yield bytes(part.data)
            part.data.clear()
    except FormParserError as error:
        raise MalformedMultipart(f"the body is not multipart/form-data: {error}"[:200]) from None
    if not part.ended or not part.n_parts:
        raise MalformedMultipart("the body ends before its closing boundary" if part.n_parts else "there is no part")
