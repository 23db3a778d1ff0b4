"""Experiments over HTTP: what a client sees from the post to the delete."""

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load
from sklearn.metrics import r2_score

from service.schemas import resolve
from tests.conftest import Server
from worker.datasets import make_dataset

LONG = {"training": {"epochs": 100_000}, "record": {"every": 1000}}


def get(server: Server, state: dict[str, Any], path: str, **query: Any) -> Any:
    answer = server.client.get(f"/experiments/{state['id']}/{path}", params=query)
    assert answer.status_code == 200, answer.text
    return answer


def test_an_empty_object_is_the_memos_experiment(server: Server) -> None:
    answer = server.client.post("/experiments", json={})
    state = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/experiments/{state['id']}"
    assert answer.headers["retry-after"] == "1"
    assert state["spec"] == resolve({}).model_dump()
    assert (state["object"], state["seed"], state["progress"]) == ("experiment", 0, {"done": 0, "total": 60})
    assert state["id"][14] == "7"  # the version of the UUID
    server.wait(state["id"])


def test_a_finished_experiment_says_what_it_ran_with(memo: dict[str, Any]) -> None:
    assert memo["progress"] == {"done": 60, "total": 60}
    assert memo["device"] == "cpu"
    assert {"python", "numpy", "torch", "scikit-learn", "rankscope"} <= set(memo["versions"])
    assert memo["created_at"] <= memo["started_at"] <= memo["finished_at"]
    assert memo["error"] is None


def test_two_posted_at_once_both_finish_and_are_equal(server: Server) -> None:
    first, second = server.post({"seed": 7}), server.post({"seed": 7})
    spectra = []
    for posted in (first, second):
        state = server.wait(posted["id"])
        assert state["status"] == "succeeded"
        spectra.append(get(server, state, "spectrum", format="npy").content)
    assert spectra[0] == spectra[1]


def test_every_representation_holds_the_same_numbers(server: Server, memo: dict[str, Any]) -> None:
    exact = np.load(io.BytesIO(get(server, memo, "spectrum", format="npy").content))
    assert (exact.shape, exact.dtype) == ((61, 64), np.float64)
    document = get(server, memo, "spectrum").json()
    assert document["complete"] is True
    assert document["last_epoch"] == 60
    assert document["layers"] == [{"name": "W2", "shape": [64, 64]}]
    assert [epoch["epoch"] for epoch in document["epochs"]] == list(range(61))
    np.testing.assert_array_equal([epoch["layers"][0]["singular_values"] for epoch in document["epochs"]], exact)
    lines = [json.loads(line) for line in get(server, memo, "spectrum", format="jsonl").text.splitlines()]
    assert lines == document["epochs"]
    table = np.loadtxt(
        io.StringIO(get(server, memo, "spectrum", format="csv").text), delimiter=",", skiprows=1, usecols=(0, 2, 3)
    )
    np.testing.assert_array_equal(table[:, 2].reshape(61, 64), exact)
    np.testing.assert_array_equal(table[:65, 1], [*range(1, 65), 1])
    arrays = np.load(io.BytesIO(get(server, memo, "spectrum", format="npz").content))
    assert {name: arrays[name].shape for name in arrays} == {
        "epochs": (61,), "W1": (61, 20), "W2": (61, 64), "W3": (61, 4),
    }  # fmt: skip
    np.testing.assert_array_equal(arrays["W2"], exact)


def test_filters_take_what_they_say(server: Server, memo: dict[str, Any]) -> None:
    query = {"layer": "all", "from": 10, "to": 30, "stride": 5, "top_k": 3, "normalize": "true"}
    document = get(server, memo, "spectrum", **query).json()
    assert [epoch["epoch"] for epoch in document["epochs"]] == [10, 15, 20, 25, 30]
    whole = np.load(io.BytesIO(get(server, memo, "spectrum", format="npz").content))
    for epoch in document["epochs"]:
        assert [layer["name"] for layer in epoch["layers"]] == ["W1", "W2", "W3"]
        for layer in epoch["layers"]:
            s = whole[layer["name"]][epoch["epoch"]]
            assert layer["singular_values"] == s[:3].tolist()
            np.testing.assert_allclose(layer["normalized"], (s / s.sum())[:3], rtol=1e-14)
            assert layer["nuclear_norm"] == pytest.approx(s.sum())  # of the whole spectrum


def test_the_update_is_zero_at_first_and_then_w_minus_w0(server: Server, memo: dict[str, Any]) -> None:
    update = np.load(io.BytesIO(get(server, memo, "spectrum", format="npy", of="update").content))
    assert not update[0].any()
    ends = [load(get(server, memo, "weights", at=at).content)["W2.weight"].astype(float) for at in ("initial", "final")]
    np.testing.assert_allclose(update[-1], np.linalg.svd(ends[1] - ends[0])[1], rtol=0, atol=1e-10 * update[-1, 0])
    first = get(server, memo, "spectrum", of="update", to=0, normalize="true").json()["epochs"][0]["layers"][0]
    assert (set(first["normalized"]), first["entropy_rank"], first["condition_number"]) == ({0.0}, 0.0, None)


def test_the_weights_are_those_whose_spectrum_was_kept(server: Server, memo: dict[str, Any]) -> None:
    spectra = np.load(io.BytesIO(get(server, memo, "spectrum", format="npz").content))
    for at, row in (("initial", 0), ("final", -1)):
        weights = load(get(server, memo, "weights", at=at).content)
        assert sorted(weights) == ["W1.bias", "W1.weight", "W2.bias", "W2.weight", "W3.bias", "W3.weight"]
        assert weights["W1.weight"].shape == (64, 20)
        for layer in ("W1", "W2", "W3"):
            s = np.linalg.svd(weights[f"{layer}.weight"].astype(float))[1]
            np.testing.assert_allclose(spectra[layer][row], s, rtol=0, atol=1e-12 * s[0])


def forward(weights: dict[str, Any], x: Any) -> Any:
    """The network in float64, straight from its definition."""
    for layer in ("W1", "W2"):
        x = np.tanh(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    return x @ weights["W3.weight"].T + weights["W3.bias"]


def test_the_report_is_what_cutting_the_network_really_costs(server: Server, memo: dict[str, Any]) -> None:
    report = get(server, memo, "compression").json()
    weights = {k: v.astype(float) for k, v in load(get(server, memo, "weights").content).items()}
    data = make_dataset(resolve({}), "float64")
    x, y = data.x_validation, data.y_validation
    w = weights["W2.weight"]
    u, s, vt = np.linalg.svd(w)
    for row in report["curve"]:
        r = row["rank"]
        cut = (u[:, :r] * s[:r]) @ vt[:r]
        norm = np.linalg.norm(w)
        assert row["relative_frobenius_error"] == pytest.approx(np.linalg.norm(w - cut) / norm, abs=1e-10)
        assert row["spectral_error"] == pytest.approx(np.linalg.norm(w - cut, 2), abs=1e-10 * norm)
        assert row["parameters_after"] == r * 128
        predicted = forward({**weights, "W2.weight": cut}, x)
        assert row["validation_loss"] == pytest.approx(np.mean((predicted - y) ** 2), rel=1e-6)
        assert row["validation_r2"] == pytest.approx(r2_score(y, predicted), rel=1e-6)
    assert [row["rank"] for row in report["curve"]] == list(range(1, 65))
    assert (report["rule"], report["threshold"], report["shape"]) == ("energy", 0.99, [64, 64])
    energies = [row["energy_kept"] for row in report["curve"]]
    assert report["rank"] == 1 + next(i for i, energy in enumerate(energies) if energy >= 0.99)
    assert report["verdict"] == ("compress" if report["rank"] <= 31 else "keep_dense")


def test_every_rule_has_its_report(server: Server, memo: dict[str, Any]) -> None:
    together = get(server, memo, "compression", rule="all").json()["rules"]
    assert [one["rule"] for one in together] == ["energy", "error", "budget", "entropy_rank", "optimal", "spikes"]
    for one in together:
        alone = get(server, memo, "compression", rule=one["rule"]).json()
        assert one.items() <= alone.items()
    assert get(server, memo, "compression", rule="rank", rank=5).json()["rank"] == 5
    assert get(server, memo, "compression", rule="budget", fraction=0.25).json()["rank"] == 8


def test_metrics_come_as_json_csv_and_lines(server: Server, memo: dict[str, Any]) -> None:
    document = get(server, memo, "metrics").json()
    assert len(document["epochs"]) == 61
    lines = [json.loads(line) for line in get(server, memo, "metrics", format="jsonl").text.splitlines()]
    assert lines == document["epochs"]
    header, *rows = get(server, memo, "metrics", format="csv").text.splitlines()
    assert len(rows) == 61 * 3
    assert header.split(",")[:6] == ["epoch", "train_loss", "validation_loss", "train_r2", "validation_r2", "name"]
    final = document["epochs"][-1]
    weights = {k: v.astype(float) for k, v in load(get(server, memo, "weights").content).items()}
    data = make_dataset(resolve({}), "float64")
    assert final["train_loss"] == pytest.approx(np.mean((forward(weights, data.x_train) - data.y_train) ** 2), rel=1e-4)
    assert final["validation_r2"] == pytest.approx(r2_score(data.y_validation, forward(weights, data.x_validation)))


@pytest.mark.parametrize(("form", "size"), [("png", (640, 400)), ("svg", None), ("gif", (640, 400))])
def test_pictures_are_drawn_once_and_cached(
    server: Server, memo: dict[str, Any], form: str, size: tuple[int, int] | None
) -> None:
    answer = get(server, memo, "spectrum", format=form)
    assert answer.headers["content-type"].startswith("image/")
    assert answer.headers["cache-control"] == "private, no-cache"  # A PATCH may still change the name drawn in it.
    assert answer.headers["vary"] == "Accept"
    tag = answer.headers["etag"]
    cached = server.data / "pictures" / memo["id"] / f"{tag.strip(chr(34))}.{form}"
    assert cached.read_bytes() == answer.content
    before = cached.stat().st_ino
    assert get(server, memo, "spectrum", format=form).content == answer.content
    assert cached.stat().st_ino == before  # Drawn anew it would be a new file.
    again = server.client.get(f"/experiments/{memo['id']}/spectrum?format={form}", headers={"if-none-match": tag})
    assert (again.status_code, again.content) == (304, b"")
    if size is not None:
        with Image.open(io.BytesIO(answer.content)) as picture:
            assert picture.size == size
            assert getattr(picture, "n_frames", 1) == (61 if form == "gif" else 1)


def test_the_accept_header_chooses(server: Server, memo: dict[str, Any]) -> None:
    def kind(accept: str) -> str:
        answer = server.client.get(f"/experiments/{memo['id']}/spectrum", headers={"accept": accept})
        return answer.headers["content-type"].partition(";")[0]

    assert kind("image/png") == "image/png"
    assert kind("image/*") == "image/png"
    assert kind("text/csv, application/json;q=0.5") == "text/csv"
    assert kind("image/gif;q=0.1, text/csv;q=0.2") == "text/csv"
    assert kind("application/xml, */*;q=0.1") == "application/json"


@pytest.mark.soak
def test_too_long_an_answer_says_what_helps(server: Server) -> None:
    tiny = {"n_samples": 2, "n_features": 1, "n_informative": 1, "n_targets": 1, "validation_fraction": 0}
    spec = {"data": tiny, "network": {"hidden": [1] * 15}, "training": {"epochs": 8000, "batch_size": 2}}
    state = server.run(spec)
    assert state["status"] == "succeeded"
    for part in ("metrics", "spectrum?layer=all"):
        answer = server.client.get(f"/experiments/{state['id']}/{part}")
        assert (answer.status_code, answer.json()["type"]) == (422, "/problems/budget-exceeded")
        assert "stride" in answer.json()["detail"]
    assert get(server, state, "spectrum", layer="all", stride=100, top_k=1).status_code == 200
    assert len(np.load(io.BytesIO(get(server, state, "spectrum", format="npy").content))) == 8001


def test_rules_that_do_not_suit_a_layer_are_told_among_all(server: Server) -> None:
    state = server.run({"network": {"hidden": [1]}, "data": {"n_targets": 1}, "training": {"epochs": 1}})
    rules = {one["rule"]: one for one in get(server, state, "compression", rule="all").json()["rules"]}
    assert rules["budget"]["rank"] is None
    assert "fraction" in rules["budget"]["chosen_by"]
    assert rules["energy"]["rank"] == 1


def test_top_k_cuts_pictures_too(server: Server, memo: dict[str, Any]) -> None:
    whole, cut = (get(server, memo, "spectrum", format="png", **query).content for query in ({}, {"top_k": 8}))
    assert whole != cut


def test_f23_row_50_a_diverging_run_keeps_what_it_recorded(server: Server) -> None:
    state = server.run({"training": {"lr": 1e300}})
    assert (state["status"], state["error"]["type"]) == ("failed", "diverged")
    assert "epoch 1" in state["error"]["detail"]
    assert "learning rate" in state["error"]["detail"]
    document = get(server, state, "spectrum").json()
    assert [epoch["epoch"] for epoch in document["epochs"]] == [0]
    assert document["complete"] is False
    assert get(server, state, "weights", at="initial").content
    answer = server.client.get(f"/experiments/{state['id']}/weights?at=final")
    assert (answer.status_code, answer.json()["type"]) == (409, "/problems/invalid-state")
    assert get(server, state, "metrics").json()["tau"] is None


def test_row_51_a_vanishing_learning_rate_changes_nothing(server: Server) -> None:
    state = server.run({"training": {"lr": 5e-324, "epochs": 2}})
    assert state["status"] == "succeeded"
    initial, final = (get(server, state, "weights", at=at).content for at in ("initial", "final"))
    assert initial == final


def test_row_55_rare_recording_has_first_and_last(server: Server) -> None:
    state = server.run({"training": {"epochs": 3}, "record": {"every": 100, "layers": ["W1"]}})
    document = get(server, state, "spectrum").json()
    assert [epoch["epoch"] for epoch in document["epochs"]] == [0, 3]
    assert document["layers"] == [{"name": "W1", "shape": [64, 20]}]  # The default layer is not recorded.


def test_row_47_a_network_of_width_one_trains(server: Server) -> None:
    state = server.run({"network": {"hidden": [1]}, "data": {"n_targets": 1}, "training": {"epochs": 2}})
    assert state["status"] == "succeeded"
    report = get(server, state, "compression").json()
    assert (report["rank"], report["verdict"]) == (1, "keep_dense")


def test_without_validation_set_its_numbers_are_null(server: Server) -> None:
    state = server.run({"data": {"validation_fraction": 0}, "training": {"epochs": 1, "batch_size": 1000}})
    epoch = get(server, state, "metrics").json()["epochs"][-1]
    assert (epoch["validation_loss"], epoch["validation_r2"]) == (None, None)
    assert epoch["train_r2"] is not None
    assert {row["validation_loss"] for row in get(server, state, "compression").json()["curve"]} == {None}


def test_a_running_experiment_is_canceled_within_a_second_and_keeps_what_it_has(server: Server) -> None:
    posted = server.post(LONG)
    path = f"/experiments/{posted['id']}"
    server.wait(posted["id"], "running")
    deleted = server.client.delete(path)
    assert (deleted.status_code, deleted.json()["type"]) == (409, "/problems/invalid-state")
    first = server.client.post(f"{path}/cancel")
    assert first.status_code == 202
    assert first.json()["status"] == "canceling"
    state = server.wait(posted["id"])
    assert state["status"] == "canceled"
    again = server.client.post(f"{path}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "canceled")


def test_a_queued_experiment_has_no_spectrum_and_is_canceled_at_once(server: Server) -> None:
    blocker, queued = server.post(LONG), server.post({})
    path = f"/experiments/{queued['id']}"
    assert server.client.get(f"{path}/spectrum").json()["epochs"] == []
    assert server.client.get(f"{path}/metrics").json()["epochs"] == []
    for part in ("spectrum?format=png", "spectrum?format=npy", "compression", "weights"):
        answer = server.client.get(f"{path}/{part}")
        assert (answer.status_code, answer.json()["type"]) == (409, "/problems/spectrum-not-ready")
    answer = server.client.post(f"{path}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (200, "canceled")
    server.client.post(f"/experiments/{blocker['id']}/cancel")
    server.wait(blocker["id"])


def test_delete_takes_the_files_along(server: Server) -> None:
    state = server.run({"training": {"epochs": 1}})
    get(server, state, "spectrum", format="png")
    folders = [server.data / kind / state["id"] for kind in ("weights", "pictures")]
    assert all(folder.exists() for folder in folders)
    assert server.client.delete(f"/experiments/{state['id']}").status_code == 204
    assert not any(folder.exists() for folder in folders)
    assert server.client.get(f"/experiments/{state['id']}").status_code == 404
    assert server.client.delete(f"/experiments/{state['id']}").status_code == 404


def test_name_and_tags_can_change_and_nothing_else(server: Server) -> None:
    state = server.run({"name": "old", "training": {"epochs": 1}})
    path = f"/experiments/{state['id']}"
    tag = server.client.get(path).headers["etag"]
    changed = server.client.patch(path, json={"tags": {"team": "blue"}}, headers={"if-match": tag})
    assert changed.status_code == 200
    assert (changed.json()["name"], changed.json()["tags"]) == ("old", {"team": "blue"})
    assert changed.json()["spec"]["tags"] == {"team": "blue"}
    weak = server.client.patch(path, json={"name": "new"}, headers={"if-match": f"W/{changed.headers['etag']}"})
    assert weak.status_code == 412
    late = server.client.patch(path, json={"name": "new"}, headers={"if-match": tag})
    assert (late.status_code, late.json()["type"]) == (412, "/problems/precondition-failed")
    assert server.client.patch(path, json={"name": None}).json()["name"] is None
    assert server.client.patch(path, json={"seed": 1}).status_code == 422
    listed = server.client.get("/experiments?tag=team:blue").json()["data"]
    assert [one["id"] for one in listed] == [state["id"]]
    assert server.client.get("/experiments?tag=team:red").json()["data"] == []
    assert server.client.delete(path, headers={"if-match": tag}).status_code == 412
    tag = server.client.get(path).headers["etag"]
    assert server.client.delete(path, headers={"if-match": tag}).status_code == 204


def test_pages_link_to_the_next(server: Server, memo: dict[str, Any]) -> None:
    server.run({"training": {"epochs": 1}})
    seen, path = [], "/experiments?limit=1&status=succeeded&order=asc"
    while path:
        answer = server.client.get(path)
        body = answer.json()
        assert len(body["data"]) == 1
        seen.append(body["data"][0]["id"])
        assert body["has_more"] == ("link" in answer.headers) == (body["next"] is not None)
        path = answer.links["next"]["url"] if body["has_more"] else ""
    assert memo["id"] in seen
    assert len(set(seen)) == len(seen) >= 2


def test_head_is_get_without_a_body(server: Server, memo: dict[str, Any]) -> None:
    for path in ("", "/spectrum", "/metrics", "/weights"):
        full = server.client.get(f"/experiments/{memo['id']}{path}")
        head = server.client.head(f"/experiments/{memo['id']}{path}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["etag"] == full.headers["etag"]
        assert int(head.headers["content-length"]) == len(full.content)


def test_an_unchanged_experiment_is_304(server: Server, memo: dict[str, Any]) -> None:
    path = f"/experiments/{memo['id']}"
    for part in ("", "/metrics", "/compression", "/weights", "/spectrum"):
        tag = server.client.get(path + part).headers["etag"]
        assert server.client.get(path + part, headers={"if-none-match": f'"x", {tag}'}).status_code == 304
        assert server.client.get(path + part, headers={"if-none-match": '"x"'}).status_code == 200


def test_weights_come_in_ranges(server: Server, memo: dict[str, Any]) -> None:
    whole = get(server, memo, "weights").content
    part = server.client.get(f"/experiments/{memo['id']}/weights", headers={"range": "bytes=8-99"})
    assert (part.status_code, part.content) == (206, whole[8:100])
    assert part.headers["content-range"] == f"bytes 8-99/{len(whole)}"
