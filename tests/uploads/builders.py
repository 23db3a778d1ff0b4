"""Builders of uploaded files, good and bad, byte by byte."""

import io
import json
import pickle
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

FLOATS = np.arange(6.0).reshape(2, 3)


class Canary:
    """Unpickled, it writes a file; no reader may ever do that."""

    def __init__(self, path: str = "canary") -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


# .npy


def npy(header: str | bytes, data: bytes = b"", version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    """A .npy of any header; `length` is the one that it claims to have."""
    text = header.encode() if isinstance(header, str) else header
    size = len(text) if length is None else length
    return b"\x93NUMPY" + bytes(version) + size.to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def npy_of(shape: object, data: bytes = b"", descr: object = "<f8", fortran: object = False) -> bytes:
    """A .npy whose header is well-formed and says what is given."""
    return npy(f"{{'descr': {descr!r}, 'fortran_order': {fortran!r}, 'shape': {shape!r}, }}\n", data)


def saved(array: ArrayLike, **options: Any) -> bytes:
    """What np.save writes."""
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def objects() -> bytes:
    """An array of objects that would write a file."""
    return saved(np.array([[Canary(), Canary()]], dtype=object), allow_pickle=True)


def with_entry(value: float) -> bytes:
    """A 2 × 3 matrix with one such entry."""
    array = FLOATS.copy()
    array[1, 2] = value
    return saved(array)


def text_header(**changes: str) -> str:
    """A .npy header's text with some values replaced."""
    fields = {"descr": "'<f8'", "fortran_order": "False", "shape": "(2, 3)"} | changes
    return "{" + "".join(f"'{key}': {value}, " for key, value in fields.items()) + "}\n"


# zip


@dataclass
class Part:
    """A zip member. What is None is worked out; a `local_…` is what the member's own header says instead."""

    name: str | bytes
    data: bytes = b""
    deflated: bool = False
    method: int | None = None
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    compressed: int | None = None
    local_name: bytes | None = None
    local_crc: int | None = None
    local_size: int | None = None
    local_compressed: int | None = None
    central_extra: bytes = b""
    local_extra: bytes = b""
    offset: int | None = None
    tail: bytes = b""


def _deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compressor.compress(data) + compressor.flush()


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def zipped(*parts: Part, count: int | None = None, prefix: bytes = b"", suffix: bytes = b"") -> bytes:
    """A zip file of the parts, lies and all."""
    body, directory = bytearray(prefix), bytearray()
    for part in parts:
        name = part.name.encode() if isinstance(part.name, str) else part.name
        stream = _deflate(part.data) if part.deflated else part.data
        method = _or(part.method, 8 if part.deflated else 0)
        crc = _or(part.crc, zlib.crc32(part.data))
        size, compressed = _or(part.size, len(part.data)), _or(part.compressed, len(stream))
        offset = _or(part.offset, len(body))
        local = _or(part.local_crc, crc), _or(part.local_compressed, compressed), _or(part.local_size, size)
        shown = _or(part.local_name, name)
        lengths = len(shown), len(part.local_extra)
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, part.flags, method, 0, 33, *local, *lengths)
        body += shown + part.local_extra + stream + part.tail
        central = (crc, compressed, size, len(name), len(part.central_extra), 0, 0, 0, 0, offset)
        directory += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, part.flags, method, 0, 33, *central)
        directory += name + part.central_extra
    count = _or(count, len(parts))
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count % 65536, count % 65536, len(directory), len(body), 0)
    return bytes(body + directory) + end + suffix


def wide(*values: int) -> bytes:
    """A zip64 block of an extra field."""
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def bomb() -> bytes:
    """Three members that declare 2 GiB each, in 1 kB."""
    head = npy_of((16_384, 16_383), descr="<f8")
    return zipped(*(Part(f"{name}.npy", head, deflated=True, size=2**31) for name in "abc"))


def hidden_bomb() -> bytes:
    """Every header agrees on a matrix of 80 MB; the stream ends after 48 bytes."""
    head = npy_of((10_000, 1_000))
    size = len(head) + 80_000_000
    return zipped(Part("a.npy", head + bytes(48), deflated=True, size=size))


def too_many_entries() -> bytes:
    """A member whose sides are within the limits and whose headers agree on 2²⁷ + 16 384 entries, in 200 bytes."""
    head = npy_of((16_384, 8_193), descr="|i1")
    return zipped(Part("a.npy", head, deflated=True, size=len(head) + 16_384 * 8_193))


def overfull(shape: tuple[int, int]) -> bytes:
    """Every header agrees on a float64 matrix of this shape; the stream goes on for 5 MB."""
    head = npy_of(shape)
    return zipped(Part("a.npy", head + bytes(5_000_000), deflated=True, size=len(head) + 8 * shape[0] * shape[1]))


def overlapping() -> bytes:
    """Two entries of the directory that name the same member."""
    part = Part("a.npy", saved(FLOATS))
    return zipped(part, Part("b.npy", local_name=b"a.npy", offset=0, data=saved(FLOATS)))


# safetensors


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; a header that is not bytes is written as JSON; `length` is the one that it claims to have."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: object = (2, 2), begin: object = 0, end: object = 16, dtype: object = "F32") -> dict[str, object]:
    """An entry of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def many_tensors() -> bytes:
    """One tensor more than the default limit."""
    header = {f"t{index}": entry((1, 1), 4 * index, 4 * index + 4) for index in range(10_001)}
    return safetensors(header, bytes(4 * 10_001))


# torch


def torch_zip(*parts: Part, top: str = "archive/") -> bytes:
    """A PyTorch-like zip: any pickle, and the parts."""
    return zipped(Part(f"{top}data.pkl", pickle.dumps({}, protocol=2)), *parts)
