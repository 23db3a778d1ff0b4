"""API keys: who may call, and who owns what. The rate limit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.access import PUBLIC, RateLimit, fingerprint, is_open, owner_of
from service.errors import RateLimited, Unauthorized
from service.settings import Settings
from tests.conftest import Server, start_server, stop_server
from tests.test_bad_inputs import problem
from tests.test_openapi import OPERATIONS
from tests.uploads.builders import saved


def make_key(name: str) -> dict[str, str]:
    command = [sys.executable, "-m", "service.cli", "key", name, "--json"]
    made: dict[str, str] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return made


@dataclass(frozen=True)
class Guarded:
    """A server with two keys, and a client for each."""

    server: Server
    alice: httpx.Client
    bob: httpx.Client
    key: str


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    keys = {name: make_key(name) for name in ("alice", "bob")}
    entries = ", ".join(key["entry"] for key in keys.values())
    running = start_server(tmp_path_factory.mktemp("keys") / "data", RANKSCOPE_API_KEYS=entries)
    alice, bob = (
        httpx.Client(
            base_url=running.client.base_url, timeout=60, headers={"authorization": f"Bearer {keys[name]['key']}"}
        )
        for name in ("alice", "bob")
    )
    with alice, bob:
        yield Guarded(running, alice, bob, keys["alice"]["key"])
    assert stop_server(running) == 0
    assert "Traceback" not in running.log.read_text()
    assert keys["alice"]["key"] not in running.log.read_text()


@pytest.mark.parametrize("path", ["/experiments", "/analyses", "/presets", "/limits", "/nothing", "/experiments/none"])
def test_without_a_key_nothing_is_told(guarded: Guarded, path: str) -> None:
    client = guarded.server.client
    answer = client.get(path)
    problem(answer, 401, "unauthorized")
    assert answer.headers["www-authenticate"] == 'Bearer realm="rankscope"'
    for header in (f"Bearer {guarded.key}x", f"Basic {guarded.key}", guarded.key, "Bearer", ""):
        refused = client.get(path, headers={"authorization": header})
        problem(refused, 401, "unauthorized")
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]
    problem(client.post("/experiments", content=b"not even JSON"), 401, "unauthorized")


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/docs", "/openapi.json", "/problems/unauthorized"])
def test_some_pages_are_open_to_all(guarded: Guarded, path: str) -> None:
    assert guarded.server.client.get(path).status_code == 200


def test_the_job_of_one_key_is_not_found_with_another(guarded: Guarded) -> None:
    spec = {"name": "alice's", "training": {"epochs": 1}}
    done = guarded.alice.post("/experiments", json=spec, headers={"prefer": "wait=30"})
    assert done.status_code == 200
    path = done.headers["location"]
    for view in ("", "/spectrum", "/metrics", "/compression", "/weights", "/events", "/deliveries"):
        assert guarded.alice.get(path + view).status_code == 200
        problem(guarded.bob.get(path + view), 404, "not-found")
    problem(guarded.bob.patch(path, json={"name": "bob's"}), 404, "not-found")
    problem(guarded.bob.post(f"{path}/cancel"), 404, "not-found")
    problem(guarded.bob.delete(path), 404, "not-found")
    assert [job["name"] for job in guarded.alice.get("/experiments").json()["data"]] == ["alice's"]
    assert guarded.bob.get("/experiments").json()["data"] == []


def test_an_analysis_its_base_and_its_factors_are_their_owners_alone(guarded: Guarded) -> None:
    content = saved(np.diag([2.0, 1.0, 0.5]))
    mine: dict[str, Any] = guarded.alice.post("/analyze", content=content, headers={"prefer": "wait=30"}).json()
    path = f"/analyses/{mine['id']}"
    made = guarded.alice.post(f"{path}/factors", json={})
    for place in (path, f"{path}/spectrum", f"{path}/compression", f"{path}/factors", made.headers["location"]):
        assert guarded.alice.get(place).status_code == 200
        problem(guarded.bob.get(place), 404, "not-found")
    problem(guarded.bob.post(f"{path}/factors", json={}), 404, "not-found")
    for place in (path, made.headers["location"]):
        problem(guarded.bob.post(f"{place}/cancel"), 404, "not-found")
        problem(guarded.bob.delete(place), 404, "not-found")
    problem(guarded.bob.post(f"/analyze?base={mine['id']}", content=content), 422, "validation-error")
    assert guarded.bob.get("/analyses").json()["data"] == []
    own = guarded.bob.post("/analyze", content=content, headers={"prefer": "wait=30"}).json()
    assert own["status"] == "succeeded"
    problem(guarded.bob.get(f"/analyses/{own['id']}/factors/{made.json()['id']}"), 404, "not-found")


def test_no_operation_finds_what_another_key_has_made(guarded: Guarded) -> None:
    alice, analysis = guarded.alice, {"content": saved(np.diag([2.0, 1.0])), "headers": {"prefer": "wait=30"}}
    ids = {"experiment_id": alice.post("/experiments", json={"training": {"epochs": 1}}).json()["id"]}
    ids["sweep_id"] = alice.post("/sweeps", json={"grid": {"seed": [1, 2]}}).json()["id"]
    ids["analysis_id"] = alice.post("/analyze", **analysis).json()["id"]
    ids["factors_id"] = alice.post(f"/analyses/{ids['analysis_id']}/factors", json={}).json()["id"]
    refused = []
    for method, path, _ in OPERATIONS.values():
        if "_id}" in path:
            answer = guarded.bob.request(method, path.format(**ids), json=None if method == "get" else {})
            problem(answer, 404, "not-found")
            refused.append(path)
    assert len(refused) > 20
    for kind in ("experiments", "sweeps", "analyses"):
        listed = {job["id"] for job in guarded.bob.get(f"/{kind}").json()["data"]}
        assert listed.isdisjoint(ids.values())


def test_a_key_of_two_owners_is_two_keys(guarded: Guarded) -> None:
    headers = {"idempotency-key": "the-same"}
    first, second = (client.post("/experiments", json={}, headers=headers) for client in (guarded.alice, guarded.bob))
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json()["id"] != second.json()["id"]
    for client, answer in ((guarded.alice, first), (guarded.bob, second)):
        client.post(f"{answer.headers['location']}/cancel")


def test_a_server_with_keys_may_leave_loopback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--host=0.0.0.0", "--workers=0", f"--data={tmp_path}/no/"]
    (tmp_path / "no").write_text("a file where the data folder should be")
    environment = {**os.environ, "RANKSCOPE_API_KEYS": f"a:{fingerprint('k')}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 5, done.stderr  # Past the question of the host, it asks for its data.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_keys", "alice"),
        ("api_keys", "alice:abc"),
        ("api_keys", f"a:{'0' * 64},a:{'1' * 64}"),
        ("rate_limit", "often"),
        ("rate_limit", "0/minute"),
        ("devices", "gpu"),
        ("devices", " , "),
        ("worker_metrics", "127.0.0.1:65536"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=name):
        Settings(**{name: value})


def test_lists_take_spaces() -> None:
    settings = Settings(devices="cpu, cuda:0", hosts="A.example, b.example")
    assert settings.device_names == ["cpu", "cuda:0"]
    assert settings.host_names == {"a.example", "b.example"}


def test_a_bad_name_for_a_key_is_refused() -> None:
    command = [sys.executable, "-m", "service.cli", "key", "Alice, Bob"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 2


def test_an_owner_is_found_by_the_key_alone() -> None:
    assert owner_of(None, {}) == owner_of("Bearer x", {}) == PUBLIC
    keys = {"a": fingerprint("ka"), "b": fingerprint("kb")}
    assert owner_of("Bearer kb", keys) == "b"
    assert owner_of("bearer  ka ", keys) == "a"
    for header in (None, "", "Bearer", "Bearer kc", "Basic ka", fingerprint("ka"), f"Bearer {fingerprint('ka')}"):
        with pytest.raises(Unauthorized):
            owner_of(header, keys)


def test_only_whole_paths_are_open() -> None:
    assert is_open("/docs/start.js")
    assert not any(is_open(path) for path in ("/docsx", "/healthz/", "/experiments", "//", "/problems"))


def test_each_caller_is_counted_alone_and_told_when_to_come_back() -> None:
    limit = RateLimit("2/hour")
    for caller in ("a", "b"):
        limit.count(caller)
        limit.count(caller)
        with pytest.raises(RateLimited) as caught:
            limit.count(caller)
        assert 3500 < int(caught.value.extra["headers"]["retry-after"]) <= 3600
    for _ in range(1000):
        RateLimit("").count("a")


def test_too_many_requests_are_refused_but_health_is_not(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_RATE_LIMIT="3/day")
    assert [server.client.get("/experiments").status_code for _ in range(3)] == [200] * 3
    answer = server.client.post("/experiments", json={})
    assert problem(answer, 429, "rate-limited")["limit"] == "3 per 1 day"
    assert int(answer.headers["retry-after"]) > 0
    assert server.client.get("/healthz").status_code == 200
    other = {"x-forwarded-for": "203.0.113.7"}  # Nobody gets another address by naming one.
    assert server.client.get("/experiments", headers=other).status_code == 429
    assert stop_server(server) == 0


def test_a_proxy_that_is_known_names_the_caller(tmp_path: Path) -> None:
    limits = {"RANKSCOPE_RATE_LIMIT": "1/day", "RANKSCOPE_PROXIES": "127.0.0.1"}
    server = start_server(tmp_path / "data", workers=0, **limits)
    callers = [{"x-forwarded-for": f"203.0.113.{number}"} for number in (7, 8, 7)]
    assert [server.client.get("/experiments", headers=one).status_code for one in callers] == [200, 200, 429]
    assert stop_server(server) == 0
