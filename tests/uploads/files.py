"""The table of bad uploads: each file, and the answer that it must get."""

import pickle
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from tests.uploads.builders import (
    FLOATS,
    Canary,
    Part,
    bomb,
    entry,
    hidden_bomb,
    many_tensors,
    npy,
    npy_of,
    objects,
    overfull,
    overlapping,
    safetensors,
    saved,
    text_header,
    too_many_entries,
    torch_zip,
    wide,
    with_entry,
    zipped,
)

Where = Literal["header", "data"]


class Bad(NamedTuple):
    """A bad file: `where` says whether its header tells ("header") or only its entries, read to the end ("data")."""

    row: str
    build: Callable[[], bytes]
    status: int
    slug: str
    where: Where = "header"


_SIX = bytes(48)
_GOOD = Part("a.npy", saved(FLOATS))


def _array(row: str, build: Callable[[], bytes], where: Where = "header") -> Bad:
    return Bad(row, build, 400, "malformed-array", where)


def _archive(row: str, build: Callable[[], bytes], where: Where = "header") -> Bad:
    return Bad(row, build, 400, "malformed-archive", where)


def _media(row: str, build: Callable[[], bytes]) -> Bad:
    return Bad(row, build, 415, "unsupported-media-type")


def _dtype(row: str, build: Callable[[], bytes]) -> Bad:
    return Bad(row, build, 422, "unsupported-dtype")


def _shape(row: str, build: Callable[[], bytes]) -> Bad:
    return Bad(row, build, 422, "unsupported-shape")


BAD_NPY = [
    Bad("61: objects", objects, 422, "pickle-forbidden"),
    Bad("61: objects in a structure", lambda: npy_of((1, 1), _SIX, [("a", "|O")]), 422, "pickle-forbidden"),
    _array("65: magic only", lambda: b"\x93NUMPY"),
    _array("65: half the magic", lambda: b"\x93NU"),
    _array("65: no length", lambda: b"\x93NUMPY\1\0\x10"),
    _array("65: truncated header", lambda: saved(FLOATS)[:60]),
    _array("65: truncated data", lambda: saved(FLOATS)[:-1]),
    _array("66: trailing bytes", lambda: saved(FLOATS) + b"\0"),
    _array("66: trailing zip", lambda: saved(FLOATS) + zipped(_GOOD)),
    _array("67: version 9.9", lambda: npy(text_header(), _SIX, (9, 9))),
    _array("67: version 1.1", lambda: npy(text_header(), _SIX, (1, 1))),
    _array("69: 20 kB header", lambda: npy(text_header() + " " * 20_000, _SIX)),
    _array("70: header of 4 GB", lambda: npy(text_header(), _SIX, (2, 0), 2**32 - 1)),
    _array("71: 4000 brackets", lambda: npy(text_header(shape="(" * 4000), _SIX)),
    _array("71: 4000 closed brackets", lambda: npy(text_header(shape="(" * 4000 + ")" * 4000), _SIX)),
    _array("71: 4000 calls", lambda: npy(text_header(shape="()" * 4000), _SIX)),
    _array("72: 9000 minus signs", lambda: npy(text_header(shape=f"({'-' * 9000}1, 2)"), _SIX)),
    _array("72: a sum of 4000", lambda: npy(text_header(shape=f"({' -1' * 3000}, 2)"), _SIX)),
    _array("integer of 5000 digits", lambda: npy(text_header(shape=f"({'9' * 5000}, 2)"), _SIX)),
    _array("key twice", lambda: npy(text_header(shape="(1, 6), 'shape': (2, 3)"), _SIX)),
    _array("unknown key", lambda: npy(text_header(more="1"), _SIX)),
    _array("no shape", lambda: npy("{'descr': '<f8', 'fortran_order': False}", _SIX)),
    _array("not a dictionary", lambda: npy("'shape'", _SIX)),
    _array("empty header", lambda: npy("", _SIX)),
    _array("a mark for a value", lambda: npy(text_header(shape=":"), _SIX)),
    _array("more after the end", lambda: npy(text_header() + "1", _SIX)),
    _array("an expression", lambda: npy(text_header(shape="(2, 1+2)"), _SIX)),
    _array("a call", lambda: npy(text_header(shape="exit()"), _SIX)),
    _array("a side that is a bool", lambda: npy(text_header(shape="(2, True)"), bytes(16))),
    _array("order is no bool", lambda: npy_of((2, 3), _SIX, fortran=1)),
    _array("descr is a number", lambda: npy_of((2, 3), _SIX, 8)),
    _array("descr is nonsense", lambda: npy_of((2, 3), _SIX, "<<f8>>")),
    _array("descr with a NUL", lambda: npy(text_header(descr="'<f8\0'"), _SIX)),
    _array("header not UTF-8", lambda: npy(text_header().encode() + b"\xff", _SIX, (3, 0))),
    _dtype("77: |V2", lambda: npy_of((2, 3), bytes(12), "|V2")),
    _dtype("80: complex64", lambda: saved(FLOATS.astype(np.complex64))),
    _dtype("80: complex128", lambda: saved(FLOATS.astype(np.complex128))),
    _dtype("82: text", lambda: saved(FLOATS.astype("U3"))),
    _dtype("82: bytes", lambda: saved(FLOATS.astype("S3"))),
    _dtype("82: datetime", lambda: saved(np.zeros((2, 2), "M8[ns]"))),
    _dtype("82: timedelta", lambda: saved(np.zeros((2, 2), "m8[25s]"))),
    _dtype("82: structured", lambda: saved(np.zeros((2, 2), [("a", "<f4"), ("b", "<i4")]))),
    _dtype("82: sub-array", lambda: npy_of((2, 2), bytes(64), ("<f4", (2, 2)))),
    _shape("84: 0-d", lambda: saved(np.array(1.0))),
    _shape("84: 1-d", lambda: saved(np.ones(3))),
    _shape("87: 65-d", lambda: npy_of((1,) * 65, bytes(8))),
    _shape("89: (0, 2⁶²)", lambda: npy_of((0, 2**62))),
    _array("90: 10⁹ entries", lambda: npy_of((10**4, 10**5), _SIX)),
    _array("90: 10¹² entries", lambda: npy_of((10**6, 10**6), _SIX)),
    _array("91: 2³² × 2³²", lambda: npy_of((2**32, 2**32), b"")),
    _array("91: 3000 sides", lambda: npy(text_header(shape=f"({'9,' * 3000})"), _SIX)),
    _array("92: negative side", lambda: npy_of((-2, 3), _SIX)),
    _array("92: negative sides", lambda: npy_of((-2, -3), _SIX)),
    _array("side of 2⁶³", lambda: npy_of((0, 2**63))),
    Bad("94: NaN", lambda: with_entry(np.nan), 422, "non-finite-values", "data"),
    Bad("94: infinity", lambda: with_entry(np.inf), 422, "non-finite-values", "data"),
    Bad("94: minus infinity", lambda: with_entry(-np.inf), 422, "non-finite-values", "data"),
    Bad("99: a side too long", lambda: saved(np.zeros((1, 20_000), np.int8)), 413, "array-too-large"),
    Bad("99: kernels too long", lambda: saved(np.zeros((1, 2, 10_000), np.int8)), 413, "array-too-large"),
]

BAD_MEDIA = [
    _media("62: raw pickle", lambda: pickle.dumps(Canary())),
    _media("62: raw pickle, protocol 0", lambda: pickle.dumps(Canary(), 0)),
    _media("62: raw pickle, protocol 2", lambda: pickle.dumps(Canary(), 2)),
    _media("64: wrong magic", lambda: b"\x93NUMPX" + saved(FLOATS)[6:]),
    _media("64: text", lambda: b"1.0, 2.0\n3.0, 4.0\n"),
    _media("64: JSON", lambda: b"[[1.0, 2.0], [3.0, 4.0]]"),
    _media("64: PNG", lambda: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(30)),
    _media("64: HTML", lambda: b"<!DOCTYPE html><title>w</title>"),
    _media("64: gzip", lambda: b"\x1f\x8b\x08\0\0\0\0\0\0\3" + bytes(20)),
    _media("64: HDF5", lambda: b"\x89HDF\r\n\x1a\n\0\0\0\0" + bytes(20)),
    _media("122: raw pickle in torch's old format", lambda: pickle.dumps(0x1950A86A20F9469CFC6C, 2) + bytes(20)),
    _media("125: garbage", lambda: bytes(range(200, 256)) * 3),
    _array("125: empty", lambda: b""),
    _array("114: fewer than 8 bytes", lambda: b"\x10\0\0\0\0"),
    _array("114: 8 bytes", lambda: b"\x10" + bytes(7)),
    _archive("106: half the zip magic", lambda: b"PK\3"),
]

BAD_NPZ = [
    Bad("100: zip bomb", bomb, 413, "archive-too-large"),
    _archive("100: the stream is shorter than declared", hidden_bomb, "data"),
    _archive("100: the stream is longer than declared", lambda: overfull((100, 100)), "data"),
    _archive("100: a short stream is longer than declared", lambda: overfull((2, 3))),
    _archive("101: lying size", lambda: zipped(Part("a.npy", saved(FLOATS), deflated=True, local_size=9))),
    _archive("101: lying stored size", lambda: zipped(Part("a.npy", saved(FLOATS), size=1000))),
    _archive("101: lying CRC", lambda: zipped(Part("a.npy", saved(FLOATS), local_crc=9))),
    _archive("101: lying name", lambda: zipped(Part("a.npy", saved(FLOATS), local_name=b"b.npy"))),
    _archive("101: lying descriptor", lambda: zipped(
        Part("a.npy", saved(FLOATS), flags=8, local_crc=0, local_size=0, local_compressed=0, tail=bytes(16)))),
    _array("101: size against the .npy header", lambda: zipped(Part("a.npy", saved(FLOATS) + b"\0"))),
    Bad("102: 20 000 members", lambda: zipped(*(Part(f"{i}.npy") for i in range(20_000))), 413, "archive-too-large"),
    Bad("102: 257 members", lambda: zipped(*(Part(f"{i}.npy", saved(FLOATS)) for i in range(257))), 413,
        "archive-too-large"),
    _archive("102: lying count", lambda: zipped(_GOOD, count=9)),
    _archive("102: too low a count", lambda: zipped(_GOOD, Part("b.npy", saved(FLOATS)), count=1)),
    _archive("105: encrypted", lambda: zipped(Part("a.npy", saved(FLOATS), flags=1))),
    _archive("bzip2", lambda: zipped(Part("a.npy", saved(FLOATS), method=12))),
    _archive("106: truncated", lambda: zipped(_GOOD)[:-1]),
    _archive("106: only the start", lambda: zipped(_GOOD)[:40]),
    _archive("106: bad CRC", lambda: zipped(Part("a.npy", saved(FLOATS), crc=9)), "data"),
    _archive("106: bad CRC, deflated", lambda: zipped(Part("a.npy", saved(FLOATS), deflated=True, crc=9)), "data"),
    _archive("106: damaged stream", lambda: zipped(Part("a.npy", b"\xff" * 200, method=8, size=300))),
    Bad("107: nothing but notes", lambda: zipped(Part("README", b"hello")), 422, "no-matrices"),
    Bad("109: empty zip", zipped, 422, "no-matrices"),
    Bad("109: only vectors", lambda: zipped(Part("a.npy", saved(np.ones(3)))), 422, "no-matrices"),
    Bad("110: only objects", lambda: zipped(Part("a.npy", objects())), 422, "pickle-forbidden"),
    Bad("110: objects and a vector", lambda: zipped(Part("a.npy", objects()), Part("b.npy", saved(np.ones(3)))), 422,
        "pickle-forbidden"),
    Bad("110: two of them", lambda: zipped(Part("a.npy", objects()), Part("b.npy", objects())), 422, "no-matrices"),
    Bad("99: too many entries", too_many_entries, 413, "array-too-large"),
    _archive("111: overlap", overlapping),
    _archive("111: zip64 fields disagree", lambda: zipped(Part("a.npy", saved(FLOATS), central_extra=wide(1, 1)))),
    _archive("111: zip64 fields lack", lambda: zipped(Part("a.npy", saved(FLOATS), local_size=2**32 - 1))),
    _archive("111: local zip64 fields lie", lambda: zipped(
        Part("a.npy", saved(FLOATS), local_size=2**32 - 1, local_extra=wide(7)))),
    _archive("name twice", lambda: zipped(_GOOD, _GOOD)),
    _archive("one label for two", lambda: zipped(_GOOD, Part("a", b"x"))),
    _archive("prepended bytes", lambda: zipped(_GOOD, prefix=b"PK\3\4polyglot")),
    _archive("trailing bytes", lambda: zipped(_GOOD, suffix=b"\0")),
    _archive("a hole", lambda: zipped(Part("a.npy", saved(FLOATS), tail=b"hidden"))),
    _archive("name not UTF-8", lambda: zipped(Part(b"\xff.npy", saved(FLOATS), flags=0x800))),
    _archive("damaged extra field", lambda: zipped(Part("a.npy", saved(FLOATS), central_extra=b"\1\0\xff"))),
    _archive("zip64 fields of half a value", lambda: zipped(
        Part("a.npy", saved(FLOATS), central_extra=b"\1\0\4\0abcd"))),
    Bad("100: directory of 4.2 MB", lambda: zipped(*(Part(f"{i:060}".encode() * 700) for i in range(101))), 413,
        "archive-too-large"),
    _archive("4000 extra blocks", lambda: zipped(Part("a.npy", saved(FLOATS), central_extra=b"\2\0\0\0" * 4000))),
]  # fmt: skip

BAD_SAFETENSORS = [
    _array("112: overlap", lambda: safetensors({"a": entry(), "b": entry((2, 2), 8, 24)}, bytes(24))),
    _array("112: same range", lambda: safetensors({"a": entry(), "b": entry()}, bytes(16))),
    _array("112: hole", lambda: safetensors({"a": entry(), "b": entry((2, 2), 20, 36)}, bytes(36))),
    _array("112: hole in front", lambda: safetensors({"a": entry((2, 2), 4, 20)}, bytes(20))),
    _array("112: trailing", lambda: safetensors({"a": entry()}, bytes(17))),
    _array("112: short", lambda: safetensors({"a": entry()}, bytes(15))),
    _array("112: size against shape", lambda: safetensors({"a": entry((2, 3))}, bytes(16))),
    _array("112: end before begin", lambda: safetensors({"a": entry((2, 2), 16, 0)}, bytes(16))),
    _array("112: product overflows", lambda: safetensors({"a": entry((2**32, 2**32), 0, 0)})),
    _array("112: a million sides", lambda: safetensors({"a": entry([2**62] * 90_000, 0, 0)})),
    _array("114: header of 2⁶³", lambda: safetensors({"a": entry()}, bytes(16), 2**63)),
    _array("114: header of 200 MB", lambda: safetensors({"a": entry()}, bytes(16), 200_000_000)),
    _array("114: longer than the file", lambda: safetensors({"a": entry()}, bytes(16), 1000)),
    _array("114: header of 0", lambda: safetensors(b"", bytes(16))),
    Bad("114: header over our limit", lambda: safetensors(b"{" + b" " * 2**21 + b"}"), 413, "archive-too-large"),
    _array("115: not UTF-8", lambda: safetensors(b'{"\xff": 1}')),
    _array("115: not JSON", lambda: safetensors(b"{weights}")),
    _array("115: 50 000 deep", lambda: safetensors(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}")),
    _array("115: begins with a blank", lambda: safetensors(b' {"a": 1}')),
    _array("115: an array", lambda: safetensors(b"[1, 2, 3]")),
    _array("115: NaN", lambda: safetensors(b'{"a": NaN}')),
    _array("115: 5000 digits", lambda: safetensors(b'{"a": ' + b"9" * 5000 + b"}")),
    _array("116: key twice", lambda: safetensors(b'{"a": 1, "a": 1}')),
    _array("116: inner key twice", lambda: safetensors(b'{"a": {"dtype": "F32", "dtype": "F64"}}')),
    _array("entry is no object", lambda: safetensors({"a": [1]})),
    _array("unknown key", lambda: safetensors({"a": {**entry(), "more": 1}}, bytes(16))),
    _array("unknown dtype", lambda: safetensors({"a": entry(dtype="F31")}, bytes(16))),
    _array("dtype is a number", lambda: safetensors({"a": entry(dtype=32)}, bytes(16))),
    _array("shape of bools", lambda: safetensors({"a": entry([True, 4])}, bytes(16))),
    _array("shape of floats", lambda: safetensors({"a": entry([2.0, 2.0])}, bytes(16))),
    _array("negative side", lambda: safetensors({"a": entry([-2, -2])}, bytes(16))),
    _array("side of 2⁶³", lambda: safetensors({"a": entry([0, 2**63], 0, 0)})),
    _array("three offsets", lambda: safetensors({"a": {**entry(), "data_offsets": [0, 16, 16]}}, bytes(16))),
    _array("metadata of numbers", lambda: safetensors({"__metadata__": {"a": 1}})),
    _array("metadata is an array", lambda: safetensors({"__metadata__": []})),
    _dtype("117: F4 alone", lambda: safetensors({"a": entry((2, 4), 0, 4, "F4")}, bytes(4))),
    _dtype("117: F6 alone", lambda: safetensors({"a": entry((2, 4), 0, 6, "F6_E2M3")}, bytes(6))),
    _dtype("117: complex alone", lambda: safetensors({"a": entry((2, 1), 0, 16, "C64")}, bytes(16))),
    Bad("120: no tensors", lambda: safetensors({}), 422, "no-matrices"),
    Bad("120: only metadata", lambda: safetensors({"__metadata__": {"a": "b"}}), 422, "no-matrices"),
    Bad("120: 0-d", lambda: safetensors({"a": entry([], 0, 4)}, bytes(4)), 422, "no-matrices"),
    Bad("120: empty", lambda: safetensors({"a": entry([0, 4], 0, 0)}), 422, "no-matrices"),
    Bad("only integers", lambda: safetensors({"a": entry(dtype="I32")}, bytes(16)), 422, "no-matrices"),
    Bad("99: one too large", lambda: safetensors({"a": entry([1, 20_000], 0, 80_000)}, bytes(80_000)), 413,
        "array-too-large"),
    Bad("130: 10 001 tensors", many_tensors, 413, "archive-too-large"),
]  # fmt: skip

BAD_TORCH = [
    Bad("124: TorchScript", lambda: torch_zip(Part("archive/constants.pkl", b"\x80\2).")), 422, "unsafe-checkpoint"),
    Bad("124: code", lambda: torch_zip(Part("archive/code/__torch__.py", b"pass")), 422, "unsafe-checkpoint"),
    _archive("125: truncated", lambda: torch_zip(Part("archive/data/0", bytes(64)))[:-30]),
    Bad("127: deflated", lambda: torch_zip(Part("archive/data/0", bytes(10**6), deflated=True)), 413,
        "archive-too-large"),
    Bad("127: deflated pickle", lambda: zipped(Part("data.pkl", b"\x80\2}.", deflated=True)), 413,
        "archive-too-large"),
    Bad("130: 10 101 members", lambda: torch_zip(*(Part(f"archive/data/{i}", b"1234") for i in range(10_100))), 413,
        "archive-too-large"),
    Bad("pickle of 33 MiB", lambda: zipped(Part("a/data.pkl", bytes(33 * 2**20))), 413, "archive-too-large"),
    _dtype("big-endian", lambda: torch_zip(Part("archive/byteorder", b"big"))),
]  # fmt: skip

BAD = BAD_MEDIA + BAD_NPY + BAD_NPZ + BAD_SAFETENSORS
"""Whatever the settings; BAD_TORCH is where PyTorch checkpoints are allowed."""
