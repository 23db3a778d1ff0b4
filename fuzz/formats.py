"""Mutated uploads into `inspect`: it returns an Upload or raises an error of ours; anything else is a finding."""

import argparse
import io
import json
import struct
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import atheris
import numpy as np
from numpy.typing import NDArray

with atheris.instrument_imports(include=["service.uploads", "service.strictjson"]):
    from service.errors import TorchDisabled, UnsupportedMediaType, UploadError
    from service.uploads import Limits, checkpoint, inspect

LIMITS = Limits(side=1024, entries=2**16, members=8, inflated=2**20, tensors=16, torch=True)
FLOATS = np.arange(6.0).reshape(2, 3)


class Finding(Exception):
    """An outcome that must not be."""


def check(data: bytes) -> None:
    """Inspect one input; whatever this raises is a finding."""
    try:
        upload = inspect(io.BytesIO(data), len(data), LIMITS)
        if upload.format == "torch":
            checkpoint.storages(io.BytesIO(data), len(data), LIMITS)
    except (UploadError, TorchDisabled, UnsupportedMediaType) as error:
        _demand(error.detail.isprintable() and len(error.detail) < 300, "a message echoes the input")
        return
    for tensor in upload.tensors:
        if tensor.refusal is None:
            _demand(max(tensor.matrix_shape) <= LIMITS.side, "a matrix passes the limit")
            place = tensor.place
            _demand(place is not None and place.start + place.size <= len(data), "entries lie outside of the file")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Finding(otherwise)


def seeds() -> list[bytes]:
    """Small valid files of every format."""
    arrays = [FLOATS, FLOATS.astype(">f4"), np.asfortranarray(FLOATS), np.ones((2, 2, 2), np.int8), np.zeros(3)]
    structured = np.zeros((1, 2), [("a", "<f4"), ("b", "<i2", (2,))])
    files = [_saved(array) for array in (*arrays, structured)]
    for save in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        save(buffer, a=FLOATS, b=np.ones((3, 2), np.float32))
        files.append(buffer.getvalue())
    entries = {
        "w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "I8", "shape": [4], "data_offsets": [8, 12]},
        "__metadata__": {"format": "pt"},
    }
    header = json.dumps(entries).encode()
    files.append(len(header).to_bytes(8, "little") + header + bytes(12))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (("data.pkl", b"\x80\2}."), ("byteorder", b"little"), ("data/0", bytes(16))):
            archive.writestr(f"archive/{name}", data)
    return [*files, buffer.getvalue(), _with_zip64_end(buffer.getvalue())]


def _with_zip64_end(archive: bytes) -> bytes:
    """The zip file with the zip64 end records that torch.save always writes."""
    count, size, start = struct.unpack("<10xH2L2x", archive[-22:])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, start)
    return archive[:-22] + record + struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1) + archive[-22:]


def _saved(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def main() -> None:
    """Fuzz for so many seconds; ends with libFuzzer's exit status, which is not zero after a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    seconds = parser.parse_args().seconds
    folder = Path(tempfile.mkdtemp(prefix="fuzz-formats-"))  # libFuzzer leaves a finding and its corpus there.
    for index, data in enumerate(seeds()):
        (folder / f"seed-{index}").write_bytes(data)
    options = [f"-max_total_time={seconds}", "-max_len=4096", "-rss_limit_mb=512", "-timeout=5", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(folder)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
