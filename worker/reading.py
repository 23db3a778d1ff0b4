"""A checked tensor's entries, from the file to a float64 matrix: in pieces, so that one matrix is all that is held."""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from service.dtypes import DTYPES, item_bytes
from service.errors import MalformedArchive, NonFiniteValues
from service.lowrank.ranks import Array
from service.uploads import Place, Tensor

PIECE = 1 << 20  # Bytes at a time.
EXACT = 2**53  # Integers beyond it need not be float64 numbers.
SAFE_EXPONENT = 400  # Squares of entries below 2^400, and above 2^-400, are float64 numbers, and so are their sums.


@dataclass(frozen=True)
class Matrix:
    """values·2^exponent is the tensor as a matrix, (m, n) in float64; `notes` say what was done to it."""

    values: torch.Tensor
    exponent: int
    notes: tuple[str, ...]


def read_matrix(path: Path, tensor: Tensor, base: tuple[Path, Tensor] | None = None) -> Matrix:
    """The tensor, or what is left of it when the base's is subtracted. Raises MalformedArchive, NonFiniteValues."""
    values = np.zeros(tensor.matrix_shape)
    n_rounded = _add(values, path, tensor, sign=1)
    if base is not None:
        _add(values, *base, sign=-1)
    exponent = int(np.frexp(_largest(values, tensor))[1])
    if abs(exponent) <= SAFE_EXPONENT:
        exponent = 0
    else:
        np.ldexp(values, -exponent, out=values)
    return Matrix(torch.from_numpy(values), exponent, tuple(_notes(tensor, n_rounded, exponent)))


def raw_bytes(path: Path, tensor: Tensor) -> Iterator[bytes]:
    """The entries as they are stored, but little-endian and in C order. Raises MalformedArchive."""
    size = item_bytes(tensor.dtype)
    for piece in _rows(path, tensor) if tensor.fortran else _pieces(path, tensor, size):
        yield np.frombuffer(piece, np.uint8).reshape(-1, size)[:, :: -1 if tensor.big_endian else 1].tobytes()


def _rows(path: Path, tensor: Tensor) -> Iterator[bytes]:
    """The entries of a tensor in Fortran order, in C order; they are held once."""
    size, whole = item_bytes(tensor.dtype), bytearray()
    for piece in _pieces(path, tensor, size):
        whole += piece
    array = np.frombuffer(whole, f"V{size}").reshape(tensor.shape or (-1,), order="F")
    step = max(PIECE * len(array) // max(len(whole), 1), 1)
    for start in range(0, len(array), step):
        yield array[start : start + step].tobytes()


def _add(values: Array, path: Path, tensor: Tensor, sign: int) -> int:
    """Add the tensor's entries to a matrix of its shape; the answer counts integers that float64 may have rounded."""
    m, n = values.shape
    # In Fortran order a piece is of whole columns, which stand in the order of the other axes reversed.
    order = np.arange(n).reshape(tensor.shape[1:] if tensor.shape else n).ravel(order="F")
    unit = m if tensor.fortran else 1
    done = n_rounded = 0
    for data in _pieces(path, tensor, unit * item_bytes(tensor.dtype)):
        entries = _decoded(data, tensor)
        if entries.dtype.kind in "iu" and entries.dtype.itemsize == 8:
            n_rounded += int(np.count_nonzero((entries > EXACT) | (entries < -EXACT)))
        with np.errstate(over="ignore", invalid="ignore"):  # What does not fit shows as infinite.
            numbers = sign * entries.astype(np.float64)
            end = done + len(entries)
            if tensor.fortran:
                values[:, order[done // m : end // m]] += numbers.reshape(-1, m).T
            else:
                values.reshape(-1)[done:end] += numbers
        done = end
    return n_rounded


def _decoded(data: bytes, tensor: Tensor) -> NDArray[Any]:
    if not DTYPES[tensor.dtype].in_numpy:
        narrow = torch.frombuffer(bytearray(data), dtype=getattr(torch, tensor.dtype))
        return narrow.to(torch.float64).numpy()
    return np.frombuffer(data, np.dtype(tensor.dtype).newbyteorder(">" if tensor.big_endian else "<"))


def _pieces(path: Path, tensor: Tensor, unit: int) -> Iterator[bytes]:
    """The bytes of the entries, each piece but the last a multiple of `unit` long."""
    assert tensor.place is not None  # noqa: S101 - only a tensor that has one is read
    if tensor.strides is not None:
        yield from _strided(path, tensor)
        return
    skip, buffer, most = tensor.place.skip, bytearray(), max(PIECE // unit, 1) * unit
    with path.open("rb") as file:
        for piece in _stream(file, tensor.place, tensor.place.skip + _size(tensor)):
            buffer += piece[skip:]
            skip = max(skip - len(piece), 0)
            while len(buffer) >= most:
                yield bytes(buffer[:most])
                del buffer[:most]
    if buffer:
        yield bytes(buffer)


def _strided(path: Path, tensor: Tensor) -> Iterator[bytes]:
    """A view into a storage, a row of its first axis at a time, in C order."""
    assert tensor.place is not None  # noqa: S101
    size = item_bytes(tensor.dtype)
    storage = np.memmap(path, f"V{size}", "r", tensor.place.start, (tensor.place.size // size,))
    strides = [size * stride for stride in tensor.strides or ()]
    for row in np.lib.stride_tricks.as_strided(storage, tensor.shape, strides, writeable=False):
        yield row.tobytes()


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape or ()) * item_bytes(tensor.dtype)


def _stream(file: BinaryIO, place: Place, expected: int) -> Iterator[bytes]:
    """Header and entries, inflated; no more than `expected` bytes are ever made. Raises MalformedArchive."""
    crc = length = 0
    for piece in _inflated(file, place) if place.deflated else _stored(file, place):
        length += len(piece)
        if length > expected:
            break
        crc = zlib.crc32(piece, crc)
        yield piece
    if length != expected:
        raise MalformedArchive(
            f"the member inflates to {'more' if length > expected else 'less'} than {expected} bytes"
        )
    if place.crc is not None and crc != place.crc:
        raise MalformedArchive(f"the member's CRC-32 is {crc:08x}, its directory says {place.crc:08x}")


def _stored(file: BinaryIO, place: Place) -> Iterator[bytes]:
    file.seek(place.start)
    left = place.size
    while left and (piece := file.read(min(PIECE, left))):
        left -= len(piece)
        yield piece


def _inflated(file: BinaryIO, place: Place) -> Iterator[bytes]:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        for piece in _stored(file, place):
            yield inflater.decompress(piece, PIECE)
            while inflater.unconsumed_tail:
                yield inflater.decompress(inflater.unconsumed_tail, PIECE)
        yield inflater.flush()
        if not inflater.eof or inflater.unused_data:
            raise MalformedArchive("the member's stream ends early, or has bytes after its end")
    except zlib.error as error:
        raise MalformedArchive(f"the member cannot be inflated: {error}") from None


def _largest(values: Array, tensor: Tensor) -> float:
    """The largest magnitude, by blocks of rows. Raises NonFiniteValues with the count and the first place."""
    m, n = values.shape
    rows = max(PIECE // (8 * n), 1)
    blocks = [values[i : i + rows] for i in range(0, m, rows)]
    largest = float(np.max([np.abs(block).max() for block in blocks]))
    if np.isfinite(largest):
        return largest
    total = sum(np.count_nonzero(~np.isfinite(block)) for block in blocks)
    first = next(i * n + int(np.argmin(np.isfinite(values[i]))) for i in range(m) if not np.isfinite(values[i]).all())
    index = [int(place) for place in np.unravel_index(first, tensor.shape or (m, n))]
    raise NonFiniteValues(f"{total} of {values.size} entries are not finite in float64, the first at {index}")


def _notes(tensor: Tensor, n_rounded: int, exponent: int) -> Iterator[str]:
    if tensor.shape is not None and len(tensor.shape) > 2:
        m, n = tensor.matrix_shape
        yield f"read as a {m}×{n} matrix: the first axis by all others"
    if tensor.dtype != "float64":
        yield f"stored as {tensor.dtype}, computed in float64"
    if n_rounded:
        yield f"{n_rounded} integers beyond ±2^53: float64 may have rounded them"
    if exponent:
        yield f"scaled by 2^{-exponent} while it was computed"
