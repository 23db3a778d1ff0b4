"""HTTP as pure functions: bodies, content negotiation, entity tags, ranges."""

import hashlib
import importlib.metadata
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.errors import (
    BadRequestValue,
    BodyTooLarge,
    MalformedJson,
    NotAcceptable,
    RangeNotSatisfiable,
    UnsupportedContentEncoding,
    UnsupportedMediaType,
)
from service.schemas import TERMINAL
from service.strictjson import parse_json

if TYPE_CHECKING:
    from service.store import JobRow

JSON_TYPES = {"application/json", "application/merge-patch+json", ""}
MOST_RANGES = 100
HEAD_LIMIT = 64 << 10  # Bytes of a request that are no body; what comes in one piece may be more.
VERSION = importlib.metadata.version("rankscope")
BYTE_RANGE = r"(?:\d{1,18}-\d{0,18}|-\d{1,18})\s*"


class Only:
    """Refuse a client that takes none of these media types. A dependency of routes that answer with nothing else."""

    def __init__(self, *media_types: str) -> None:
        self._media_types = {media_type: media_type for media_type in media_types}

    async def __call__(self, request: Request) -> None:
        """Raises NotAcceptable."""
        choose_format(None, request.headers.get("accept"), self._media_types)


async def declared_query(request: Request) -> None:
    """Refuse a parameter that comes twice, and any where a route takes none.

    A route that takes some has a model that refuses all others.
    """
    counts = Counter(name for name, _ in request.query_params.multi_items())
    if counts and max(counts.values()) > 1:
        raise BadRequestValue(max(counts, key=counts.__getitem__)[:100], None, "is given more than once")
    if request.query_params and not request.scope["route"].dependant.query_params:
        name, value = next(iter(request.query_params.items()))
        raise BadRequestValue(name[:100], value, "is unknown: this path takes no query parameters")


async def json_body(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object. A dependency of every route that takes one."""
    check_encoding(request)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in JSON_TYPES:
        raise UnsupportedMediaType(f"{content_type[:100]!r} is not taken, application/json is")
    body = await _read(request, request.app.state.settings.body_limit)
    if not body:
        raise BadRequestValue("", None, "is missing; send {} for the defaults")
    parsed = parse_json(body)
    if not isinstance(parsed, dict):
        raise BadRequestValue("", type(parsed).__name__, "must be a JSON object")
    return parsed


def check_encoding(request: Request) -> None:
    """Refuse a compressed body: what strangers send is never inflated here. Raises UnsupportedContentEncoding."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        headers = {"accept-encoding": "identity"}
        raise UnsupportedContentEncoding(f"content-encoding {encoding[:40]!r} is not taken", headers=headers)


async def _read(request: Request, limit: int) -> bytes:
    """The body, refused before reading where its length is declared, and else as soon as it passes the limit.

    FastAPI's own limit answers in plain text.
    """
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if int(declared) <= limit:
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    break
            else:
                return bytes(body)
        except ClientDisconnect:
            raise MalformedJson("the body broke off", offset=len(body)) from None
    raise BodyTooLarge(f"the body is larger than {limit} bytes", limit=limit)


RANGE = re.compile(r"\s*([\w!#$&^+.-]+|\*)/([\w!#$&^+.-]+|\*)\s*((?:;[^,]*)?)")
QUALITY = re.compile(r";\s*q=([^;,\s]*)", re.IGNORECASE)
QUALITY_VALUE = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")


def choose_format(requested: str | None, accept: str | None, media_types: Mapping[str, str]) -> str:
    """The representation to send: `format=` beats Accept, and the first of `media_types` wins a tie.

    Raises BadRequestValue for an unknown format, NotAcceptable where Accept allows none.
    """
    if requested is not None:
        if requested not in media_types:
            raise BadRequestValue("format", requested, f"must be one of {', '.join(media_types)}")
        return requested
    qualities = {name: _quality(accept or "*/*", media_type) for name, media_type in media_types.items()}
    best = max(qualities, key=lambda name: qualities[name])
    if qualities[best] == 0:
        available = list(media_types.values())
        raise NotAcceptable(f"available are {', '.join(available)}", available=available)
    return best


def _quality(accept: str, media_type: str) -> float:
    """The weight that an Accept header gives a media type: the most specific range decides (RFC 9110, 12.5.1)."""
    best = (-1, 0.0)
    for part in accept.split(","):
        matched = RANGE.fullmatch(part)
        quality = QUALITY.search(part)
        if matched is None or (quality is not None and not QUALITY_VALUE.fullmatch(quality[1])):
            return 1.0  # A malformed header says nothing, and is read as */*.
        kind, subtype = matched[1].lower(), matched[2].lower()
        own_kind, own_subtype = media_type.split("/")
        if kind in {"*", own_kind} and subtype in {"*", own_subtype}:
            specific = (kind != "*") + (subtype != "*")
            best = max(best, (specific, float(quality[1]) if quality else 1.0))
    return best[1]


def etag(*parts: object) -> str:
    """A strong entity tag of what determines the bytes, this program's version included."""
    digest = hashlib.sha256("\n".join(map(str, (VERSION, *parts))).encode("utf-8", "surrogatepass"))
    return f'"{digest.hexdigest()[:32]}"'


def settled(request: Request, row: "JobRow") -> None:
    """Tell `service.replay` of a view that depends on this job's row and on what it has recorded, and is over.

    A sweep is not: its members can still be renamed and deleted.
    """
    if row.status in TERMINAL and row.kind != "sweep":
        request.state.settled = (row.id, row.revision)


def validators(request: Request, row: "JobRow", *parts: object) -> dict[str, str]:
    """ETag and caching of a view of what a job has recorded; `parts` are what the view depends on besides the job.

    Computed without reading the recording, which can only grow while the job is not over.
    """
    settled(request, row)
    over = row.status in TERMINAL
    return {
        "etag": etag(row.id, row.attempt, row.status, *parts),
        "vary": "Accept",
        "cache-control": "private, max-age=31536000, immutable" if over else "private, no-cache",
    }


def unchanged(request: Request, headers: Mapping[str, str]) -> bool:
    """Whether the client already has what these headers describe."""
    return matches(request.headers.get("if-none-match"), headers["etag"])


def matches(header: str | None, tag: str, *, weakly: bool = True) -> bool:
    """Whether a list of tags names this one; If-None-Match compares weakly, If-Match does not (RFC 9110, 8.8.3.2)."""
    names = {name.strip().removeprefix("W/" if weakly else "") for name in (header or "").split(",")}
    return tag in names or "*" in names


def usable_range(header: str | None, size: int) -> str | None:
    """The part of a Range header that lies in the file, in plain form; None where the whole file is to be sent.

    A header that is no valid set of byte ranges is ignored (RFC 9110, 14.2). Raises RangeNotSatisfiable.
    """
    if header is None or not re.fullmatch(r"bytes=\s*" + BYTE_RANGE + r"(?:,\s*" + BYTE_RANGE + ")*", header):
        return None
    inside = []
    for first, last in re.findall(r"(\d*)-(\d*)", header):
        start = int(first) if first else max(0, size - int(last))
        end = min(int(last), size - 1) if first and last else size - 1
        if first and last and int(first) > int(last):
            return None
        if start < size:
            inside.append(f"{start}-{end}")
    if not inside or len(inside) > MOST_RANGES:
        reason = f"more than {MOST_RANGES} ranges" if inside else f"no byte of {size} lies in it"
        raise RangeNotSatisfiable(reason, headers={"content-range": f"bytes */{size}"})
    return f"bytes={','.join(inside)}"
