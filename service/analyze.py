"""`rankscope analyze`: a weight file's report on the terminal, from a server or from a private one on this machine."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from service.client import Client
from service.console import check_end, follow_progress, show, show_json
from service.demo import running_server, wait_until_ready
from service.settings import Settings

Given = Mapping[str, str | int | float | None]


def analyze(client: Client, file: Path, given: Given, *, as_json: bool) -> None:
    """Post the file, wait for its analysis, print what the rule in `given` makes of it."""
    job = client.analyze(file, name=file.name[:200], top_k=1)
    check_end(follow_progress(client, job, "analysing"))
    found = client.analysis(job.id, top_k=1)
    compression = client.compression(found, layer="all", **given)
    report = {"analysis": found.model_dump(mode="json"), "compression": compression}
    if as_json:
        show_json(report)
    else:
        _show(file, report)


@contextlib.contextmanager
def private_server(settings: Settings, file: Path) -> Iterator[Client]:
    """A client of a server in a temporary folder that ends with us and takes this very file."""
    with tempfile.TemporaryDirectory(prefix="rankscope-") as folder:
        changes = {
            "data": Path(folder) / "data",
            "database_url": "",
            "torch_files": True,
            "upload_limit": max(settings.upload_limit, file.stat().st_size),
        }
        own = settings.model_copy(update=changes)
        with running_server(own, Path(folder)) as address, Client(address) as client:
            wait_until_ready(client.http)
            yield client


def _show(file: Path, report: dict[str, Any]) -> None:
    compression, tensors = report["compression"], report["analysis"]["tensors"]
    found = {tensor["name"]: tensor for tensor in tensors}
    if compression["rule"] == "all":
        show(_rules_table(file, compression["layers"]))
    else:
        show(_layers_table(file, compression, found), _summary(compression["totals"]))
    for tensor in tensors:
        if tensor["status"] == "skipped":
            show(f"skipped {tensor['name']}: {tensor['detail']} ({tensor['reason']})")


def _layers_table(file: Path, compression: dict[str, Any], found: dict[str, Any]) -> Table:
    table = Table(title=Text(f"{file.name}: {compression['rule']}"))
    table.add_column("layer", overflow="fold", min_width=12)
    for heading in ("shape", "stable", "entropy", "rank", "even", "kept", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for layer in compression["layers"]:
        tensor = found[layer["layer"]]
        ranks = [f"{tensor[name]:.1f}" for name in ("stable_rank", "entropy_rank")]
        head: list[str | Text] = [Text(layer["layer"]), "×".join(map(str, layer["shape"])), *ranks]
        if layer["rank"] is None:
            table.add_row(*head, "–", "", "", "", layer["chosen_by"])
            continue
        sizes = [f"{layer['kept_fraction']:.3f}", f"{layer['relative_frobenius_error']:.4f}"]
        verdict = layer["verdict"].removeprefix("keep_")
        table.add_row(*head, str(layer["rank"]), str(layer["break_even_rank"]), *sizes, verdict)
    return table


def _rules_table(file: Path, layers: list[dict[str, Any]]) -> Table:
    rules = [one["rule"] for one in layers[0]["rules"]] if layers else []
    table = Table("layer", "shape", "even", *rules, title=Text(f"{file.name}: the rank by every rule"))
    for layer in layers:
        even = next((str(one["break_even_rank"]) for one in layer["rules"] if one["rank"] is not None), "–")
        ranks = ["–" if one["rank"] is None else str(one["rank"]) for one in layer["rules"]]
        table.add_row(Text(layer["layer"]), "×".join(map(str, layer["shape"])), even, *ranks)
    return table


def _summary(totals: dict[str, Any]) -> str:
    if totals["kept_fraction"] is None:
        return "no layer was analysed"
    return (
        f"{totals['parameters_before']} parameters → {totals['parameters_after']}, {totals['kept_fraction']:.1%} kept, "
        f"relative Frobenius error {totals['relative_frobenius_error']:.4f}"
    )
