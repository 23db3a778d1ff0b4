"""Sweeps over HTTP: members are experiments that are trained together."""

import io
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from tests.conftest import OVER, Server, wait_for
from tests.test_bad_inputs import problem

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"n_samples": 60, "n_features": 6},
    "network": {"hidden": [8, 7]},
    "training": {"epochs": 6, "batch_size": 8},
}
LONG: dict[str, Any] = {"training": {"epochs": 100_000}, "record": {"every": 1000}}


def post(server: Server, base: dict[str, Any], grid: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = server.client.post("/sweeps", json={"base": base, "grid": grid}, headers=headers)
    assert answer.is_success, answer.text
    state: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/sweeps/{state['id']}"
    return state


def read(server: Server, sweep_id: str) -> dict[str, Any]:
    answer = server.client.get(f"/sweeps/{sweep_id}")
    assert answer.status_code == 200, answer.text
    state: dict[str, Any] = answer.json()
    return state


def finished(server: Server, sweep_id: str) -> dict[str, Any]:
    def over() -> dict[str, Any] | None:
        state = read(server, sweep_id)
        return state if state["status"] in OVER else None

    state: dict[str, Any] = wait_for(over, f"{sweep_id} to be over", 180)
    return state


def spectrum(server: Server, experiment_id: str) -> Any:
    answer = server.client.get(f"/experiments/{experiment_id}/spectrum?format=npz")
    assert answer.status_code == 200, answer.text
    arrays = np.load(io.BytesIO(answer.content))
    return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def small(server: Server) -> dict[str, Any]:
    """A sweep of two shapes, one member of which diverges, finished."""
    grid = {"network.hidden": [[8, 7], [5]], "training.lr": [0.05, 1e300], "seed": {"range": [0, 2]}}
    posted = post(server, SMALL, grid)
    assert (posted["object"], posted["status"], posted["progress"]["total"]) == ("sweep", "queued", 8 * 6)
    return finished(server, posted["id"])


def test_members_are_the_grid_in_order_and_the_grouping_is_told(small: dict[str, Any]) -> None:
    varied = [member["varied"] for member in small["members"]]
    assert varied[:3] == [
        {"network.hidden": [8, 7], "training.lr": 0.05, "seed": 0},
        {"network.hidden": [8, 7], "training.lr": 0.05, "seed": 1},
        {"network.hidden": [8, 7], "training.lr": 1e300, "seed": 0},
    ]
    assert [(batch["members"], batch["widths"]) for batch in small["batches"]] == [
        ([0, 1, 2, 3], [6, 8, 7, 4]),
        ([4, 5, 6, 7], [6, 5, 4]),
    ]


def test_f23_a_diverging_member_fails_alone(server: Server, small: dict[str, Any]) -> None:
    assert (small["status"], small["counts"]) == ("succeeded", {"succeeded": 4, "failed": 4})
    for member in small["members"]:
        state = server.read(member["id"])
        assert state["sweep"] == small["id"]
        if member["varied"]["training.lr"] == 0.05:
            assert (state["status"], state["progress"]) == ("succeeded", {"done": 6, "total": 6})
        else:
            assert (state["status"], state["error"]["type"]) == ("failed", "diverged")
            assert len(spectrum(server, member["id"])["epochs"]) >= 1


def test_a_member_is_what_the_same_specification_is_alone(server: Server, small: dict[str, Any]) -> None:
    member = server.read(small["members"][1]["id"])
    alone = server.run({name: part for name, part in member["spec"].items() if part is not None})
    assert alone["spec"] == member["spec"]
    assert (alone["sweep"], alone["device"], alone["versions"]) == (None, member["device"], member["versions"])
    ours, theirs = spectrum(server, member["id"]), spectrum(server, alone["id"])
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, atol=1e-5)
    for at in ("initial", "final"):
        both = [load(server.client.get(f"/experiments/{one['id']}/weights?at={at}").content) for one in (member, alone)]
        for name, weight in both[1].items():
            np.testing.assert_allclose(both[0][name], weight, atol=1e-5)
    for view in ("metrics", "compression", "spectrum?format=png", "spectrum?format=gif"):
        answer = server.client.get(f"/experiments/{member['id']}/{view}")
        assert answer.status_code == 200, answer.text


def test_the_same_key_makes_one_sweep(server: Server) -> None:
    grid = {"seed": [0, 1]}
    first, second = (
        post(server, SMALL, grid, **{"idempotency-key": "a-sweep-once", "prefer": "wait=20"}) for _ in "12"
    )
    assert first["id"] == second["id"]
    assert first["status"] == "succeeded"


def test_sweeps_are_listed_and_their_members_are_among_the_experiments(server: Server, small: dict[str, Any]) -> None:
    listed = server.client.get("/sweeps", params={"name_prefix": "small"}).json()["data"]
    found = next(state for state in listed if state["id"] == small["id"])
    assert "members" not in found
    assert found["counts"] == small["counts"]
    names = {state["name"] for state in server.client.get("/experiments?limit=100").json()["data"]}
    assert "small: hidden=[5], lr=0.05, seed=1" in names
    assert server.client.get(f"/experiments/{small['id']}").status_code == 404


def test_cancel_stops_all_and_delete_takes_all_along(server: Server) -> None:
    posted = post(server, {**SMALL, **LONG}, {"seed": [0, 1, 2]})
    one, two, three = (member["id"] for member in posted["members"])
    server.wait(one, "running")
    wait_for(lambda: read(server, posted["id"])["status"] == "running", "the sweep to run")
    problem(server.client.delete(f"/sweeps/{posted['id']}"), 409, "invalid-state")
    problem(server.client.delete(f"/experiments/{one}"), 409, "invalid-state")
    assert server.client.post(f"/experiments/{one}/cancel").json()["status"] == "canceled"
    before = server.read(two)["progress"]["done"]
    wait_for(lambda: server.read(two)["progress"]["done"] > before, "the others to go on")
    assert server.client.delete(f"/experiments/{one}").status_code == 204
    answer = server.client.post(f"/sweeps/{posted['id']}/cancel")
    assert (answer.status_code, answer.json()["status"]) == (202, "canceling")
    state = finished(server, posted["id"])
    assert (state["status"], state["counts"]) == ("canceled", {"canceled": 2})
    assert server.client.post(f"/sweeps/{posted['id']}/cancel").status_code == 200
    server.delete_unchanged(f"/sweeps/{posted['id']}")
    for path in (f"/sweeps/{posted['id']}", f"/experiments/{two}", f"/experiments/{three}"):
        assert server.client.get(path).status_code == 404
    assert not any((server.data / "weights" / member).exists() for member in (one, two, three))


def test_canceling_the_last_member_ends_the_sweep(server: Server) -> None:
    posted = post(server, {**SMALL, **LONG}, {"seed": [0, 1]})
    for member in posted["members"]:
        assert server.client.post(f"/experiments/{member['id']}/cancel").json()["status"] == "canceled"
    assert finished(server, posted["id"])["status"] == "canceled"


def test_a_batch_that_is_killed_is_trained_again(server: Server) -> None:
    base = {**SMALL, "training": {"epochs": 1000, "batch_size": 8}, "record": {"every": 50}}
    posted = post(server, base, {"seed": {"range": [0, 4]}})
    first = posted["members"][0]["id"]
    wait_for(lambda: server.read(first)["progress"]["done"] > 0, "the first epochs")
    for job in server.job_children():
        job.kill()
    state = finished(server, posted["id"])
    assert (state["status"], state["counts"]) == ("succeeded", {"succeeded": 4})
    assert {server.read(member["id"])["attempt"] for member in state["members"]} == {2}
    assert spectrum(server, first)["epochs"].tolist() == list(range(0, 1001, 50))
    assert server.client.get(f"/experiments/{first}/weights").status_code == 200


@pytest.mark.parametrize(
    ("body", "pointer", "told"),
    [
        ({"grid": {}}, "/grid", "empty"),
        ({}, "/grid", "empty"),
        ({"grid": [1]}, "/grid", "an object"),
        ({"base": 3, "grid": {"seed": [1]}}, "/base", "an object"),
        ({"grid": {"seed": [1]}, "epochs": 3}, "/epochs", "unknown"),
        ({"grid": {"training.speed": [1]}}, "/grid/training.speed", "no field"),
        ({"grid": {"name": ["a"]}}, "/grid/name", "no field"),
        ({"grid": {"training": [{}]}}, "/grid/training", "no field"),
        ({"grid": {"seed": []}}, "/grid/seed", "no values"),
        ({"grid": {"seed": 3}}, "/grid/seed", "list of values"),
        ({"grid": {"seed": {"range": [0, 2], "log": [1, 2, 3]}}}, "/grid/seed", "list of values"),
        ({"grid": {"seed": {"range": [3, 3]}}}, "/grid/seed", "lo < hi"),
        ({"grid": {"seed": {"range": [0, 10**9]}}}, "/grid/seed", "1 to 1024"),
        ({"grid": {"seed": {"range": [0, 1.5]}}}, "/grid/seed", "two integers"),
        ({"grid": {"training.lr": {"log": [0, 1, 3]}}}, "/grid/training.lr", "0 < lo < hi"),
        ({"grid": {"training.lr": {"log": [0.1, 1, True]}}}, "/grid/training.lr", "two numbers"),
        ({"grid": {"training.lr": {"log": [0.1, 1, 10**9]}}}, "/grid/training.lr", "2 to 1024"),
        ({"grid": {"training.lr": {"log": [0.1, 10**400, 3]}}}, "/grid/training.lr", "finite"),
        ({"grid": {"training.lr": [0.1, 0.2, 0.1]}}, "/grid/training.lr/2", "twice"),
        ({"grid": {"seed": {"range": [0, 33]}, "data.seed": {"range": [0, 32]}}}, "/grid", "33 × 32"),
        ({"grid": {"training.lr": [0.1, -1], "seed": [7]}}, "/grid/training.lr", "lr=-1, seed=7"),
        ({"grid": {"training.epochs": [10.5]}}, "/grid/training.epochs", "epochs=10.5"),
        ({"grid": {"network.hidden": [[4], [0]]}}, "/grid/network.hidden", "hidden=[0]"),
        ({"grid": {"training.batch_size": [16, 2000]}}, "/grid/training.batch_size", "batch_size=2000"),
        ({"base": {"training": {"lr": -1}}, "grid": {"seed": [1]}}, "/base/training/lr", "greater than 0"),
        ({"base": {"training": 3}, "grid": {"training.lr": [1]}}, "/base/training", "lr=1"),
        ({"base": {"name": 3}, "grid": {"seed": [1]}}, "/base/name", "valid string"),
        ({"base": {"name": "w" * 201}, "grid": {"seed": [1]}}, "/base/name", "at most 200"),
        ({"grid": {"data.target": ["a\x07b"]}}, "/grid/data.target", "tanh"),
        ({"base": {"device": "cuda"}, "grid": {"seed": [1]}}, "/device", "offers"),
        ({"base": {"webhook": {"url": "https://example.org"}}, "grid": {"seed": [1]}}, "/base/webhook", "has set no"),
    ],
)
def test_a_bad_sweep_is_refused(server: Server, body: dict[str, Any], pointer: str, told: str) -> None:
    found = problem(server.client.post("/sweeps", json=body), 422, "validation-error")
    assert [error["pointer"] for error in found["errors"]] == [pointer]
    assert told in found["detail"]


def test_long_names_are_cut_and_kept_composed(server: Server) -> None:
    base = {**SMALL, "name": "e\u0301" * 150, "training": {"epochs": 1}}
    posted = post(server, base, {"seed": [0, 1], "network.activation": ["relu"]})
    assert posted["name"] == "\u00e9" * 150
    names = [server.read(member["id"])["name"] for member in posted["members"]]
    assert names == [f"{posted['name']}: seed={seed}, activation=relu" for seed in (0, 1)]
    longest = post(server, {**base, "name": "w" * 200}, {"seed": [5]})
    assert server.read(longest["members"][0]["id"])["name"] == "w" * 200


def test_all_members_together_have_a_budget(server: Server) -> None:
    wide = {"network": {"hidden": [4096, 2000]}}
    found = problem(
        server.client.post("/sweeps", json={"base": wide, "grid": {"seed": {"range": [0, 100]}}}),
        422,
        "budget-exceeded",
    )
    assert found["what"] == "parameters of all members"
    heavy = {"training.epochs": [1, 100_000]}
    one = problem(server.client.post("/sweeps", json={"base": wide, "grid": heavy}), 422, "budget-exceeded")
    assert "epochs=100000" in one["what"]


def test_a_field_twice_is_malformed(server: Server) -> None:
    content = b'{"grid": {"seed": [0], "seed": [1]}}'
    answer: httpx.Response = server.client.post(
        "/sweeps", content=content, headers={"content-type": "application/json"}
    )
    problem(answer, 400, "malformed-json")
