"""The data folder: weights of experiments and cached pictures; every file appears whole or not at all.

data/
├── rankscope.sqlite3
├── weights/<experiment>/<attempt>-initial.safetensors, <attempt>-final.safetensors
└── pictures/<experiment>/<key>.png|svg|gif
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Literal

At = Literal["initial", "final"]


def weights_path(data: Path, job_id: str, attempt: int, at: At) -> Path:
    """Where an attempt's weights are; of its own attempt, so that a late one cannot overwrite them."""
    return data / "weights" / job_id / f"{attempt}-{at}.safetensors"


def picture_path(data: Path, job_id: str, key: str, suffix: str) -> Path:
    """Where a drawn picture is kept; the key names everything that determines its bytes."""
    return data / "pictures" / job_id / f"{key}.{suffix}"


def write(path: Path, content: bytes) -> None:
    """Create or replace a file in one step, in a folder that is there; a crash leaves the old one or none."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def read_cached(path: Path) -> bytes | None:
    """A picture that has been drawn; it is then the last one used."""
    try:
        content = path.read_bytes()
        os.utime(path)
    except FileNotFoundError:
        return None
    return content


def remove_job(data: Path, job_id: str) -> None:
    """Remove every file of a job that has been deleted from the database."""
    for folder in ("weights", "pictures"):
        shutil.rmtree(data / folder / job_id, ignore_errors=True)


def prune_pictures(data: Path, limit: int) -> None:
    """Keep the cached pictures within `limit` bytes: those not used for longest go first."""
    found = []
    for path in (data / "pictures").glob("*/*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue  # Another request's experiment was deleted meanwhile.
        found.append((status.st_mtime_ns, status.st_size, path))
    excess = sum(size for _, size, _ in found) - limit
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


def free_bytes(data: Path) -> int:
    """Bytes free on the disk of the data folder."""
    return shutil.disk_usage(data).free
