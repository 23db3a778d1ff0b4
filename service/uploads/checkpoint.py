"""PyTorch's zip format, from outside: what can be refused without a look into the pickle. The job finds the tensors."""

import re
from typing import BinaryIO

from service.errors import ArchiveTooLarge, MalformedArchive, TorchDisabled, UnsafeCheckpoint, UnsupportedDtype
from service.uploads import archive
from service.uploads.archive import Member
from service.uploads.checks import excerpt, read_at
from service.uploads.model import Limits

MAX_PICKLE = 32 * 2**20  # A checkpoint of 10 000 tensors has about 2 MB; unpickled, it takes some ten times its size.

_PICKLE = re.compile(r"(?:([^/]*)/)?data\.pkl")


def find_top(members: tuple[Member, ...]) -> str | None:
    """The prefix of all members' names ("archive/" or "") if this is a PyTorch checkpoint, else None."""
    for member in members:
        if match := _PICKLE.fullmatch(member.name):
            return "" if match[1] is None else f"{match[1]}/"
    return None


def check(file: BinaryIO, members: tuple[Member, ...], top: str, limits: Limits) -> None:
    """Raise unless the job may try to read the checkpoint."""
    if not limits.torch:
        raise TorchDisabled("PyTorch checkpoints are not taken here; save the tensors with safetensors and send those")
    named = {member.name: member for member in members}
    if f"{top}constants.pkl" in named or any(name.startswith(f"{top}code/") for name in named):
        raise UnsafeCheckpoint("the file is a TorchScript archive, which holds code; save a state_dict instead")
    for member in members:
        if member.deflated:
            raise ArchiveTooLarge(f"the member {excerpt(member.name)} is compressed; torch.save writes stored members")
    pickle = named[f"{top}data.pkl"]
    if pickle.size > MAX_PICKLE:
        raise ArchiveTooLarge(f"data.pkl has {pickle.size} bytes, the limit is {MAX_PICKLE}")
    order = named.get(f"{top}byteorder")
    if order and read_at(file, order.start, min(order.size, 16)) != b"little":
        raise UnsupportedDtype("the checkpoint was not written on a little-endian machine; send it as safetensors")


def storages(file: BinaryIO, size: int, limits: Limits) -> dict[int, int]:
    """Where in the file each member's bytes start → how many there are, for a checkpoint that passes `check`."""
    members = archive.members(file, size, limits)
    top = find_top(members)
    if top is None:
        raise MalformedArchive("the archive has no data.pkl")
    check(file, members, top, limits)
    return {member.start: member.size for member in members}
