"""The command line, as a person or a script uses it."""

import contextlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from starlette.responses import HTMLResponse
from typer.testing import CliRunner, Result

from service.access import fingerprint
from service.cli import app
from service.client import Client
from service.commands import find
from service.console import interruptible
from service.views import Analysis
from tests.conftest import Server, free_port, serving, start_server, stop_server
from tests.test_processes import LONG
from tests.test_sweeps import SMALL


def rankscope(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def run(*arguments: str, **options: Any) -> Result:
    """The same in this process, which has loaded everything already; an unexpected error is raised."""
    result = CliRunner().invoke(app, arguments, **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model [v1].safetensors"
    rng = np.random.default_rng(0)
    low = torch.from_numpy((rng.standard_normal((60, 3)) @ rng.standard_normal((3, 50))).astype(np.float32))
    save_file({"[bold]fc": low, "head": torch.randn(20, 20), "head.bias": torch.zeros(20)}, path)
    return path


@pytest.fixture(scope="module")
def no_stream_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose only stream is taken, by a job that trains beside others."""
    data = tmp_path_factory.mktemp("taken") / "data"
    running = start_server(data, RANKSCOPE_STREAM_LIMIT="1", RANKSCOPE_JOBS="2")
    with running.client.stream("GET", f"/experiments/{running.post(LONG)['id']}/events"):
        yield running
    stop_server(running)


def test_analyze_prints_a_table_of_layers(server: Server, model: Path) -> None:
    url = str(server.client.base_url)
    done = rankscope("analyze", str(model), "--rule", "energy", "--threshold", "0.95", "--server", url)
    assert done.returncode == 0, done.stderr
    assert "[bold]fc" in done.stdout
    assert "compress" in done.stdout
    assert "skipped head.bias" in done.stdout
    assert "% kept" in done.stdout
    table = rankscope("analyze", str(model), "--rule", "all", "--server", url)
    assert "entropy_rank" in table.stdout


def test_analyze_prints_json_for_scripts(server: Server, model: Path) -> None:
    url = str(server.client.base_url)
    done = rankscope("analyze", str(model), "--rule", "global_budget", "--fraction", "0.6", "--json", "--server", url)
    report = json.loads(done.stdout)
    assert report["analysis"]["name"] == model.name
    assert report["compression"]["rule"] == "global_budget"
    ranks = {layer["layer"]: layer["rank"] for layer in report["compression"]["layers"]}
    assert ranks["[bold]fc"] >= 3


def test_analyze_tells_by_its_exit_code_what_went_wrong(server: Server, model: Path, tmp_path: Path) -> None:
    url, nan, text = str(server.client.base_url), tmp_path / "nan.npy", tmp_path / "text.npy"
    np.save(nan, np.full((2, 2), np.nan))
    text.write_text("these are no weights, they are words")
    for arguments, code, words in (
        ((str(nan), "--server", url), 1, "not finite"),
        ((str(tmp_path / "none.npy"),), 2, "does not exist"),
        ((str(model), "--server", f"http://127.0.0.1:{free_port()}"), 3, "no server"),
        ((str(text), "--server", url), 4, "formats"),
        ((str(model), "--rule", "best", "--server", url), 4, "rule"),
    ):
        done = rankscope("analyze", *arguments)
        assert done.returncode == code, done.stderr
        assert words in " ".join(done.stderr.replace("│", " ").split())  # A usage error is in a box, and folded.
        assert "Traceback" not in done.stderr


def test_a_specification_is_submitted_followed_listed_shown_and_drawn(server: Server, tmp_path: Path) -> None:
    at = ("--server", str(server.client.base_url))
    spec = tmp_path / "spec.json"
    spec.write_text('{"name": "[bold]by hand", "tags": {"cli": "yes"}, "training": {"epochs": 3}}')
    followed = run("submit", str(spec), "--follow", *at)
    assert followed.exit_code == 0, followed.stderr
    assert "entropy rank of W2" in followed.stderr
    job_id, status = followed.stdout.split()
    assert status == "succeeded"
    assert "[bold]by hand" in run("ls", "--tag", "cli:yes", *at).stdout
    shown = run("show", job_id, *at).stdout
    assert job_id in shown
    assert "3 of 3" in shown
    drawn = run("spectrum", job_id, "-o", str(tmp_path / "x.gif"), *at)
    assert drawn.exit_code == 0, drawn.stderr
    assert (tmp_path / "x.gif").read_bytes().startswith(b"GIF8")


def test_a_sweep_is_submitted_followed_listed_shown_and_drawn(server: Server, tmp_path: Path) -> None:
    at, out = ("--server", str(server.client.base_url)), tmp_path / "x.gif"
    spec = json.dumps({"base": {**SMALL, "tags": {"swept": "by hand"}}, "grid": {"seed": {"range": [0, 3]}}})
    followed = run("submit", "-", "--follow", *at, input=spec)
    assert followed.exit_code == 0, followed.stderr
    sweep_id, status = followed.stdout.split()
    assert status == "succeeded"
    assert sweep_id in run("ls", "--kind", "sweep", "--tag", "swept", *at).stdout
    shown = " ".join(run("show", sweep_id, *at).stdout.split())
    assert "18 of 18" in shown
    assert '{"succeeded":3}' in shown
    assert run("spectrum", sweep_id, "-o", str(out), *at).exit_code == 0
    assert out.read_bytes().startswith(b"GIF8")
    refused = run("spectrum", sweep_id, "-o", str(tmp_path / "x.npy"), *at)
    assert (refused.exit_code, "one of its members" in " ".join(refused.stderr.split())) == (2, True)
    lines = run("submit", "-", "--follow", "--json", *at, input=spec).stdout.splitlines()
    *progress, job = map(json.loads, lines)
    assert progress[-1] == {"done": 18, "total": 18}
    assert len(job["members"]) == 3
    assert json.loads(run("cancel", sweep_id, "--json", *at).stdout)["status"] == "succeeded"


def test_every_command_has_json_for_scripts(server: Server, tmp_path: Path) -> None:
    at = ("--json", "--server", str(server.client.base_url))
    spec = '{"tags": {"json": "yes"}, "training": {"epochs": 2}}'
    lines = run("submit", "-", "--follow", *at, input=spec).stdout.splitlines()
    epochs = [json.loads(line) for line in lines[:-1]]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2]
    assert [layer["name"] for layer in epochs[-1]["layers"]] == ["W1", "W2", "W3"]
    job = json.loads(lines[-1])
    assert [one["id"] for one in json.loads(run("ls", "--tag=json", *at).stdout)] == [job["id"]]
    assert json.loads(run("show", job["id"], *at).stdout) == job
    assert json.loads(run("cancel", job["id"], *at).stdout)["status"] == "succeeded"
    out = tmp_path / "x.npy"
    written = json.loads(run("spectrum", job["id"], "-o", str(out), *at).stdout)
    assert written == {"file": str(out), "format": "npy", "bytes": out.stat().st_size}


def test_commands_tell_by_their_exit_code_what_went_wrong(server: Server, tmp_path: Path) -> None:
    url, nobody = str(server.client.base_url), f"http://127.0.0.1:{free_port()}"
    diverging = (
        '{"training": {"lr": 1e300, "epochs": 9}, "network": {"activation": "relu"}, "data": {"target": "relu"}}'
    )
    for arguments, text, code, words in (
        (("submit", "-", "--wait", "--server", url), diverging, 1, "(diverged)"),
        (("submit", "-", "--server", url), "{no json", 2, "not JSON"),
        (("submit", "-", "--server", "localhost:8000"), "{}", 2, "http://host:port"),
        (("spectrum", "x", "-o", "x.jpg", "--server", url), "", 2, "gif"),
        (("ls", "--server", "http://[::1"), "", 2, "no server"),
        (("ls", "--server", url, "--key", "a\nb"), "", 2, "visible ASCII"),
        (("ls", "--server", url, "--key", "clé"), "", 2, "visible ASCII"),
        (("ls", "--server", url, "--tag", "\udcff"), "", 2, "surrogates"),
        (("show", ".", "--server", url), "", 2, "no id"),
        (("cancel", "..", "--server", url), "", 2, "no id"),
        (("spectrum", "", "-o", "x.png", "--server", url), "", 2, "no id"),
        (("ls", "--server", nobody), "", 3, "no server"),
        (("submit", "-", "--server", url), '{"training": {"epochs": 0}}', 4, "/training/epochs"),
        (("submit", "-", "--server", url), '{"base": {}}', 4, "grid"),
        (("show", "nothing", "--server", url), "", 4, "nothing"),
    ):
        done = run(*arguments, input=text)
        assert done.exit_code == code, done.stderr
        assert words in " ".join(done.stderr.split())
        assert "Bearer" not in done.stderr
        assert "clé" not in done.stderr


def test_an_answer_that_cannot_be_read_is_told_in_a_line() -> None:
    with serving(HTMLResponse("<h1>Welcome</h1>")) as url:
        done = run("show", "x", "--server", url)
    assert done.exit_code == 4
    (line,) = done.stderr.splitlines()
    assert "is no Experiment" in line


def test_only_who_asks_for_a_whole_analysis_reads_one(server: Server) -> None:
    url, file = str(server.client.base_url), io.BytesIO()
    np.save(file, np.eye(9))
    whole = server.analyze(file.getvalue())
    assert whole["top_k"] > 1
    with Client(url) as client:
        found = find(client, whole["id"])
    assert isinstance(found, Analysis)
    assert found.top_k == 1
    assert json.loads(run("show", whole["id"], "--json", "--server", url).stdout)["tensors"] == whole["tensors"]


def test_the_key_comes_from_the_command_or_from_the_environment(tmp_path: Path, model: Path) -> None:
    assert "RANKSCOPE_API_KEY" in run("ls", "--help").stdout
    server = start_server(tmp_path / "data", workers=0, RANKSCOPE_API_KEYS=f"alice:{fingerprint('secret')}")
    url = str(server.client.base_url)
    assert run("ls", "--server", url).exit_code == 4
    assert run("ls", "--server", url, "--key", "secret").exit_code == 0
    given = {"RANKSCOPE_API_KEY": "secret", "RANKSCOPE_SERVER": url}
    assert run("submit", "-", input="{}", env=given).stdout.split()[1] == "queued"
    refused = run("analyze", str(model), "--server", url, "--key", "other")
    assert (refused.exit_code, "key" in refused.stderr) == (4, True)
    stop_server(server)


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_job_whose_stream_is_refused_is_named_and_followed_all_the_same(
    no_stream_left: Server, form: list[str]
) -> None:
    spec = json.dumps({"training": {"epochs": 5}})
    followed = run("submit", "-", "--follow", "--server", str(no_stream_left.client.base_url), *form, input=spec)
    assert followed.exit_code == 0, followed.stderr
    first = followed.stderr.split()
    (job, *_) = no_stream_left.client.get("/experiments").json()["data"]
    assert first[:2] == ["experiment", job["id"]]
    assert "Too many event streams" in followed.stderr
    assert job["id"] in followed.stdout.splitlines()[-1]
    assert ('{"done":5,"total":5}' in followed.stdout) == bool(form)


def test_an_interrupt_that_got_lost_still_makes_the_exit_code() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as ended, interruptible(), contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert ended.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.slow
def test_analyze_needs_no_server(model: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    torch.save({"fc": torch.ones(8, 9)}, checkpoint)
    for path, tensors in ((model, 3), (checkpoint, 1)):
        done = rankscope("analyze", str(path), "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["analysis"]["tensors"]) == tensors
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}
