"""What a job of kind `analysis` does: find the singular values of every matrix in an uploaded file, largest first."""

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from service import store
from service.errors import JobFailed, NoConvergence
from service.lowrank.ranks import Array
from service.settings import Settings
from service.store import Found
from service.uploads import Tensor
from service.uploads.checks import require_matrix
from worker.decompose import AT_ONCE, spectra
from worker.devices import choose_device, environment
from worker.engines import SHARE
from worker.reading import Matrix
from worker.recorder import Recorder
from worker.source import Source


def run(settings: Settings, recorder: Recorder, spec: dict[str, Any]) -> None:
    """Analyse what no earlier attempt has; where the job runs as several tasks, this one's share of it.

    Raises Canceled, Drained, LostJob, and where the only matrix of the file cannot be analysed the reason for it.
    """
    device = choose_device("auto", settings.device_names)
    recorder.start(environment(device), store.adopt_twin if spec["reuse"] else None)
    source = Source.of(settings, recorder.token.job_id, spec)
    recorder.write(lambda session, token: store.list_tensors(session, token, source.tensors))
    left = recorder.read(lambda session: store.pending(session, recorder.token.job_id))
    for position in sorted(at for at in left if source.tensors[at].refusal is not None):  # They are not in the base.
        left.remove(position)
        recorder.add(Found(position, refusal=source.tensors[position].refusal))
    require_matrix(source.tensors)
    is_alone = source.n_matrices == 1
    for batch in _share(source.tensors, left, *spec.get(SHARE, (0, 1))):
        recorder.stop_if_draining()
        for found in _analyse(source, batch, device):
            recorder.add(found)
            if is_alone and found.refusal is not None:
                raise found.refusal
    if SHARE in spec:
        recorder.flush()
        if recorder.read(lambda session: store.pending(session, recorder.token.job_id)):
            return  # Others are still at theirs; the last one ends the job.
    recorder.end("succeeded")


def _share(tensors: Sequence[Tensor], left: Collection[int], share: int, n_shares: int) -> Iterator[list[int]]:
    """What one of several tasks has to do, in batches.

    Dealt before what is done is left out: tasks that begin at different times must not take the same.
    """
    for batch in list(_batches(tensors))[share::n_shares]:
        if mine := [position for position in batch if position in left]:
            yield mine


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of all matrices, most work first; small ones of one shape and dtype together."""
    batch: list[int] = []
    kind: tuple[object, ...] = ()
    matrices = [position for position, tensor in enumerate(tensors) if tensor.refusal is None]
    for position in sorted(
        matrices, key=lambda at: (-tensors[at].work, tensors[at].matrix_shape, tensors[at].dtype, at)
    ):
        shape, dtype = tensors[position].matrix_shape, tensors[position].dtype
        if batch and ((shape, dtype) != kind or (len(batch) + 1) * math.prod(shape) > AT_ONCE):
            yield batch
            batch = []
        batch, kind = [*batch, position], (shape, dtype)
    if batch:
        yield batch


def _analyse(source: Source, batch: Sequence[int], device: str) -> Iterator[Found]:
    """What there is to say of each: one that cannot be read or decomposed does the others no harm."""
    matrices: dict[int, Matrix] = {}
    for position in batch:
        try:
            matrices[position] = source.matrix(position)
        except JobFailed as error:
            yield Found(position, refusal=error)
    dtype = source.tensors[batch[0]].dtype
    for position, spectrum in zip(matrices, _spectra(list(matrices.values()), dtype, device), strict=True):
        matrix = matrices[position]
        if isinstance(spectrum, NoConvergence):
            yield Found(position, notes=matrix.notes, refusal=spectrum)
        else:
            yield Found(position, spectrum, matrix.exponent, matrix.notes)


def _spectra(matrices: Sequence[Matrix], dtype: str, device: str) -> list[Array | NoConvergence]:
    try:
        return list(spectra([matrix.values.to(device) for matrix in matrices], dtype))
    except NoConvergence as error:
        if len(matrices) == 1:
            return [error]
    return [_spectra([matrix], dtype, device)[0] for matrix in matrices]
