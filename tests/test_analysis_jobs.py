"""Analyses as jobs: waiting, reuse of what is known, cancel and delete."""

import sqlite3

import numpy as np
import torch
from safetensors.torch import save as save_safetensors

from tests.conftest import Server, wait_for
from tests.test_bad_inputs import problem
from tests.test_uploads import values_of
from tests.uploads.builders import saved


def test_prefer_decides_how_long_an_answer_waits(server: Server) -> None:
    content = saved(np.random.default_rng(0).standard_normal((40, 40)))
    for header, applied in (("respond-async", "respond-async"), ("wait=0", "wait=0")):
        answer = server.client.post("/analyze", content=content, headers={"prefer": header})
        assert (answer.status_code, answer.headers["preference-applied"]) == (202, applied)
        assert answer.headers["retry-after"] == "1"
        path = answer.headers["location"]
        assert path == f"/analyses/{answer.json()['id']}"
        wait_for(lambda path=path: server.client.get(path).json()["status"] == "succeeded", "the analysis")
    answer = server.client.post("/analyze", content=content, headers={"prefer": "wait=99"})
    assert (answer.status_code, answer.headers["preference-applied"]) == (200, "wait=30")


def test_the_same_bytes_are_decomposed_once_unless_asked_otherwise(server: Server) -> None:
    content = saved(np.random.default_rng(9).standard_normal((30, 20)))
    first = server.analyze(content)
    with sqlite3.connect(server.data / "rankscope.sqlite3") as database:
        database.execute("UPDATE tensors SET notes = '[\"taken over\"]' WHERE job_id = ?", (first["id"],))
    database.close()
    second, third = server.analyze(content), server.analyze(content, reuse=False)
    assert [state["tensors"][0]["notes"] for state in (second, third)] == [["taken over"], []]
    assert len({state["id"] for state in (first, second, third)}) == 3
    for state in (first, second, third):
        assert state["progress"] == {"done": 1, "total": 1}
        assert values_of(state).tolist() == values_of(first).tolist()
    unread = server.client.post("/analyze?matricize=none", content=saved(np.ones((3, 2, 2))))
    problem(unread, 422, "unsupported-shape")


def test_the_tag_of_a_running_analysis_changes_with_what_it_has_found(server: Server) -> None:
    rng = np.random.default_rng(4)
    content = save_safetensors({f"{i}": torch.from_numpy(rng.standard_normal((800, 800))) for i in range(4)})
    path = server.client.post("/analyze?top_k=1", content=content, headers={"prefer": "wait=0"}).headers["location"]
    seen: dict[str, int] = {}

    def over() -> bool:
        answer = server.client.get(path, params={"top_k": 1})
        found = answer.json()["totals"]["analysed"]
        assert seen.setdefault(answer.headers["etag"], found) == found
        return bool(answer.json()["status"] == "succeeded")

    wait_for(over, "the analysis")
    assert max(seen.values()) == 4


def test_an_analysis_can_be_canceled_deleted_and_leaves_no_file(server: Server) -> None:
    content = saved(np.random.default_rng(3).standard_normal((3000, 3000)))
    answer = server.client.post("/analyze", content=content, headers={"prefer": "wait=0"})
    path = answer.headers["location"]
    wait_for(lambda: server.client.get(path).json()["status"] == "running", "the analysis to run")
    problem(server.client.get(f"{path}/spectrum"), 409, "spectrum-not-ready")
    problem(server.client.delete(path), 409, "invalid-state")
    assert server.client.post(f"{path}/cancel").status_code == 202
    wait_for(lambda: server.client.get(path).json()["status"] == "canceled", "the cancel")
    problem(server.client.get(f"{path}/spectrum"), 409, "invalid-state")
    assert server.client.delete(path).status_code == 204
    problem(server.client.get(path), 404, "not-found")
    assert not (server.data / "uploads" / path.split("/")[-1]).exists()
