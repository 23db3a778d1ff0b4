"""The uploaded file of an analysis, and the base that is subtracted from it, as matrices by position."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from service import files
from service.errors import NotInBase
from service.settings import Settings
from service.uploads import Limits, Tensor, inspect
from worker.checkpoint import read_checkpoint
from worker.reading import Matrix, raw_bytes, read_matrix


@dataclass(frozen=True)
class Source:
    """Tensors of a file in its order; those without a counterpart in the base, where there is one, are refused."""

    path: Path
    tensors: Sequence[Tensor]
    base_path: Path | None
    base: dict[str, Tensor]

    @staticmethod
    def of(settings: Settings, analysis_id: str, spec: dict[str, Any]) -> "Source":
        """What an analysis with this specification is of. Raises UploadError."""
        limits = settings.upload_limits(spec["matricize"])
        path = files.upload_path(settings.data, analysis_id)
        tensors = _tensors(path, limits)
        if spec["base"] is None:
            return Source(path, tensors, None, {})
        base_path = files.base_path(settings.data, analysis_id)
        base = {tensor.name: tensor for tensor in _tensors(base_path, limits)}
        return Source(path, [_against(tensor, base) for tensor in tensors], base_path, base)

    def matrix(self, position: int) -> Matrix:
        """The tensor, less its counterpart in the base. Raises UploadError."""
        tensor = self.tensors[position]
        if self.base_path is None:
            return read_matrix(self.path, tensor)
        return read_matrix(self.path, tensor, base=(self.base_path, self.base[tensor.name]))

    @property
    def is_difference(self) -> bool:
        """Whether a base is subtracted."""
        return self.base_path is not None

    @property
    def n_matrices(self) -> int:
        """How many tensors the file, were it not for its base, would have to analyse."""
        return sum(tensor.refusal is None or isinstance(tensor.refusal, NotInBase) for tensor in self.tensors)

    def raw(self, position: int) -> Iterator[bytes]:
        """The tensor's own entries as they are stored, little-endian and in C order. Raises MalformedArchive."""
        return raw_bytes(self.path, self.tensors[position])


def _tensors(path: Path, limits: Limits) -> Sequence[Tensor]:
    limits = replace(limits, torch=True)  # Whatever is allowed now, this file was when it came.
    with path.open("rb") as file:
        upload = inspect(file, path.stat().st_size, limits)
    return read_checkpoint(path, limits) if upload.format == "torch" else upload.tensors


def _against(tensor: Tensor, base: dict[str, Tensor]) -> Tensor:
    other = base.get(tensor.name)
    if tensor.refusal is not None:
        return tensor
    if other is None:
        return replace(tensor, refusal=NotInBase("the base has no tensor of that name"))
    if other.refusal is not None:
        return replace(tensor, refusal=NotInBase(f"the base cannot give it: {other.refusal.detail}"))
    if other.shape != tensor.shape:
        return replace(tensor, refusal=NotInBase(f"its shape is {tensor.shape}, in the base {other.shape}"))
    return tensor
