"""Numbers of an experiment that are refused: section B of the list of bad inputs, each with its status and place."""

import json
from typing import Any

import pytest

from tests.conftest import Server
from tests.test_bad_inputs import problem

BAD: list[tuple[str, str, tuple[object, ...]]] = [
    ("row 45", "training.epochs", (0, -1, 10**9)),
    ("row 46", "training.epochs", (10.5, "12", True, 1e3, None)),
    ("row 47", "network.hidden", ([0], [10**6])),
    ("row 49", "training.lr", (-1, 0, "0.1", [0.1])),
    ("row 52", "training.batch_size", (1001,)),
    ("row 54", "seed", (-1, 2**32, 1.0, "0", True)),
    ("row 56", "network.hidden", ([], [8] * 16, [[8]], 8, "8")),
    ("row 57", "network.activation", ("__import__", "gelu", None, 1)),
    ("more", "training.batch_size", (0,)),
    ("more", "training.optimizer", ("lion",)),
    ("more", "training.momentum", (1,)),
    ("more", "training.weight_decay", (-1e-9,)),
    ("more", "data.n_informative", (21,)),
    ("more", "data.target", ("sin",)),
    ("more", "data.standardize", (1,)),
    ("more", "data.validation_fraction", (1, 0.9999)),
    ("more", "data.n_samples", (10**6 + 1,)),
    ("more", "record.every", (0,)),
    ("more", "record.layers", (["W4"], [], ["W1", "W1"], "some")),
    ("more", "preset", ("memos",)),
    ("more", "device", ("cuda", "cuda:0", "tpu")),
    ("more", "priority", ("urgent",)),
    ("more", "webhook", ({"url": "http://127.0.0.1"}, {"url": "http://a.example", "events": ["failed", "failed"]})),
    ("more", "name", ("", "x" * 201)),
    ("more", "tags", ({"a:b": "c"}, {"a": 1})),
    ("more", "training", ([], None)),
]


def with_field(path: str, value: object) -> dict[str, Any]:
    """A body in which one dotted field is set."""
    *parents, last = path.split(".")
    body: dict[str, Any] = {last: value}
    for parent in reversed(parents):
        body = {parent: body}
    return body


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param(path, value, id=f"{row}: {path}={json.dumps(value)[:30]}")
        for row, path, values in BAD
        for value in values
    ],
)
def test_a_bad_field_is_named_with_its_value(server: Server, path: str, value: object) -> None:
    answer = server.client.post("/experiments", json=with_field(path, value))
    found = problem(answer, 422, "validation-error")["errors"]
    pointer = "/" + path.replace(".", "/")
    assert any(error["pointer"].startswith(pointer) for error in found)
    if isinstance(value, str | int | float):
        shown = [json.dumps(error["value"]) for error in found if "value" in error]
        assert json.dumps(value if value != "x" * 201 else "x" * 100 + "…", ensure_ascii=True) in shown


@pytest.mark.parametrize(
    ("path", "value"),
    [
        pytest.param("training.epochs", b"1e3", id="row 46: 1e3"),
        pytest.param("network.hidden", b"[8.0]", id="row 47: 8.0"),
        pytest.param("seed", b"1.0", id="row 54: 1.0"),
        pytest.param("seed", b"-0.0", id="row 54: -0.0"),
    ],
)
def test_an_integer_is_written_as_one(server: Server, path: str, value: bytes) -> None:
    body = json.dumps(with_field(path, "here")).encode().replace(b'"here"', value)
    answer = server.client.post("/experiments", content=body, headers={"content-type": "application/json"})
    assert problem(answer, 422, "validation-error")["errors"][0]["pointer"].startswith("/" + path.replace(".", "/"))


def test_momentum_is_for_sgd_alone(server: Server) -> None:
    training = {"optimizer": "adam", "momentum": 0.9}
    answer = server.client.post("/experiments", json={"training": training})
    assert "sgd" in problem(answer, 422, "validation-error")["detail"]


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ({"network": {"hidden": [4096] * 4}}, "parameters"),
        ({"data": {"n_samples": 10**6}, "network": {"hidden": [512, 512]}, "training": {"epochs": 10**5}}, "work"),
        (
            {"data": {"n_samples": 10**6}, "network": {"hidden": [4096] * 2}, "training": {"epochs": 1}},
            "work of the cuts",
        ),
        ({"network": {"hidden": [512] * 2}, "training": {"epochs": 10**5}}, "recorded values"),
        ({"data": {"n_samples": 10**6, "n_features": 200}}, "data values"),
        (
            {"data": {"n_samples": 10**5}, "training": {"batch_size": 80_000}, "network": {"hidden": [4096]}},
            "batch values",
        ),
    ],
)
def test_too_much_all_together_tells_the_figure(server: Server, spec: dict[str, Any], what: str) -> None:
    body = problem(server.client.post("/experiments", json=spec), 422, "budget-exceeded")
    assert body["what"].partition(" (")[0] == what
    assert body["figure"] > body["limit"]
