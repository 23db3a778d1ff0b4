"""Processes that die, are killed or told to stop: a real server, real workers, real signals."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from service import store
from service.settings import Settings
from tests.conftest import Server, command_line, start_server, stop_server, wait_for

LONG = {"training": {"epochs": 100_000}, "record": {"every": 1000}}
FAST = {"RANKSCOPE_HEARTBEAT_S": "0.1", "RANKSCOPE_LEASE_S": "1"}


@pytest.fixture
def own_server(tmp_path: Path):
    """A server that this test alone may hurt."""
    running = start_server(tmp_path / "data", **FAST)
    yield running
    stop_server(running)


def descendants(server: Server) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def job_child(server: Server, experiment_id: str) -> psutil.Process:
    """The process that runs the experiment; the worker's own first child only warms its fork server up."""
    server.wait(experiment_id, "running")
    return wait_for(server.job_children, "a job's process")[0]


def test_f2_a_killed_child_is_tried_again_and_fails_the_third_time(server: Server) -> None:
    posted = server.post(LONG)
    for attempt in (1, 2, 3):
        wait_for(lambda n=attempt: server.read(posted["id"])["attempt"] == n, f"attempt {attempt}")
        child = job_child(server, posted["id"])
        child.kill()
        wait_for(lambda c=child: not c.is_running() or c.status() == psutil.STATUS_ZOMBIE, "its end")
        wait_for(lambda c=child: c.pid not in psutil.pids(), "its burial")
    state = server.wait(posted["id"])
    assert (state["status"], state["error"]["type"]) == ("failed", "worker-crashed")
    assert server.run({"training": {"epochs": 1}})["status"] == "succeeded"  # The worker goes on.


@pytest.mark.slow
def test_a_killed_worker_takes_its_children_along_and_another_does_the_job(own_server: Server) -> None:
    posted = own_server.post({"training": {"epochs": 600}, "record": {"every": 100}})
    child, worker = job_child(own_server, posted["id"]), own_server.workers()[0]
    worker.kill()
    wait_for(lambda: not psutil.pid_exists(child.pid), "the child to follow its worker")
    state = own_server.wait(posted["id"])
    assert (state["status"], state["attempt"]) == ("succeeded", 2)
    document = own_server.client.get(f"/experiments/{posted['id']}/spectrum").json()
    assert [epoch["epoch"] for epoch in document["epochs"]] == list(range(0, 601, 100))


@pytest.mark.slow
def test_sigterm_gives_the_running_job_back_and_the_next_server_finishes_it(tmp_path: Path) -> None:
    first = start_server(tmp_path / "data", **FAST)
    posted = first.post({"training": {"epochs": 600}, "record": {"every": 100}})
    first.wait(posted["id"], "running")
    everyone = psutil.Process(first.process.pid).children(recursive=True)
    assert stop_server(first) == 0
    wait_for(lambda: not any(process.is_running() for process in everyone), "every process to end")
    assert "Traceback" not in first.log.read_text()
    second = start_server(tmp_path / "data", **FAST)
    state = second.wait(posted["id"])
    assert (state["status"], state["attempt"]) == ("succeeded", 2)
    assert stop_server(second) == 0


def test_a_killed_server_leaves_no_process(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data")
    done = server.run({"training": {"epochs": 1}})
    assert server.client.get(f"/experiments/{done['id']}/spectrum?format=png").status_code == 200
    job_child(server, server.post(LONG)["id"])
    everyone = psutil.Process(server.process.pid).children(recursive=True)
    assert len(everyone) >= 4  # the worker, its fork server, the job and the drawing process
    server.process.kill()
    assert stop_server(server) == -signal.SIGKILL
    wait_for(lambda: not any(process.is_running() for process in everyone), "every process to end")


@pytest.mark.slow
def test_sigterm_while_pictures_are_drawn_is_quick_and_told_to_those_who_wait(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data")
    path = f"/experiments/{server.run({'training': {'epochs': 100}})['id']}/spectrum?format=gif&height=2000"
    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(server.client.get, f"{path}&width={1900 + i}") for i in range(6)]
        wait_for(lambda: any("spawn_main" in command_line(p) for p in descendants(server)), "the drawing process")
        server.process.send_signal(signal.SIGTERM)
        done = [answer.result() for answer in answers]
    assert server.process.wait(30) == 0
    for answer in done:
        if answer.status_code != 200:
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/draining")
    assert any(answer.status_code == 503 for answer in done)
    assert "Traceback" not in server.log.read_text()
    assert stop_server(server) == 0


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("RANKSCOPE_JOBS", "0", 2),
        ("RANKSCOPE_DEVICES", "gpu", 2),
        ("RANKSCOPE_ENGINE", "ray", 2),  # It needs PostgreSQL.
        ("RANKSCOPE_RAY_ADDRESS", "head", 2),
        ("RANKSCOPE_HEARTBEAT_S", "9", 2),
        ("RANKSCOPE_DATABASE_URL", "nonsense", 5),
        ("RANKSCOPE_DATA", "/dev/null/data", 5),
    ],
)
def test_a_bad_setting_is_one_line(tmp_path: Path, name: str, value: str, code: int) -> None:
    environment = {**os.environ, "RANKSCOPE_DATA": str(tmp_path), name: value}
    command = [sys.executable, "-m", "service.cli", "migrate"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_migration_tells_the_schema_to_scripts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "migrate", "--json", f"--data={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"schema": store.schema(store.connect(Settings(data=tmp_path)))[1]}


def test_an_engine_that_is_not_installed_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "RANKSCOPE_DATA": str(tmp_path),
        "RANKSCOPE_DATABASE_URL": "postgresql://127.0.0.1:1/none",
        "RANKSCOPE_ENGINE": "ray",
    }
    command = [sys.executable, "-m", "worker"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["RANKSCOPE_ENGINE=ray needs Ray: install rankscope[ray]"]


@pytest.mark.slow
def test_a_job_past_its_limit_fails(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", RANKSCOPE_JOB_LIMIT_S="0.3", **FAST)
    state = server.run(LONG)
    assert (state["status"], state["error"]["type"]) == ("failed", "timed-out")
    stop_server(server)


@pytest.mark.slow
def test_f18_a_device_that_is_offered_but_missing_fails_the_job_in_a_fresh_process(tmp_path: Path) -> None:
    server = start_server(tmp_path / "data", RANKSCOPE_DEVICES="cpu,cuda:99")
    failed = server.run({"device": "cuda:99"})
    assert (failed["status"], failed["error"]["type"]) == ("failed", "device-unavailable")
    assert server.run({"device": "cpu", "training": {"epochs": 1}})["device"] == "cpu"
    assert stop_server(server) == 0


@pytest.mark.parametrize("command", ["serve", "migrate", "work"])
def test_a_damaged_database_is_one_line_and_exit_code_5(tmp_path: Path, command: str) -> None:
    (tmp_path / "rankscope.sqlite3").write_bytes(b"no database" * 1000)
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", command, f"--data={tmp_path}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 5
    assert len(done.stderr.strip().splitlines()) == 1
    assert "not a database" in done.stderr


def test_a_server_without_keys_does_not_leave_loopback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "service.cli", "serve", "--host=0.0.0.0", f"--data={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "RANKSCOPE_OPEN_NETWORK" in done.stderr


def demo_in(folder: Path) -> list[str]:
    return [sys.executable, "-m", "service.cli", "demo", f"--data={folder / 'data'}", f"--out={folder / 'demo'}"]


@pytest.mark.slow
def test_the_demo_leaves_its_files(tmp_path: Path) -> None:
    done = subprocess.run(demo_in(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "entropy rank" in done.stdout
    again = subprocess.run([*demo_in(tmp_path), "--json"], capture_output=True, text=True, check=True)
    start, end = json.loads(again.stdout)["entropy_rank"]
    assert f"{start:.2f}" in done.stdout
    assert f"{end:.2f}" in done.stdout
    left = {path.name for path in (tmp_path / "demo").iterdir()}
    assert {"spectrum.gif", "spectrum.png", "spectrum.json", "compression.json"} <= left


def test_ctrl_c_ends_a_demo_that_a_script_has_put_in_the_background(tmp_path: Path) -> None:
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh"]
    process = subprocess.Popen([*ignoring, *demo_in(tmp_path)], stderr=subprocess.PIPE, start_new_session=True)
    family = psutil.Process(process.pid)
    (serving,) = wait_for(lambda: [p for p in family.children() if "serve" in command_line(p)], "the server's process")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, b"Traceback" in errors) == (130, False)
    wait_for(lambda: not serving.is_running(), "the server to end")


@pytest.mark.slow
def test_ctrl_c_ends_the_demo_and_leaves_no_process(tmp_path: Path) -> None:
    command = demo_in(tmp_path)
    for wanted in (1, 3, 5):  # at moments ever later: as soon as there are so many processes
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        family = psutil.Process(process.pid)
        # Before its exec a child is a copy of its parent, in the parent's group, and would get the signal too.
        wait_for(lambda f=family: any("serve" in command_line(p) for p in f.children()), "the server's process")
        wait_for(lambda f=family, n=wanted: len(f.children(recursive=True)) >= n, f"{wanted} processes", limit_s=30)
        everyone = family.children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert b"Traceback" not in errors
        wait_for(lambda e=everyone: not any(p.is_running() for p in e), "every process to end")
