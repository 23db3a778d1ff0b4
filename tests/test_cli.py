"""The command line, as a person or a script uses it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import Server, free_port


def rankscope(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model [v1].safetensors"
    rng = np.random.default_rng(0)
    low = torch.from_numpy((rng.standard_normal((60, 3)) @ rng.standard_normal((3, 50))).astype(np.float32))
    save_file({"[bold]fc": low, "head": torch.randn(20, 20), "head.bias": torch.zeros(20)}, path)
    return path


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
        assert words in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_analyze_needs_no_server(model: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "model.pt"
    torch.save({"fc": torch.ones(8, 9)}, checkpoint)
    for path, tensors in ((model, 3), (checkpoint, 1)):
        done = rankscope("analyze", str(path), "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["analysis"]["tensors"]) == tensors
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt"}
