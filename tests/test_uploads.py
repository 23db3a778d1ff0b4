"""Uploaded files against a running server: sections C and D of the list of bad inputs, row by row."""

import io
import os
import pickle
import socket
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from tests.conftest import Server, start_server, stop_server
from tests.test_bad_inputs import problem
from tests.uploads.builders import FLOATS, Canary, Part, entry, npy, objects, safetensors, saved, text_header, zipped
from tests.uploads.files import BAD, BAD_TORCH, Bad

MATRIX = np.random.default_rng(0).standard_normal((7, 5))
CANARIES = (Path("canary"), Path("/tmp/rankscope-canary"))  # noqa: S108 - where nobody else writes


@pytest.fixture(autouse=True)
def _no_payload_runs() -> Any:
    yield
    assert not any(canary.exists() for canary in CANARIES)


def torch_file(value: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def multipart(content: bytes, head: bytes = b'Content-Disposition: form-data; name="file"; filename="w"') -> bytes:
    return b"--limit\r\n" + head + b"\r\n\r\n" + content + b"\r\n--limit--\r\n"


FORM = {"content-type": "multipart/form-data; boundary=limit"}


@pytest.mark.parametrize("bad", BAD + BAD_TORCH, ids=lambda bad: f"row {bad.row}")
def test_a_bad_file_gets_its_status_and_type(torch_server: Server, bad: Bad) -> None:
    answer = torch_server.client.post("/analyze", content=bad.build())
    problem(answer, bad.status, bad.slug)
    assert ("location" in answer.headers) == (bad.where == "data")  # What the job finds out has a job to be read.
    if bad.where == "data":
        job = torch_server.client.get(answer.headers["location"]).json()
        assert (job["status"], job["error"]["type"]) == ("failed", bad.slug)
        assert {tensor["status"] for tensor in job["tensors"]} == {"skipped"}
        assert job["error"]["detail"] == answer.json()["detail"]


def test_row_71_a_header_is_not_echoed(server: Server) -> None:
    answer = server.client.post("/analyze", content=npy(text_header(shape="(secret" * 500)))
    problem(answer, 400, "malformed-array")
    assert "secret" not in answer.text


def test_row_77_what_numpy_cannot_keep_is_asked_for_as_safetensors(server: Server) -> None:
    answer = server.client.post("/analyze", content=npy(text_header(descr="'|V2'"), bytes(12)))
    assert "safetensors" in problem(answer, 422, "unsupported-dtype")["detail"]


def test_a_file_that_is_refused_leaves_nothing(torch_server: Server) -> None:
    before = set((torch_server.data / "uploads").iterdir())
    problem(torch_server.client.post("/analyze", content=saved(FLOATS) + b"\0"), 400, "malformed-array")
    assert set((torch_server.data / "uploads").iterdir()) == before


def test_row_94_nan_is_told_with_its_count_and_place(server: Server) -> None:
    matrix = np.zeros((3, 4, 2))
    matrix[1, 2, 1] = matrix[2, 0, 0] = np.nan
    answer = server.client.post("/analyze", content=saved(matrix))
    detail = problem(answer, 422, "non-finite-values")["detail"]
    assert detail == "2 of 24 entries are not finite in float64, the first at [1, 2, 1]"


class Payload:
    """What os.system would run when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {CANARIES[1]}",)


EYE = torch.eye(2)
NESTED: Any = ()
for _ in range(40):
    NESTED = (NESTED, NESTED)


@pytest.mark.parametrize(
    ("content", "status", "slug"),
    [
        pytest.param(torch_file({"w": Payload()}), 422, "unsafe-checkpoint", id="row 121: os.system"),
        pytest.param(torch_file([Canary()]), 422, "unsafe-checkpoint", id="row 121: open"),
        pytest.param(pickle.dumps(Payload()), 415, "unsupported-media-type", id="row 122"),
        pytest.param(torch_file(torch.nn.Linear(2, 2)), 422, "unsafe-checkpoint", id="a whole module"),
        pytest.param(torch_file({"w": torch.eye(3)})[:-10], 400, "malformed-archive", id="row 125: truncated"),
        pytest.param(torch_file({"w": torch.zeros(1).expand(9, 9)}), 413, "array-too-large", id="row 126: small"),
        pytest.param(torch_file([EYE] * 10_001), 413, "archive-too-large", id="row 130: one more than may be"),
        pytest.param(
            torch_file({"w": torch.zeros(1).expand(100_000, 100_000)}), 413, "array-too-large", id="row 126: 40 GB"
        ),
        pytest.param(torch_file(torch.eye(3).to_sparse()), 422, "unsupported-dtype", id="sparse"),
        pytest.param(torch_file({"w": torch.eye(3, dtype=torch.complex64)}), 422, "unsupported-dtype", id="complex"),
        pytest.param(torch_file({"w": torch.eye(3, dtype=torch.int64)}), 422, "no-matrices", id="integers"),
        pytest.param(torch_file({"w": torch._neg_view(torch.eye(3))}), 422, "unsupported-dtype", id="negated"),
        pytest.param(torch_file({"epoch": 3}), 422, "no-matrices", id="no tensors"),
        pytest.param(
            torch_file({"a": {"b": torch.eye(2)}, "a.b": torch.eye(3)}), 400, "malformed-archive", id="one name for two"
        ),
        pytest.param(torch_file({"w": torch.full((2, 2), torch.inf)}), 422, "non-finite-values", id="infinite"),
        pytest.param(torch_file({"a": NESTED}), 413, "archive-too-large", id="2^40 empty tuples"),
        pytest.param(
            torch_file({"w": torch.eye(3)}, _use_new_zipfile_serialization=False),
            415,
            "unsupported-media-type",
            id="the old format",
        ),
    ],
)
def test_a_bad_checkpoint_gets_its_status_and_type(
    torch_server: Server, content: bytes, status: int, slug: str
) -> None:
    problem(torch_server.client.post("/analyze", content=content), status, slug)


def test_a_storage_that_is_not_in_the_file_is_malformed(torch_server: Server) -> None:
    good = zipfile.ZipFile(io.BytesIO(torch_file({"w": torch.eye(9)})))
    parts = {name: good.read(name) for name in good.namelist()}
    (data,) = (name for name in parts if name.endswith("data/0"))
    parts[data] = parts[data][:-4]
    content = zipped(*(Part(name, part) for name, part in parts.items()))
    problem(torch_server.client.post("/analyze", content=content), 400, "malformed-archive")


def test_checkpoints_are_taken_only_where_the_operator_says_so(server: Server) -> None:
    answer = server.client.post("/analyze", content=torch_file({"w": torch.eye(3)}))
    page = problem(answer, 415, "torch-disabled")["type"]
    assert "RANKSCOPE_TORCH_FILES" in server.client.get(page).json()["advice"]


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        pytest.param(multipart(saved(FLOATS)), {"content-type": "multipart/form-data"}, id="row 131: no boundary"),
        pytest.param(b"garbage" * 99, FORM, id="row 131: garbage"),
        pytest.param(b"", FORM, id="empty"),
        pytest.param(b"--limit--\r\n", FORM, id="no part"),
        pytest.param(multipart(saved(FLOATS))[:-12], FORM, id="row 132: cut"),
        pytest.param(multipart(saved(FLOATS))[:40], FORM, id="row 132: cut in the headers"),
        pytest.param(multipart(b"a")[:-11] + b"\r\n" + multipart(b"b"), FORM, id="two parts"),
        pytest.param(multipart(b"a", b"X: " + b"y" * (16 << 20)), FORM, id="row 134: 16 MB header"),
        pytest.param(multipart(b"a", b"\r\n".join([b"X: y"] * 10_000)), FORM, id="row 134: 10 000 headers"),
        pytest.param(b"\r\n" * (8 << 20) + multipart(b"a"), FORM, id="row 134: preamble"),
        pytest.param(multipart(b"a") + b"e" * (1 << 20), FORM, id="epilogue"),
    ],
)
def test_bad_multipart_is_malformed(server: Server, content: bytes, headers: dict[str, str]) -> None:
    problem(server.client.post("/analyze", content=content, headers=headers), 400, "malformed-multipart")


NAMES = [b"../../etc/passwd", b"x" * 10_000, b"", b"a\0b", "ж".encode()]


@pytest.mark.parametrize("name", NAMES, ids=["up", "long", "empty", "NUL", "Cyrillic"])
def test_row_135_a_filename_is_not_used(server: Server, name: bytes) -> None:
    head = b'Content-Disposition: form-data; name="file"; filename="' + name + b'"\r\nContent-Type: image/png'
    answer = server.client.post("/analyze", content=multipart(saved(MATRIX), head), headers=FORM)
    assert answer.status_code == 200, answer.text
    assert answer.json()["tensors"][0]["name"] == "array"
    assert answer.json()["source"]["bytes"] == len(saved(MATRIX))


def test_row_136_the_content_type_decides_nothing(server: Server) -> None:
    for content_type in ("image/png", "application/x-www-form-urlencoded", "application/json", "nonsense"):
        answer = server.client.post("/analyze", content=saved(MATRIX), headers={"content-type": content_type})
        assert answer.status_code == 200


def test_row_21_an_upload_over_the_limit_is_refused_before_it_is_read_or_as_soon_as_it_is(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_UPLOAD_LIMIT="2000000")
    chunks = (bytes(100_000) for _ in range(30))
    problem(server.client.post("/analyze", content=chunks), 413, "body-too-large")
    with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0)) as connection:
        connection.sendall(b"POST /analyze HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n")
        assert b"413" in connection.recv(1000)
    form = server.client.post("/analyze", content=multipart(bytes(2_050_000)), headers=FORM)
    problem(form, 413, "body-too-large")
    answer = server.client.post("/analyze", content=b"x", headers={"content-encoding": "gzip"})
    problem(answer, 415, "unsupported-content-encoding")
    assert list((server.data / "uploads").iterdir()) == []
    assert stop_server(server) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_client_that_breaks_off_an_upload_leaves_nothing(server: Server) -> None:
    before = sorted((server.data / "uploads").iterdir())
    with socket.create_connection(("127.0.0.1", server.client.base_url.port or 0)) as connection:
        connection.sendall(b"POST /analyze HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n")
        connection.sendall(bytes(2_000_000))
    assert server.client.get("/healthz").status_code == 200
    assert sorted((server.data / "uploads").iterdir()) == before


@pytest.mark.parametrize(
    "query", ["matricize=all", "top_k=0", "reuse=2", "base=none", "priority=urgent", "name=", "name=%07", "color=red"]
)
def test_bad_parameters_are_named(server: Server, query: str) -> None:
    answer = server.client.post(f"/analyze?{query}", content=saved(MATRIX))
    assert problem(answer, 422, "validation-error")["errors"][0]["parameter"] == query.partition("=")[0]


# Files that are good


def values_of(state: dict[str, Any], name: str = "array") -> np.ndarray:
    (tensor,) = (tensor for tensor in state["tensors"] if tensor["name"] == name)
    assert tensor["status"] == "analysed", tensor["detail"]
    return np.array(tensor["singular_values"])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("ends", ["<", ">"])
@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "f16", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"])
def test_rows_74_75_76_79_81_every_dtype_in_every_order_is_read(
    server: Server, kind: str, ends: str, order: Any
) -> None:
    matrix = (10 * MATRIX).astype(np.dtype(kind).newbyteorder(ends))
    state = server.analyze(saved(np.asarray(matrix, order=order)), reuse=False)
    expected = np.linalg.svd(matrix.astype(np.float64))[1]
    np.testing.assert_allclose(values_of(state), expected, rtol=0, atol=1e-14 * expected[0])
    (tensor,) = state["tensors"]
    assert tensor["dtype"] == np.dtype(kind).name
    assert any("computed in float64" in note for note in tensor["notes"]) == (kind != "f8")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy_is_read(server: Server, version: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, MATRIX, version=version)
    expected = np.linalg.svd(MATRIX)[1]
    np.testing.assert_allclose(values_of(server.analyze(buffer.getvalue())), expected, rtol=1e-13)


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_74_86_both_memory_orders_of_a_kernel_are_the_same_matrix(server: Server, order: Any) -> None:
    kernel = np.random.default_rng(1).standard_normal((6, 5, 3, 2))
    state = server.analyze(saved(np.asarray(kernel, order=order)))
    np.testing.assert_array_equal(values_of(state), values_of(server.analyze(saved(kernel), reuse=False)))
    np.testing.assert_allclose(values_of(state), np.linalg.svd(kernel.reshape(6, 30))[1], rtol=1e-13)
    (tensor,) = state["tensors"]
    assert (tensor["shape"], tensor["matrix_shape"]) == ([6, 5, 3, 2], [6, 30])
    assert any("6×30" in note for note in tensor["notes"])
    problem(server.client.post("/analyze?matricize=none", content=saved(kernel)), 422, "unsupported-shape")


def test_row_81_large_integers_say_that_they_may_be_rounded(server: Server) -> None:
    (tensor,) = server.analyze(saved(np.array([[2**60 + 1, 3], [1, -(2**62)]])))["tensors"]
    assert any(note.startswith("2 integers beyond") for note in tensor["notes"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1)])
def test_row_85_a_vector_has_one_singular_value_its_norm(server: Server, shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(2).standard_normal(shape)
    assert values_of(server.analyze(saved(matrix))) == pytest.approx([np.linalg.norm(matrix)], rel=1e-14)


def test_row_95_the_zero_matrix_has_rank_0_and_no_nan(server: Server) -> None:
    answer = server.client.post("/analyze", content=saved(np.zeros((4, 3))))
    assert "NaN" not in answer.text
    (tensor,) = answer.json()["tensors"]
    ranks = ("stable_rank", "entropy_rank", "numerical_rank", "energy_rank_99")
    assert [tensor[name] for name in ranks] == [0] * len(ranks)
    assert [tensor[name] for name in ("condition_number", "top_share_1", "noise_edge")] == [None] * 3
    assert (tensor["compression"]["rank"], tensor["compression"]["times_smaller"]) == (0, None)


@pytest.mark.parametrize("scale", [1e308, 1e-320, 5e-324])
def test_row_96_matrices_at_the_ends_of_float64_have_their_ranks(server: Server, scale: float) -> None:
    (tensor,) = server.analyze(saved(np.full((3, 3), scale)))["tensors"]
    assert (tensor["numerical_rank"], tensor["energy_rank_99"], tensor["compression"]["rank"]) == (1, 1, 1)
    assert tensor["stable_rank"] == pytest.approx(1, rel=1e-12)
    largest = 3 * scale
    assert tensor["spectral_norm"] == (pytest.approx(largest, rel=1e-12) if np.isfinite(largest) else None)


def test_rows_104_119_names_of_members_and_keys_are_escaped_labels(server: Server) -> None:
    names = ["../../etc/x", "/etc/passwd", "a\0b", "\u202egnp.exe", "back\\slash"]
    content = safetensors({name: entry((2, 2), 16 * i, 16 * i + 16) for i, name in enumerate(names)}, bytes(80))
    shown = [tensor["name"] for tensor in server.analyze(content)["tensors"]]
    assert sorted(shown) == sorted(["../../etc/x", "/etc/passwd", r"a\x00b", r"\u202egnp.exe", r"back\\slash"])
    parts = [Part(f"{name}.npy", saved(FLOATS)) for name in names if "\0" not in name]
    assert len(server.analyze(zipped(*parts))["tensors"]) == len(parts)


def test_rows_94_99_106_107_110_117_120_one_bad_tensor_harms_no_other(server: Server) -> None:
    nan = np.full((2, 2), np.nan)
    content = zipped(
        Part("good.npy", saved(MATRIX)),
        Part("objects.npy", objects()),
        Part("nan.npy", saved(nan)),
        Part("crc.npy", saved(FLOATS), crc=9),
        Part("vector.npy", saved(np.ones(3))),
        Part("large.npy", saved(np.zeros((1, 20_000), np.int8))),
        Part("README", b"hello"),
        Part("other.npy", saved(MATRIX.T), deflated=True),
    )
    state = server.analyze(content)
    standing = {tensor["name"]: tensor["reason"] for tensor in state["tensors"]}
    assert standing == {
        "good": None, "objects": "pickle-forbidden", "nan": "non-finite-values", "crc": "malformed-archive",
        "vector": "unsupported-shape", "large": "array-too-large", "README": "no-matrices", "other": None,
    }  # fmt: skip
    assert all(tensor["detail"] for tensor in state["tensors"] if tensor["status"] == "skipped")
    np.testing.assert_allclose(values_of(state, "good"), values_of(state, "other"), rtol=1e-13)
    assert (state["totals"]["analysed"], state["totals"]["skipped"]) == (2, 6)


FLOAT8 = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", *FLOAT8])
def test_rows_117_129_every_float_of_safetensors_and_torch_is_read(torch_server: Server, dtype: str) -> None:
    tensor = torch.from_numpy(MATRIX).to(getattr(torch, dtype))
    expected = np.linalg.svd(tensor.double().numpy())[1]
    integers = {"ids": torch.arange(6).reshape(2, 3)}
    contents = [save_safetensors({"w": tensor, **integers}), torch_file({"w": tensor, **integers})]
    for content in contents:
        state = torch_server.analyze(content)
        np.testing.assert_allclose(values_of(state, "w"), expected, rtol=0, atol=1e-14 * expected[0])
        assert {one["name"]: one["dtype"] for one in state["tensors"]} == {"w": dtype, "ids": "int64"}


def test_row_129_views_parameters_and_nests_of_a_checkpoint_are_read(torch_server: Server) -> None:
    whole = torch.from_numpy(np.random.default_rng(3).standard_normal((12, 9)))
    saved_dict = {
        "model": {"rows": whole[3:7], "columns": whole[:, 2:5], "turned": whole.T, "half": whole[::2, ::3]},
        "parameters": [torch.nn.Parameter(whole + 1)],
        "kernel": whole.reshape(2, 3, 3, 6).permute(3, 0, 1, 2),
        "bias": whole[0],
        "step": 7,
    }
    state = torch_server.analyze(torch_file(saved_dict))
    expected = {f"model.{name}": value for name, value in saved_dict["model"].items()}
    expected |= {"parameters.0": whole + 1, "kernel": saved_dict["kernel"].reshape(6, -1)}
    for name, value in expected.items():
        np.testing.assert_allclose(values_of(state, name), torch.linalg.svdvals(value.detach()), rtol=1e-12)
    assert len(state["tensors"]) == len(expected) + 1


def test_scalars_and_tensors_with_attributes_harm_no_other(torch_server: Server) -> None:
    disguised = torch.eye(4)
    for name in ("numel", "permute", "is_contiguous", "shape_of"):
        setattr(disguised, name, 5)
    state = torch_server.analyze(torch_file({"w": torch.eye(3), "scale": torch.tensor(2.65), "disguised": disguised}))
    standing = {tensor["name"]: tensor["reason"] for tensor in state["tensors"]}
    assert standing == {"w": None, "scale": "unsupported-shape", "disguised": None}


def test_rows_89_120_an_empty_tensor_with_endless_sides_is_only_skipped(server: Server) -> None:
    content = safetensors({"w": entry(), "empty": entry([0, 2**62, 2**62], 16, 16)}, bytes(16))
    state = server.analyze(content)
    assert {tensor["name"]: tensor["status"] for tensor in state["tensors"]} == {"w": "analysed", "empty": "skipped"}
    assert server.client.get(f"/analyses/{state['id']}").json() == state


def test_bytes_after_a_deflated_stream_are_found(server: Server) -> None:
    compressed = zlib.compressobj(wbits=-15)
    stream = compressed.compress(saved(np.zeros((40, 40)))) + compressed.flush() + b"hidden"
    whole = saved(np.zeros((40, 40)))
    part = Part("a.npy", stream, method=8, size=len(whole), crc=zlib.crc32(whole))
    problem(server.client.post("/analyze", content=zipped(part)), 400, "malformed-archive")


def test_an_archive_of_headers_full_of_brackets_is_cheap_to_refuse(server: Server) -> None:
    headers = [npy(text_header(shape="(" * 9000)) for _ in range(256)]
    content = zipped(*(Part(f"{i}.npy", header, deflated=True) for i, header in enumerate(headers)))
    problem(server.client.post("/analyze", content=content), 422, "no-matrices")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_tensors_are_not_read(torch_server: Server) -> None:
    content = torch_file({"v": torch.eye(2), "q": torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.qint8)})
    problem(torch_server.client.post("/analyze", content=content), 422, "unsupported-dtype")
