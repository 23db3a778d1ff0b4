"""`rankscope demo`: the memo's experiment over HTTP, from an empty folder to Figure 1."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.settings import Settings, environment

INTERRUPTED = 130
START_S = 60.0
R2_LOST = 0.01


def run(settings: Settings, out: Path) -> int:
    """Start a server, post the memo preset, follow it, fetch everything; the answer is the exit code."""
    console = Console()
    try:
        with running_server(settings, out) as url, httpx.Client(base_url=url, timeout=60) as client:
            wait_until_ready(client)
            experiment = _checked(
                client.post("/experiments", json={"preset": "memo", "name": "The memo: Y = tanh(AX)"})
            ).json()
            status = _follow(client, experiment, console)
            if status["status"] != "succeeded":
                console.print(f"the experiment {status['status']}: {status['error']}")
                return 1
            _fetch(client, f"/experiments/{experiment['id']}", out)
            console.print(_summary(client, f"/experiments/{experiment['id']}"))
            console.print(f"Figure 1 is [bold]{out / 'spectrum.gif'}[/bold]; beside it spectrum.png and the numbers.")
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


@contextlib.contextmanager
def running_server(settings: Settings, out: Path) -> Iterator[str]:
    """A server of its own on a free port. It stops when its standard input ends: even if we are killed."""
    out.mkdir(parents=True, exist_ok=True)
    own = settings.model_copy(update={"api_keys": "", "rate_limit": ""})  # It is for us alone.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "service.cli", "serve", "--tied", f"--port={port}"]
    with (out / "server.log").open("wb") as log:
        # A session of its own: Ctrl-C is for us, and we tell the server.
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, **environment(own)},
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(client: httpx.Client) -> None:
    """Return when the server takes work. Raises SystemExit if it does not within a minute."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            answer = client.get("/readyz")
            if answer.is_success:
                return
            reason = answer.text
        except httpx.TransportError as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise SystemExit(f"the server is not ready after {START_S:g} s: {reason}")
        time.sleep(0.1)


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        raise SystemExit(f"the server refused {response.request.url}: {response.text}")
    return response


def _follow(client: httpx.Client, experiment: dict[str, Any], console: Console) -> dict[str, Any]:
    """Show a bar with epoch, loss and entropy rank until the experiment is over; answer with its last state."""
    path = f"/experiments/{experiment['id']}"
    columns = (TextColumn("epoch {task.completed:>3.0f}/{task.total:.0f}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console) as progress:
        task = progress.add_task("the worker is loading torch", total=experiment["progress"]["total"])
        last = -1
        while True:
            state: dict[str, Any] = _checked(client.get(path)).json()
            query: dict[str, str | int] = {"layer": "W2", "from": last + 1}
            for epoch in _checked(client.get(f"{path}/metrics", params=query)).json()["epochs"]:
                last = epoch["epoch"]
                rank = epoch["layers"][0]["entropy_rank"]
                text = f"loss {epoch['train_loss']:.5f}   entropy rank {rank:.1f}"
                progress.update(task, completed=last, description=text)
            if state["status"] in {"succeeded", "failed", "canceled"}:
                return state
            time.sleep(0.1)


def _fetch(client: httpx.Client, path: str, out: Path) -> None:
    for suffix in ("gif", "png", "json"):
        answer = _checked(client.get(f"{path}/spectrum", params={"format": suffix, "layer": "W2"}))
        (out / f"spectrum.{suffix}").write_bytes(answer.content)
    (out / "compression.json").write_bytes(_checked(client.get(f"{path}/compression?layer=W2&rule=all")).content)


def _summary(client: httpx.Client, path: str) -> Table:
    metrics = _checked(client.get(f"{path}/metrics", params={"layer": "W2"})).json()
    report = _checked(client.get(f"{path}/compression", params={"layer": "W2"})).json()
    first, last = metrics["epochs"][0], metrics["epochs"][-1]
    start, end = first["layers"][0], last["layers"][0]
    table = Table("W2", "start", "end", title="The memo's experiment")
    table.add_row("entropy rank", f"{start['entropy_rank']:.2f}", f"{end['entropy_rank']:.2f}")
    table.add_row("stable rank", f"{start['stable_rank']:.2f}", f"{end['stable_rank']:.2f}")
    table.add_row("spikes", str(start["spikes"]), str(end["spikes"]))
    table.add_row("τ", "", f"{metrics['tau']:.2f}")
    table.add_row("validation R²", f"{first['validation_r2']:.3f}", f"{last['validation_r2']:.3f}")
    table.add_row(f"rank with R² lost ≤ {R2_LOST}", "", f"{least_rank(report['curve'], last['validation_r2'])} of 64")
    return table


def least_rank(curve: list[dict[str, Any]], r2: float) -> int:
    """The smallest rank whose cut costs at most R2_LOST of R²; the curve's full rank costs nothing."""
    return next(int(row["rank"]) for row in curve if r2 - row["validation_r2"] <= R2_LOST)
