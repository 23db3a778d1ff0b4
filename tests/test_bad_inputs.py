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
        pytest.param(b'{"name": "%s"}' % (b"x" * 10_000_000), 413, "body-too-large", id="row 15: name of 10 MB"),
        pytest.param(b"[" * 65_536, 400, "malformed-json", id="row 6: as deep as fits the limit"),
        pytest.param(b'{"seed": ' + b"9" * 5000 + b"}", 400, "malformed-json", id="row 7: 5000 digits"),
        pytest.param(b'{"training": {"epochs": 1, "epochs": 2}}', 400, "malformed-json", id="row 9: twice"),
        pytest.param(b'{"epochs": 3}', 422, "validation-error", id="row 10: unknown field"),
        pytest.param(b'{"training": {"lr": NaN}}', 400, "malformed-json", id="row 11: NaN"),
        pytest.param(b'{"training": {"lr": Infinity}}', 400, "malformed-json", id="row 11: Infinity"),
        pytest.param(b'{"training": {"lr": -Infinity}}', 400, "malformed-json", id="row 11: -Infinity"),
        pytest.param(b'{"training": {"lr": 1e999}}', 422, "validation-error", id="row 12: overflow"),
        pytest.param(rb'{"name": "a\u0000b"}', 422, "validation-error", id="row 14: NUL"),
        pytest.param(rb'{"name": "a\u0007b"}', 422, "validation-error", id="row 14: control character"),
        pytest.param(rb'{"name": "\ud800"}', 422, "validation-error", id="lone surrogate"),
    ],
)
@pytest.mark.parametrize("path", ["/experiments", "/sweeps"])
def test_a_bad_body_is_refused(server: Server, path: str, body: bytes, status: int, slug: str) -> None:
    problem(server.client.post(path, content=body, headers=JSON), status, slug)


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        pytest.param("/experiments", b'{"epochs": 3}', "extra_forbidden", id="row 10"),
        pytest.param("/sweeps", b'{"grid": {"seed": [1]}, "epochs": 3}', "extra_forbidden", id="row 10: sweep"),
        pytest.param(
            "/sweeps",
            b'{"base": {"epochs": 3}, "grid": {"seed": [1]}}',
            "extra_forbidden",
            id="row 10: base of a sweep",
        ),
        pytest.param("/experiments", b'{"training": {"lr": 1e999}}', "finite_number", id="row 12"),
        pytest.param(
            "/sweeps", b'{"grid": {"training.lr": [0.1, 1e999]}}', "finite_number", id="row 12: one of a sweep"
        ),
    ],
)
def test_rows_10_12_a_refusal_tells_its_kind(server: Server, path: str, body: bytes, kind: str) -> None:
    answer = server.client.post(path, content=body, headers=JSON)
    assert [error["type"] for error in problem(answer, 422, "validation-error")["errors"]] == [kind]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/sweeps", {"grid": {"preset": ["x" * 60_000]}}),
        ("/experiments", {"x" * 60_000: 1}),
        ("/experiments", {"preset": "x" * 60_000}),
    ],
)
def test_row_71_what_was_sent_is_not_sent_back_at_length(server: Server, path: str, body: dict[str, Any]) -> None:
    answer = server.client.post(path, json=body)
    problem(answer, 422, "validation-error")
    assert len(answer.content) < 5000


def test_row_2_a_missing_body_is_named(server: Server) -> None:
    error = problem(server.client.post("/experiments", headers=JSON), 422, "validation-error")["errors"][0]
    assert error["pointer"] == ""
    assert "missing" in error["detail"]


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


def test_row_1_malformed_json_tells_where(server: Server) -> None:
    answer = server.client.post("/experiments", content=b'{"a": 1,}', headers=JSON)
    assert problem(answer, 400, "malformed-json")["offset"] == 8


def test_row_22_a_chunked_body_over_the_limit_is_refused(server: Server) -> None:
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


ID = "00000000-0000-7000-8000-000000000000"
UNKNOWN = {"unknown": ID, "10 kB": "x" * 10_000, "quotes": "'%20OR%201=1--%22", "NUL": f"{ID}%00", "number": "9" * 25}
VIEWS = {
    "experiments": ["", "/spectrum", "/metrics", "/compression", "/weights", "/events"],
    "analyses": ["", "/spectrum", "/compression", "/events", "/factors", "/factors/none"],
    "sweeps": ["", "/summary"],
}


@pytest.mark.parametrize("name", UNKNOWN.values(), ids=[f"row 32: {name}" for name in UNKNOWN])
@pytest.mark.parametrize("kind", VIEWS)
def test_an_id_that_is_not_ours_is_not_found(server: Server, kind: str, name: str) -> None:
    for view in VIEWS[kind]:
        problem(server.client.get(f"/{kind}/{name}{view}"), 404, "not-found")
    problem(server.client.post(f"/{kind}/{name}/cancel"), 404, "not-found")
    problem(server.client.delete(f"/{kind}/{name}"), 404, "not-found")


@pytest.mark.parametrize(
    "path",
    [
        "/%2e%2e/%2e%2e/etc/passwd",
        "/a%00b",
        "/nothing",
        "/experiments/",
        "/docs/",
        "/problems/none",
        "/docs/none.js",
        "/docs/..%2f..%2fapp.py",
    ],
    ids=lambda path: f"row 31: {path}",
)
def test_what_is_not_there_is_not_found(server: Server, path: str) -> None:
    problem(server.client.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/", "GET, HEAD"),
        ("/experiments", "GET, HEAD, POST"),
        ("/experiments/none", "DELETE, GET, HEAD, PATCH"),
        ("/experiments/none/spectrum", "GET, HEAD"),
        ("/experiments/none/cancel", "POST"),
        ("/analyze", "POST"),
        ("/analyses", "GET, HEAD"),
        ("/analyses/none/factors", "GET, HEAD, POST"),
        ("/sweeps/none", "DELETE, GET, HEAD"),
        ("/healthz", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_row_34_a_method_that_a_path_does_not_take(server: Server, path: str, allowed: str) -> None:
    answer = server.client.put(path)
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == allowed


HUGE = "99999999999999999999"  # does not fit the database's integers
PAGES = ["limit=0", "limit=-1", "limit=101", "limit=abc", "limit=1.5", "limit=1&limit=2", "after=abc", "after=%00",
         "after=" + "A" * 300, "after=4Z2Q"]  # fmt: skip


@pytest.mark.parametrize("query", [pytest.param(f"limit={HUGE}", id="row 39")] + [
    pytest.param(query, id=f"row 40: {query[:20]}") for query in PAGES
])  # fmt: skip
@pytest.mark.parametrize("path", ["/experiments", "/analyses", "/sweeps"])
def test_bad_pages_are_named(server: Server, path: str, query: str) -> None:
    body = problem(server.client.get(f"{path}?{query}"), 422, "validation-error")
    assert body["errors"][0]["parameter"] == query.partition("=")[0]


@pytest.mark.parametrize(
    "query",
    [
        "order=up", "status=done", "color=red", "created_after=yesterday", "created_before=2026-01-01", "tag=%20",
        "tag=", "tag=a%0a", "name_prefix=", "name_prefix=%07",
    ],
)  # fmt: skip
def test_bad_filters_of_lists_are_named(server: Server, query: str) -> None:
    body = problem(server.client.get(f"/experiments?{query}"), 422, "validation-error")
    assert body["errors"][0]["parameter"] == query.partition("=")[0]


@pytest.mark.parametrize(
    "query",
    [
        "layer=W9", "layer=", "layer=1", "from=-1", "to=-1", "from=x", "stride=0", "top_k=0", "of=both", "normalize=2",
        "format=bmp", "scale=cubic", "height=0", "frames=201", "fps=0", "colour=red", "layer=all&format=png",
        "layer=all&format=npy", "from=100000&format=gif",
        pytest.param(f"from={HUGE}", id="row 39"),
        *[pytest.param(query, id=f"row 138: {query}") for query in ("width=1000000000", "dpi=1000000")],
        *[pytest.param(query, id=f"row 139: {query}") for query in ("frames=0", "fps=1000")],
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
def test_row_137_bad_compression_parameters_are_refused(server: Server, memo: dict[str, Any], query: str) -> None:
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


@pytest.mark.parametrize(
    ("path", "available"),
    [
        *[(path, ["application/json"]) for path in ("/experiments", "/presets", "/limits", "/problems/not-found")],
        *[(path, ["application/json"]) for path in ("/healthz", "/readyz", "/openapi.json")],
        ("/metrics", ["text/plain", "application/openmetrics-text"]),
        ("/docs", ["text/html"]),
        ("/docs/start.js", ["text/javascript", "text/css"]),
        ("/experiments/none/weights", ["application/octet-stream"]),
        ("/", ["application/json", "text/html"]),
    ],
)
def test_row_35_what_a_path_has_is_not_acceptable_to_all(server: Server, path: str, available: list[str]) -> None:
    answer = server.client.get(path, headers={"accept": "application/xml"})
    assert problem(answer, 406, "not-acceptable")["available"] == available


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
def test_row_30_other_hosts_are_not_ours(server: Server, host: str) -> None:
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
