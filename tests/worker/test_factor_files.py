"""Files of factors, read back by the libraries that people read them with."""

import hashlib
import json
import math
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from service import files
from service.errors import MalformedArchive, NonFiniteValues, UnsupportedDtype, UnsupportedShape, UploadError
from service.settings import Settings
from service.uploads import Place, Tensor, inspect
from tests.worker.test_decompose import matrix_with
from worker import factor_files, factor_layout
from worker.factor_files import write_factors
from worker.factor_layout import Options, Planned, lay_out
from worker.factoring import CannotFactor
from worker.reading import Matrix

HERE = Place(0, 0)
SCALAR = UnsupportedShape("no matrix")
NO_MODULE = "PEFT adapts modules, and the name is not that of a module's .weight"


@dataclass
class Upload:
    """Torch tensors as the source of a plan; what is read is noted, to see in what order."""

    tensors: list[tuple[str, torch.Tensor, int | None]]
    is_difference: bool = False
    refusals: dict[str, UploadError] = field(default_factory=dict)
    read: list[str] = field(default_factory=list)

    @property
    def planned(self) -> list[Planned]:
        plan = []
        for name, values, rank in self.tensors:
            refusal = self.refusals.get(name) or (SCALAR if values.ndim < 2 else None)
            tensor = Tensor(name, str(values.dtype)[6:], tuple(values.shape), HERE, refusal=refusal)
            plan.append(Planned(tensor, rank, "asked for"))
        return plan

    def matrix(self, position: int) -> Matrix:
        name, values, _ = self.tensors[position]
        self.read.append(name)
        return Matrix(values.reshape(len(values), -1).double(), 0, ())

    def raw(self, position: int) -> Iterator[bytes]:
        name, values, _ = self.tensors[position]
        self.read.append(name)
        content = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield from (content[start : start + 7] for start in range(0, len(content), 7))


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    s = 2.0 ** -np.arange(min(shape[0], math.prod(shape[1:])))
    return torch.from_numpy(matrix_with(s, (shape[0], math.prod(shape[1:])), seed).reshape(shape))


def model() -> Upload:
    """Narrow and wide floats, a kernel, a layer left dense, a zero matrix, biases and a buffer."""
    return Upload(
        [
            ("steps", torch.tensor(7, dtype=torch.int64), None),
            ("mask", torch.tensor([True, False, True]), None),
            ("half.weight", weight(6, 5, seed=1).half(), None),
            ("brain.weight", weight(6, 5, seed=2).bfloat16(), None),
            ("fc.weight", weight(8, 6).float(), 2),
            ("fc.bias", torch.arange(8).float(), None),
            ("brain.bias", torch.arange(3).bfloat16(), None),
            ("conv.weight", weight(8, 3, 2, 2), 3),
            ("zero.weight", torch.zeros(4, 7), 0),
        ]
    )


def write(path: Path, upload: Any, options: Options, ticks: list[int] | None = None) -> dict[str, Any]:
    done: list[int] = [] if ticks is None else ticks
    manifest = write_factors(path, upload.planned, upload, options, done.append)
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
def test_the_file_is_a_complete_model(tmp_path: Path, file_format: Any) -> None:
    path, upload = tmp_path / f"file.{file_format}", model()
    manifest = write(path, upload, Options(file_format))
    found = read(path)
    by_name = {layer["name"]: layer for layer in manifest["layers"]}
    assert list(by_name) == [name for name, _, _ in upload.tensors]
    assert sorted(found) == sorted(name for layer in manifest["layers"] for name in layer["tensors"])
    for name, values, rank in upload.tensors:
        layer = by_name[name]
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
    assert list(tmp_path.iterdir()) == [path]


def test_an_entry_of_the_manifest(tmp_path: Path) -> None:
    manifest = write(tmp_path / "file", Upload([("fc.weight", weight(8, 6).float(), 2)]), Options("safetensors"))
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


def test_a_safetensors_file_tells_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.safetensors"

    def inside() -> Any:
        with safetensors.safe_open(path, "pt") as opened:
            return json.loads(opened.metadata()["rankscope"])

    manifest = write(path, model(), Options("safetensors"))
    later = {"relative_frobenius_error", "measured_error", "spectral_error"}
    known = [{key: value for key, value in layer.items() if key not in later} for layer in manifest["layers"]]
    assert inside() == {key: manifest[key] for key in manifest.keys() - {"bytes", "sha256"}} | {"layers": known}
    monkeypatch.setattr(factor_files, "MAX_METADATA", 100)
    write(path, model(), Options("safetensors"))
    assert inside() == {key: manifest[key] for key in manifest.keys() - {"bytes", "sha256", "layers"}}


def test_every_tensor_is_aligned_to_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write(path, model(), Options("safetensors"))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    size = {"I64": 8, "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "BOOL": 1}
    del header["__metadata__"]
    assert length % 8 == 0
    assert all(entry["data_offsets"][0] % size[entry["dtype"]] == 0 for entry in header.values())


@pytest.mark.parametrize("file_format", ["safetensors", "npz", "peft"])
def test_the_same_factors_are_the_same_bytes(tmp_path: Path, file_format: Any) -> None:
    sums = {write(tmp_path / str(i), model(), Options(file_format))["sha256"] for i in range(2)}
    assert len(sums) == 1


@pytest.mark.parametrize("file_format", ["safetensors", "npz"])
def test_our_own_reader_takes_the_file(tmp_path: Path, file_format: Any) -> None:
    path = tmp_path / "file"
    write(path, model(), Options(file_format))
    with path.open("rb") as file:
        found = inspect(file, path.stat().st_size, Settings().upload_limits("auto"))
    assert found.format == file_format
    assert {tensor.name for tensor in found.tensors} == set(read(path.rename(path.with_suffix(f".{file_format}"))))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_the_dtype_asked_for_is_that_of_what_is_computed(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "file.safetensors"
    manifest = write(path, model(), Options("safetensors", dtype, "left"))
    found = read(path)
    assert str(found["conv.weight.A"].dtype) == str(found["fc.weight.B"].dtype) == f"torch.{dtype}"
    assert found["half.weight"].dtype == torch.float16
    assert found["fc.bias"].dtype == torch.float32
    assert (manifest["dtype"], manifest["split"]) == (dtype, "left")


def test_a_difference_holds_no_copies(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    upload = replace(model(), is_difference=True)
    manifest = write(path, upload, Options("safetensors"))
    found = read(path)
    assert found["half.weight"].dtype == found["brain.weight"].dtype == torch.float32
    assert torch.equal(found["brain.weight"], model().tensors[3][1].float())
    left_out = [layer for layer in manifest["layers"] if layer["verdict"] == "left_out"]
    assert {layer["name"] for layer in left_out} == {"steps", "mask", "fc.bias", "brain.bias"}
    assert all(layer["reason"] == "asked for; not copied, as the file is of differences" for layer in left_out)
    assert manifest["difference"] is True


def test_what_was_refused_is_copied_where_it_can_be(tmp_path: Path) -> None:
    upload = model()
    upload.tensors += [
        ("diverged", torch.full((2, 2), torch.nan), None),
        ("damaged", torch.ones(2, 2), None),
        ("phases", torch.ones(3, dtype=torch.complex128), None),
    ]
    upload.refusals = {
        "diverged": NonFiniteValues("4 of 4"),
        "damaged": MalformedArchive("bad CRC"),
        "phases": UnsupportedDtype("complex"),
    }
    path = tmp_path / "file.safetensors"
    manifest = write(path, upload, Options("safetensors"))
    verdicts = {layer["name"]: (layer["verdict"], layer["reason"]) for layer in manifest["layers"]}
    assert verdicts["diverged"] == ("copied", "asked for")
    assert verdicts["damaged"] == ("left_out", "asked for; its entries cannot be read")
    assert verdicts["phases"] == ("left_out", "asked for; safetensors cannot hold complex128")
    assert read(path)["diverged"].isnan().all()
    before = [math.prod(v.shape) for n, v, _ in upload.tensors if n not in ("damaged", "phases")]
    assert manifest["totals"]["parameters_before"] == sum(before)
    write(tmp_path / "file.npz", upload, Options("npz"))
    assert read(tmp_path / "file.npz")["phases"].dtype == torch.complex128


@pytest.mark.parametrize("unread", [{"dtype": ""}, {"shape": None}, {"place": None}])
def test_what_a_refusal_left_unknown_is_left_out(unread: dict[str, Any]) -> None:
    tensor = Tensor("x", "float32", (3,), HERE, refusal=SCALAR)
    (layer,) = lay_out([Planned(replace(tensor, **unread), None, "r")], Options("npz"), is_difference=False)
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
    upload = Upload([(name, weight(4, 4), 1 if name == "w" else None) for name in names])
    with pytest.raises(CannotFactor, match=f"would be named '{names[-1]}"):
        write(tmp_path / "file", upload, Options(file_format))
    assert not list(tmp_path.iterdir())
    assert not upload.read


@pytest.mark.parametrize("file_format", ["safetensors", "npz", "peft"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, file_format: Any) -> None:
    path, seen = tmp_path / "file", []

    def cancel(work: int) -> None:
        seen.append(work)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_factors(path, model().planned, model(), Options(file_format), cancel)
    assert not list(tmp_path.iterdir())
    files.write(path, b"before")
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        write_factors(path, model().planned, model(), Options(file_format), cancel)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("file_format", ["safetensors", "npz"])
def test_a_source_that_gives_too_little_is_noticed(tmp_path: Path, file_format: Any) -> None:
    class Short(Upload):
        def raw(self, position: int) -> Iterator[bytes]:
            yield b"abc"

    upload = Short([("w", weight(2, 2), None)])
    with pytest.raises(CannotFactor, match="w: the upload gave 3 bytes, expected 32"):
        write(tmp_path / "file", upload, Options(file_format))
    assert not list(tmp_path.iterdir())


def test_ticks_add_up_to_the_work_of_all(tmp_path: Path) -> None:
    ticks: list[int] = []
    write(tmp_path / "file", model(), Options("npz"), ticks)
    assert len(ticks) == len(model().tensors)
    assert sum(ticks) == sum(planned.tensor.work for planned in model().planned)


def test_one_layer_is_read_at_a_time_and_nothing_that_is_left_out(tmp_path: Path) -> None:
    upload = replace(model(), is_difference=True)
    write(tmp_path / "file", upload, Options("safetensors"))
    assert sorted(upload.read) == sorted(name for name, values, _ in upload.tensors if values.ndim > 1)


def test_an_adapter_says_what_is_not_in_it(tmp_path: Path) -> None:
    upload = model()
    upload.tensors += [
        ("in_proj_weight", weight(4, 4), 1),
        (".weight", weight(4, 4), 1),
        ("deep.weight", weight(2, 2, 1, 1, 1, 1), 1),
    ]
    manifest = write(tmp_path / "file.zip", upload, Options("peft"))
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
    with pytest.raises(CannotFactor, match="an adapter would be empty"):
        write(tmp_path / "file", Upload([("w", weight(3, 3), 1)]), Options("peft"))


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
    ranks = [None if share is None else round(share * min(shape)) for shape, share in zip(shapes, shares, strict=False)]
    dtype = torch.float64 if wide else torch.float32
    upload = Upload([(f"w{i}", weight(*shape, seed=i).to(dtype), ranks[i]) for i, shape in enumerate(shapes)])
    path = tmp_path_factory.mktemp("any") / f"file.{file_format}"
    layers = write(path, upload, Options(file_format, split=split))["layers"]
    found = read(path)
    for layer, (name, values, rank) in zip(layers, upload.tensors, strict=True):
        stored = found[name] if rank is None else found[f"{name}.B"].double() @ found[f"{name}.A"].double()
        distance = float(torch.linalg.norm(stored - values) / torch.linalg.norm(values))
        assert layer["measured_error"] == pytest.approx(distance, abs=1e-7)
        assert layer["relative_frobenius_error"] == pytest.approx(distance, abs=1e-6)
