"""Untrusted bytes → a checked list of tensors. Nothing is unpickled, allocated or inflated beyond its header here."""

import re
from typing import BinaryIO

from service.errors import MalformedArchive, MalformedArray, UnsupportedMediaType
from service.uploads import archive, checkpoint, npy, npz, safetensors
from service.uploads.checks import read_at, require_distinct, require_matrix
from service.uploads.model import Format, Limits, Matricize, Place, Tensor, Upload

__all__ = ["Format", "Limits", "Matricize", "Place", "Tensor", "Upload", "inspect"]

_ZIP = (b"PK\3\4", b"PK\5\6")
_PICKLE_OR_GZIP = re.compile(rb"\x80[\2-\5][^\0]|\x1f\x8b\x08", re.DOTALL)


def inspect(file: BinaryIO, size: int, limits: Limits) -> Upload:
    """The tensors of a file of `size` bytes, whose format its first bytes tell.

    Raises an UploadError, TorchDisabled, or UnsupportedMediaType. A tensor that is bad among others is listed with its
    `refusal`. What only the entries can tell (a bad CRC, NaN) is left to whoever reads them all.
    """
    first = read_at(file, 0, 9)
    if first.startswith(npy.MAGIC):
        return Upload("npy", (npy.inspect(file, size, limits),))
    if first.startswith(_ZIP):
        return _inspect_zip(file, size, limits)
    if len(first) < 9:
        raise _too_short(first)
    if not _may_be_safetensors(first):
        raise UnsupportedMediaType(
            "the bytes are none of the formats that are read: .npy, .npz, safetensors, PyTorch's zip format"
        )
    return Upload("safetensors", _usable(safetensors.inspect(file, size, limits), MalformedArray))


def _inspect_zip(file: BinaryIO, size: int, limits: Limits) -> Upload:
    members = archive.members(file, size, limits)
    top = checkpoint.find_top(members)
    if top is None:
        return Upload("npz", _usable(npz.inspect(file, members, limits), MalformedArchive))
    checkpoint.check(file, members, top, limits)
    return Upload("torch", ())


def _usable(tensors: tuple[Tensor, ...], malformed: type[MalformedArray | MalformedArchive]) -> tuple[Tensor, ...]:
    """The tensors; raises if two have one name (`a` and `a.npy` would) or if none is left to analyse."""
    require_distinct(tensors, malformed)
    require_matrix(tensors)
    return tensors


def _too_short(first: bytes) -> MalformedArray | MalformedArchive:
    """What a file of fewer than 9 bytes is, that begins no format in full."""
    if first and any(magic.startswith(first) for magic in _ZIP):
        return MalformedArchive(f"the archive ends after {len(first)} bytes")
    if first and npy.MAGIC.startswith(first):
        return MalformedArray(f"the .npy ends after {len(first)} bytes")
    return MalformedArray(f"the file has {len(first)} bytes, too short to be any format")


def _may_be_safetensors(first: bytes) -> bool:
    """Whether a header's length may come first; no text and no picture has three zeros at bytes 5 to 7.

    A raw pickle can (its frame's length is there) and so can gzip (its time), but only where a header would be of
    64 KiB and more.
    """
    if first[8:9] == b"{":
        return True
    return first[5:8] == bytes(3) and not _PICKLE_OR_GZIP.match(first)
