"""The tensors of a PyTorch checkpoint: unpickled by `weights_only`, without their data, under the kernel's limits."""

import contextlib
import math
import pickle
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from service.dtypes import FLOATS
from service.errors import (
    ArchiveTooLarge,
    ArrayTooLarge,
    MalformedArchive,
    UnsafeCheckpoint,
    UnsupportedDtype,
    UploadError,
)
from service.uploads import Limits, Place, Tensor
from service.uploads.checkpoint import storages
from service.uploads.checks import label, require_distinct, shape_refusal

MEMORY = 2 << 30  # Bytes of address space that the unpickling may add: its file is at most 32 MiB.
CPU_S = 20  # Past it the kernel ends the process: a tuple of tuples of … takes for ever to hash.
DEEPEST = 16


def read_checkpoint(path: Path, limits: Limits) -> tuple[Tensor, ...]:
    """The tensors of a state dict, nested ones by dotted names, and where their entries are. Raises UploadError."""
    with path.open("rb") as file:
        stored = storages(file, path.stat().st_size, limits)
    with _restrained():
        found = _named(_load(path), limits)
        tensors = tuple(_checked(name, value, stored, limits) for name, value in found)
    require_distinct(tensors, MalformedArchive)
    return tensors


@contextlib.contextmanager
def _restrained() -> Iterator[None]:
    """Bounds on address space and CPU time until the end of the block."""
    own = psutil.Process()
    bounds = {
        resource.RLIMIT_AS: own.memory_info().vms + MEMORY,
        resource.RLIMIT_CPU: math.ceil(sum(own.cpu_times()[:2])) + CPU_S,
    }
    before = {kind: resource.getrlimit(kind) for kind in bounds}
    for kind, bound in bounds.items():
        hard = before[kind][1]
        resource.setrlimit(kind, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
    try:
        yield
    finally:
        for kind, limit in before.items():
            resource.setrlimit(kind, limit)


def _load(path: Path) -> Any:
    """The unpickled object, its tensors without storage: `meta` leaves the data where it is."""
    try:
        return torch.load(path, map_location="meta", weights_only=True)
    except MemoryError:
        raise
    except NotImplementedError:
        raise UnsupportedDtype("it holds tensors without plain entries, such as quantized ones") from None
    except pickle.UnpicklingError:
        raise UnsafeCheckpoint("it holds more than tensors, numbers, text and plain containers of them") from None
    except Exception as error:
        # What torch raises on damaged pickles is any of KeyError, EOFError, ValueError, RuntimeError and others.
        raise MalformedArchive(f"torch cannot read it: {type(error).__name__}") from None


def _named(loaded: Any, limits: Limits) -> list[tuple[str, torch.Tensor]]:
    """Dotted names and tensors, in the file's order. Raises ArchiveTooLarge for too many, or too deep a nest."""
    found: list[tuple[str, torch.Tensor]] = []
    left = 100 * limits.tensors

    def walk(value: Any, names: tuple[str, ...]) -> None:
        nonlocal left
        left -= 1
        if left < 0 or len(names) > DEEPEST or len(found) + isinstance(value, torch.Tensor) > limits.tensors:
            raise ArchiveTooLarge(f"it holds more than {limits.tensors} tensors, or nests deeper than {DEEPEST}")
        if isinstance(value, torch.Tensor):
            # A pickle can give a tensor attributes, which would be asked in its methods' place.
            found.append((label(".".join(names)) or "array", torch.Tensor.detach(value)))
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*names, str(key)))
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(item, (*names, str(index)))

    walk(loaded, ())
    return found


def _checked(name: str, value: torch.Tensor, stored: dict[int, int], limits: Limits) -> Tensor:
    """The tensor as the format checks would describe it; refused where it is not the plain matrix that it may be."""
    dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
    try:
        if value.layout != torch.strided or value.is_neg():
            raise UnsupportedDtype("only plain dense tensors are analysed, no sparse or negated ones")
        layout = _layout(value, dtype, stored)
    except UploadError as error:
        return Tensor(name, dtype, shape, refusal=error)
    return Tensor(name, dtype, shape, **layout, refusal=_kind_refusal(dtype) or shape_refusal(shape, limits))


def _kind_refusal(dtype: str) -> UnsupportedDtype | None:
    if dtype in FLOATS:
        return None
    complex_numbers = dtype.startswith("complex")
    return UnsupportedDtype("complex numbers" if complex_numbers else "integers: an index or a buffer, no weight")


def _layout(value: torch.Tensor, dtype: str, stored: dict[int, int]) -> dict[str, Any]:
    """Where the entries lie and in which order; all of them inside the storage, and that inside the file.

    A stride of 0 makes of a few bytes a matrix of any size: there may be no more entries than the storage holds.
    """
    size, storage = value.element_size(), value.untyped_storage()
    if value.numel() * size > storage.nbytes():
        raise ArrayTooLarge(f"its {value.numel()} entries are a view of only {storage.nbytes()} bytes")
    start = getattr(storage, "_checkpoint_offset", None)
    if start is None or stored.get(start, -1) < storage.nbytes():
        raise MalformedArchive("its storage is not in the file")
    strides, offset = value.stride(), int(value.storage_offset())
    last = offset + sum((side - 1) * stride for side, stride in zip(value.shape, strides, strict=True))
    if min(strides, default=0) < 0 or offset < 0 or (last + 1) * size > storage.nbytes():
        raise MalformedArchive("it reaches beyond its storage")
    place = Place(start + offset * size, (last + 1 - offset) * size)
    reversed_axes = value.permute(tuple(reversed(range(value.dim()))))
    if value.is_contiguous():
        return {"place": place}
    if reversed_axes.is_contiguous():
        return {"place": place, "fortran": True}
    return {"place": place, "strides": tuple(strides)}
