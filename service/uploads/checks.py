"""Rules that every format shares: how a name is shown, how large a matrix may be, what is left when nothing is left."""

import hashlib
from collections.abc import Sequence
from typing import BinaryIO, TypeVar

from service.errors import (
    ArrayTooLarge,
    MalformedArchive,
    MalformedArray,
    NoMatrices,
    UnsupportedDtype,
    UnsupportedShape,
    UploadError,
)
from service.uploads.model import Limits, Tensor

MAX_AXES = 64  # numpy's own bound
MAX_INT = 2**63  # Sizes from here on fit no file, and no integer of a database.
SHOWN = 60
LABEL = 500
LISTED = 20
Refusal = TypeVar("Refusal", bound=UploadError)


def read_at(file: BinaryIO, start: int, count: int) -> bytes:
    """The `count` bytes at `start`, fewer at the end of the file."""
    file.seek(start)
    return file.read(count)


def escaped(text: str) -> str:
    """Injective and printable: the backslash, controls, direction marks and lone surrogates become escapes."""
    return "".join(
        character if character.isprintable() and character != "\\" else character.encode("unicode_escape").decode()
        for character in text
    )


def label(name: str) -> str:
    """What a foreign name is called here; a long one is cut, and told from its like by the start of its SHA-256."""
    shown = escaped(name[: LABEL + 1])  # Escaping all of a name of megabytes takes half a second.
    if len(shown) <= LABEL:
        return shown
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{shown[:480]}…{digest[:8]}"


def excerpt(text: str) -> str:
    """The start of a foreign text, fit for a message."""
    return _cut(escaped(text[: SHOWN + 1]))


def _cut(shown: str) -> str:
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 1]}…"


def count_entries(shape: tuple[int, ...]) -> int:
    """The product of the sides, exact below 2⁶³; a larger one is only known to be at least that.

    A header of 2 MiB has room for a million sides, whose exact product takes minutes.
    """
    if 0 in shape:
        return 0
    product = 1
    for side in shape:
        product *= side
        if product >= MAX_INT:
            break
    return product


def figure(count: int) -> str:
    """A count for a message; one of any length would pass Python's own limit on digits."""
    return str(count) if count < MAX_INT else "more than 9·10¹⁸"


def shape_refusal(shape: tuple[int, ...], limits: Limits) -> UploadError | None:
    """Why an array of this shape is not analysed, if it is not."""
    if len(shape) > 2 and limits.matricize == "none":
        return UnsupportedShape(f"the array has {len(shape)} axes; matricize=auto reads it as (first) × (all others)")
    if not 2 <= len(shape) <= MAX_AXES:
        return UnsupportedShape(f"the array has {len(shape)} axes, not 2 to {MAX_AXES}")
    if 0 in shape:
        return UnsupportedShape("the array is empty")
    rows, columns = shape[0], count_entries(shape[1:])
    if max(rows, columns) > limits.side:
        sides = f"{figure(rows)} × {figure(columns)}"
        return ArrayTooLarge(f"the matrix is {sides}, the limit is {limits.side} a side")
    if rows * columns > limits.entries:
        return ArrayTooLarge(f"the matrix has {rows * columns} entries, the limit is {limits.entries}")
    return None


def quietly(refusal: Refusal) -> Refusal:
    """The refusal without the frames in which it was raised: kept in a tensor it would keep all that they held."""
    refusal.__context__ = None
    return refusal.with_traceback(None)


def require_distinct(tensors: Sequence[Tensor], malformed: type[MalformedArray | MalformedArchive]) -> None:
    """Raise if two tensors have one name, as `a` and `a.npy` would."""
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise malformed("two tensors have names that are shown alike")


def require_matrix(tensors: Sequence[Tensor]) -> None:
    """Raise if no tensor is left to analyse: the one fault there is, or else that there is no matrix."""
    if not all(tensor.refusal for tensor in tensors):
        return
    faults = [(tensor, tensor.refusal) for tensor in tensors if tensor.refusal and _is_fault(tensor)]
    if len(faults) == 1:
        tensor, refusal = faults[0]
        raise type(refusal)(f"{_cut(tensor.name)}: {refusal.detail}")
    skipped = [
        {"name": tensor.name, "reason": tensor.refusal.kind, "detail": tensor.refusal.detail}
        for tensor in tensors[:LISTED]
        if tensor.refusal
    ]
    listed = f"; `skipped` lists the first {LISTED}" if len(tensors) > LISTED else ""
    raise NoMatrices(f"none of the {len(tensors)} parts of the file is a matrix to analyse{listed}", skipped=skipped)


def _is_fault(tensor: Tensor) -> bool:
    """Whether a lone refusal is what is wrong with the file: biases, indices and notes are in it by right."""
    if isinstance(tensor.refusal, UnsupportedDtype):
        return not tensor.dtype.startswith(("int", "uint", "bool"))
    return not isinstance(tensor.refusal, UnsupportedShape | NoMatrices)
