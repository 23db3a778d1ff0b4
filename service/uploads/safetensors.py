"""safetensors: the header's length, a JSON header, and a buffer that the tensors fill without hole or overlap."""

from typing import Any, BinaryIO

from service.dtypes import DTYPES
from service.errors import ArchiveTooLarge, MalformedArray, MalformedJson, UnsupportedDtype, UploadError
from service.strictjson import parse_json
from service.uploads.checks import MAX_AXES, MAX_INT, count_entries, excerpt, figure, label, read_at, shape_refusal
from service.uploads.model import Limits, Place, Tensor

FORMAT_HEADER = 100_000_000  # The format's own bound.
MAX_HEADER = 2 * 2**20  # 10 000 tensors with names of 100 characters; parsed, it takes up to 30 times that in memory.

_DTYPES = {dtype.code: dtype for dtype in DTYPES.values() if dtype.code}


def inspect(file: BinaryIO, size: int, limits: Limits) -> tuple[Tensor, ...]:
    """The tensors in the order of the file; raises what is wrong with the file as a whole."""
    header, start = _read_header(file, size)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedArray("__metadata__ is not an object of texts")
    if len(header) > limits.tensors:
        raise ArchiveTooLarge(f"the file has {len(header)} tensors, the limit is {limits.tensors}")
    tensors = [_tensor(name, entry, start, limits) for name, entry in header.items()]
    places = sorted((place.start, place.size) for _, place in tensors)
    _check_tiling(places, start, size)
    tensors.sort(key=lambda pair: (pair[1].start, pair[1].size))
    return tuple(tensor for tensor, _ in tensors)


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where the buffer starts."""
    length = int.from_bytes(read_at(file, 0, 8), "little")
    if not 2 <= length <= FORMAT_HEADER:
        raise MalformedArray(f"the safetensors header has {figure(length)} bytes, not 2 to {FORMAT_HEADER}")
    if 8 + length > size:
        raise MalformedArray(f"the file ends within its safetensors header of {length} bytes")
    if length > MAX_HEADER:
        raise ArchiveTooLarge(f"the safetensors header has {length} bytes, the limit is {MAX_HEADER}")
    text = read_at(file, 8, length)
    if not text.startswith(b"{"):
        raise MalformedArray("the safetensors header does not begin with {")
    try:
        header: dict[str, Any] = parse_json(text)
    except MalformedJson as error:
        raise MalformedArray(f"the safetensors header is not strict JSON: {excerpt(error.detail)}") from None
    return header, 8 + length


def _tensor(name: str, entry: object, start: int, limits: Limits) -> tuple[Tensor, Place]:
    shown = label(name)
    dtype, shape, begin, end = _fields(entry, excerpt(name))
    declared = (count_entries(shape) * _DTYPES[dtype].bits + 7) // 8
    if end - begin != declared:
        raise MalformedArray(f"{excerpt(name)}: {dtype} of its shape is {figure(declared)} bytes, not {end - begin}")
    place = Place(start + begin, end - begin)
    refusal = _dtype_refusal(dtype) or shape_refusal(shape, limits)
    kept = shape if len(shape) <= MAX_AXES else None
    return Tensor(shown, _DTYPES[dtype].name, kept, place, refusal=refusal), place


def _fields(entry: object, name: str) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of an entry of the header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedArray(f"{name} has not exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MalformedArray(f"{name} has a dtype that safetensors does not know")
    if not _are_sizes(shape) or not _are_sizes(offsets):
        raise MalformedArray(f"the shape and data_offsets of {name} are not lists of integers in [0, 2⁶³)")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MalformedArray(f"the data_offsets of {name} are not a begin and an end")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_INT for value in values)


def _dtype_refusal(dtype: str) -> UploadError | None:
    if _DTYPES[dtype].kind == "integer":
        return UnsupportedDtype("integers: an index or a buffer, no weight")
    if _DTYPES[dtype].kind == "other":
        return UnsupportedDtype(f"entries of type {dtype} are not analysed; F64, F32, F16, BF16 and F8 are")
    return None


def _check_tiling(places: list[tuple[int, int]], start: int, size: int) -> None:
    """Raise unless the places, in order, fill the buffer from `start` to the end of the file."""
    position = start
    for begin, length in places:
        if begin != position:
            fault = "overlaps" if begin < position else "leaves a hole before"
            raise MalformedArray(f"the tensor at byte {begin} {fault} what the header puts at byte {position}")
        position += length
    if position != size:
        raise MalformedArray(f"the tensors end at byte {position}, the file at byte {size}")
