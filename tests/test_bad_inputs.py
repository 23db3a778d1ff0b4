"""Bad input against a running server: the exact status and problem type of each."""

import io
import json
import socket
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.conftest import Server
from tests.uploads.builders import saved

JSON = {"content-type": "application/json"}
DEEP = b"[" * 100_000


def problem(answer: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """The answer's problem document, checked for what every one has."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    body: dict[str, Any] = answer.json()
    assert (body["type"], body["status"]) == (f"/problems/{slug}", status)
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


@pytest.mark.parametrize(
    ("body", "status", "slug"),
    [
        pytest.param(b'{"name": ', 400, "malformed-json", id="row 1: truncated"),
        pytest.param(b"hello", 400, "malformed-json", id="row 1: not JSON"),
        pytest.param(b"", 422, "validation-error", id="row 2: empty"),
        pytest.param(b"[1]", 422, "validation-error", id="not an object"),
        pytest.param(b'{"name": "\xff"}', 400, "malformed-json", id="row 4: invalid UTF-8"),
        pytest.param('{"name": "a"}'.encode("utf-16"), 400, "malformed-json", id="row 5: UTF-16"),
        pytest.param(DEEP, 413, "body-too-large", id="row 15: too large"),
        pytest.param(DEEP[:60_000], 400, "malformed-json", id="row 6: deep brackets"),
        pytest.param(b'{"seed": ' + b"9" * 5000 + b"}", 400, "malformed-json", id="row 7: 5000 digits"),
        pytest.param(b'{"training": {"epochs": 1, "epochs": 2}}', 400, "malformed-json", id="row 9: twice"),
        pytest.param(b'{"epochs": 3}', 422, "validation-error", id="row 10: unknown field"),
        pytest.param(b'{"training": {"lr": NaN}}', 400, "malformed-json", id="row 11: NaN"),
        pytest.param(b'{"training": {"lr": -Infinity}}', 400, "malformed-json", id="row 11: -Infinity"),
        pytest.param(b'{"training": {"lr": 1e999}}', 422, "validation-error", id="row 12: overflow"),
        pytest.param(rb'{"name": "a\u0000b"}', 422, "validation-error", id="row 14: NUL"),
        pytest.param(rb'{"name": "a\u0007b"}', 422, "validation-error", id="row 14: control character"),
        pytest.param(rb'{"name": "\ud800"}', 422, "validation-error", id="lone surrogate"),
    ],
)
def test_a_bad_body_is_refused(server: Server, body: bytes, status: int, slug: str) -> None:
    problem(server.client.post("/experiments", content=body, headers=JSON), status, slug)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/experiments", rb'{"\ud800": 1}'),
        ("/experiments", rb'{"tags": {"\ud800": "c"}}'),
        ("/experiments", rb'{"network": {"activation": "\ud800"}}'),
        ("/sweeps", rb'{"\ud800": 1}'),
        ("/sweeps", rb'{"base": {}, "grid": {"\ud800": [1]}}'),
        ("/sweeps", rb'{"base": {}, "grid": {"training.\ud800": [1]}}'),
        ("/sweeps", rb'{"base": {}, "grid": {"data.target": ["\ud800"]}}'),
        ("/sweeps", rb'{"base": {"\ud800": 1}, "grid": {"seed": [1]}}'),
        ("/sweeps", rb'{"base": {}, "grid": {"seed": "\ud800"}}'),
        ("/sweeps", rb'{"base": {}, "grid": {"seed": {"\ud800": 1}}}'),
    ],
)
def test_a_lone_surrogate_is_refused_wherever_it_stands(server: Server, path: str, body: bytes) -> None:
    answer = server.client.post(path, content=body, headers=JSON)
    assert problem(answer, 422, "validation-error")["errors"]


def test_a_lone_surrogate_in_a_key_twice_is_malformed(server: Server) -> None:
    body = rb'{"\ud800": 1, "\ud800": 2}'
    problem(server.client.post("/experiments", content=body, headers=JSON), 400, "malformed-json")


def test_malformed_json_tells_where(server: Server) -> None:
    answer = server.client.post("/experiments", content=b'{"a": 1,}', headers=JSON)
    assert problem(answer, 400, "malformed-json")["offset"] == 8


def test_a_chunked_body_over_the_limit_is_refused(server: Server) -> None:
    chunks = (b" " * 10_000 for _ in range(20))
    problem(server.client.post("/experiments", content=chunks, headers=JSON), 413, "body-too-large")


@pytest.mark.parametrize(
    ("headers", "slug"),
    [
        pytest.param({"content-type": "text/plain"}, "unsupported-media-type", id="row 19"),
        pytest.param({**JSON, "content-encoding": "gzip"}, "unsupported-content-encoding", id="row 20"),
    ],
)
def test_bodies_of_other_types_are_refused(server: Server, headers: dict[str, str], slug: str) -> None:
    answer = server.client.post("/experiments", content=b"{}", headers=headers)
    problem(answer, 415, slug)
    if "content-encoding" in headers:
        assert answer.headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[("training.epochs", value) for value in (0, -1, 10**9, 10.5, "12", True, 1e3, None)],  # rows 45, 46
        *[("network.hidden", value) for value in ([0], [10**6], [], [8] * 16, [[8]], 8, "8")],  # rows 47, 56
        *[("training.lr", value) for value in (-1, 0, "0.1", [0.1])],  # row 49
        ("training.batch_size", 1001),  # row 52
        ("training.batch_size", 0),
        *[("seed", value) for value in (-1, 2**32, 1.0, "0", True)],  # row 54
        *[("network.activation", value) for value in ("__import__", "gelu", None, 1)],  # row 57
        ("training.optimizer", "lion"),
        ("training.momentum", 1),
        ("training.weight_decay", -1e-9),
        ("data.n_informative", 21),
        ("data.target", "sin"),
        ("data.standardize", 1),
        ("data.validation_fraction", 1),
        ("data.validation_fraction", 0.9999),
        ("data.n_samples", 10**6 + 1),
        ("record.every", 0),
        ("record.layers", ["W4"]),
        ("record.layers", []),
        ("record.layers", ["W1", "W1"]),
        ("record.layers", "some"),
        ("preset", "memos"),
        ("device", "cuda"),
        ("device", "cuda:0"),
        ("device", "tpu"),
        ("priority", "urgent"),
        ("webhook", {"url": "http://127.0.0.1"}),
        ("name", ""),
        ("name", "x" * 201),
        ("tags", {"a:b": "c"}),
        ("tags", {"a": 1}),
        ("training", []),
        ("training", None),
    ],
)
def test_a_bad_field_is_named_with_its_value(server: Server, path: str, value: object) -> None:
    *parents, last = path.split(".")
    body: dict[str, Any] = {last: value}
    for parent in reversed(parents):
        body = {parent: body}
    answer = server.client.post("/experiments", json=body)
    found = problem(answer, 422, "validation-error")["errors"]
    pointer = "/" + path.replace(".", "/")
    assert any(error["pointer"].startswith(pointer) for error in found)
    if isinstance(value, str | int | float):
        shown = [json.dumps(error["value"]) for error in found if "value" in error]
        assert json.dumps(value if value != "x" * 201 else "x" * 100 + "…", ensure_ascii=True) in shown


def test_momentum_is_for_sgd_alone(server: Server) -> None:
    training = {"optimizer": "adam", "momentum": 0.9}
    answer = server.client.post("/experiments", json={"training": training})
    assert "sgd" in problem(answer, 422, "validation-error")["detail"]


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        ({"network": {"hidden": [4096] * 4}}, "parameters"),
        ({"data": {"n_samples": 10**6}, "network": {"hidden": [512, 512]}, "training": {"epochs": 10**5}}, "work"),
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
    assert body["what"].startswith(what)
    assert body["figure"] > body["limit"]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/a%00b",
        "/nothing",
        "/experiments/00000000-0000-7000-8000-000000000000",
        "/experiments/" + "x" * 10_000,
        "/experiments/'%20OR%201=1",
        "/experiments/a%00b",
        "/experiments/00000000-0000-7000-8000-00000000000%00",
        "/experiments/none/spectrum",
        "/experiments/none/metrics",
        "/experiments/none/compression",
        "/experiments/none/weights",
        "/problems/none",
        "/docs/none.js",
        "/docs/..%2f..%2fapp.py",
    ],
)
def test_what_is_not_there_is_not_found(server: Server, path: str) -> None:
    problem(server.client.get(path), 404, "not-found")


def test_row_34_a_method_that_a_path_does_not_take(server: Server) -> None:
    answer = server.client.put("/experiments")
    problem(answer, 405, "method-not-allowed")
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
    assert server.client.post("/openapi.json").headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "query",
    [
        "limit=0", "limit=-1", "limit=101", "limit=abc", "limit=99999999999999999999", "limit=1.5",  # rows 39, 40
        "after=abc", "after=%00", "after=" + "A" * 300, "after=4Z2Q", "order=up", "status=done", "color=red",
        "created_after=yesterday", "created_before=2026-01-01", "tag=%20", "tag=", "tag=a%0a", "name_prefix=",
        "name_prefix=%07", "limit=1&limit=2",
    ],
)  # fmt: skip
def test_bad_list_parameters_are_named(server: Server, query: str) -> None:
    body = problem(server.client.get(f"/experiments?{query}"), 422, "validation-error")
    assert body["errors"][0]["parameter"] == query.partition("=")[0]


@pytest.mark.parametrize(
    "query",
    [
        "layer=W9", "layer=", "layer=1", "from=-1", "to=-1", "from=x", "stride=0", "top_k=0", "of=both", "normalize=2",
        "format=bmp", "scale=cubic", "width=1000000000", "height=0", "dpi=1000000", "frames=0", "frames=201", "fps=0",
        "fps=1000", "colour=red", "from=90000000000000000000", "layer=all&format=png", "layer=all&format=npy",
        "from=100000&format=gif",
    ],
)  # fmt: skip
def test_bad_spectrum_parameters_are_refused(server: Server, memo: dict[str, Any], query: str) -> None:
    answer = server.client.get(f"/experiments/{memo['id']}/spectrum?{query}")
    assert problem(answer, 422, "validation-error")["errors"][0]["parameter"] == query.partition("=")[0]


@pytest.mark.parametrize(
    "query",
    [
        "rule=rank", "rule=rank&rank=0", "rule=rank&rank=65", "rule=energy&threshold=1.5", "rule=energy&threshold=0",
        "rule=energy&threshold=nan", "rule=error&threshold=1", "rule=budget&fraction=0", "rule=budget&fraction=0.001",
        "rule=best", "rule=energy&rank=3", "rule=spikes&threshold=0.5", "rule=all&rank=3", "layer=all", "layer=W0",
        "unknown=1",
    ],
)  # fmt: skip
def test_bad_compression_parameters_are_refused(server: Server, memo: dict[str, Any], query: str) -> None:
    problem(server.client.get(f"/experiments/{memo['id']}/compression?{query}"), 422, "validation-error")


def test_a_budget_below_one_rank_names_the_least_that_gives_one(server: Server, memo: dict[str, Any]) -> None:
    answer = server.client.get(f"/experiments/{memo['id']}/compression?rule=budget&fraction=0.03")
    assert "0.03125" in problem(answer, 422, "validation-error")["detail"]  # (64 + 64) / 64² of the parameters


@pytest.mark.parametrize("path", ["spectrum", "metrics", "compression"])
def test_row_35_what_nobody_can_send_is_not_acceptable(server: Server, memo: dict[str, Any], path: str) -> None:
    answer = server.client.get(f"/experiments/{memo['id']}/{path}", headers={"accept": "application/xml"})
    assert "application/json" in problem(answer, 406, "not-acceptable")["available"]


@pytest.mark.parametrize("accept", ["", "///", "image/png;q=9", "text/html;q=x, */*", ","])
def test_row_36_a_malformed_accept_is_anything(server: Server, memo: dict[str, Any], accept: str) -> None:
    answer = server.client.get(f"/experiments/{memo['id']}/spectrum", headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("header", ["bytes=5-2", "bytes=abc", "items=0-1", "bytes=1-0,0-1"])
def test_what_is_no_range_is_ignored(server: Server, memo: dict[str, Any], header: str) -> None:
    answer = server.client.get(f"/experiments/{memo['id']}/weights", headers={"range": header})
    assert answer.status_code == 200
    assert len(answer.content) == int(answer.headers["content-length"])


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00%2B14:00", "9999-12-31T23:59:59-14:00"])
def test_moments_at_the_ends_of_time_are_only_moments(server: Server, moment: str) -> None:
    for name in ("created_after", "created_before"):
        assert server.client.get(f"/experiments?{name}={moment}").status_code == 200


def test_a_client_that_breaks_off_leaves_no_traceback(server: Server) -> None:  # the session's fixture reads the log
    with socket.create_connection(("127.0.0.1", server.client.base_url.port)) as connection:
        head = "POST /experiments HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 20"
        connection.sendall(f"{head}\r\n\r\n{{".encode())
    assert server.client.get("/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/experiments", "/presets", "/limits", "/problems/not-found"])
def test_json_alone_is_not_acceptable_to_all(server: Server, path: str) -> None:
    answer = server.client.get(path, headers={"accept": "application/xml"})
    assert problem(answer, 406, "not-acceptable")["available"] == ["application/json"]


def test_a_name_that_grows_when_composed_is_measured_composed(server: Server) -> None:
    answer = server.client.post("/experiments", json={"name": "\ufb2c" * 67})  # each becomes three code points
    problem(answer, 422, "validation-error")
    state = server.run({"name": "\ufb2c" * 66, "training": {"epochs": 1}})
    assert state["status"] == "succeeded"
    assert server.client.get(f"/experiments/{state['id']}/spectrum").status_code == 200


@pytest.mark.parametrize("header", ["bytes=" + ",".join(["0-"] * 10_000), "bytes=99999999-", "bytes=-0"])
def test_row_37_bad_ranges_are_not_satisfiable(server: Server, memo: dict[str, Any], header: str) -> None:
    answer = server.client.get(f"/experiments/{memo['id']}/weights", headers={"range": header})
    problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"].startswith("bytes */")


@pytest.mark.parametrize("name", ["شبكة عصبية 🧠 é", r"$\frac{", "<script>alert(1)</script>", "'; DROP TABLE jobs; --"])
def test_rows_16_17_any_printable_name_is_a_mere_label(server: Server, name: str) -> None:
    state = server.run({"name": name, "training": {"epochs": 1}})
    assert (state["status"], state["name"]) == ("succeeded", name)
    for form in ("png", "svg", "gif"):
        answer = server.client.get(f"/experiments/{state['id']}/spectrum?format={form}")
        assert answer.status_code == 200
        assert b"<script" not in answer.content


def test_names_are_stored_composed(server: Server) -> None:
    assert server.post({"name": "e\u0301", "training": {"epochs": 1}})["name"] == "\u00e9"


def test_row_5_a_byte_order_mark_is_let_through(server: Server) -> None:
    body = b"\xef\xbb\xbf" + json.dumps({"training": {"epochs": 1}}).encode()
    assert server.client.post("/experiments", content=body, headers=JSON).status_code == 202


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "", "localhost.evil.example"])
def test_other_hosts_are_not_ours(server: Server, host: str) -> None:
    problem(server.client.get("/healthz", headers={"host": host}), 400, "host-not-allowed")


def test_rows_140_141_equal_frames_are_all_drawn_and_a_zero_spectrum_too(server: Server) -> None:
    state = server.run({"training": {"lr": 5e-324, "epochs": 9}})
    path = f"/experiments/{state['id']}/spectrum"
    for of in ("weights", "update"):  # The weights never change, so the update is zero.
        answer = server.client.get(path, params={"format": "gif", "of": of})
        assert answer.status_code == 200
        assert getattr(Image.open(io.BytesIO(answer.content)), "n_frames", 1) == 10
        for form in ("png", "svg"):
            assert server.client.get(path, params={"format": form, "of": of, "scale": "log"}).status_code == 200
    zero = server.analyze(saved(np.zeros((4, 3))))
    assert server.client.get(f"/analyses/{zero['id']}/spectrum", params={"format": "png"}).status_code == 200


@pytest.mark.parametrize("query", ["width=1000000000", "height=0", "dpi=1000000", "scale=cubic"])
def test_row_138_bad_pictures_of_an_analysis_are_refused(server: Server, query: str) -> None:
    state = server.analyze(saved(np.eye(3)))
    answer = server.client.get(f"/analyses/{state['id']}/spectrum?format=png&{query}")
    assert problem(answer, 422, "validation-error")["errors"][0]["parameter"] == query.partition("=")[0]
