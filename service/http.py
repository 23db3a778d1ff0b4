"""HTTP as pure functions: strict JSON, content negotiation, entity tags, ranges."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from fastapi import Request

from service.errors import (
    BadRequestValue,
    BodyTooLarge,
    MalformedJson,
    NotAcceptable,
    RangeNotSatisfiable,
    UnsupportedContentEncoding,
    UnsupportedMediaType,
)

JSON_TYPES = {"application/json", "application/merge-patch+json", ""}
MOST_RANGES = 100


async def json_body(request: Request) -> dict[str, Any]:
    """The request's body as a JSON object. A dependency of every route that takes one."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        headers = {"accept-encoding": "identity"}
        raise UnsupportedContentEncoding(f"content-encoding {encoding[:40]!r} is not taken", headers=headers)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in JSON_TYPES:
        raise UnsupportedMediaType(f"{content_type[:100]!r} is not taken, application/json is")
    body = await _read(request, request.app.state.settings.body_limit)
    if not body:
        raise BadRequestValue("body", None, "is missing; send {} for the defaults")
    parsed = parse_json(body)
    if not isinstance(parsed, dict):
        raise BadRequestValue("body", type(parsed).__name__, "must be a JSON object")
    return parsed


async def _read(request: Request, limit: int) -> bytes:
    """The body, refused before reading where its length is declared, and else as soon as it passes the limit.

    FastAPI's own limit answers in plain text.
    """
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if int(declared) <= limit:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                break
        else:
            return bytes(body)
    raise BodyTooLarge(f"the body is larger than {limit} bytes", limit=limit)


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8 (a byte order mark is let through), no duplicate keys, NaN or Infinity.

    Raises MalformedJson with the offset where the parser knows it.
    """
    try:
        text = body.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise MalformedJson(f"byte {error.start} is not UTF-8", offset=error.start) from None
    except json.JSONDecodeError as error:
        raise MalformedJson(f"{error.msg} at character {error.pos}", offset=error.pos) from None
    except RecursionError:
        raise MalformedJson("the brackets are nested too deeply") from None
    except ValueError:  # Python's limit on the digits of an integer
        raise MalformedJson("a number has too many digits") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise MalformedJson(f"the key {twice[:100]!r} appears twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise MalformedJson(f"{name} is not JSON")


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
    """A strong entity tag of what determines the bytes."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogatepass"))
    return f'"{digest.hexdigest()[:32]}"'


def matches(header: str | None, tag: str) -> bool:
    """Whether an If-Match or If-None-Match header names the tag."""
    names = {name.strip().removeprefix("W/") for name in (header or "").split(",")}
    return tag in names or "*" in names


def check_range(header: str | None, size: int) -> None:
    """Raise RangeNotSatisfiable unless some range of the header lies in the file, or it is no range at all."""
    if header is None or not re.fullmatch(r"bytes=\s*(\d{0,18}-\d{0,18}\s*)(,\s*\d{0,18}-\d{0,18}\s*)*", header):
        return
    ranges = [one.strip().split("-") for one in header.removeprefix("bytes=").split(",")]
    inside = any(int(first) < size if first else int(last or 0) > 0 for first, last in ranges)
    if not inside or len(ranges) > MOST_RANGES:
        reason = f"more than {MOST_RANGES} ranges" if inside else f"no byte of {size} lies in it"
        raise RangeNotSatisfiable(reason, headers={"content-range": f"bytes */{size}"})
