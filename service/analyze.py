"""`rankscope analyze`: a weight file's report on the terminal, from a server or from a private one on this machine."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from service.demo import INTERRUPTED, running_server, wait_until_ready
from service.settings import Settings

FAILED, NO_SERVER, REFUSED = 1, 3, 4
OVER = {"succeeded", "failed", "canceled"}
Given = Mapping[str, str | int | float | None]


class _Stop(Exception):
    """The end of the command: its exit code and what to say."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def run(settings: Settings, file: Path, given: Given, server: str | None, *, as_json: bool) -> int:
    """Post the file, wait for its analysis, print what the rule in `given` makes of it; the answer is the exit code."""
    errors = Console(stderr=True)
    query = {name: value for name, value in given.items() if value is not None}
    try:
        with _server(settings, file, server) as client:
            report = _analyse(client, file, query, errors)
    except KeyboardInterrupt:
        return INTERRUPTED
    except httpx.TransportError as error:
        errors.print(f"no server at {server or 'the private address'}: {error}", markup=False)
        return NO_SERVER
    except _Stop as stop:
        errors.print(str(stop), markup=False)
        return stop.code
    if as_json:
        print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())  # noqa: T201 - it is what was asked for
    else:
        # A file or a pipe has no width: there a line a layer serves better than a fold.
        console = Console(highlight=False)
        _show(console if console.is_terminal else Console(width=160, highlight=False), file, report)
    return 0


@contextlib.contextmanager
def _server(settings: Settings, file: Path, url: str | None) -> Iterator[httpx.Client]:
    """A client of the server named, or of one in a temporary folder that ends with us and takes this very file."""
    if url is not None:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="rankscope-") as folder:
        changes = {
            "data": Path(folder) / "data",
            "database_url": "",
            "torch_files": True,
            "upload_limit": max(settings.upload_limit, file.stat().st_size),
        }
        own = settings.model_copy(update=changes)
        with running_server(own, Path(folder)) as address, httpx.Client(base_url=address, timeout=60) as client:
            wait_until_ready(client)
            yield client


def _analyse(client: httpx.Client, file: Path, query: dict[str, Any], console: Console) -> dict[str, Any]:
    """The analysis and the rule's report. Raises _Stop."""
    with file.open("rb") as content:
        answer = client.post(
            "/analyze",
            content=content,
            params={"name": file.name[:200], "top_k": 1},
            headers={"prefer": "respond-async", "content-length": str(file.stat().st_size)},
        )
    state = _follow(client, _checked(answer).json(), console)
    if state["status"] != "succeeded":
        raise _Stop(FAILED, f"the analysis {state['status']}: {(state['error'] or {}).get('detail', '')}")
    path = f"/analyses/{state['id']}"
    report = _checked(client.get(f"{path}/compression", params={"layer": "all", **query})).json()
    return {"analysis": state, "compression": report}


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        problem = answer.json() if "json" in answer.headers.get("content-type", "") else {}
        raise _Stop(
            REFUSED, f"{problem.get('title', answer.reason_phrase)}: {problem.get('detail', answer.text[:200])}"
        )
    return answer


def _follow(client: httpx.Client, state: dict[str, Any], console: Console) -> dict[str, Any]:
    columns = (TextColumn("analysing"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=state["progress"]["total"])
        took = 0.0
        while state["status"] not in OVER:
            time.sleep(max(0.1, took))  # The report of a file of very many tensors takes the server its time.
            asked = time.monotonic()
            state = _checked(client.get(f"/analyses/{state['id']}", params={"top_k": 1})).json()
            took = time.monotonic() - asked
            progress.update(task, completed=state["progress"]["done"], total=state["progress"]["total"])
    return state


def _show(console: Console, file: Path, report: dict[str, Any]) -> None:
    compression, tensors = report["compression"], report["analysis"]["tensors"]
    found = {tensor["name"]: tensor for tensor in tensors}
    if compression["rule"] == "all":
        console.print(_rules_table(file, compression["layers"]))
    else:
        console.print(_layers_table(file, compression, found))
        console.print(_summary(compression["totals"]), markup=False)
    for tensor in tensors:
        if tensor["status"] == "skipped":
            console.print(f"skipped {tensor['name']}: {tensor['detail']} ({tensor['reason']})", markup=False)


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
