"""What the service says about itself."""

import re

import pytest

from service.problems import BY_SLUG
from service.schemas import PRESETS, resolve
from tests.conftest import Server

OPENMETRICS = "application/openmetrics-text"
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"


def test_the_first_page_is_json_for_programs_and_html_for_browsers(server: Server) -> None:
    links = server.client.get("/").json()["links"]
    for link in links.values():
        assert server.client.get(link).status_code == 200
    page = server.client.get("/", headers={"accept": BROWSER})
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["vary"] == "Accept"
    assert all(f'href="{link}"' in page.text for link in links.values())


def test_every_preset_is_shown_as_it_would_run(server: Server) -> None:
    shown = {one["name"]: one["spec"] for one in server.client.get("/presets").json()["data"]}
    assert shown == {name: resolve({"preset": name}).model_dump() for name in PRESETS}


def test_the_limits_are_those_that_refuse(server: Server) -> None:
    limits = server.client.get("/limits").json()
    assert limits["body_bytes"] == limits["head_bytes"] == 64 * 1024
    assert (limits["parameters"], limits["work"], limits["recorded_values"]) == (5 * 10**7, 10**16, 2 * 10**7)
    epochs = limits["fields"]["training.epochs"]["maximum"]
    refused = server.client.post("/experiments", json={"training": {"epochs": epochs + 1}})
    assert str(epochs) in refused.json()["detail"]
    full = b'{"name": "%s"}' % (b"x" * (limits["body_bytes"] - 12))
    for body, status in ((full, 422), (full + b" ", 413)):
        answer = server.client.post("/experiments", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status


def test_health_and_readiness(server: Server) -> None:
    assert server.client.get("/healthz").json() == {"status": "ok"}
    assert server.client.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize("slug", BY_SLUG)
def test_every_problem_type_has_its_page(server: Server, slug: str) -> None:
    page = server.client.get(f"/problems/{slug}").json()
    assert page == {"type": f"/problems/{slug}", **BY_SLUG[slug]._asdict()}


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "text/plain"),
        ("application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.5", OPENMETRICS),
        ("application/openmetrics-text;version=abc", OPENMETRICS),
        ("text/plain;version=x;escaping=y", "text/plain"),
        ("application/*", OPENMETRICS),
    ],
)
def test_metrics_come_in_the_form_that_is_wanted_most(server: Server, accept: str, media_type: str) -> None:
    answer = server.client.get("/metrics", headers={"accept": accept})
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, media_type)


def test_the_documentation_asks_nobody_else(server: Server) -> None:
    page = server.client.get("/docs")
    parts = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    own = [part for part in parts if not part.startswith("data:")]
    assert len(own) == 3
    for part in own:
        assert part.startswith("/docs/")
        assert server.client.get(part).status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_the_openapi_document_knows_every_body_and_model(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    references = set(re.findall(r'"#/components/schemas/(\w+)"', server.client.get("/openapi.json").text))
    assert references <= set(document["components"]["schemas"])
    body = document["paths"]["/experiments"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ExperimentSpec"}


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2_3", True), ("a b", False), ("x" * 65, False)])
def test_a_sane_request_id_is_kept(server: Server, given: str, kept: bool) -> None:
    answer = server.client.get("/healthz", headers={"x-request-id": given})
    assert (answer.headers["x-request-id"] == given) == kept
