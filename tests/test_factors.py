"""Factors over HTTP: what is downloaded multiplies to what was promised."""

import hashlib
import io
import json
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from tests.conftest import OVER, Server, wait_for
from tests.test_bad_inputs import problem
from tests.uploads.builders import saved
from tests.worker.test_decompose import matrix_with


def layer(shape: tuple[int, int], decay: float, seed: int) -> torch.Tensor:
    return torch.from_numpy(matrix_with(np.exp(-np.arange(min(shape)) / decay), shape, seed)).float()


WEIGHTS = {
    "a.weight": layer((60, 40), 3, 0),
    "b.weight": layer((50, 50), 500, 1),
    "c.weight": layer((40, 90), 6, 2).bfloat16(),
    "c.bias": torch.randn(40, generator=torch.Generator().manual_seed(0)),
    "ids": torch.arange(6),
    "nan.weight": torch.full((3, 3), torch.nan),
}


@pytest.fixture(scope="module")
def analysis(server: Server) -> dict[str, Any]:
    return server.analyze(save_safetensors(WEIGHTS))


def make(server: Server, analysis: dict[str, Any], **body: Any) -> tuple[dict[str, Any], bytes]:
    """The finished job, and its file."""
    answer = server.client.post(f"/analyses/{analysis['id']}/factors", json=body)
    assert answer.status_code == 202, answer.text
    path = answer.headers["location"]

    def over() -> dict[str, Any] | None:
        state: dict[str, Any] = server.client.get(path).json()
        return state if state["status"] in OVER else None

    state = wait_for(over, "the factors")
    assert state["status"] == "succeeded", state["error"]
    canceled = server.client.post(f"{path}/cancel")
    assert (canceled.json(), canceled.headers["etag"]) == (state, server.client.get(path).headers["etag"])
    file = server.client.get(path, params={"format": body.get("format", "safetensors")})
    assert file.status_code == 200, file.text
    return state, file.content


def check(manifest: dict[str, Any], tensors: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Every layer of the manifest is in the file, and as far from the upload as it says."""
    for one in manifest["layers"]:
        if one["verdict"] != "factored":
            continue
        w = weights[one["name"]].double().numpy()
        a, b = (np.asarray(tensors[f"{one['name']}.{part}"], dtype=float) for part in "AB")
        assert (a.shape, b.shape) == ((one["rank"], w.shape[1]), (w.shape[0], one["rank"]))
        s = np.linalg.svd(w)[1]
        promised = np.sqrt((s[one["rank"] :] ** 2).sum() / (s**2).sum())
        measured = np.linalg.norm(w - b @ a) / np.linalg.norm(w)
        assert one["relative_frobenius_error"] == pytest.approx(promised, abs=1e-6)
        assert one["measured_error"] == pytest.approx(measured, abs=1e-9)
        assert measured == pytest.approx(promised, abs=1e-6)
        assert np.linalg.norm(w - b @ a, 2) == pytest.approx(one["spectral_error"], abs=1e-6)


@pytest.mark.parametrize("file_format", ["safetensors", "npz"])
@pytest.mark.parametrize("body", [{"rule": "energy", "threshold": 0.95}, {"rule": "global_budget", "fraction": 0.5}])
def test_factors_multiply_to_the_truncation_that_was_promised(
    server: Server, analysis: dict[str, Any], body: dict[str, Any], file_format: str
) -> None:
    state, content = make(server, analysis, **body, format=file_format)
    manifest = state["manifest"]
    assert (manifest["bytes"], manifest["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    load = load_safetensors if file_format == "safetensors" else lambda data: dict(np.load(io.BytesIO(data)))
    tensors = load(content)
    check(manifest, tensors, WEIGHTS)
    verdicts = {one["name"]: one["verdict"] for one in manifest["layers"]}
    assert verdicts == {
        "a.weight": "factored", "b.weight": "dense", "c.weight": "factored", "c.bias": "copied", "ids": "copied",
        "nan.weight": "copied",
    }  # fmt: skip
    np.testing.assert_array_equal(tensors["b.weight"], WEIGHTS["b.weight"])
    np.testing.assert_array_equal(tensors["ids"], WEIGHTS["ids"])
    dense = next(one for one in manifest["layers"] if one["name"] == "b.weight")
    assert dense["reason"].startswith("dense: ")
    path = f"/analyses/{analysis['id']}/compression"
    report = server.client.get(path, params=body).json()
    ranks = {one["layer"]: one["rank"] for one in report["layers"] if one["verdict"] == "compress"}
    assert ranks == {one["name"]: one["rank"] for one in manifest["layers"] if one["verdict"] == "factored"}


def test_the_left_split_and_a_dtype_are_what_was_asked_for(server: Server, analysis: dict[str, Any]) -> None:
    state, content = make(server, analysis, rule="rank", rank=4, split="left", dtype="float64", layers=["a.weight"])
    tensors = load_safetensors(content)
    a = tensors["a.weight.A"].numpy()
    np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-12)
    verdicts = {one["name"]: one["verdict"] for one in state["manifest"]["layers"]}
    assert (verdicts["c.weight"], tensors["c.weight"].dtype) == ("dense", torch.bfloat16)


def test_an_adapter_is_a_zip_of_its_configuration_and_its_tensors(server: Server) -> None:
    before = {name: WEIGHTS[name].float() for name in ("a.weight", "b.weight", "c.weight")}
    update = {name: 0.1 * layer((w.shape[0], w.shape[1]), 2, 9) for name, w in before.items()}
    base = server.analyze(save_safetensors(before))
    after = {name: w + update[name] for name, w in before.items()}
    state, content = make(
        server, server.analyze(save_safetensors(after), base=base["id"]), rule="rank", rank=5, format="peft"
    )
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sorted(archive.namelist()) == ["adapter_config.json", "adapter_model.safetensors"]
        config = json.loads(archive.read("adapter_config.json"))
        tensors = load_safetensors(archive.read("adapter_model.safetensors"))
    assert config["peft_type"] == "LORA"
    assert config["rank_pattern"] == config["alpha_pattern"]
    for name, w in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        product = (tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]).double()
        difference = after[name].double() - w.double()
        s = torch.linalg.svdvals(difference)
        error = torch.linalg.norm(difference - product) / torch.linalg.norm(difference)
        assert float(error) == pytest.approx(float((s[5:].square().sum() / s.square().sum()).sqrt()), abs=1e-5)
    assert state["manifest"]["difference"] is True


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"rule": "all"}, "/rule"),
        ({"rule": "rank"}, "rank"),
        ({"rule": "rank", "rank": 4000}, "rank"),
        ({"rule": "energy", "rank": 3}, "rank"),
        ({"rule": "energy", "threshold": 1.5}, "/threshold"),
        ({"rule": "global_budget", "fraction": 1e-6}, "fraction"),
        ({"layers": ["none"]}, "/layers"),
        ({"layers": ["c.bias"]}, "/layers"),
        ({"format": "pt"}, "/format"),
        ({"format": "npz", "dtype": "bfloat16"}, "/dtype"),
        ({"dtype": "int8"}, "/dtype"),
        ({"colour": "red"}, "/colour"),
    ],
)
def test_bad_requests_name_the_field(
    server: Server, analysis: dict[str, Any], body: dict[str, Any], place: str
) -> None:
    answer = server.client.post(f"/analyses/{analysis['id']}/factors", json=body)
    (error, *_) = problem(answer, 422, "validation-error")["errors"]
    assert error.get("pointer", error.get("parameter")) == place


def test_factors_are_listed_ranged_and_deleted_with_their_analysis(server: Server) -> None:
    analysis = server.analyze(saved(WEIGHTS["a.weight"].numpy()), reuse=False)
    state, content = make(server, analysis)
    path = f"/analyses/{analysis['id']}/factors/{state['id']}"
    assert [one["id"] for one in server.client.get(path.rpartition("/")[0]).json()["data"]] == [state["id"]]
    part = server.client.get(f"{path}?format=safetensors", headers={"range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, content[8:16])
    problem(server.client.get(f"{path}?format=npz"), 406, "not-acceptable")
    other = server.analyze(saved(np.eye(3)), reuse=False)
    problem(server.client.get(path.replace(analysis["id"], other["id"])), 404, "not-found")
    assert server.client.post(f"{path}/cancel").status_code == 200
    second, _ = make(server, analysis, format="npz")
    server.delete_unchanged(path.replace(state["id"], second["id"]))
    server.delete_unchanged(f"/analyses/{analysis['id']}")
    problem(server.client.get(path), 404, "not-found")
    assert not (server.data / "factors" / state["id"]).exists()


def test_names_that_would_collide_fail_the_job_and_say_so(server: Server) -> None:
    content = save_safetensors({"w": WEIGHTS["a.weight"], "w.A": torch.ones(3)})
    analysis = server.analyze(content)
    path = server.client.post(f"/analyses/{analysis['id']}/factors", json={}).headers["location"]
    wait_for(lambda: server.client.get(path).json()["status"] == "failed", "the failure")
    error = server.client.get(path).json()["error"]
    assert (error["type"], "w.A" in error["detail"]) == ("cannot-factor", True)
    problem(server.client.get(f"{path}?format=safetensors"), 409, "invalid-state")


def test_a_canceled_job_leaves_no_file(server: Server) -> None:
    weights = {"large": torch.randn(2500, 2500, generator=torch.Generator().manual_seed(0)), "a": WEIGHTS["a.weight"]}
    analysis = server.analyze(save_safetensors(weights))
    body = {"rule": "rank", "rank": 10}
    path = server.client.post(f"/analyses/{analysis['id']}/factors", json=body).headers["location"]
    folder = server.data / "factors" / path.rpartition("/")[2]
    wait_for(folder.exists, "the file to be begun")
    assert server.client.post(f"{path}/cancel").status_code == 202
    wait_for(lambda: server.client.get(path).json()["status"] in OVER, "the end")
    assert server.client.get(path).json()["status"] == "canceled"
    assert list(folder.iterdir()) == []
