"""Every bad file gets its answer, from its header where that can tell, and without much memory."""

import io
import tracemalloc

import pytest
from _pytest.mark import ParameterSet

from service import errors
from service.uploads import Limits, inspect
from tests.uploads.builders import bomb, npy, safetensors, text_header, torch_zip
from tests.uploads.files import BAD, BAD_TORCH, Bad

LIMITS = Limits(side=16_384, entries=134_217_728, members=256, inflated=2**32, tensors=10_000, torch=True)
CLASSES = {
    ("unsupported-media-type", 415): errors.UnsupportedMediaType,
    ("torch-disabled", 415): errors.TorchDisabled,
    **{
        (kind.kind, status): kind
        for status, kinds in {
            400: (errors.MalformedArray, errors.MalformedArchive),
            413: (errors.ArrayTooLarge, errors.ArchiveTooLarge),
            422: (errors.PickleForbidden, errors.UnsafeCheckpoint, errors.UnsupportedDtype, errors.UnsupportedShape,
                  errors.NonFiniteValues, errors.NoMatrices),
        }.items()
        for kind in kinds
    },
}  # fmt: skip


def rows(where: str) -> list[ParameterSet]:
    """The table's files as parameters."""
    named = [(bad, f"row {bad.row}" if bad.row[0].isdigit() else bad.row) for bad in BAD + BAD_TORCH]
    return [pytest.param(bad, id=name) for bad, name in named if bad.where == where]


@pytest.mark.parametrize("bad", rows("header"))
def test_a_bad_file_is_refused_by_its_header(bad: Bad) -> None:
    data = bad.build()
    file = io.BytesIO(data)
    tracemalloc.start()
    try:
        with pytest.raises(errors.RankscopeError) as caught:
            inspect(file, len(data), LIMITS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert type(caught.value) is CLASSES[bad.slug, bad.status], caught.value
    assert len(caught.value.detail) < 200
    assert caught.value.detail.isprintable()
    assert peak < 2**20 + 30 * min(len(data), 2 * 2**20), peak


@pytest.mark.parametrize("bad", rows("data"))
def test_what_only_the_entries_tell_is_left_to_their_reader(bad: Bad) -> None:
    data = bad.build()
    upload = inspect(io.BytesIO(data), len(data), LIMITS)
    assert all(tensor.refusal is None for tensor in upload.tensors)


def test_torch_is_off_unless_the_operator_allows_it() -> None:
    data = torch_zip()
    closed = Limits(**{**vars(LIMITS), "torch": False})
    with pytest.raises(errors.TorchDisabled):
        inspect(io.BytesIO(data), len(data), closed)


def test_a_header_is_not_echoed() -> None:
    data = npy(text_header(shape="secret" * 500))
    with pytest.raises(errors.MalformedArray) as caught:
        inspect(io.BytesIO(data), len(data), LIMITS)
    assert "secret" not in caught.value.detail


def test_at_most_sixty_characters_of_a_foreign_name_are_echoed() -> None:
    data = safetensors({"x\u202e" * 500: {}})
    with pytest.raises(errors.MalformedArray) as caught:
        inspect(io.BytesIO(data), len(data), LIMITS)
    assert caught.value.detail.startswith("x\\u202ex")
    assert len(caught.value.detail) < 130


def test_a_bomb_is_found_by_its_directory_alone() -> None:
    data = bomb()
    start = int.from_bytes(data[-6:-2], "little")
    blanked = bytes([*data[:4], *bytes(start - 4), *data[start:]])
    with pytest.raises(errors.ArchiveTooLarge):
        inspect(io.BytesIO(blanked), len(blanked), LIMITS)


def test_what_is_left_out_is_listed_when_nothing_is_left() -> None:
    header = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(30)}
    data = safetensors(header, bytes(120))
    with pytest.raises(errors.NoMatrices) as caught:
        inspect(io.BytesIO(data), len(data), LIMITS)
    skipped = caught.value.extra["skipped"]
    assert len(skipped) == 20
    assert skipped[0].keys() == {"name", "reason", "detail"}
    assert skipped[0]["reason"] == "unsupported-shape"


def test_the_one_fault_among_vectors_is_named_with_its_member() -> None:
    entries = {
        "bias": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "packed": {"dtype": "F4", "shape": [2, 4], "data_offsets": [16, 20]},
    }
    data = safetensors(entries, bytes(20))
    with pytest.raises(errors.UnsupportedDtype, match=r"^packed: "):
        inspect(io.BytesIO(data), len(data), LIMITS)
