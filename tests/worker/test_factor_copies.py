"""Tensors that a file of factors holds whole, as the upload stores them."""

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as saved_safetensors

from service.errors import MalformedArchive, NonFiniteValues
from tests.uploads.builders import Part, entry, npy_of, safetensors, saved, zipped
from tests.worker.test_factor_files import RANKS, model, plan, read, source_of, write
from worker import reading


def test_what_was_refused_is_copied_where_it_can_be(tmp_path: Path) -> None:
    weights = model() | {
        "diverged": torch.full((2, 2), torch.nan),
        "damaged": torch.ones(2, 2),
        "phases": torch.ones(3, dtype=torch.complex64),
    }
    source = source_of(tmp_path, saved_safetensors(weights))
    planned = plan(source, RANKS, {"diverged": NonFiniteValues("4 of 4"), "damaged": MalformedArchive("bad CRC")})
    path = tmp_path / "file.safetensors"
    manifest = write(path, source, planned)
    verdicts = {layer["name"]: (layer["verdict"], layer["reason"]) for layer in manifest["layers"]}
    assert verdicts["diverged"] == ("copied", "asked for")
    assert verdicts["damaged"] == ("left_out", "asked for; its entries cannot be read")
    assert read(path)["diverged"].isnan().all()
    before = [math.prod(values.shape) for name, values in weights.items() if name != "damaged"]
    assert manifest["totals"]["parameters_before"] == sum(before)
    write(tmp_path / "file.npz", source, planned, format="npz")
    assert read(path)["phases"].dtype == read(tmp_path / "file.npz")["phases"].dtype == torch.complex64


@pytest.mark.parametrize(("file_format", "kept"), [("safetensors", {"F8_E8M0", "C64", "U64"}), ("npz", {"C64", "U64"})])
def test_what_a_format_has_no_name_for_is_left_out(tmp_path: Path, file_format: Any, kept: set[str]) -> None:
    header = {
        "C64": entry((1,), 0, 8, "C64"),
        "U64": entry((1,), 8, 16, "U64"),
        "F8_E8M0": entry((2,), 16, 18, "F8_E8M0"),
        "F4": entry((3, 2), 18, 21, "F4"),
        "w": entry((1, 1), 21, 25),
    }
    source = source_of(tmp_path, safetensors(header, bytes(range(25))))
    manifest = write(tmp_path / "file", source, format=file_format)
    reasons = {layer["name"]: layer["reason"] for layer in manifest["layers"] if layer["verdict"] == "left_out"}
    assert reasons.keys() == header.keys() - kept - {"w"}
    assert reasons["F4"] == f"asked for; {file_format} cannot hold float4_e2m1fn"


@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("descr", [">f4", "<i2", ">f16"])
@pytest.mark.parametrize("shape", [(300, 2, 4), (2, 700), (0, 3), (5,), ()])
def test_copies_are_in_c_order_and_little_endian(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], descr: str, deflated: bool
) -> None:
    monkeypatch.setattr(reading, "PIECE", 1000)
    array = np.arange(math.prod(shape)).astype(descr).reshape(shape)
    content = npy_of(shape, array.tobytes("F"), descr, fortran=True)
    parts = Part("a.npy", content, deflated=deflated), Part("w.npy", saved(np.ones((2, 2))))
    source = source_of(tmp_path, zipped(*parts))
    write(tmp_path / "file.npz", source, plan(source, {}), format="npz")
    with np.load(tmp_path / "file.npz") as found:
        np.testing.assert_array_equal(found["a"], array)
        assert found["a"].dtype == array.dtype.newbyteorder("<")
        assert found["a"].flags.c_contiguous


def test_a_copy_in_fortran_order_is_held_once(tmp_path: Path) -> None:
    array = np.asfortranarray(np.arange(8 << 20, dtype=np.int8).reshape(1 << 10, -1))
    source = source_of(tmp_path, zipped(Part("a.npy", saved(array)), Part("w.npy", saved(np.ones((2, 2))))))
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece in source.raw(0)) == array.nbytes
        assert tracemalloc.get_traced_memory()[1] < 1.6 * array.nbytes
    finally:
        tracemalloc.stop()
