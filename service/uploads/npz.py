""".npz: a zip of .npy members. A bad member is refused alone and harms no other."""

import zlib
from typing import BinaryIO

from service.errors import ArchiveTooLarge, MalformedArchive, NoMatrices
from service.uploads import npy
from service.uploads.archive import Member
from service.uploads.checks import label, quietly, read_at
from service.uploads.model import Limits, Place, Tensor

_SUFFIX = ".npy"


def inspect(file: BinaryIO, members: tuple[Member, ...], limits: Limits) -> tuple[Tensor, ...]:
    """The tensors of a zip file whose directory has been checked; of a member only the header is inflated."""
    if len(members) > limits.members:
        raise ArchiveTooLarge(f"the .npz has {len(members)} members, the limit is {limits.members}")
    return tuple(_tensor(file, member, limits) for member in members)


def _tensor(file: BinaryIO, member: Member, limits: Limits) -> Tensor:
    if not member.name.endswith(_SUFFIX):
        return Tensor(label(member.name), refusal=NoMatrices("it is not a .npy member"))
    name = label(member.name.removesuffix(_SUFFIX))
    try:
        prefix = _prefix(file, member)
    except MalformedArchive as error:
        return Tensor(name, refusal=quietly(error))
    stream = Place(member.start, member.compressed, deflated=member.deflated, crc=member.crc)
    return npy.describe(name, prefix, stream, member.size, limits)


def _prefix(file: BinaryIO, member: Member) -> bytes:
    """The first bytes of a member; raises MalformedArchive if they cannot be inflated or are more than it declares."""
    # A header that needs more input than output was not written by a compressor.
    stored = read_at(file, member.start, min(member.compressed, npy.PREFIX + 1000))
    if not member.deflated:
        return stored[: npy.PREFIX]
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(stored, npy.PREFIX)
    except zlib.error:
        raise MalformedArchive("its compressed bytes are damaged") from None
    if len(inflated) > member.size:
        raise MalformedArchive(f"it inflates to more than the {member.size} bytes that it declares")
    return inflated
