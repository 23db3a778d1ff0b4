"""Files of factors, read back by the libraries that people read them with."""

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as saved_safetensors

from service import files
from service.errors import MalformedArchive, UnsupportedShape, UploadError
from service.schemas import FactorsSpec
from service.settings import Settings
from service.uploads import Place, Tensor, inspect
from tests.uploads.builders import Part, saved, zipped
from tests.worker.test_decompose import matrix_with
from worker import factor_files, factor_layout
from worker.factor_files import write_factors
from worker.factor_layout import Planned, lay_out
from worker.factoring import CannotFactor
from worker.source import Source

HERE = Place(0, 0)
SCALAR = UnsupportedShape("no matrix")
NO_MODULE = "PEFT adapts modules, and the name is not that of a module's .weight"
Weights = dict[str, torch.Tensor]


def source_of(data: Path, content: bytes, base: bytes | None = None) -> Source:
    """An upload, less another one where that is given."""
    for path, part in [(files.upload_path(data, "job"), content), (files.base_path(data, "job"), base)]:
        if part is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(part)
    return Source.of(Settings(data=data), "job", {"matricize": "auto", "base": base and "base"})


def plan(source: Source, ranks: Mapping[str, int | None], refusals: Mapping[str, UploadError] = {}) -> list[Planned]:
    """Tensors at the ranks asked for; those not named stay dense."""
    tensors = [replace(one, refusal=one.refusal or refusals.get(one.name)) for one in source.tensors]
    return [Planned(tensor, ranks.get(tensor.name), "asked for") for tensor in tensors]


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    s = 2.0 ** -np.arange(min(shape[0], math.prod(shape[1:])))
    return torch.from_numpy(matrix_with(s, (shape[0], math.prod(shape[1:])), seed).reshape(shape))


RANKS = {"fc.weight": 2, "conv.weight": 3, "zero.weight": 0}


def model() -> Weights:
    """Narrow and wide floats, a kernel, a layer left dense, a zero matrix, biases and a buffer."""
    return {
        "steps": torch.tensor(7, dtype=torch.int64),
        "mask": torch.tensor([True, False, True]),
        "half.weight": weight(6, 5, seed=1).half(),
        "brain.weight": weight(6, 5, seed=2).bfloat16(),
        "fc.weight": weight(8, 6).float(),
        "fc.bias": torch.arange(8).float(),
        "brain.bias": torch.arange(3).bfloat16(),
        "conv.weight": weight(8, 3, 2, 2),
        "zero.weight": torch.zeros(4, 7),
    }


def zeros(weights: Weights) -> bytes:
    """A base that subtracts nothing."""
    return saved_safetensors({name: torch.zeros_like(values) for name, values in weights.items()})


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return source_of(tmp_path / "data", saved_safetensors(model()))


@pytest.fixture
def difference(tmp_path: Path) -> Source:
    return source_of(tmp_path / "data", saved_safetensors(model()), zeros(model()))


def write(path: Path, source: Source, planned: list[Planned] | None = None, **spec: Any) -> dict[str, Any]:
    manifest = write_factors(path, planned or plan(source, RANKS), source, FactorsSpec(**spec), lambda _: None)
    content = path.read_bytes()
    assert manifest["bytes"] == len(content)
    assert manifest["sha256"] == hashlib.sha256(content).hexdigest()
    json.dumps(manifest, allow_nan=False)
    return manifest


def read(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    with np.load(path) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


@pytest.mark.parametrize("file_format", ["safetensors", "npz"])
def test_the_file_is_a_complete_model(tmp_path: Path, source: Source, file_format: Any) -> None:
    path = tmp_path / "out" / f"file.{file_format}"
    manifest = write(path, source, format=file_format)
    found = read(path)
    by_name = {layer["name"]: layer for layer in manifest["layers"]}
    assert list(by_name) == [tensor.name for tensor in source.tensors]
    assert sorted(found) == sorted(name for layer in manifest["layers"] for name in layer["tensors"])
    for name, values in model().items():
        layer, rank = by_name[name], RANKS.get(name)
        if rank is None:
            # An npz has no bfloat16, but float32 holds the same numbers.
            same = file_format == "safetensors" or values.dtype != torch.bfloat16
            assert found[name].dtype == (values.dtype if same else torch.float32)
            assert torch.equal(found[name].double(), values.double())
            assert found[name].shape == values.shape
            assert layer["verdict"] == ("dense" if values.ndim > 1 else "copied")
            assert layer["measured_error"] == (0 if values.ndim > 1 else None)
            assert ("stored as float32" in layer["reason"]) != same
            continue
        matrix = values.reshape(len(values), -1).double()
        product = found[f"{name}.B"].double() @ found[f"{name}.A"].double()
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        torch.testing.assert_close(product, (u[:, :rank] * s[:rank]) @ vt[:rank], rtol=0, atol=1e-6)
        assert found[f"{name}.A"].dtype == values.dtype
        assert (layer["shape"], layer["matrix_shape"]) == (list(values.shape), list(matrix.shape))
        assert layer["parameters_after"] == rank * sum(matrix.shape)
        assert layer["measured_error"] == pytest.approx(layer["relative_frobenius_error"], abs=1e-6)
    assert list(path.parent.iterdir()) == [path]


def test_an_entry_of_the_manifest(tmp_path: Path) -> None:
    source = source_of(tmp_path, saved_safetensors({"fc.weight": weight(8, 6).float()}))
    manifest = write(tmp_path / "file", source)
    (layer,) = manifest["layers"]
    errors = {name: layer.pop(name) for name in ("relative_frobenius_error", "measured_error", "spectral_error")}
    tail = math.sqrt(sum(4.0**-i for i in range(2, 6)) / sum(4.0**-i for i in range(6)))
    assert errors == pytest.approx(
        {"relative_frobenius_error": tail, "measured_error": tail, "spectral_error": 0.25}, rel=1e-6
    )
    assert layer == {
        "name": "fc.weight",
        "shape": [8, 6],
        "matrix_shape": [8, 6],
        "stored_dtype": "float32",
        "rank": 2,
        "verdict": "factored",
        "reason": "asked for",
        "dtype": "float32",
        "tensors": ["fc.weight.A", "fc.weight.B"],
        "parameters_before": 48,
        "parameters_after": 28,
    }
    assert (manifest["format"], manifest["dtype"], manifest["split"]) == ("safetensors", "auto", "balanced")
    counts = {"factored": 1, "dense": 0, "copied": 0, "left_out": 0}
    assert manifest["totals"] == {"parameters_before": 48, "parameters_after": 28, **counts}


def test_a_safetensors_file_tells_of_itself(tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    def inside(path: Path) -> Any:
        with safetensors.safe_open(path, "pt") as opened:
            return json.loads(opened.metadata()["rankscope"])

    manifest = write(tmp_path / "all", source)
    later = {"relative_frobenius_error", "measured_error", "spectral_error"}
    known = [{key: value for key, value in layer.items() if key not in later} for layer in manifest["layers"]]
    before = {key: manifest[key] for key in manifest.keys() - {"bytes", "sha256", "layers"}}
    assert inside(tmp_path / "all") == before | {"layers": known}
    monkeypatch.setattr(factor_files, "MAX_METADATA", 100)
    write(tmp_path / "short", source)
    assert inside(tmp_path / "short") == before


def test_every_tensor_is_aligned_to_its_entries(tmp_path: Path, source: Source) -> None:
    path = tmp_path / "file.safetensors"
    write(path, source)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    size = {"I64": 8, "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "BOOL": 1}
    del header["__metadata__"]
    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % size[entry["dtype"]] == 0 for entry in header.values())


@pytest.mark.parametrize("file_format", ["safetensors", "npz", "peft"])
def test_the_same_factors_are_the_same_bytes(tmp_path: Path, source: Source, file_format: Any) -> None:
    sums = {write(tmp_path / str(i), source, format=file_format)["sha256"] for i in range(2)}
    assert len(sums) == 1


@pytest.mark.parametrize("file_format", ["safetensors", "npz"])
def test_our_own_reader_takes_the_file(tmp_path: Path, source: Source, file_format: Any) -> None:
    path = tmp_path / f"file.{file_format}"
    write(path, source, format=file_format)
    with path.open("rb") as file:
        found = inspect(file, path.stat().st_size, Settings().upload_limits("auto"))
    assert found.format == file_format
    assert {tensor.name for tensor in found.tensors} == set(read(path))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_dtype_asked_for_is_that_of_what_is_computed(tmp_path: Path, source: Source, dtype: Any) -> None:
    path = tmp_path / "file.safetensors"
    manifest = write(path, source, dtype=dtype, split="left")
    found = read(path)
    assert str(found["conv.weight.A"].dtype) == str(found["fc.weight.B"].dtype) == f"torch.{dtype}"
    assert found["half.weight"].dtype == torch.float16
    assert found["fc.bias"].dtype == torch.float32
    assert (manifest["dtype"], manifest["split"]) == (dtype, "left")


def test_a_difference_holds_no_copies(tmp_path: Path, difference: Source) -> None:
    path = tmp_path / "file.safetensors"
    manifest = write(path, difference)
    found = read(path)
    assert found["half.weight"].dtype == found["brain.weight"].dtype == torch.float32
    assert torch.equal(found["brain.weight"], model()["brain.weight"].float())
    left_out = [layer for layer in manifest["layers"] if layer["verdict"] == "left_out"]
    assert {layer["name"] for layer in left_out} == {"steps", "mask", "fc.bias", "brain.bias"}
    assert all(layer["reason"] == "asked for; not copied, as the file is of differences" for layer in left_out)
    assert manifest["difference"] is True


@pytest.mark.parametrize("unread", [{"dtype": ""}, {"shape": None}, {"place": None}])
def test_what_a_refusal_left_unknown_is_left_out(unread: dict[str, Any]) -> None:
    tensor = Tensor("x", "float32", (3,), HERE, refusal=SCALAR)
    planned = [Planned(replace(tensor, **unread), None, "r")]
    (layer,) = lay_out(planned, FactorsSpec(format="npz"), is_difference=False)
    assert (layer.verdict, layer.stored) == ("left_out", ())


@pytest.mark.parametrize(
    ("file_format", "names"),
    [
        ("safetensors", ["w", "w.A"]),
        ("npz", ["w", "w.B"]),
        ("npz", ["v", "v.npy"]),
        ("safetensors", ["__metadata__"]),
    ],
)
def test_names_that_collide_are_refused(tmp_path: Path, file_format: Any, names: list[str]) -> None:
    path, parts = tmp_path / "out" / "file", [Part(f"{name}.npy", saved(np.eye(4))) for name in names]
    source = source_of(tmp_path / "data", zipped(*parts))
    with pytest.raises(CannotFactor, match=f"would be named '{names[-1]}"):
        write(path, source, plan(source, {"w": 1}), format=file_format)
    assert not path.parent.exists()


@pytest.mark.parametrize("file_format", ["safetensors", "npz", "peft"])
def test_a_failure_leaves_no_file(tmp_path: Path, source: Source, file_format: Any) -> None:
    path, seen = tmp_path / "out" / "file", []

    def cancel(work: int) -> None:
        seen.append(work)
        assert not list(path.parent.iterdir())
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_factors(path, plan(source, RANKS), source, FactorsSpec(format=file_format), cancel)
    assert not list(path.parent.iterdir())


def test_an_upload_that_has_lost_bytes_leaves_no_file(tmp_path: Path, source: Source) -> None:
    path = tmp_path / "out" / "file"
    os.truncate(source.path, source.path.stat().st_size - 1)
    with pytest.raises(MalformedArchive):
        write(path, source)
    assert not list(path.parent.iterdir())


def test_a_count_of_bytes_that_is_wrong_is_noticed() -> None:
    stored = factor_layout.Stored("w", "float64", (2, 2))
    with pytest.raises(CannotFactor, match="w: the upload gave 3 bytes, expected 32"):
        factor_files._write(io.BytesIO(), stored, [b"abc"])


def test_ticks_add_up_to_the_work_of_all(tmp_path: Path, source: Source) -> None:
    ticks: list[int] = []
    planned = plan(source, RANKS)
    write_factors(tmp_path / "file", planned, source, FactorsSpec(format="npz"), ticks.append)
    assert len(ticks) == len(model())
    assert sum(ticks) == sum(one.tensor.work for one in planned)


def test_nothing_that_is_left_out_is_read(tmp_path: Path) -> None:
    damaged, kernel = Part("b.npy", saved(np.ones(3)), crc=9), Part("w.npy", saved(np.eye(3)))
    source = source_of(tmp_path, zipped(damaged, kernel), zipped(kernel))
    with pytest.raises(MalformedArchive):
        list(source.raw(0))
    manifest = write(tmp_path / "file", source)
    assert [layer["verdict"] for layer in manifest["layers"]] == ["left_out", "dense"]


def test_an_adapter_says_what_is_not_in_it(tmp_path: Path) -> None:
    more = {"in_proj_weight": weight(4, 4), ".weight": weight(4, 4), "deep.weight": weight(2, 2, 1, 1, 1, 1)}
    source = source_of(tmp_path, saved_safetensors(model() | more))
    planned = plan(source, RANKS | dict.fromkeys(more, 1))
    manifest = write(tmp_path / "file.zip", source, planned, format="peft")
    reasons = {layer["name"]: layer["reason"] for layer in manifest["layers"] if layer["verdict"] == "left_out"}
    assert reasons == {
        **dict.fromkeys(("steps", "mask", "fc.bias", "brain.bias"), "asked for; an adapter holds factors only"),
        "zero.weight": "asked for; what is zero needs no adapter",
        "deep.weight": "asked for; PEFT adapts weights of 2 to 5 axes",
        **dict.fromkeys(("in_proj_weight", ".weight"), f"asked for; {NO_MODULE}"),
    }
    assert "torch.nn.Linear" in manifest["note"]
    with zipfile.ZipFile(tmp_path / "file.zip") as archive:
        assert archive.namelist() == ["adapter_config.json", "adapter_model.safetensors"]
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    shapes = {name: tuple(values.shape) for name, values in read(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        "base_model.model.half.lora_A.weight": (5, 5),
        "base_model.model.half.lora_B.weight": (6, 5),
        "base_model.model.brain.lora_A.weight": (5, 5),
        "base_model.model.brain.lora_B.weight": (6, 5),
        "base_model.model.fc.lora_A.weight": (2, 6),
        "base_model.model.fc.lora_B.weight": (8, 2),
        "base_model.model.conv.lora_A.weight": (3, 3, 2, 2),
        "base_model.model.conv.lora_B.weight": (8, 3, 1, 1),
    }


def test_an_adapter_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, saved(np.eye(3)))
    with pytest.raises(CannotFactor, match="an adapter would be empty"):
        write(tmp_path / "file", source, plan(source, {"array": 1}), format="peft")


def test_a_member_past_two_gibibytes_has_room_for_its_size(tmp_path: Path) -> None:
    layout = factor_layout.Stored("w", "float32", (1 << 15, 1 << 15))
    path = tmp_path / "file"
    with zipfile.ZipFile(path, "w") as archive, factor_files._member(archive, "w.npy", layout.n_bytes) as member:
        member.write(b"x")
    assert b"\x01\x00\x10\x00" in path.read_bytes()[:60]


@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    shares=st.lists(st.none() | st.floats(0, 1), min_size=5, max_size=5),
    file_format=st.sampled_from(["safetensors", "npz"]),
    split=st.sampled_from(["balanced", "left"]),
    wide=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_plan_is_written_as_promised(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[int, int]],
    shares: list[float | None],
    file_format: Any,
    split: Any,
    wide: bool,
) -> None:
    names = [f"w{i}" for i in range(len(shapes))]
    named = zip(names, shapes, shares, strict=False)
    ranks = {name: None if share is None else round(share * min(shape)) for name, shape, share in named}
    dtype = torch.float64 if wide else torch.float32
    weights = {
        name: weight(*shape, seed=i).to(dtype) for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    folder = tmp_path_factory.mktemp("any")
    source, path = source_of(folder, saved_safetensors(weights)), folder / f"file.{file_format}"
    layers = write(path, source, plan(source, ranks), format=file_format, split=split)["layers"]
    found = read(path)
    for layer in layers:
        name = layer["name"]
        stored = found[name] if ranks[name] is None else found[f"{name}.B"].double() @ found[f"{name}.A"].double()
        distance = float(torch.linalg.norm(stored - weights[name]) / torch.linalg.norm(weights[name]))
        assert layer["measured_error"] == pytest.approx(distance, abs=1e-7)
        assert layer["relative_frobenius_error"] == pytest.approx(distance, abs=1e-6)
