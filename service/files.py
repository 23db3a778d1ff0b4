"""The data folder: weights, uploads, factors and cached pictures; every file appears whole or not at all.

data/
├── rankscope.sqlite3
├── weights/<experiment>/<attempt>-initial.safetensors, <attempt>-final.safetensors
├── uploads/<analysis>/file, base
├── factors/<factors>/<attempt>.safetensors|npz|zip
└── pictures/<job>/<key>.png|svg|gif
"""

import contextlib
import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

At = Literal["initial", "final"]
FOLDERS = ("weights", "uploads", "factors", "pictures")


def weights_path(data: Path, job_id: str, attempt: int, at: At) -> Path:
    """Where an attempt's weights are; of its own attempt, so that a late one cannot overwrite them."""
    return data / "weights" / job_id / f"{attempt}-{at}.safetensors"


def upload_path(data: Path, job_id: str) -> Path:
    """Where an analysis has the file that it is of."""
    return data / "uploads" / job_id / "file"


def base_path(data: Path, job_id: str) -> Path:
    """Where an analysis has the file that it subtracts: a second name of the base's upload, which may be deleted."""
    return data / "uploads" / job_id / "base"


def factors_path(data: Path, job_id: str, attempt: int, suffix: str) -> Path:
    """Where an attempt's factors are."""
    return data / "factors" / job_id / f"{attempt}.{suffix}"


def picture_path(data: Path, job_id: str, key: str, suffix: str) -> Path:
    """Where a drawn picture is kept; the key names everything that determines its bytes."""
    return data / "pictures" / job_id / f"{key}.{suffix}"


@contextlib.contextmanager
def nameless(data: Path) -> Iterator[BinaryIO]:
    """A new file for an upload that nobody finds, and nobody need clean up after a crash, until `keep` names it."""
    folder = data / "uploads"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # Not tempfile's: it asks the kernel that its file never get a name.
        file: Any = os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600), "w+b")
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EISDIR}:
            raise
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".")  # noqa: SIM115 - on file systems that have only names
    with file:
        yield file


def keep(file: BinaryIO, path: Path) -> None:
    """Give a nameless file its name, in a folder that is made for it, once it is safely on the disk."""
    file.flush()
    os.fsync(file.fileno())
    path.parent.mkdir(parents=True, exist_ok=True)
    source = file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.fileno()}"
    # With a folder's descriptor Python calls the one of two system calls that follows the link in /proc.
    os.link(source, path, src_dir_fd=file.fileno(), follow_symlinks=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write and read, in a folder that is there, which gets its name in one step as the block ends.

    A failure leaves what was there before, or nothing; so does a crash.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def share(path: Path, other: Path) -> None:
    """Give a file a second name; it lives as long as one of them."""
    other.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, other)


def write(path: Path, content: bytes) -> None:
    """Create or replace a file in one step."""
    with replacing(path) as file:
        file.write(content)


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
    for folder in FOLDERS:
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


def settled_jobs(data: Path) -> set[str]:
    """Ids of the jobs that have files here, but for those of the last hour: their rows may be about to be stored."""
    latest = time.time() - 3600
    folders = [path for kind in FOLDERS for path in (data / kind).glob("*-*-*") if path.is_dir()]
    return {path.name for path in folders if path.stat().st_mtime < latest}


def free_bytes(data: Path) -> int:
    """Bytes free on the disk of the data folder."""
    return shutil.disk_usage(data).free
