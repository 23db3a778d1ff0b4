"""The example service, as a process of its own, calls a real server and takes signed webhooks."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from standardwebhooks import Webhook

from tests.conftest import Server, free_port, wait_for

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 - of this test alone


@pytest.fixture(scope="module")
def example(server: Server) -> Iterator[httpx.Client]:
    """The example on a port."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    given = {"STUDY_SERVER": str(server.client.base_url), "STUDY_WEBHOOK_SECRET": SECRET}
    command = [sys.executable, "-m", "uvicorn", "--factory", "examples.decay_study:create_app", f"--port={port}"]
    process = subprocess.Popen(command, env={**os.environ, **given}, stderr=subprocess.PIPE, text=True)
    with httpx.Client(base_url=url, timeout=60) as client:

        def listens() -> bool:
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                return client.get("/openapi.json").is_success
            except httpx.TransportError:
                return False

        wait_for(listens, "the example to answer")
        yield client
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors


def signed(event: dict[str, Any], secret: str = SECRET, age: timedelta = timedelta()) -> dict[str, Any]:
    """A delivery as rankscope sends it."""
    body, moment = json.dumps(event), datetime.now(tz=UTC) - age
    signature = Webhook(secret).sign("msg_1", moment, body)
    stamp = str(int(moment.timestamp()))
    return {
        "content": body,
        "headers": {"webhook-id": "msg_1", "webhook-timestamp": stamp, "webhook-signature": signature},
    }


def test_a_study_by_another_service(example: httpx.Client) -> None:
    study = {"name": "decay", "weight_decays": [0.02, 0], "epochs": 30}
    started = example.post("/studies", json=study)
    assert started.status_code == 202, started.text
    assert example.post("/studies", json=study).json() == started.json()  # The same experiments.

    def rows() -> list[dict[str, Any]] | None:
        found = example.get("/studies/decay").json()
        return found if all(row["rank_that_suffices"] for row in found) else None

    without, with_decay = wait_for(rows, "the study's numbers")
    assert {without["experiment"], with_decay["experiment"]} == set(started.json())
    assert (without["weight_decay"], with_decay["weight_decay"]) == (0, 0.02)
    assert with_decay["entropy_rank"] < without["entropy_rank"]


def test_a_refusal_of_rankscope_is_told(example: httpx.Client, server: Server) -> None:
    study = {"name": "again", "weight_decays": [0.5], "epochs": 1}
    example.post("/studies", json=study)
    refused = example.post("/studies", json={**study, "epochs": 2})
    assert refused.status_code == 502
    assert "key" in refused.json()["detail"]


def test_a_webhook_is_believed_by_its_signature_alone(example: httpx.Client, server: Server) -> None:
    job = server.run({"tags": {"study": "hooked"}, "training": {"epochs": 2}})
    event = {"type": "experiment.succeeded", "timestamp": job["finished_at"], "data": {"id": job["id"]}}
    forged = signed(event, "whsec_" + "A" * 32)
    late = signed(event, age=timedelta(hours=1))
    unsigned = {"content": json.dumps(event)}
    changed = {**signed(event), "content": json.dumps({**event, "more": 1})}
    for delivery in (forged, late, unsigned, changed):
        assert example.post("/hooks/rankscope", **delivery).status_code == 401
    assert example.get("/studies/hooked").json()[0]["entropy_rank"] is None
    for _ in range(2):  # It may come twice.
        assert example.post("/hooks/rankscope", **signed(event)).status_code == 204
    assert example.get("/studies/hooked").json()[0]["entropy_rank"] > 1
    gone = signed({**event, "data": {"id": "deleted-meanwhile"}})
    assert example.post("/hooks/rankscope", **gone).status_code == 204
