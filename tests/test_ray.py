"""Jobs on a Ray cluster: real nodes as processes of this machine, a real PostgreSQL, jobs posted to a real server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save

from service import files
from service.settings import Settings
from tests import ray_cluster
from tests.conftest import Server, free_port, start_server, stop_server, wait_for
from tests.postgres import Postgres
from tests.ray_cluster import Cluster, Node

pytestmark = [pytest.mark.soak, pytest.mark.skipif(not ray_cluster.installed(), reason=ray_cluster.MISSING)]

SHORT = {"device": "cpu", "training": {"epochs": 20}}
LONG = {"device": "cpu", "training": {"epochs": 100_000}, "record": {"every": 1000}}
RAY = {"RANKSCOPE_ENGINE": "ray", "RANKSCOPE_DEVICES": "cpu,cuda:0"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes, each with one CPU and a GPU that is not there."""
    with ray_cluster.cluster() as running:
        for _ in range(2):
            running.add_node(gpus=1)
        yield running


@pytest.fixture(scope="module")
def ray_server(cluster: Cluster, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose worker is the cluster's dispatcher."""
    where = {"RANKSCOPE_DATABASE_URL": postgres.new_database(), "RANKSCOPE_RAY_ADDRESS": cluster.address}
    running = start_server(tmp_path_factory.mktemp("ray") / "data", **where, **RAY)
    yield running
    assert stop_server(running) == 0, running.log.read_text()
    assert "Traceback" not in running.log.read_text()


def recorded(server: Server, job_id: str) -> tuple[Any, Any, bytes]:
    """All that an experiment has recorded of its epochs, and its trained weights."""
    spectra = server.client.get(f"/experiments/{job_id}/spectrum", params={"layer": "all"})
    metrics = server.client.get(f"/experiments/{job_id}/metrics")
    weights = server.client.get(f"/experiments/{job_id}/weights", params={"at": "final"})
    assert {spectra.status_code, metrics.status_code, weights.status_code} == {200}
    return spectra.json()["epochs"], metrics.json()["epochs"], weights.content


def start_long(server: Server, cluster: Cluster, epochs: int = 300) -> tuple[str, Node, psutil.Process]:
    """Post an experiment; the answer has its id, the node that runs it and its process there."""

    def busy() -> list[tuple[Node, psutil.Process]]:
        return [(node, process) for node in cluster.nodes for process in node.job_processes()]

    wait_for(lambda: not busy(), "the job before to be gone")
    posted = server.post({**LONG, "training": {"epochs": epochs}})
    return posted["id"], *wait_for(busy, "the job's process")[0]


def test_results_are_those_of_the_local_engine_to_the_last_bit(ray_server: Server, server: Server) -> None:
    there, here = ray_server.post(SHORT), server.run(SHORT)
    assert ray_server.wait(there["id"])["status"] == "succeeded"
    assert recorded(ray_server, there["id"]) == recorded(server, here["id"])


def test_a_third_job_for_a_gpu_waits_for_the_second_gpu(ray_server: Server) -> None:
    # The GPUs are not there, which each job finds out and says: it has held its place until then.
    waiting = [ray_server.post({"device": "cuda"}) for _ in range(3)]
    over = [ray_server.wait(job["id"]) for job in waiting]
    assert {state["error"]["type"] for state in over} == {"device-unavailable"}
    assert over[2]["started_at"] >= min(over[0]["finished_at"], over[1]["finished_at"])


def test_a_job_that_is_canceled_stops_and_its_node_takes_the_next(ray_server: Server, cluster: Cluster) -> None:
    job, _, process = start_long(ray_server, cluster, epochs=100_000)
    ray_server.client.post(f"/experiments/{job}/cancel")
    assert ray_server.wait(job)["status"] == "canceled"
    wait_for(lambda: not process.is_running(), "the job's process to end")
    assert ray_server.run(SHORT)["status"] == "succeeded"


def test_a_killed_process_is_tried_again(ray_server: Server, cluster: Cluster) -> None:
    job, _, process = start_long(ray_server, cluster)
    process.kill()
    state = ray_server.wait(job)
    assert (state["status"], state["attempt"]) == ("succeeded", 2)


def test_a_job_outlives_its_node(ray_server: Server, cluster: Cluster) -> None:
    job, node, _ = start_long(ray_server, cluster)
    cluster.replace(node)
    state = ray_server.wait(job)
    assert (state["status"], state["attempt"]) == ("succeeded", 2)


def test_a_node_says_what_keeps_it_from_running_jobs(tmp_path: Path) -> None:
    find_fault = pytest.importorskip("worker.ray_engine").find_fault
    nowhere = f"postgresql://postgres@127.0.0.1:{free_port()}/none"
    settings = Settings(data=tmp_path, database_url=nowhere)
    assert "RANKSCOPE_DATABASE_URL" in (find_fault(settings, files.mark(tmp_path)) or "")
    assert "mount the one that all share" in (find_fault(settings, "another folder's mark") or "")
    away = Settings(data=tmp_path / "away", database_url=nowhere)
    assert "cannot use the data folder" in (find_fault(away, files.mark(tmp_path)) or "")


def test_a_head_that_cannot_be_reached_is_one_line_and_exit_code_3(tmp_path: Path, postgres: Postgres) -> None:
    environment = {
        **os.environ,
        **RAY,
        "RANKSCOPE_DATABASE_URL": postgres.new_database(),
        "RANKSCOPE_RAY_ADDRESS": f"127.0.0.1:{free_port()}",
    }
    command = [sys.executable, "-m", "service.cli", "work", f"--data={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 3
    assert "cannot reach Ray's head" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_large_analysis_is_shared_out_and_finds_what_one_process_finds(
    cluster: Cluster, postgres: Postgres, tmp_path: Path, server: Server
) -> None:
    rng = np.random.default_rng(0)
    content = save({f"{i}": torch.from_numpy(rng.standard_normal((3300, 3300)).astype(np.float32)) for i in range(3)})
    where = {"RANKSCOPE_DATABASE_URL": postgres.new_database(), "RANKSCOPE_RAY_ADDRESS": cluster.address}
    without_gpu = start_server(tmp_path / "data", **where, **{**RAY, "RANKSCOPE_DEVICES": "cpu"})
    there, here = (running.analyze(content) for running in (without_gpu, server))
    assert stop_server(without_gpu) == 0
    assert "the analysis is shared by 2 tasks" in without_gpu.log.read_text()
    assert there["progress"]["done"] == there["progress"]["total"]
    assert [one["singular_values"] for one in there["tensors"]] == [one["singular_values"] for one in here["tensors"]]
