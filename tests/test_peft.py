"""Adapters as PEFT reads them: the update of every module is the B·A that the manifest promises."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from tests.worker.test_factor_files import Weights, plan, source_of, write, zeros

RANKS = {
    "fc": 1,
    "block.fc": 3,
    "block.inner.fc": 2,
    "block.fc2": None,
    "blockXfc": 4,
    "conv": 2,
    "line": 2,
    "block.zero": 0,
}

# PEFT is not imported here: that takes seconds, and warns.
SCRIPT = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import save_file
from tests.test_peft import CASES, Network

for folder in Path(sys.argv[1]).iterdir():
    base = Network().to(getattr(torch, CASES[folder.name][0]))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = PeftModel.from_pretrained(base, folder)
    updates = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            assert module.scaling == {"default": 1.0}, (name, module.scaling)
            updates[f"delta/{name}"] = module.get_delta_weight("default").detach().contiguous()
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == before.keys()
    for name, value in merged.items():
        updates[f"merged/{name}"] = (value - before[name]).contiguous()
    save_file(updates, folder / "updates.safetensors")
"""

# The dtype of the model, and how its adapter is stored.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "single": ("float32", {"dtype": "float32", "split": "balanced"}),
    "double": ("float64", {"dtype": "float64", "split": "left"}),
    "brain": ("float32", {"dtype": "bfloat16", "split": "balanced"}),
    "one": ("float32", {}),
}


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 7)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)
        self.zero = nn.Linear(4, 4)
        self.inner = Inner()


class Network(nn.Module):
    """Modules whose names end alike, one whose name an unescaped dot would match, and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.fc = nn.Linear(9, 5)
            self.block = Block()
            self.blockXfc = nn.Linear(6, 8)
            self.conv = nn.Conv2d(3, 6, (3, 2), padding=1)
            self.line = nn.Conv1d(4, 5, 3)


def update_of(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A low rank and some noise, as training leaves it."""
    if name == "block.zero":
        return torch.zeros_like(weight)
    generator = torch.Generator().manual_seed(len(name))
    m, n = weight.shape[0], weight[0].numel()
    low = torch.randn(m, 2, generator=generator) @ torch.randn(2, n, generator=generator)
    return (low + 0.1 * torch.randn(m, n, generator=generator)).reshape(weight.shape)


def updates_of(case: str) -> Weights:
    """What the weights are more than those of the base."""
    updates = {
        name: update_of(name.removesuffix(".weight"), values) if name.endswith(".weight") else torch.zeros_like(values)
        for name, values in Network().state_dict().items()
    }
    return {"fc.weight": updates["fc.weight"]} if case == "one" else updates


@dataclass
class Adapter:
    """What was written, and what PEFT made of it: `delta/{module}` and `merged/{name}`."""

    manifest: dict[str, Any]
    config: dict[str, Any]
    factors: dict[str, torch.Tensor]
    updates: dict[str, torch.Tensor]

    @property
    def held(self) -> dict[str, dict[str, Any]]:
        return {layer["name"]: layer for layer in self.manifest["layers"] if layer["verdict"] != "left_out"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Every case, written here and loaded in one process of PEFT's."""
    zips, folders = tmp_path_factory.mktemp("zips"), tmp_path_factory.mktemp("adapters")
    manifests = {}
    for case, (_, stored) in CASES.items():
        updates = updates_of(case)
        source = source_of(zips / "data", save(updates), zeros(updates))
        planned = plan(source, {f"{module}.weight": rank for module, rank in RANKS.items()})
        manifests[case] = write(zips / case, source, planned, format="peft", **stored)
        with zipfile.ZipFile(zips / case) as archive:
            archive.extractall(folders / case)
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-c", SCRIPT, str(folders)]
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "missing adapter keys" not in done.stderr, done.stderr
    return {case: read_case(folders / case, manifest) for case, manifest in manifests.items()}


def read_case(folder: Path, manifest: dict[str, Any]) -> Adapter:
    config = json.loads((folder / "adapter_config.json").read_text())
    factors, updates = (load_file(folder / f"{name}.safetensors") for name in ("adapter_model", "updates"))
    return Adapter(manifest, config, factors, updates)


def distance(found: torch.Tensor, update: torch.Tensor) -> float:
    return (torch.linalg.norm(found - update) / torch.linalg.norm(update)).item()


@pytest.mark.parametrize("case", ["single", "double"])
def test_peft_adds_what_the_factors_promise(adapters: dict[str, Adapter], case: str) -> None:
    adapter = adapters[case]
    held, found = adapter.held, adapter.updates
    assert held.keys() == {f"{name}.weight" for name in RANKS} - {"block.zero.weight"}
    for name, update in updates_of(case).items():
        if name not in held:
            assert not found[f"merged/{name}"].any()
            continue
        a, b = (adapter.factors[key] for key in held[name]["tensors"])
        product = (b.flatten(1) @ a.flatten(1)).reshape(update.shape)
        assert a.shape[0] == b.shape[1] == held[name]["rank"]
        assert held[name]["rank"] == (RANKS[name.removesuffix(".weight")] or min(update.flatten(1).shape))
        for kind in (f"delta/{name.removesuffix('.weight')}", f"merged/{name}"):
            torch.testing.assert_close(found[kind], product, rtol=0, atol=1e-6)
            promised = held[name]["relative_frobenius_error"]
            assert distance(found[kind], update) == pytest.approx(promised, abs=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_peft_adapts_the_modules_of_the_manifest_and_no_other(adapters: dict[str, Adapter], case: str) -> None:
    modules = {name for name in adapters[case].updates if name.startswith("delta/")}
    assert modules == {f"delta/{name.removesuffix('.weight')}" for name in adapters[case].held}


def test_a_dense_layer_keeps_its_full_rank(adapters: dict[str, Adapter]) -> None:
    layer = adapters["single"].held["block.fc2.weight"]
    assert (layer["verdict"], layer["rank"], layer["relative_frobenius_error"]) == ("dense", 4, 0)
    assert layer["measured_error"] < 1e-6


def test_a_module_whose_name_only_ends_alike_is_left_alone(adapters: dict[str, Adapter]) -> None:
    adapter = adapters["one"]
    assert adapter.config["rank_pattern"] == adapter.config["alpha_pattern"] == {"^(?:fc)": 1}
    assert [adapter.config[key] for key in ("r", "lora_alpha", "target_modules")] == [1, 1, "(?:fc)"]
    changed = [name for name, update in adapter.updates.items() if name.startswith("merged") and update.any()]
    assert changed == ["merged/fc.weight"]


def test_rounded_factors_are_as_far_off_as_was_measured(adapters: dict[str, Adapter]) -> None:
    updates = updates_of("brain")
    for name, layer in adapters["brain"].held.items():
        found = distance(adapters["brain"].updates[f"merged/{name}"], updates[name])
        assert found == pytest.approx(layer["measured_error"], abs=1e-5)
