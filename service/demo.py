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

import httpcore  # noqa: F401  (httpx loads it for its first client, and Ctrl-C in the midst of loading may get lost)
import httpx
import numpy as np
import orjson
from rich.table import Table

from service.client import Client
from service.console import check_end, follow_training, show, show_json
from service.lowrank.compression import R2_LOST, rank_within_r2
from service.settings import Settings, environment
from service.views import Experiment

START_S = 60.0
RANKS = ("entropy_rank", "stable_rank", "spikes")


def run(settings: Settings, out: Path, *, as_json: bool = False) -> None:
    """Start a server, post the memo preset, follow it, fetch everything."""
    with running_server(settings, out) as url, Client(url) as client:
        wait_until_ready(client.http)
        job = client.create_experiment({"preset": "memo", "name": "The memo: Y = tanh(AX)"})
        done = follow_training(client, job)
        check_end(done)
        _fetch(client, done, out)
        found = _summary(client, done)
    if as_json:
        show_json({"experiment": done.id, "files": str(out), **found})
    else:
        show(_table(found), f"Figure 1 is {out / 'spectrum.gif'}; beside it spectrum.png and the numbers.")


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


def _fetch(client: Client, job: Experiment, out: Path) -> None:
    for suffix in ("gif", "png", "json"):
        (out / f"spectrum.{suffix}").write_bytes(client.spectrum_file(job, suffix, layer="W2"))
    report = client.compression(job, layer="W2", rule="all")
    (out / "compression.json").write_bytes(orjson.dumps(report))


def _summary(client: Client, job: Experiment) -> dict[str, Any]:
    """What the run came to, of W2: ranks at its start and end, and what a cut costs."""
    metrics, report = client.metrics(job, layer="W2"), client.compression(job, layer="W2")
    first, last = metrics["epochs"][0], metrics["epochs"][-1]
    ranks = {name: [epoch["layers"][0][name] for epoch in (first, last)] for name in RANKS}
    return {
        **ranks,
        "tau": metrics["tau"],
        "validation_r2": [epoch["validation_r2"] for epoch in (first, last)],
        "rank_within_r2": rank_within_r2(np.array([row["validation_r2"] for row in report["curve"]])),
    }


def _table(found: dict[str, Any]) -> Table:
    table = Table("W2", "start", "end", title="The memo's experiment")
    for name in RANKS:
        start, end = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in found[name])
        table.add_row(name.replace("_", " "), start, end)
    table.add_row("τ", "", f"{found['tau']:.2f}")
    table.add_row("validation R²", *(f"{value:.3f}" for value in found["validation_r2"]))
    table.add_row(f"rank with R² lost ≤ {R2_LOST}", "", f"{found['rank_within_r2']} of 64")
    return table
