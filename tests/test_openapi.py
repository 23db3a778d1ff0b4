"""The OpenAPI document is held to the running server, by examples, by its own problems, and by schemathesis."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest

from service.app import create_app
from service.problems import BY_SLUG
from service.settings import Settings
from tests.conftest import Server, start_server, stop_server
from tests.test_bad_inputs import problem
from tests.uploads.builders import saved

DOCUMENT: dict[str, Any] = create_app(Settings()).state.openapi()
OPERATIONS = {
    operation["operationId"]: (method, path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
BODIES = [
    pytest.param(name, example["value"], id=f"{name}: {example['summary']}")
    for name, (_, _, operation) in OPERATIONS.items()
    for media in operation.get("requestBody", {}).get("content", {}).values()
    for example in media.get("examples", {}).values()
]


def answers_as_documented(answer: httpx.Response, operation: dict[str, Any]) -> bool:
    """Whether status and media type, and of a problem its type, are in the document."""
    found = operation["responses"][str(answer.status_code)]
    media = answer.headers.get("content-type", "").partition(";")[0]
    if media == "application/problem+json":
        assert answer.json()["type"].removeprefix("/problems/") in operation["x-problems"]
    return not answer.content or media in found["content"]


def test_operation_ids_are_stable_and_unique() -> None:
    assert len(OPERATIONS) == sum(len(methods) for methods in DOCUMENT["paths"].values())
    expected = {"experiments_create", "experiments_cancel", "analyses_analyze", "factors_create", "spectrum_spectrum"}
    assert expected <= OPERATIONS.keys()


def test_every_problem_has_an_operation_and_every_operation_its_problems() -> None:
    named = {slug for _, _, operation in OPERATIONS.values() for slug in operation["x-problems"]}
    # A path that no operation has is not found, and takes no method: 405 is of no operation.
    assert named == BY_SLUG.keys() - {"method-not-allowed"}
    for _, _, operation in OPERATIONS.values():
        shown = [
            slug
            for response in operation["responses"].values()
            for slug in response.get("content", {}).get("application/problem+json", {}).get("examples", {})
        ]
        assert set(shown) == set(operation["x-problems"])


def test_no_operation_leaves_anything_open() -> None:
    for name, (method, _, operation) in OPERATIONS.items():
        assert "default" not in operation["responses"], name
        assert operation["summary"], name
        assert operation["description"], name
        parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
        assert (method == "post") == ("Idempotency-Key" in parameters), name


@pytest.mark.parametrize(("name", "body"), BODIES)
def test_every_example_of_a_request_is_taken(server: Server, name: str, body: dict[str, Any]) -> None:
    method, path, operation = OPERATIONS[name]
    ids = {"{analysis_id}": "", "{experiment_id}": ""}
    if "{analysis_id}" in path:
        ids["{analysis_id}"] = server.analyze(saved(np.diag(np.arange(1.0, 13.0))))["id"]
    if "{experiment_id}" in path:
        ids["{experiment_id}"] = server.post({"training": {"epochs": 1}})["id"]
    filled = re.sub(r"{\w+}", lambda found: ids[found[0]], path)
    answer = server.client.request(method, filled, json=body)
    assert answer.is_success, answer.text
    assert answers_as_documented(answer, operation)


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_wrong_anywhere_is_answered_as_documented(server: Server, name: str) -> None:
    method, path, operation = OPERATIONS[name]
    filled = re.sub(r"{\w+}", "none", path)
    for headers in ({}, {"host": "evil.example"}, {"accept": "application/xml"}, {"content-encoding": "gzip"}):
        answer = server.client.request(method, filled, headers=headers, content=b"{" if method != "get" else None)
        assert answers_as_documented(answer, operation)
    stray = server.client.request(method, f"{filled}?no_such_parameter=1")
    assert answers_as_documented(stray, operation)
    assert problem(stray, 422, "validation-error")["errors"][0]["parameter"] == "no_such_parameter"


def test_head_is_answered_like_get_without_a_body(server: Server, memo: dict[str, Any]) -> None:
    for method, path, _ in OPERATIONS.values():
        if method == "get":
            filled = path.replace("{experiment_id}", memo["id"]).replace("{slug}", "not-found")
            get, head = server.client.get(filled), server.client.head(filled)
            assert (head.status_code, head.content) == (get.status_code, b"")
            assert head.headers["content-type"] == get.headers["content-type"]


def test_the_command_prints_the_document(server: Server) -> None:
    done = subprocess.run([sys.executable, "-m", "service.cli", "openapi"], capture_output=True, check=True)
    assert orjson.loads(done.stdout) == server.client.get("/openapi.json").json()


def schemathesis(server: Server, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "schemathesis"
    command = [str(program), "run", f"{server.client.base_url}/openapi.json", "--checks", ",".join(CHECKS)]
    command += ["--warnings", "off", "--no-color", "--continue-on-failure", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


def test_schemathesis_finds_nothing_that_is_not_documented(tmp_path: Path) -> None:
    running = start_server(tmp_path / "data", RANKSCOPE_QUEUE_LIMIT="1000000")
    running.post({"training": {"epochs": 1}})
    phases = ("--phases", "examples,coverage,fuzzing", "--max-examples", "3", "--max-time", "25", "--seed", "1")
    done = schemathesis(running, tmp_path, *phases)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()


@pytest.mark.soak
@pytest.mark.parametrize(("phases", "n_examples"), [("examples,coverage,fuzzing", "30"), ("stateful", "50")])
def test_schemathesis_finds_nothing_in_all_phases(tmp_path: Path, phases: str, n_examples: str) -> None:
    # Apart, so that a slow machine does not spend the time of the last phase on the one before.
    running = start_server(tmp_path / "data", RANKSCOPE_QUEUE_LIMIT="1000000")
    bounds = ("--max-examples", n_examples, "--max-time", "400")
    done = schemathesis(running, tmp_path, "--phases", phases, *bounds)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"Selected: {len(OPERATIONS)}/{len(OPERATIONS)}" in done.stdout
    for phase in phases.split(","):
        assert f"✅ {phase.capitalize()}\n" in done.stdout
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()
