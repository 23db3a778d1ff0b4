"""The directory of a zip file, read strictly: what two readers could read differently is refused.

The members must fill the bytes before the directory exactly, each must repeat in its own header what the directory
says of it, and nothing may follow the end record. The number of members and the size of the directory are bounded
before the directory is read, the declared sizes before any member is.
"""

import struct
from dataclasses import astuple, dataclass, replace
from typing import BinaryIO

from service.errors import ArchiveTooLarge, MalformedArchive
from service.uploads.checks import excerpt, figure, read_at
from service.uploads.model import Limits

MAX_DIRECTORY = 4 * 2**20  # Parsed, it takes about ten times that in memory.
MAX_EXTRAS = 16  # Blocks in the extra field of a member, which has room for 16 000.

_END = struct.Struct("<4s4H2LH")
_WIDE_LOCATOR = struct.Struct("<4sLQL")
_WIDE_END = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<L6H3L5H2L")
_LOCAL = struct.Struct("<L5H3L2H")
_ENTRY_MAGIC = int.from_bytes(b"PK\1\2", "little")
_LOCAL_MAGIC = int.from_bytes(b"PK\3\4", "little")
_16, _32 = 0xFFFF, 0xFFFFFFFF  # "see the zip64 field instead"
_ENCRYPTED, _DESCRIPTOR, _UTF8 = 0x1, 0x8, 0x800
_FLAGS = _DESCRIPTOR | _UTF8 | 0x6  # 0x6: how hard the compressor tried
_METHODS = {0: False, 8: True}


@dataclass(frozen=True)
class Member:
    """A member as the directory has it; `start` is where its bytes begin in the file."""

    name: str
    raw_name: bytes
    flags: int
    deflated: bool
    crc: int
    compressed: int
    size: int
    header: int
    start: int = 0


@dataclass(frozen=True)
class _Directory:
    count: int
    size: int
    start: int


def members(file: BinaryIO, size: int, limits: Limits) -> tuple[Member, ...]:
    """The members of a zip file of `size` bytes, in the order of its directory, every claim checked."""
    directory = _find_directory(file, size)
    limit = max(limits.members, limits.tensors + 100)
    if directory.count > limit:
        raise ArchiveTooLarge(f"the archive has {directory.count} members, the limit is {limit}")
    if directory.size > MAX_DIRECTORY:
        raise ArchiveTooLarge(f"the directory has {directory.size} bytes, the limit is {MAX_DIRECTORY}")
    entries = _parse_directory(read_at(file, directory.start, directory.size), directory.count)
    declared = sum(entry.size for entry in entries)
    if declared > limits.inflated:
        raise ArchiveTooLarge(f"the members declare {figure(declared)} bytes in all, the limit is {limits.inflated}")
    if len({entry.name for entry in entries}) < len(entries):
        raise MalformedArchive("two members have the same name")
    starts = _check_tiling(file, entries, directory.start)
    return tuple(replace(entry, start=start) for entry, start in zip(entries, starts, strict=True))


def _find_directory(file: BinaryIO, size: int) -> _Directory:
    """The directory that the end record names; it must reach up to that record."""
    at = size - _END.size
    if at < 0:
        raise MalformedArchive("the archive is cut off: it has no end record")
    end = _END.unpack(_read(file, at, _END.size))
    if end[0] != b"PK\5\6" or end[7] != 0:
        raise MalformedArchive("the archive is cut off, or something follows its end record")
    if end[1] or end[2] or end[3] != end[4]:
        raise MalformedArchive("the archive is a part of several")
    directory, stop = _widen_end(file, at, _Directory(*end[4:7]))
    if directory.start + directory.size != stop:
        raise MalformedArchive("the directory is not where the end record says, or something precedes the archive")
    return directory


def _widen_end(file: BinaryIO, end: int, narrow: _Directory) -> tuple[_Directory, int]:
    """The directory by the zip64 end record if there is one, and where the first of the end records begins."""
    locator = read_at(file, max(end - _WIDE_LOCATOR.size, 0), _WIDE_LOCATOR.size)
    sentinels = (_16, _32, _32)
    if not locator.startswith(b"PK\6\7"):
        if any(value == sentinel for value, sentinel in zip(astuple(narrow), sentinels, strict=True)):
            raise MalformedArchive("the end record refers to a zip64 record that is not there")
        return narrow, end
    wide, start = _wide_end(file, end, locator)
    for value, wide_value, sentinel in zip(astuple(narrow), astuple(wide), sentinels, strict=True):
        if value not in (wide_value, sentinel):
            raise MalformedArchive("the zip64 end record disagrees with the end record")
    return wide, start


def _wide_end(file: BinaryIO, end: int, locator: bytes) -> tuple[_Directory, int]:
    """The directory by the zip64 end record, and where that record begins."""
    _, disk, at, disks = _WIDE_LOCATOR.unpack(locator)
    if disk or disks != 1 or at + _WIDE_END.size != end - _WIDE_LOCATOR.size:
        raise MalformedArchive("the zip64 end record is not where its locator says")
    record = _WIDE_END.unpack(_read(file, at, _WIDE_END.size))
    if record[0] != b"PK\6\6" or record[1] != _WIDE_END.size - 12:
        raise MalformedArchive("the zip64 end record is damaged")
    if record[4] or record[5] or record[6] != record[7]:
        raise MalformedArchive("the archive is a part of several")
    return _Directory(*record[7:]), at


def _parse_directory(directory: bytes, count: int) -> list[Member]:
    """The directory's entries, which must fill it exactly."""
    entries, position = [], 0
    for _ in range(count):
        if position + _ENTRY.size > len(directory):
            raise MalformedArchive("the directory ends within an entry")
        fields = _ENTRY.unpack_from(directory, position)
        position += _ENTRY.size
        lengths = fields[10:13]
        texts = directory[position : position + sum(lengths)]
        position += sum(lengths)
        if fields[0] != _ENTRY_MAGIC or position > len(directory):
            raise MalformedArchive("an entry of the directory is damaged")
        entries.append(_entry(fields, texts[: lengths[0]], texts[lengths[0] : lengths[0] + lengths[1]]))
    if position != len(directory):
        raise MalformedArchive("the directory has other bytes than its entries")
    return entries


def _entry(fields: tuple[int, ...], raw_name: bytes, extra: bytes) -> Member:
    """One entry of the directory; raises MalformedArchive for what is not read."""
    flags, method, crc = fields[3], fields[4], fields[7]
    size, compressed, header = _widen(extra, (fields[9], fields[8], fields[16]))
    if flags & _ENCRYPTED:
        raise MalformedArchive("a member is encrypted")
    if flags & ~_FLAGS or fields[13]:
        raise MalformedArchive("a member is patched, masked, or on another disk")
    if method not in _METHODS:
        raise MalformedArchive(f"a member is compressed by method {method}; stored and deflated ones are read")
    if not _METHODS[method] and compressed != size:
        raise MalformedArchive(f"a stored member of {compressed} bytes declares {size}")
    try:
        name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        raise MalformedArchive("the name of a member is not UTF-8, as its flag says") from None
    return Member(name, raw_name, flags, _METHODS[method], crc, compressed, size, header)


def _widen(extra: bytes, narrow: tuple[int, ...]) -> tuple[int, ...]:
    """The fields, those that say so replaced by their zip64 values, of which there must be exactly that many."""
    wide = _wide_values(extra)
    if narrow.count(_32) != len(wide):
        raise MalformedArchive("the zip64 fields of a member disagree with its others")
    values = iter(wide)
    return tuple(next(values) if value == _32 else value for value in narrow)


def _wide_values(extra: bytes) -> tuple[int, ...]:
    """The values of the one zip64 block among the extra blocks."""
    found, position = [], 0
    for _ in range(MAX_EXTRAS):
        if position + 4 > len(extra):
            break
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4 + length
        if kind == 1:
            found.append(extra[position - length : position])
    if position != len(extra):
        raise MalformedArchive("the extra field of a member is damaged")
    if len(found) > 1 or (found and len(found[0]) % 8):
        raise MalformedArchive("the zip64 fields of a member are damaged")
    return struct.unpack(f"<{len(found[0]) // 8}Q", found[0]) if found else ()


def _check_tiling(file: BinaryIO, entries: list[Member], end: int) -> list[int]:
    """Where each member's bytes start; raises unless headers, members and descriptors fill the file up to `end`."""
    order = sorted(range(len(entries)), key=lambda index: entries[index].header)
    borders = [entries[index].header for index in order] + [end]
    if borders[0] != 0:
        raise MalformedArchive("something precedes the first member")
    starts = [0] * len(entries)
    for index, limit in zip(order, borders[1:], strict=True):
        entry = entries[index]
        start = _check_local(file, entry, limit)
        rest = limit - start - entry.compressed
        if rest < 0:
            raise MalformedArchive(f"the member {excerpt(entry.name)} overlaps what follows it")
        if entry.flags & _DESCRIPTOR:
            _check_descriptor(_read(file, start + entry.compressed, min(rest, 25)), entry)
        elif rest:
            raise MalformedArchive(f"{rest} bytes after the member {excerpt(entry.name)} belong to none")
        starts[index] = start
    return starts


def _check_local(file: BinaryIO, entry: Member, limit: int) -> int:
    """Where the member's bytes start; raises unless its own header agrees with the directory."""
    if entry.header + _LOCAL.size > limit:
        raise MalformedArchive("two members overlap")
    fields: tuple[int, ...] = _LOCAL.unpack(_read(file, entry.header, _LOCAL.size))
    start = entry.header + _LOCAL.size + fields[9] + fields[10]
    if fields[0] != _LOCAL_MAGIC or start > limit or fields[9] != len(entry.raw_name):
        raise _disagreement(entry)
    texts = _read(file, entry.header + _LOCAL.size, fields[9] + fields[10])
    size, compressed = _widen(texts[fields[9] :], (fields[8], fields[7]))
    there = (fields[2], fields[3], texts[: fields[9]])
    if there != (entry.flags, 8 if entry.deflated else 0, entry.raw_name):
        raise _disagreement(entry)
    blank = {0} if entry.flags & _DESCRIPTOR else set()
    for value, claimed in ((fields[6], entry.crc), (compressed, entry.compressed), (size, entry.size)):
        if value != claimed and value not in blank:
            raise _disagreement(entry)
    return start


def _check_descriptor(descriptor: bytes, entry: Member) -> None:
    """Raise unless the bytes after the member are its data descriptor, with or without signature and zip64."""
    allowed = [struct.pack("<L2Q", entry.crc, entry.compressed, entry.size)]
    if max(entry.compressed, entry.size) <= _32:
        allowed.append(struct.pack("<3L", entry.crc, entry.compressed, entry.size))
    if descriptor.removeprefix(b"PK\7\x08") not in allowed and descriptor not in allowed:
        raise _disagreement(entry)


def _disagreement(entry: Member) -> MalformedArchive:
    return MalformedArchive(f"the member {excerpt(entry.name)} and the directory disagree")


def _read(file: BinaryIO, start: int, count: int) -> bytes:
    found = read_at(file, start, count)
    if len(found) < count:
        raise MalformedArchive("the archive is cut off")
    return found
