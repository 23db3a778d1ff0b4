""".npy: a header in Python's syntax, then the entries.

The header is parsed here and not by `ast.literal_eval`, which brackets or signs in the thousands take down. What it
says is compared with the bytes that follow before anything is allocated, and is never echoed.
"""

import re
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from service.errors import MalformedArray, PickleForbidden, UnsupportedDtype, UploadError
from service.uploads.checks import MAX_AXES, MAX_INT, count_entries, figure, quietly, read_at, shape_refusal
from service.uploads.model import Limits, Place, Tensor

MAGIC = b"\x93NUMPY"
MAX_HEADER = 10_000  # numpy's own bound
PREFIX = MAX_HEADER + 12  # How much of a file has to be read to describe it.
MAX_NESTING = 20

MAX_TOKENS = 400  # 64 axes are 150; an archive may have hundreds of headers, each of thousands of brackets.
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>'(?:[^'\\\x00-\x1f]|\\[^\x00-\x1f])*'|"(?:[^"\\\x00-\x1f]|\\[^\x00-\x1f])*")"""
    r"""|(?P<number>-?[0-9]{1,20})L?\b|(?P<word>True|False|None)\b|(?P<mark>[][(){},:]))\s*""",
    re.ASCII,
)
_WORDS = {"True": True, "False": False, "None": None}
_CLOSING = {"(": ")", "[": "]"}
_END = ("mark", "")  # No token of a text looks like it.
_Tokens = list[tuple[str, str]]

_DTYPES = {
    "b1": ("bool", 1),
    "f2": ("float16", 2),
    "f4": ("float32", 4),
    "f8": ("float64", 8),
    "f16": ("float128", 16),
    **{f"i{size}": (f"int{8 * size}", size) for size in (1, 2, 4, 8)},
    **{f"u{size}": (f"uint{8 * size}", size) for size in (1, 2, 4, 8)},
}
_DTYPE = re.compile(r"[<>|=]?([a-zA-Z]{1,12}[0-9]{0,10})(\[[0-9a-zA-Z/]{1,20}\])?")


@dataclass(frozen=True)
class Header:
    """What a .npy says of its entries, which begin at byte `length`; `dtype` is "" if it is not analysed."""

    length: int
    shape: tuple[int, ...]
    fortran: bool
    dtype: str = ""
    itemsize: int = 0
    big_endian: bool = False
    refusal: UploadError | None = None


def inspect(file: BinaryIO, size: int, limits: Limits) -> Tensor:
    """The tensor of a file that is one .npy; raises what is wrong with it."""
    tensor = describe("array", read_at(file, 0, PREFIX), Place(0, size), size, limits)
    if tensor.refusal:
        raise tensor.refusal
    return tensor


def describe(name: str, prefix: bytes, stream: Place, size: int, limits: Limits) -> Tensor:
    """The tensor of a .npy of `size` bytes that begins with `prefix`; what is wrong with it is its refusal."""
    try:
        header = read_header(prefix)
        if not header.refusal:
            _check_size(header, size)
    except MalformedArray as error:
        return Tensor(name, refusal=quietly(error))
    return Tensor(
        name,
        header.dtype,
        header.shape if len(header.shape) <= MAX_AXES else None,
        Place(stream.start, stream.size, header.length, stream.deflated, stream.crc),
        header.big_endian,
        header.fortran,
        refusal=header.refusal or shape_refusal(header.shape, limits),
    )


def read_header(prefix: bytes) -> Header:
    """The header at the start of a .npy; raises MalformedArray."""
    start, length = _extent(prefix)
    if length > MAX_HEADER:
        raise MalformedArray(f"the .npy header has {length} bytes, the limit is {MAX_HEADER}")
    if len(prefix) < start + length:
        raise MalformedArray(f"the .npy ends within its header of {length} bytes")
    encoding = "utf-8" if prefix[6] == 3 else "latin-1"
    try:
        text = prefix[start : start + length].decode(encoding)
    except UnicodeDecodeError:
        raise MalformedArray("the .npy header is not UTF-8") from None
    descr, fortran, shape = _fields(text)
    return _with_dtype(Header(start + length, shape=shape, fortran=fortran), descr)


def _extent(prefix: bytes) -> tuple[int, int]:
    """Where the header begins, and its length."""
    if not prefix.startswith(MAGIC):
        raise MalformedArray("the bytes do not begin with the .npy magic")
    if len(prefix) < 8:
        raise MalformedArray("the .npy ends before its version")
    major, minor = prefix[6:8]
    if major not in (1, 2, 3) or minor != 0:
        raise MalformedArray(f"version {major}.{minor} of .npy is not known; 1.0, 2.0 and 3.0 are")
    start = 10 if major == 1 else 12
    if len(prefix) < start:
        raise MalformedArray("the .npy ends before its header")
    return start, int.from_bytes(prefix[8:start], "little")


def _check_size(header: Header, size: int) -> None:
    """Raise unless the entries fill the rest of the bytes exactly."""
    declared, there = count_entries(header.shape) * header.itemsize, size - header.length
    if declared != there:
        raise MalformedArray(f"the .npy header declares {figure(declared)} bytes of entries, {there} are there")


def _fields(text: str) -> tuple[object, bool, tuple[int, ...]]:
    """(descr, fortran_order, shape); the type of descr is not checked yet."""
    tokens = _tokenise(text)
    fields = _mapping(tokens)
    if tokens != [_END]:
        raise MalformedArray("the .npy header goes on after its end")
    if fields.keys() != {"descr", "fortran_order", "shape"}:
        raise MalformedArray("the .npy header has not exactly the keys descr, fortran_order and shape")
    fortran, shape = fields["fortran_order"], fields["shape"]
    if not isinstance(fortran, bool):
        raise MalformedArray("fortran_order in the .npy header is neither True nor False")
    if not isinstance(shape, tuple) or not all(type(side) is int for side in shape):
        raise MalformedArray("the shape in the .npy header is not a tuple of integers")
    if not all(0 <= side < MAX_INT for side in shape):
        raise MalformedArray("the shape in the .npy header has a side that is negative or 2⁶³ or more")
    return fields["descr"], fortran, shape


def _tokenise(text: str) -> _Tokens:
    """The header's tokens, the last one first."""
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match or not match.lastgroup:
            raise MalformedArray(f"the .npy header is not a dictionary of plain values: see its byte {position}")
        tokens.append((match.lastgroup, match[match.lastgroup]))
        if len(tokens) > MAX_TOKENS:
            raise MalformedArray(f"the .npy header has more than {MAX_TOKENS} words and marks")
        position = match.end()
    return [_END, *reversed(tokens)]


def _mapping(tokens: _Tokens) -> dict[str, Any]:
    """Take a dictionary whose keys are texts off the tokens."""
    _expect(tokens, "{")
    found: dict[str, Any] = {}
    while tokens[-1] != ("mark", "}"):
        kind, key = tokens.pop()
        if kind != "text" or key[1:-1] in found:
            raise MalformedArray("a key of the .npy header is not a text, or is there twice")
        _expect(tokens, ":")
        found[key[1:-1]] = _value(tokens, 0)
        _separate(tokens, "}")
    tokens.pop()
    return found


def _value(tokens: _Tokens, depth: int) -> Any:
    """Take one value off the tokens: a text (escapes as they are), a number, a word, a tuple or a list."""
    kind, token = tokens.pop()
    if kind == "text":
        return token[1:-1]
    if kind == "number":
        return int(token)
    if kind == "word":
        return _WORDS[token]
    if token not in _CLOSING:
        raise MalformedArray("the .npy header has a mark where a value should be")
    if depth == MAX_NESTING:
        raise MalformedArray(f"the brackets of the .npy header are nested deeper than {MAX_NESTING}")
    return _sequence(tokens, token, depth + 1)


def _sequence(tokens: _Tokens, opening: str, depth: int) -> Any:
    """Take the rest of a tuple or a list off the tokens; one value in parentheses is that value."""
    closing, items, comma = _CLOSING[opening], [], False
    while tokens[-1] != ("mark", closing):
        items.append(_value(tokens, depth))
        comma = _separate(tokens, closing)
    tokens.pop()
    if opening == "[":
        return items
    return tuple(items) if comma or len(items) != 1 else items[0]


def _separate(tokens: _Tokens, closing: str) -> bool:
    """Take a comma off the tokens; without one the closing mark must be next."""
    if tokens[-1] == ("mark", ","):
        tokens.pop()
        return True
    if tokens[-1] != ("mark", closing):
        raise MalformedArray("the .npy header lacks a comma or a closing bracket")
    return False


def _expect(tokens: _Tokens, mark: str) -> None:
    if tokens.pop() != ("mark", mark):
        raise MalformedArray(f"the .npy header lacks a {mark}")


def _with_dtype(header: Header, descr: object) -> Header:
    """The header with its dtype, or with the reason why entries of that type are not read."""
    if not isinstance(descr, str | list | tuple):
        raise MalformedArray("descr in the .npy header is no dtype")
    if _has_objects(descr):
        refusal = PickleForbidden("the array holds Python objects, which only unpickling would restore")
        return replace(header, refusal=refusal)
    if not isinstance(descr, str):
        advice = "save each field as an array of its own"
        return replace(header, refusal=UnsupportedDtype(f"structured and sub-array dtypes are not analysed; {advice}"))
    match = _DTYPE.fullmatch(descr)
    if not match:
        raise MalformedArray("descr in the .npy header is no dtype")
    if match[2] or match[1] not in _DTYPES:
        return replace(header, refusal=_unsupported(match[1]))
    dtype, itemsize = _DTYPES[match[1]]
    return replace(header, dtype=dtype, itemsize=itemsize, big_endian=descr[0] == ">" and itemsize > 1)


def _has_objects(descr: object) -> bool:
    """Whether the dtype, or a field of it, is that of Python objects."""
    if isinstance(descr, str):
        return descr.lstrip("<>|=")[:1] == "O" or descr == "object"
    return isinstance(descr, list | tuple) and any(_has_objects(part) for part in descr)


def _unsupported(code: str) -> UnsupportedDtype:
    if code == "V2":
        return UnsupportedDtype("numpy writes bfloat16 as raw bytes (V2); send it as safetensors, which keeps the type")
    return UnsupportedDtype(
        f"entries of numpy type {code} are not analysed; float16, 32, 64 and 128, integers and bool are"
    )
