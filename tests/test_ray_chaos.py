"""Nodes, dispatchers and heads of a Ray cluster that die at random while two dozen jobs run: each is done once."""

import io
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import ray_cluster
from tests.conftest import Server, start_server, stop_server, wait_for
from tests.postgres import Postgres
from tests.ray_cluster import Cluster
from tests.test_ray import recorded

SEEDS = range(4)
FAULTS = ("node", "dispatcher", "process", "head") * 2
PAUSE_S = (5.0, 12.0)
LIMIT_S = 480.0


def spec(seed: int) -> dict[str, object]:
    """An experiment of some seconds."""
    return {"seed": seed, "training": {"epochs": 4000}, "record": {"every": 500}}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Two nodes of one CPU each."""
    with ray_cluster.cluster() as running:
        for _ in range(2):
            running.add_node()
        yield running


@pytest.fixture
def ray_server(cluster: Cluster, postgres: Postgres, tmp_path: Path) -> Iterator[Server]:
    """A server with two dispatchers, for which no number of lost attempts is too many."""
    environment = {
        "RANKSCOPE_ENGINE": "ray",
        "RANKSCOPE_RAY_ADDRESS": cluster.address,
        "RANKSCOPE_DATABASE_URL": postgres.new_database(),
        "RANKSCOPE_MAX_ATTEMPTS": "100",
    }
    running = start_server(tmp_path / "data", workers=2, **environment)
    yield running
    stop_server(running)


def strike(fault: str, server: Server, cluster: Cluster, choose: random.Random) -> None:
    """Kill one of a kind; nodes and head are replaced, as what restarts machines would do."""
    match fault:
        case "node":
            cluster.replace(choose.choice(cluster.nodes))
        case "dispatcher":
            choose.choice(wait_for(server.workers, "a dispatcher")).kill()
        case "process":
            running = wait_for(lambda: [p for node in cluster.nodes for p in node.job_processes()], "a job", LIMIT_S)
            choose.choice(running).kill()
        case "head":
            cluster.head.kill()
            for node in list(cluster.nodes):
                node.process.wait(120)  # It leaves by itself, as its setting says.
            cluster.start_head()
            for node in list(cluster.nodes):
                cluster.replace(node)


@pytest.mark.soak
@pytest.mark.skipif(not ray_cluster.installed(), reason=ray_cluster.MISSING)
def test_whatever_dies_every_job_is_done_once_and_to_the_last_bit(
    ray_server: Server, cluster: Cluster, server: Server
) -> None:
    np.save(file := io.BytesIO(), np.random.default_rng(0).standard_normal((300, 200)))
    expected = {seed: recorded(server, server.run(spec(seed))["id"]) for seed in SEEDS}
    analysis = server.analyze(file.getvalue())
    jobs = [(seed, ray_server.post(spec(seed))["id"]) for _ in range(4) for seed in SEEDS]
    query = {"reuse": "false"}
    headers = {"prefer": "respond-async"}
    posted = [
        ray_server.client.post("/analyze", content=file.getvalue(), params=query, headers=headers) for _ in range(4)
    ]
    assert {answer.status_code for answer in posted} == {202}
    choose = random.Random(0)  # noqa: S311
    for seed, fault in zip(itertools.cycle(SEEDS), choose.sample(FAULTS, len(FAULTS)), strict=False):
        time.sleep(choose.uniform(*PAUSE_S))
        jobs.append((seed, ray_server.post(spec(seed))["id"]))  # However fast the machine, there is a job to hit.
        strike(fault, ray_server, cluster, choose)
    states = [wait_for(lambda j=job: over(ray_server, f"/experiments/{j}"), job, LIMIT_S) for _, job in jobs]
    assert {state["status"] for state in states} == {"succeeded"}
    assert sum(state["attempt"] for state in states) > len(states)  # The faults did hit jobs.
    assert all(recorded(ray_server, job) == expected[seed] for seed, job in jobs)
    reports = [wait_for(lambda a=a: over(ray_server, a.headers["location"]), "an analysis", LIMIT_S) for a in posted]
    assert all(report["tensors"] == analysis["tensors"] for report in reports)


def over(server: Server, path: str) -> dict[str, object] | None:
    """The job once it is over."""
    state = server.client.get(path).json()
    return state if state["status"] in {"succeeded", "failed", "canceled"} else None
