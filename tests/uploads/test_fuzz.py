"""Whatever the bytes, the checks return an Upload or raise one of our errors, in little memory."""

import io
import json
import tracemalloc
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import TorchDisabled, UnsupportedMediaType, UploadError
from service.uploads import Limits, checkpoint, inspect
from tests.uploads.builders import FLOATS, Part, entry, npy, safetensors, saved, zipped
from tests.uploads.test_bad import LIMITS


def outcome(data: bytes, limits: Limits = LIMITS) -> None:
    """Inspect the bytes, and the storages of a checkpoint too; check what a user would be shown."""
    tracemalloc.start()
    try:
        upload = inspect(io.BytesIO(data), len(data), limits)
        if upload.format == "torch":
            checkpoint.storages(io.BytesIO(data), len(data), limits)
        assert all(tensor.name.isprintable() for tensor in upload.tensors)
    except (UploadError, TorchDisabled, UnsupportedMediaType) as error:
        shown = error.detail
        assert shown.isprintable()
        assert len(shown) < 200
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**20 + 30 * len(data)


def _checkpoint() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2, 3), "b": torch.ones(2)}, buffer)
    return buffer.getvalue()


def _npz(save: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, a=FLOATS, b=np.ones(3))
    return buffer.getvalue()


VALID = [
    saved(FLOATS),
    saved(np.zeros((2, 2), [("a", "<f4"), ("b", "<i4", (2,))])),
    _npz(np.savez),
    _npz(np.savez_compressed),
    zipped(Part("a.npy", saved(FLOATS)), Part("notes.txt", b"x")),
    safetensors({"w": entry(), "b": entry((2,), 16, 24), "__metadata__": {"a": "b"}}, bytes(24)),
    _checkpoint(),
]
COUNTS = st.one_of(
    st.integers(-2, 40), st.sampled_from([2**31, 2**32, 2**62, 2**63, 10**30]), st.booleans(), st.floats(), st.none()
)
VALUES = st.recursive(
    COUNTS | st.text(max_size=5) | st.sampled_from(["<f8", "|O", "|V2", ">i4", "<M8[ns]", "<U3"]),
    lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I64", "C64", "X", 3]),
        "shape": st.lists(COUNTS, max_size=4),
        "data_offsets": st.lists(COUNTS, min_size=2, max_size=2),
    },
    optional={"more": VALUES},
)
QUICK = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\3\4", b"PK\5\6", b"\x93NUMPY\1\0", b"\x10" + bytes(7)]))
def test_random_bytes(data: bytes, magic: bytes) -> None:
    outcome(magic + data)


@QUICK
@given(st.sampled_from(VALID), st.data())
def test_truncated_files(valid: bytes, data: st.DataObject) -> None:
    outcome(valid[: data.draw(st.integers(0, len(valid) - 1))])


@settings(QUICK, max_examples=600)
@given(st.sampled_from(VALID), st.data())
def test_mutated_files(valid: bytes, data: st.DataObject) -> None:
    mutated = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(valid) - 1) | st.integers(max(len(valid) - 200, 0), len(valid) - 1))
        patch = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\xff" * 8, bytes(4)]))
        mutated[at : at + len(patch)] = patch
    outcome(bytes(mutated))


@QUICK
@given(st.fixed_dictionaries({"descr": VALUES, "fortran_order": VALUES, "shape": VALUES}), st.binary(max_size=60))
def test_npy_headers_of_random_values(fields: dict[str, Any], data: bytes) -> None:
    outcome(npy(repr(fields).encode("utf-8", "replace"), data, (3, 0)))


@QUICK
@given(st.text("(){}[],:'\"\\-0129LTrueFalseNone descrshape\n", max_size=200), st.binary(max_size=60))
def test_npy_headers_of_random_marks(text: str, data: bytes) -> None:
    outcome(npy(text, data))


@QUICK
@given(st.dictionaries(st.text(max_size=6), ENTRIES | VALUES, max_size=4), st.binary(max_size=100))
def test_safetensors_headers_of_random_values(header: dict[str, Any], data: bytes) -> None:
    outcome(safetensors(json.dumps(header).encode(), data))


NUMBERS = st.none() | st.integers(0, 2**16) | st.sampled_from([2**31, 2**32 - 1])


@QUICK
@given(
    st.lists(
        st.builds(
            Part,
            name=st.sampled_from([b"a.npy", b"b.npy", b"data.pkl", b"x/data.pkl", b"x/code/", b"\xff\0.npy"]),
            data=st.sampled_from([saved(FLOATS), b"", b"hello"]) | st.binary(max_size=40),
            deflated=st.booleans(),
            method=st.sampled_from([None, None, 0, 8, 99]),
            flags=st.sampled_from([0, 0, 1, 8, 0x800]),
            crc=NUMBERS,
            size=NUMBERS,
            compressed=NUMBERS,
            local_size=NUMBERS,
            central_extra=st.just(b"") | st.binary(max_size=30),
            local_extra=st.just(b"") | st.binary(max_size=30),
            offset=st.sampled_from([None, None, 0, 30]),
        ),
        max_size=4,
    ),
    st.sampled_from([None, None, 0, 3, 65_535]),
)
def test_zip_files_that_lie(parts: list[Part], count: int | None) -> None:
    outcome(zipped(*parts, count=count))
