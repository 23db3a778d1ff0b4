"""The data folder: weights, uploads, factors and cached pictures; every file appears whole or not at all.

data/
├── rankscope.sqlite3, or mark: which folder this is
├── weights/<experiment>/<attempt>-initial.safetensors, <attempt>-final.safetensors
├── uploads/<analysis>/file, base
├── checkpoints/<job>/<attempt>-<number>
├── factors/<factors>/<attempt>.safetensors|npz|zip
└── pictures/<job>/<key>.png|svg|gif
"""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

At = Literal["initial", "final"]
INCOMING, MARK = "incoming", "mark"
FOLDERS = ("weights", "uploads", "checkpoints", "factors", "pictures")


def weights_path(data: Path, job_id: str, attempt: int, at: At) -> Path:
    """Where an attempt's weights are; of its own attempt, so that a late one cannot overwrite them."""
    return data / "weights" / job_id / f"{attempt}-{at}.safetensors"


def upload_path(data: Path, job_id: str) -> Path:
    """Where an analysis has the file that it is of."""
    return data / "uploads" / job_id / "file"


def base_path(data: Path, job_id: str) -> Path:
    """Where an analysis has the file that it subtracts: a second name of the base's upload, which may be deleted."""
    return data / "uploads" / job_id / "base"


def checkpoint_folder(data: Path, job_id: str) -> Path:
    """Where the attempts at a job leave what the next one goes on from."""
    return data / "checkpoints" / job_id


def with_checkpoints(data: Path) -> list[str]:
    """Ids of the jobs that have checkpoints."""
    return [folder.name for folder in (data / "checkpoints").glob("*")]


def remove_checkpoints(data: Path, job_id: str) -> None:
    """Remove what nobody goes on from any more."""
    shutil.rmtree(checkpoint_folder(data, job_id), ignore_errors=True)


def factors_path(data: Path, job_id: str, attempt: int, file_format: str) -> Path:
    """Where an attempt's factors are; an adapter for PEFT is a zip of two files."""
    suffix = "zip" if file_format == "peft" else file_format
    return data / "factors" / job_id / f"{attempt}.{suffix}"


def picture_path(data: Path, job_id: str, key: str, suffix: str) -> Path:
    """Where a drawn picture is kept; the key names everything that determines its bytes."""
    return data / "pictures" / job_id / f"{key}.{suffix}"


def mark(data: Path) -> str:
    """A text that only this folder holds, written by the first who asks; `has_mark` tells whether another has it."""
    path = data / MARK
    with contextlib.suppress(FileExistsError), nameless(data) as file:
        file.write(secrets.token_hex(16).encode())
        settle(file)
        keep(file, path)
    return path.read_text()


def has_mark(data: Path, text: str) -> bool:
    """Whether this is the folder with that mark, seen from another machine. Raises OSError."""
    return (data / MARK).read_text() == text


@contextlib.contextmanager
def nameless(folder: Path) -> Iterator[BinaryIO]:
    """A new file that nobody finds, and nobody need clean up after a crash, until `keep` names it."""
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


def settle(file: IO[bytes]) -> None:
    """Return once all that was written is safely on the disk."""
    file.flush()
    os.fsync(file.fileno())


def keep(file: BinaryIO, path: Path) -> None:
    """Give a nameless file that is settled its name, in a folder that is made for it; no other may have that name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = file.name if isinstance(file.name, str) else f"/proc/self/fd/{file.fileno()}"
    # With a folder's descriptor Python calls the one of two system calls that follows the link in /proc.
    os.link(source, path, src_dir_fd=file.fileno(), follow_symlinks=True)


def share(path: Path, other: Path) -> None:
    """Give a file a second name; it lives as long as one of them."""
    other.parent.mkdir(parents=True, exist_ok=True)
    os.link(path, other)


def write(path: Path, content: bytes) -> None:
    """Create or replace a file, in a folder that is there, in one step; a failure leaves what was there before."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        try:
            file.write(content)
            settle(file)
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


def abandoned(data: Path) -> list[str]:
    """Ids under which an upload was kept at least an hour ago by somebody who then never said that it `arrived`."""
    latest = time.time() - 3600
    marks = (data / "uploads").glob(f"*/{INCOMING}")
    return [mark.parent.name for mark in marks if mark.stat().st_mtime < latest]


def expect(data: Path, job_id: str) -> None:
    """Mark an upload as one whose job is not stored yet: a crash from here to `arrived` leaves files without a job."""
    mark = upload_path(data, job_id).with_name(INCOMING)
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def arrived(data: Path, job_id: str) -> None:
    """The job is stored: its files are nobody else's to remove."""
    upload_path(data, job_id).with_name(INCOMING).unlink(missing_ok=True)


def free_bytes(data: Path) -> int:
    """Bytes free on the disk of the data folder."""
    return shutil.disk_usage(data).free
