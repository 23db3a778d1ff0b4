"""Factors on disk: layouts become safetensors, npz or PEFT files, written a layer at a time and whole or not at all.

A safetensors file has the manifest as JSON text in its `__metadata__`, under `rankscope`, as far as it is known before
the layers are read, and without its `layers` where these are long. An npz has none: every member of one is an array.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, assert_never

import numpy as np
import torch
from numpy.lib import format as npy

from service import files
from service.dtypes import DTYPES
from service.errors import CannotFactor
from service.schemas import FactorsFormat, FactorsSpec
from worker.factor_layout import Layer, Planned, Stored, adapter_config, describe, lay_out, with_errors
from worker.factoring import Errors, auto_dtype, dense, factor, widened
from worker.source import Source

MAX_METADATA = 1 << 20  # Characters; headers of 2 MiB and more are refused by our own reader.

Chunk = bytes | memoryview
Add = Callable[[Stored, Iterable[Chunk]], None]


def write_factors(
    path: Path, planned: Sequence[Planned], source: Source, spec: FactorsSpec, tick: Callable[[int], None]
) -> dict[str, Any]:
    """Write the file, which must not be there, in a folder that is made for it, and tell what is in it.

    After each tensor, in the order of the file, `tick` is given its `work`; what it raises ends the writing, and then
    no file is left. Raises CannotFactor, NoConvergence, and what the source raises.
    """
    layers = lay_out(planned, spec, is_difference=source.is_difference)
    manifest = describe(layers, spec, is_difference=source.is_difference)
    errors: dict[int, Errors | None] = {}
    with files.nameless(path.parent) as file:
        with _writer(file, spec.format, layers, manifest) as add:
            for layer in _in_file_order(layers):
                errors[layer.position] = _write_layer(layer, source, spec, add)
                tick(layer.tensor.work)
        manifest["layers"] = [with_errors(entry, errors[i]) for i, entry in enumerate(manifest["layers"])]
        manifest["bytes"] = file.seek(0, os.SEEK_END)
        file.seek(0)
        # BinaryIO leaves out `readinto`, which every file has.
        manifest["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        files.settle(file)
        files.keep(file, path)
    return manifest


def _in_file_order(layers: Sequence[Layer]) -> list[Layer]:
    """Those of wide entries first, so that every tensor of a safetensors file starts at a multiple of its entries."""
    return sorted(layers, key=lambda layer: -max((stored.item_bytes for stored in layer.stored), default=0))


def _write_layer(layer: Layer, source: Source, spec: FactorsSpec, add: Add) -> Errors | None:
    """Its errors; None for what is no matrix or is not in the file."""
    if not layer.stored:
        return None
    first, dtype = layer.stored[0], spec.dtype or auto_dtype(layer.tensor.dtype)
    if layer.rank is not None:
        factors = factor(source.matrix(layer.position), layer.rank, dtype, spec.split)
        for stored, values in zip(layer.stored, (factors.a, factors.b), strict=True):
            add(stored, [_bytes_of(values)])
        return factors.errors
    if source.is_difference:
        values, errors = dense(source.matrix(layer.position), dtype)
        add(first, [_bytes_of(values)])
        return errors
    chunks = source.raw(layer.position)
    same = first.dtype == layer.tensor.dtype
    add(first, chunks if same else widened(chunks, layer.tensor.dtype, auto_dtype(layer.tensor.dtype)))
    return Errors() if layer.verdict == "dense" else None


def _bytes_of(values: torch.Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data


def _writer(
    file: IO[bytes], file_format: FactorsFormat, layers: Sequence[Layer], manifest: dict[str, Any]
) -> AbstractContextManager[Add]:
    match file_format:
        case "safetensors":
            return _safetensors(file, layers, manifest)
        case "npz":
            return _npz(file)
        case "peft":
            return _adapter(file, layers, manifest)
        case _:
            assert_never(file_format)


@contextmanager
def _safetensors(file: IO[bytes], layers: Sequence[Layer], manifest: dict[str, Any]) -> Iterator[Add]:
    file.write(_header(layers, manifest))
    yield lambda stored, chunks: _write(file, stored, chunks)


@contextmanager
def _npz(file: IO[bytes]) -> Iterator[Add]:
    with zipfile.ZipFile(file, "w") as archive:

        def add(stored: Stored, chunks: Iterable[Chunk]) -> None:
            start = _npy_header(stored)
            with _member(archive, f"{stored.name}.npy", len(start) + stored.n_bytes) as member:
                member.write(start)
                _write(member, stored, chunks)

        yield add


@contextmanager
def _adapter(file: IO[bytes], layers: Sequence[Layer], manifest: dict[str, Any]) -> Iterator[Add]:
    config = json.dumps(adapter_config(layers), indent=2).encode()
    start = _header(layers, manifest)
    size = len(start) + sum(stored.n_bytes for layer in layers for stored in layer.stored)
    with zipfile.ZipFile(file, "w") as archive:
        with _member(archive, "adapter_config.json", len(config)) as member:
            member.write(config)
        with _member(archive, "adapter_model.safetensors", size) as member:
            member.write(start)
            yield lambda stored, chunks: _write(member, stored, chunks)


def _member(archive: zipfile.ZipFile, name: str, size: int) -> IO[bytes]:
    member = zipfile.ZipInfo(name)  # Stored, of 1980: the same factors are the same bytes on any day.
    member.create_system, member.external_attr = 3, 0o644 << 16
    member.file_size = size  # From 2 GiB on, its header must have room for wider numbers.
    return archive.open(member, "w")


def _write(file: IO[bytes], stored: Stored, chunks: Iterable[Chunk]) -> None:
    written = 0
    for chunk in chunks:
        written += file.write(chunk)
    if written != stored.n_bytes:
        raise CannotFactor(f"{stored.name}: the upload gave {written} bytes, expected {stored.n_bytes}")


def _header(layers: Sequence[Layer], manifest: dict[str, Any]) -> bytes:
    """A safetensors header, which names every tensor's place."""
    text = json.dumps(manifest)
    if len(text) > MAX_METADATA:
        text = json.dumps({key: value for key, value in manifest.items() if key != "layers"})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "rankscope": text}}
    end = 0
    for layer in _in_file_order(layers):
        for stored in layer.stored:
            start, end = end, end + stored.n_bytes
            header[stored.name] = {
                "dtype": DTYPES[stored.dtype].code,
                "shape": stored.shape,
                "data_offsets": [start, end],
            }
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _npy_header(stored: Stored) -> bytes:
    buffer = io.BytesIO()
    descr = npy.dtype_to_descr(np.dtype(stored.dtype))
    npy.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": stored.shape})
    return buffer.getvalue()
