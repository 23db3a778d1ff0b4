"""What the format checks say of an uploaded file: its tensors, and where in the file each one's entries are."""

import math
from dataclasses import dataclass
from typing import Literal

from service.errors import UploadError

Format = Literal["npy", "npz", "safetensors", "torch"]
Matricize = Literal["auto", "none"]


@dataclass(frozen=True)
class Limits:
    """How large a file's matrices and how many its parts may be; `torch` says whether PyTorch checkpoints are taken."""

    side: int
    entries: int
    members: int
    inflated: int
    tensors: int
    torch: bool
    matricize: Matricize = "auto"


@dataclass(frozen=True)
class Place:
    """Where entries lie: a stream of `size` bytes at `start` of the file, whose first `skip` bytes are a header.

    `skip` counts inflated bytes where the stream is deflated; `crc` is the CRC-32 of the whole inflated stream, header
    and entries, where the format has one.
    """

    start: int
    size: int
    skip: int = 0
    deflated: bool = False
    crc: int | None = None


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file: to be analysed as a matrix of `matrix_shape`, or left out because of `refusal`.

    `name` is printable and unique in its file. `dtype` is the name that numpy or torch gives it ("float32",
    "bfloat16", "int8", "float128"), whatever the byte order. What a refusal left unread is "" or None. `strides`, in
    entries, are given where the entries are neither in C nor in Fortran order: a view into a shared storage.
    """

    name: str
    dtype: str = ""
    shape: tuple[int, ...] | None = None
    place: Place | None = None
    big_endian: bool = False
    fortran: bool = False
    strides: tuple[int, ...] | None = None
    refusal: UploadError | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(first axis, product of all others): how a convolution's kernel is read as a matrix."""
        assert self.shape is not None  # noqa: S101 - a tensor that is analysed has a shape
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def work(self) -> int:
        """What the decomposition costs, in units of ten million multiplications, at least 1; 0 where there is none."""
        if self.refusal is not None:
            return 0
        m, n = self.matrix_shape
        return max(m * n * min(m, n) // 10**7, 1)


@dataclass(frozen=True)
class Upload:
    """A file whose headers, shapes and sizes agree. A PyTorch checkpoint's tensors are found by the job."""

    format: Format
    tensors: tuple[Tensor, ...]
