"""Valid files of every kind: what their tensors are called, and that their entries are where `Place` says."""

import io
import json
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from service import errors
from service.uploads import Limits, Tensor, Upload, checkpoint, inspect
from service.uploads.checks import count_entries, label
from tests.uploads.builders import FLOATS, Canary, Part, entry, npy, npy_of, objects, saved, text_header, wide, zipped
from tests.uploads.builders import safetensors as written
from tests.uploads.test_bad import LIMITS

NAMES = {"bool": "?", "float128": "g"}


def read(data: bytes, **limits: Any) -> Upload:
    """What the checks say of the bytes."""
    return inspect(io.BytesIO(data), len(data), Limits(**{**vars(LIMITS), **limits}))


def entries(data: bytes, tensor: Tensor) -> NDArray[Any]:
    """The tensor's entries, read by nothing but what the checks say of it."""
    place = tensor.place
    assert place is not None
    assert tensor.shape is not None
    stream = data[place.start : place.start + place.size]
    if place.deflated:
        stream = zlib.decompress(stream, -zlib.MAX_WBITS)
    if place.crc is not None:
        assert zlib.crc32(stream) == place.crc
    dtype = np.dtype(NAMES.get(tensor.dtype, tensor.dtype)).newbyteorder(">" if tensor.big_endian else "<")
    flat: NDArray[Any] = np.frombuffer(stream[place.skip :], dtype)
    return flat.reshape(tensor.shape[::-1]).T if tensor.fortran else flat.reshape(tensor.shape)


@pytest.mark.parametrize("code", ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", "g"])
@pytest.mark.parametrize("order", "<>")
def test_rows_75_76_79_81_an_array_of_any_real_dtype_is_found(code: str, order: str) -> None:
    array = FLOATS.astype(np.dtype(code).newbyteorder(order))
    data = saved(array)
    (tensor,) = read(data).tensors
    assert (tensor.name, tensor.shape, tensor.matrix_shape) == ("array", (2, 3), (2, 3))
    assert tensor.dtype == ("float128" if code == "g" else array.dtype.name)
    np.testing.assert_array_equal(entries(data, tensor), array)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (4, 3, 2), (4, 3, 2, 2), (1,) * 63 + (2,)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_74_85_86_an_array_of_any_shape_is_found(shape: tuple[int, ...], order: str) -> None:
    array = np.arange(float(np.prod(shape))).reshape(shape, order=order)
    data = saved(array)
    (tensor,) = read(data).tensors
    assert tensor.matrix_shape == (shape[0], np.prod(shape[1:]))
    np.testing.assert_array_equal(entries(data, tensor), array)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy_is_read(version: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, FLOATS, version=version)
    (tensor,) = read(buffer.getvalue()).tensors
    np.testing.assert_array_equal(entries(buffer.getvalue(), tensor), FLOATS)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(text_header(shape="(2L, 3L)"), id="python 2"),
        pytest.param('{"shape":(2,3),"fortran_order":False,"descr":"<f8"}', id="other quotes, no blanks"),
        pytest.param(text_header(descr="('<f8')"), id="in parentheses"),
        pytest.param(text_header(descr="'=f8'"), id="native order"),
    ],
)
def test_other_writers_headers_are_read(header: str) -> None:
    assert read(npy(header, FLOATS.tobytes())).tensors[0].shape == (2, 3)


def test_row_86_only_matrices_are_taken_where_asked_for() -> None:
    assert read(saved(FLOATS), matricize="none").tensors[0].refusal is None
    with pytest.raises(errors.UnsupportedShape, match="matricize"):
        read(saved(np.ones((2, 2, 2))), matricize="none")


def test_row_99_the_limits_themselves_are_allowed() -> None:
    assert read(saved(FLOATS), side=3, entries=6).tensors
    for limits in ({"side": 2}, {"entries": 5}):
        with pytest.raises(errors.ArrayTooLarge):
            read(saved(FLOATS), **limits)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_of_numpy_is_read(save: Any) -> None:
    buffer = io.BytesIO()
    arrays = {"a": FLOATS, "b/c": np.asfortranarray(FLOATS.astype(">f4")), "d.npy": np.ones((2, 2), np.float16)}
    save(buffer, **arrays)
    upload = read(buffer.getvalue())
    assert upload.format == "npz"
    for tensor, (name, array) in zip(upload.tensors, arrays.items(), strict=True):
        assert tensor.name == name
        np.testing.assert_array_equal(entries(buffer.getvalue(), tensor), array)


def test_an_npz_written_to_a_pipe_is_read() -> None:
    class Pipe(io.RawIOBase):
        """Takes bytes, cannot seek: the sizes then follow each member."""

        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.data += data
            return len(data)

    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for force_zip64 in (False, True):
            pipe = Pipe()
            with zipfile.ZipFile(pipe, "w", compression) as archive:
                for name in ("a.npy", "b.npy"):
                    with archive.open(name, "w", force_zip64=force_zip64) as member:
                        member.write(saved(FLOATS))
            for tensor in read(bytes(pipe.data)).tensors:
                np.testing.assert_array_equal(entries(bytes(pipe.data), tensor), FLOATS)


def test_row_111_honest_zip64_fields_are_read() -> None:
    data = saved(FLOATS)
    part = Part("a.npy", data, size=len(data), compressed=len(data), local_extra=wide(len(data), len(data)))
    part.local_size = part.local_compressed = 2**32 - 1
    assert read(zipped(part)).tensors[0].shape == (2, 3)


def test_rows_106_107_110_bad_members_harm_no_others() -> None:
    upload = read(
        zipped(
            Part("good.npy", saved(FLOATS), deflated=True),
            Part("README", b"hello"),
            Part("objects.npy", objects()),
            Part("cut.npy", saved(FLOATS)[:-1]),
            Part("damaged.npy", b"\xff" * 200, method=8, size=300),
            Part("vector.npy", saved(np.ones(3))),
            Part("complex.npy", saved(FLOATS.astype(complex))),
            Part("empty.npy"),
            Part("folder/"),
            Part("long.npy", npy_of((2**40, 0))),
        )
    )
    reasons = {tensor.name: tensor.refusal.kind for tensor in upload.tensors if tensor.refusal}
    assert reasons == {
        "README": "no-matrices",
        "objects": "pickle-forbidden",
        "cut": "malformed-array",
        "damaged": "malformed-archive",
        "vector": "unsupported-shape",
        "complex": "unsupported-dtype",
        "empty": "malformed-array",
        "folder/": "no-matrices",
        "long": "unsupported-shape",
    }


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/x", "../../etc/x"),
        ("/etc/passwd", "/etc/passwd"),
        ("a\0b", r"a\x00b"),
        ("a\u202eb", r"a\u202eb"),
        ("a\\x00b", r"a\\x00b"),
        ("gewöhnlich ☃", "gewöhnlich ☃"),
        ("a\nb", r"a\nb"),
    ],
)
def test_rows_104_119_names_are_escaped_labels(name: str, shown: str) -> None:
    assert read(zipped(Part(f"{name}.npy", saved(FLOATS), flags=0x800))).tensors[0].name == shown
    assert read(written({name: entry()}, bytes(16))).tensors[0].name == shown


def test_row_119_a_lone_surrogate_is_escaped() -> None:
    text = json.dumps({"\ud800": entry()}).encode()
    assert read(written(text, bytes(16))).tensors[0].name == r"\ud800"


def test_long_names_are_cut_and_stay_different() -> None:
    first, second = label("x" * 600), label("x" * 599 + "y")
    assert first != second
    assert len(first) == len(second) == 489


def test_labels_that_collide_are_refused() -> None:
    long = "x" * 600
    header = {long: entry(), label(long): entry((2, 2), 16, 32)}
    with pytest.raises(errors.MalformedArray):
        read(written(header, bytes(32)))


def test_safetensors_of_the_library_are_read() -> None:
    arrays = {"w": FLOATS, "half": FLOATS.astype(np.float16), "b": np.ones(3), "i": np.ones((2, 2), np.int64)}
    data = save_safetensors(arrays, {"format": "pt"})
    tensors = {tensor.name: tensor for tensor in read(data).tensors}
    reasons = {name: tensor.refusal.kind for name, tensor in tensors.items() if tensor.refusal}
    assert reasons == {"b": "unsupported-shape", "i": "unsupported-dtype"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(entries(data, tensors[name]), array)


@pytest.mark.parametrize(
    "dtype", ["float64", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
)
def test_row_117_dtypes_are_named_as_torch_does(dtype: str) -> None:
    data = safetensors.torch.save({"w": torch.ones(2, 3).to(getattr(torch, dtype))})
    (tensor,) = read(data).tensors
    assert (tensor.dtype, tensor.shape, tensor.refusal) == (dtype, (2, 3), None)


def test_row_117_dtypes_of_fewer_bits_are_left_out() -> None:
    header = {"w": entry(), "four": entry((3, 3), 16, 21, "F4"), "six": entry((1, 1), 21, 22, "F6_E3M2")}
    tensors = read(written(header, bytes(22))).tensors
    assert [tensor.refusal and tensor.refusal.kind for tensor in tensors] == [None] + 2 * ["unsupported-dtype"]


def test_row_120_scalars_and_empty_tensors_are_left_out() -> None:
    header = {
        "w": entry(),
        "none": entry((0, 4), 16, 16),
        "scalar": entry((), 16, 20),
        "axes": entry((1,) * 65, 20, 24),
    }
    tensors = {tensor.name: tensor for tensor in read(written(header, bytes(24))).tensors}
    assert {name for name, tensor in tensors.items() if tensor.refusal} == {"none", "scalar", "axes"}
    assert tensors["none"].shape == (0, 4)
    assert tensors["axes"].shape is None


def test_a_safetensors_header_may_be_padded() -> None:
    text = json.dumps({"w": entry()}).encode() + b"   "
    assert read(written(text, bytes(16))).tensors[0].name == "w"


def test_a_checkpoint_of_torch_is_taken_and_its_storages_found() -> None:
    state = {"w": torch.arange(12.0).reshape(3, 4), "h": torch.ones(5, 5, dtype=torch.bfloat16), "i": torch.arange(3)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    assert read(data) == Upload("torch", ())
    found = checkpoint.storages(io.BytesIO(data), len(data), LIMITS)
    for name, tensor in torch.load(io.BytesIO(data), weights_only=True, map_location="meta").items():
        storage = tensor.untyped_storage()
        assert found[storage._checkpoint_offset] == storage.nbytes()
        assert data[storage._checkpoint_offset :].startswith(
            state[name].contiguous().view(torch.uint8).numpy().tobytes()
        )


def test_the_storages_of_what_is_no_checkpoint_are_not_looked_for() -> None:
    data = zipped(Part("a.npy", saved(FLOATS)))
    with pytest.raises(errors.MalformedArchive):
        checkpoint.storages(io.BytesIO(data), len(data), LIMITS)


def test_a_file_that_is_shorter_than_its_size_is_refused() -> None:
    data = zipped(Part("a.npy", saved(FLOATS)))
    with pytest.raises(errors.MalformedArchive):
        inspect(io.BytesIO(data), len(data) + 100, LIMITS)


def test_a_torchscript_archive_is_unsafe() -> None:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            archive.writestr(f"model/{name}", b"\x80\2).")
    with pytest.raises(errors.UnsafeCheckpoint):
        read(buffer.getvalue())


def test_rows_61_121_no_pickle_is_run(tmp_path: Path) -> None:
    canary = Canary(str(tmp_path / "canary"))
    torch.save(canary, buffer := io.BytesIO())
    assert read(buffer.getvalue()).format == "torch"
    for data in (saved(np.array([[canary]], dtype=object), allow_pickle=True), pickle.dumps(canary)):
        with pytest.raises(errors.RankscopeError):
            read(data)
    assert not list(tmp_path.iterdir())


def test_the_largest_directory_is_read() -> None:
    parts = [Part(f"archive/data/{index}", b"1234") for index in range(10_099)]
    data = zipped(Part("archive/data.pkl", b"\x80\2}."), *parts)
    assert read(data).format == "torch"


def test_the_product_of_a_million_sides_is_not_worked_out() -> None:
    assert count_entries((2**62,) * 10**6) >= 2**63
    assert count_entries((2**62,) * 10**6 + (0,)) == 0
    assert count_entries((3, 5, 7)) == 105
