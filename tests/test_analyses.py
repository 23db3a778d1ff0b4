"""Analyses over HTTP: the numbers against matrices of chosen singular values, and what a client does with them."""

import io
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save as save_safetensors

from service.lowrank import describe
from tests.conftest import Server
from tests.test_bad_inputs import problem
from tests.test_uploads import torch_file, values_of
from tests.uploads.builders import saved
from tests.worker.test_decompose import matrix_with


def spectrum(kind: str, k: int) -> NDArray[np.float64]:
    match kind:
        case "geometric":
            return np.geomspace(1, 1e-12, k)
        case "rank one":
            return np.eye(1, k)[0] * 3
        case "zero":
            return np.zeros(k)
        case "orthogonal":
            return np.ones(k)
        case "repeated":
            return np.repeat([2.0, 1.0], [k // 2, k - k // 2])
    return np.linspace(5, 1, k)


CHOSEN = {
    f"{kind} {m}x{n}": (spectrum(kind, min(m, n)), (m, n))
    for kind in ("linear", "geometric", "rank one", "zero", "repeated", "orthogonal")
    for m, n in ((60, 20), (20, 60), (30, 30))
}


def as_stored(dtype: str) -> dict[str, torch.Tensor]:
    """Matrices of the chosen singular values, rounded to a dtype."""
    return {name: torch.from_numpy(matrix_with(*one)).to(getattr(torch, dtype)) for name, one in CHOSEN.items()}


def check(name: str, dtype: str, stored: torch.Tensor, found: NDArray[np.float64]) -> None:
    """Against what was chosen, and for a rounded matrix against numpy's SVD of what is stored."""
    expected = CHOSEN[name][0] if dtype == "float64" else np.linalg.svd(stored.double().numpy())[1]
    tolerance = (1e-10 if dtype == "float64" else 1e-7) * expected[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_row_97_chosen_singular_values_come_back_from_files_of_many(torch_server: Server, dtype: str) -> None:
    tensors = as_stored(dtype)
    files = [
        save_safetensors(tensors),
        torch_file(tensors),
        torch_file({k: t.T.contiguous().T for k, t in tensors.items()}),
    ]
    if dtype != "bfloat16":
        for save in (np.savez, np.savez_compressed):
            buffer = io.BytesIO()
            save(buffer, **{name: tensor.numpy() for name, tensor in tensors.items()})
            files.append(buffer.getvalue())
    states = [torch_server.analyze(file) for file in files]
    for name, stored in tensors.items():
        for state in states:
            check(name, dtype, stored, values_of(state, name))
            np.testing.assert_array_equal(values_of(state, name), values_of(states[0], name))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", CHOSEN)
def test_row_97_chosen_singular_values_come_back_from_every_npy(server: Server, name: str, dtype: str) -> None:
    stored = as_stored(dtype)[name]
    turned = np.asfortranarray(stored.numpy().astype(stored.numpy().dtype.newbyteorder(">")))
    for array in (stored.numpy(), turned):
        check(name, dtype, stored, values_of(server.analyze(saved(array), reuse=False)))


def test_row_97_the_hilbert_matrix_comes_back(server: Server) -> None:
    i = np.arange(12)
    hilbert = 1 / (i[:, None] + i + 1.0)
    # From 60-digit arithmetic: sigma_1 and sigma_12 of the matrix of exact fractions.
    values = values_of(server.analyze(saved(hilbert)))
    assert values[0] == pytest.approx(1.7953720595619975, rel=1e-12)
    assert values[-1] == pytest.approx(2.6477e-17, abs=1e-10)


@pytest.mark.parametrize(("dtype", "side"), [("float64", 64), ("float32", 64), ("bfloat16", 256), ("float32", 256)])
def test_the_numerical_rank_of_a_rank_5_matrix_is_5(server: Server, dtype: str, side: int) -> None:
    rng = np.random.default_rng(5)
    matrix = rng.standard_normal((side, 5)) @ rng.standard_normal((5, side))
    content = save_safetensors({"w": torch.from_numpy(matrix).to(getattr(torch, dtype))})
    assert server.analyze(content)["tensors"][0]["numerical_rank"] == 5


@pytest.fixture(scope="module")
def layers() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(7)
    shapes = {"embed": (40, 64), "block.0.fc": (64, 48), "block.1.fc": (64, 48), "head": (10, 64)}
    made = {}
    for decay, (name, (m, n)) in enumerate(shapes.items()):
        k = min(m, n)
        made[name] = (matrix_with(np.exp(-np.arange(k) / (3 + 4 * decay)), (m, n), decay)).astype(np.float32)
        made[name] += (1e-3 * rng.standard_normal((m, n))).astype(np.float32)
    return made


@pytest.fixture(scope="module")
def model(server: Server, layers: dict[str, NDArray[np.float32]]) -> dict[str, Any]:
    """An analysed model of four layers and a bias."""
    tensors = {name: torch.from_numpy(values) for name, values in layers.items()}
    return server.analyze(save_safetensors({**tensors, "head.bias": torch.zeros(10)}), name="a model")


def get(server: Server, state: dict[str, Any], path: str = "", **query: Any) -> Any:
    answer = server.client.get(f"/analyses/{state['id']}{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer


def test_the_report_is_what_metrics_say_of_the_spectrum(
    server: Server, model: dict[str, Any], layers: dict[str, NDArray[np.float32]]
) -> None:
    assert (model["name"], model["source"]["format"], model["progress"]["done"]) == (
        "a model", "safetensors", model["progress"]["total"],
    )  # fmt: skip
    for tensor in model["tensors"]:
        if tensor["name"] == "head.bias":
            assert (tensor["status"], tensor["reason"]) == ("skipped", "unsupported-shape")
            continue
        s = np.linalg.svd(layers[tensor["name"]].astype(float))[1]
        (fields,) = describe(s[None], tuple(tensor["shape"]), "float32")
        for name, value in fields.items():
            assert tensor[name] == (None if value is None else pytest.approx(value, rel=1e-9)), name
        report = tensor["compression"]
        lost = np.sqrt((s[report["rank"] :] ** 2).sum() / (s**2).sum())
        if report["verdict"] == "compress":
            assert report["relative_frobenius_error"] == pytest.approx(lost, rel=1e-6)
        assert [row["rule"] for row in report["table"]] == [
            "energy", "error", "budget", "entropy_rank", "optimal", "spikes",
        ]  # fmt: skip
    assert get(server, model).json() == model


def test_the_totals_are_of_the_model_that_the_cuts_would_make(
    model: dict[str, Any], layers: dict[str, NDArray[np.float32]]
) -> None:
    lost = energy = after = 0.0
    for tensor in model["tensors"]:
        if tensor["status"] == "analysed":
            w, report = layers[tensor["name"]].astype(float), tensor["compression"]
            u, s, vt = np.linalg.svd(w, full_matrices=False)
            r = len(s) if report["verdict"] == "keep_dense" else report["rank"]
            lost += ((w - (u[:, :r] * s[:r]) @ vt[:r]) ** 2).sum()
            energy += (w**2).sum()
            after += report["parameters_after"]
    assert model["totals"]["relative_frobenius_error"] == pytest.approx(math.sqrt(lost / energy), rel=1e-6)
    assert model["totals"]["parameters_after"] == after


def test_every_representation_of_the_spectra_holds_the_same_numbers(server: Server, model: dict[str, Any]) -> None:
    arrays = np.load(io.BytesIO(get(server, model, "/spectrum", format="npz").content))
    document = get(server, model, "/spectrum").json()
    assert (document["complete"], [one["name"] for one in document["tensors"]]) == (True, list(arrays))
    lines = [json.loads(line) for line in get(server, model, "/spectrum", format="jsonl").text.splitlines()]
    assert lines == document["tensors"]
    rows = get(server, model, "/spectrum", format="csv").text.splitlines()
    assert rows[0] == "layer,index,value"
    for one in document["tensors"]:
        np.testing.assert_array_equal(one["singular_values"], arrays[one["name"]])
        table = [float(row.split(",")[2]) for row in rows if row.startswith(f"{one['name']},")]
        np.testing.assert_array_equal(table, arrays[one["name"]])
        single = get(server, model, "/spectrum", format="npy", layer=one["name"]).content
        np.testing.assert_array_equal(np.load(io.BytesIO(single)), arrays[one["name"]])


def test_the_spectrum_takes_its_filters(server: Server, model: dict[str, Any]) -> None:
    document = get(server, model, "/spectrum", layer="head", top_k=3, normalize="true").json()
    (one,) = document["tensors"]
    whole = values_of(model, "head")
    assert one["singular_values"] == whole[:3].tolist()
    np.testing.assert_allclose(one["normalized"], (whole / whole.sum())[:3], rtol=1e-12)


def test_one_layer_has_a_curve_over_all_its_ranks(server: Server, model: dict[str, Any]) -> None:
    report = get(server, model, "/compression", layer="block.0.fc", rule="energy", threshold=0.95).json()
    s = values_of(model, "block.0.fc")
    energy = np.cumsum(s**2) / (s**2).sum()
    assert report["rank"] == int(np.argmax(energy >= 0.95)) + 1
    assert [point["rank"] for point in report["curve"]] == list(range(1, 49))
    np.testing.assert_allclose([point["energy_kept"] for point in report["curve"]], energy, rtol=1e-9)
    assert report["curve"][4]["spectral_error"] == pytest.approx(s[5], rel=1e-12)


def test_all_layers_have_a_report_by_one_rule_or_by_all(server: Server, model: dict[str, Any]) -> None:
    report = get(server, model, "/compression", rule="error", threshold=0.2).json()
    assert [layer["layer"] for layer in report["layers"]] == ["block.0.fc", "block.1.fc", "embed", "head"]
    assert report["totals"]["parameters_after"] == sum(layer["parameters_after"] for layer in report["layers"])
    every = get(server, model, "/compression", rule="all").json()
    assert all(len(layer["rules"]) == 6 for layer in every["layers"])
    rows = get(server, model, "/compression", rule="all", format="csv").text.splitlines()
    assert len(rows) == 1 + 4 * 6
    fixed = get(server, model, "/compression", rule="rank", rank=20).json()["layers"]
    assert [layer["rank"] for layer in fixed] == [20, 20, 20, None]  # The head has but 10.


def test_a_global_budget_is_kept_and_no_worse_than_uniform(server: Server, model: dict[str, Any]) -> None:
    for weighting in ("relative", "absolute"):
        plan = get(server, model, "/compression", rule="global_budget", fraction=0.4, weighting=weighting).json()
        totals, uniform = plan["totals"], plan["uniform"]
        assert totals["parameters_after"] <= plan["budget_parameters"] == math.floor(0.4 * totals["parameters_before"])
        assert plan["bound"] - 1e-12 <= plan["objective"] <= uniform["objective"] + 1e-12
        lost = sum(
            layer["relative_frobenius_error"] ** 2 * (1 if weighting == "relative" else norm**2)
            for layer, norm in ((layer, np.linalg.norm(values_of(model, layer["layer"]))) for layer in plan["layers"])
        )
        assert plan["objective"] == pytest.approx(lost, rel=1e-9)
    assert totals["relative_frobenius_error"] <= uniform["relative_frobenius_error"] + 1e-12  # absolute is last


@pytest.mark.parametrize("weighting", ["relative", "absolute"])
def test_a_budget_is_kept_however_far_apart_the_scales_are(server: Server, weighting: str) -> None:
    rng, buffer = np.random.default_rng(2), io.BytesIO()
    np.savez(buffer, large=rng.standard_normal((64, 64)) * 1e200, small=rng.standard_normal((64, 64)) * 1e-200)
    state = server.analyze(buffer.getvalue())
    plan = get(server, state, "/compression", rule="global_budget", fraction=0.3, weighting=weighting).json()
    assert plan["totals"]["parameters_after"] <= plan["budget_parameters"]
    assert all(layer["rank"] >= 1 for layer in plan["layers"])


@pytest.mark.parametrize(
    "path",
    [
        "/spectrum?layer=head",
        "/spectrum?layer=embed&scale=log&rule=spikes",
        "/spectrum",
        "/compression?rule=global_budget",
    ],
)
def test_pictures_are_drawn_once_and_as_large_as_asked(server: Server, model: dict[str, Any], path: str) -> None:
    query = f"/analyses/{model['id']}{path}{'&' if '?' in path else '?'}width=500&height=300&format="
    first = server.client.get(f"{query}png")
    assert (first.status_code, first.headers["content-type"]) == (200, "image/png")
    with Image.open(io.BytesIO(first.content)) as image:
        assert image.size == (500, 300)
        assert len(image.convert("RGB").getcolors(500 * 300) or []) > 20
    assert server.client.get(f"{query}png").content == first.content
    drawing = server.client.get(f"{query}svg")
    assert drawing.headers["content-type"].startswith("image/svg+xml")
    assert b'width="500" height="300"' in drawing.content


def test_row_140_the_picture_of_one_layer_is_drawn_for_a_zero_matrix_too(server: Server) -> None:
    state = server.analyze(saved(np.zeros((5, 4))))
    for path in ("spectrum?format=png", "spectrum?format=png&layer=all", "compression?rule=global_budget&format=png"):
        answer = server.client.get(f"/analyses/{state['id']}/{path}")
        assert answer.headers["content-type"] == "image/png", answer.text


@pytest.mark.parametrize(
    ("path", "slug"),
    [
        ("/compression?rule=global_budget&fraction=0.0001", "validation-error"),
        ("/compression?rule=global_budget&layer=head", "validation-error"),
        ("/compression?rule=global_budget&threshold=0.5", "validation-error"),
        ("/compression?rule=rank", "validation-error"),
        ("/compression?rule=rank&rank=0", "validation-error"),
        ("/compression?rule=rank&rank=49&layer=head", "validation-error"),
        ("/compression?rule=rank&rank=4000", "validation-error"),
        ("/compression?rule=energy&threshold=1.5", "validation-error"),
        ("/compression?rule=best", "validation-error"),
        ("/compression?colour=red", "validation-error"),
        ("/compression?layer=head.bias", "validation-error"),
        ("/compression?format=png", "validation-error"),
        ("/compression?format=gif", "validation-error"),
        ("/spectrum?layer=none", "validation-error"),
        ("/spectrum?layer=all&format=npy", "validation-error"),
        ("/spectrum?format=gif", "validation-error"),
        ("/spectrum?rule=all", "validation-error"),
        ("/spectrum?width=1000000000", "validation-error"),
        ("/spectrum?dpi=1000000", "validation-error"),
        ("?top_k=0", "validation-error"),
        ("?rule=energy", "validation-error"),
    ],
)
def test_bad_parameters_of_views_are_refused(server: Server, model: dict[str, Any], path: str, slug: str) -> None:
    body = problem(server.client.get(f"/analyses/{model['id']}{path}"), 422, slug)
    assert body["errors"][0]["parameter"] in path


def test_what_does_not_exist_is_not_found(server: Server, model: dict[str, Any], memo: dict[str, Any]) -> None:
    for name in ("none", memo["id"], "x" * 10_000):
        for path in ("", "/spectrum", "/compression"):
            problem(server.client.get(f"/analyses/{name}{path}"), 404, "not-found")
    problem(server.client.get(f"/experiments/{model['id']}"), 404, "not-found")


def test_views_have_tags_that_hold(server: Server, model: dict[str, Any]) -> None:
    for path in ("", "/spectrum", "/spectrum?format=npz", "/compression?rule=global_budget"):
        answer = server.client.get(f"/analyses/{model['id']}{path}")
        again = server.client.get(f"/analyses/{model['id']}{path}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        head = server.client.head(f"/analyses/{model['id']}{path}")
        assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", answer.headers["etag"])


def test_the_list_shows_analyses_without_their_tensors(server: Server, model: dict[str, Any]) -> None:
    page = server.client.get("/analyses?name_prefix=a%20model&limit=1").json()
    (shown,) = page["data"]
    assert shown == {key: value for key, value in model.items() if key not in {"tensors", "totals", "top_k"}}
    assert server.client.get("/analyses?status=running&name_prefix=a%20model").json()["data"] == []


def test_a_difference_is_analysed_tensor_by_tensor(server: Server, layers: dict[str, NDArray[np.float32]]) -> None:
    rng = np.random.default_rng(1)
    before = {name: torch.from_numpy(values) for name, values in layers.items()}
    update = {
        name: rng.standard_normal((w.shape[0], 2)) @ rng.standard_normal((2, w.shape[1])) for name, w in layers.items()
    }
    after = {name: w + torch.from_numpy(1e-3 * update[name]).float() for name, w in before.items() if name != "embed"}
    base = server.analyze(save_safetensors({**before, "other": torch.eye(3)}))
    state = server.analyze(save_safetensors({**after, "other": torch.eye(4), "new": torch.eye(2)}), base=base["id"])
    standing = {tensor["name"]: tensor["reason"] for tensor in state["tensors"]}
    assert standing == {
        "block.0.fc": None,
        "block.1.fc": None,
        "head": None,
        "other": "not-in-base",
        "new": "not-in-base",
    }
    for name, values in after.items():
        expected = np.linalg.svd(values.double().numpy() - layers[name].astype(float))[1]
        np.testing.assert_allclose(values_of(state, name), expected, rtol=0, atol=1e-7 * expected[0])
    assert state["base"] == base["id"]
    alone = server.client.post(f"/analyze?base={base['id']}", content=saved(np.eye(3)))
    problem(alone, 422, "not-in-base")
    assert server.client.delete(f"/analyses/{base['id']}").status_code == 204
    assert get(server, state).json()["tensors"] == state["tensors"]


def test_a_shares_name_that_a_tensor_has_is_refused_not_overwritten(server: Server) -> None:
    state = server.analyze(save_safetensors({"a": torch.eye(3), "a_normalized": torch.ones(3, 3)}))
    path = f"/analyses/{state['id']}/spectrum?format=npz"
    problem(server.client.get(f"{path}&normalize=true"), 422, "validation-error")
    assert set(np.load(io.BytesIO(server.client.get(path).content))) == {"a", "a_normalized"}
