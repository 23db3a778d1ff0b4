"""The command `rankscope`. Exit codes: 0 ok, 1 failed, 2 usage, 3 no server, 4 refused, 5 database unusable."""

import contextlib
import importlib.util
import ipaddress
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import orjson
import typer
from pydantic import ValidationError

from service.errors import DatabaseUnusable
from service.settings import KEY_ENTRY, Settings, environment

if TYPE_CHECKING:
    from service.client import Client


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Data = Annotated[Path | None, typer.Option(help="folder of database, weights and pictures (default: ./data)")]
SERVER = "RANKSCOPE_SERVER"
Server = Annotated[str, typer.Option(envvar=SERVER, help="URL of the server")]
RETRIES = 2  # Somebody waits at a terminal.
LOCAL = "http://127.0.0.1:8000"
Key = Annotated[str | None, typer.Option(help="API key, where the server wants one; or RANKSCOPE_API_KEY")]
AsJson = Annotated[bool, typer.Option("--json", help="as JSON, for scripts")]
JobId = Annotated[str, typer.Argument(help="id of an experiment, analysis or sweep")]
Tied = Annotated[bool, typer.Option("--tied", hidden=True, help="stop when standard input ends")]


def _settings(data: Path | None) -> Settings:
    try:
        return Settings() if data is None else Settings(data=data)
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(["RANKSCOPE", *(str(part).upper() for part in first["loc"])])
        raise _usage(f"{name}: {first['msg']}") from error


def _usage(message: str) -> typer.Exit:
    from service.console import USAGE, stop  # noqa: PLC0415  (the client is not for `rankscope --help`)

    return stop(USAGE, message)


def _prepare(settings: Settings) -> str:
    """Set up the log, open and migrate the database, or end with one clear line; the answer is its schema."""
    from service import logs, store  # noqa: PLC0415  (SQLAlchemy is not for `rankscope --help`)

    logs.configure(settings)
    try:
        database = store.connect(settings)
        schema = store.migrate(database, settings)
        database.engine.dispose()
    except DatabaseUnusable as error:
        from service.console import UNUSABLE, stop  # noqa: PLC0415

        raise stop(UNUSABLE, error.detail) from error
    return schema


@contextlib.contextmanager
def _client(server: str, key: str | None) -> Iterator["Client"]:
    """A client of the server; what goes wrong ends the command with its exit code."""
    from service.client import Client  # noqa: PLC0415  (pydantic's models are not for `rankscope --help`)
    from service.console import exit_codes  # noqa: PLC0415

    with exit_codes(), Client(server, api_key=key, retries=RETRIES) as client:
        yield client


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_worker_extra() -> None:
    if importlib.util.find_spec("torch") is None:
        raise _usage("workers need torch: install rankscope[worker], or serve with --workers 0")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    data: Data = None,
    workers: Annotated[int, typer.Option(min=0, max=64, help="0: the API alone")] = 1,
    tied: Tied = False,
) -> None:
    """Serve the API and run workers beside it."""
    settings = _settings(data)
    if not (_is_loopback(host) or settings.keys or settings.open_network):
        advice = "set RANKSCOPE_API_KEYS, or RANKSCOPE_OPEN_NETWORK=true to mean it"
        raise _usage(f"{host} is not loopback and anyone could call: {advice}")
    if workers:
        _check_worker_extra()
    if workers > 1 and (settings.worker_metrics_address or ("", 0))[1]:
        raise _usage(f"{workers} workers cannot share RANKSCOPE_WORKER_METRICS={settings.worker_metrics}: port 0")
    at_once = max(settings.sweep_batches, workers * settings.jobs)
    settings = settings.model_copy(update={"sweep_batches": min(at_once, 1024)})
    _prepare(settings)
    from service.serving import serve as run  # noqa: PLC0415

    run(settings, host, port, workers, tied=tied)


@app.command()
def work(data: Data = None) -> None:
    """Run jobs of a database until told to stop."""
    _check_worker_extra()
    settings = _settings(data)
    _prepare(settings)
    # The worker takes our place: signals and exit code are its own.
    os.execve(sys.executable, [sys.executable, "-m", "worker"], {**os.environ, **environment(settings)})  # noqa: S606


@app.command()
def demo(
    data: Data = None,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """Run the memo's experiment over HTTP and leave its pictures and reports."""
    _check_worker_extra()
    from service.console import exit_codes, interruptible  # noqa: PLC0415
    from service.demo import run  # noqa: PLC0415

    with exit_codes(), interruptible():
        run(_settings(data), out, as_json=as_json)


@app.command()
def analyze(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, readable=True, help=".npy .npz .safetensors .pt")
    ],
    rule: Annotated[str, typer.Option(help="rank, energy, error, budget, entropy_rank, optimal, spikes, …")] = "energy",
    rank: Annotated[int | None, typer.Option(help="for --rule rank")] = None,
    threshold: Annotated[float | None, typer.Option(help="for --rule energy (0.99) and error (0.1)")] = None,
    fraction: Annotated[float | None, typer.Option(help="for --rule budget and global_budget (0.5)")] = None,
    server: Annotated[
        str | None, typer.Option(envvar=SERVER, help="URL of a server; without one, a worker on this machine")
    ] = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Tell which layers of a weight file to factor, to what rank, at what error."""
    if server is None:
        _check_worker_extra()
    from service.analyze import analyze as run  # noqa: PLC0415
    from service.analyze import private_server  # noqa: PLC0415

    given = {"rule": rule, "rank": rank, "threshold": threshold, "fraction": fraction}
    if server is not None:
        with _client(server, key) as client:
            run(client, file, given, as_json=as_json)
        return
    from service.console import exit_codes, interruptible  # noqa: PLC0415

    with exit_codes(), interruptible(), private_server(_settings(None), file) as client:
        run(client, file, given, as_json=as_json)


@app.command()
def submit(
    spec: Annotated[typer.FileBinaryRead, typer.Argument(help="file with the specification as JSON; - for input")],
    wait: Annotated[bool, typer.Option("--wait", help="end when the job does, with 1 if it did not succeed")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="show how far it is, and end when the job does")] = False,
    server: Server = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Post an experiment; or a sweep, where the specification has `base` and `grid`."""
    from service import commands  # noqa: PLC0415

    with _client(server, key) as client:
        commands.submit(client, spec.read(), wait=wait, follow=follow, as_json=as_json)


@app.command()
def ls(
    kind: Annotated[Literal["experiment", "analysis", "sweep"], typer.Option(help="what to list")] = "experiment",
    status: Annotated[str | None, typer.Option(help="only jobs of this status")] = None,
    tag: Annotated[str | None, typer.Option(help="only jobs with this tag: key or key:value")] = None,
    limit: Annotated[int, typer.Option(min=1, help="at most so many")] = 20,
    server: Server = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List the newest jobs."""
    from service import commands  # noqa: PLC0415

    with _client(server, key) as client:
        commands.list_jobs(client, kind, limit, {"status": status, "tag": tag}, as_json=as_json)


@app.command()
def show(job_id: JobId, server: Server = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Show one job."""
    from service import commands  # noqa: PLC0415

    with _client(server, key) as client:
        commands.show_job(client, job_id, as_json=as_json)


@app.command()
def cancel(job_id: JobId, server: Server = LOCAL, key: Key = None, as_json: AsJson = False) -> None:
    """Ask a job to stop."""
    from service import commands  # noqa: PLC0415

    with _client(server, key) as client:
        commands.cancel(client, job_id, as_json=as_json)


@app.command()
def spectrum(
    job_id: JobId,
    out: Annotated[Path, typer.Option("-o", "--out", help="file: .png .svg .gif .npy .npz .csv .jsonl .json")],
    layer: Annotated[str | None, typer.Option(help="one layer, or all")] = None,
    server: Server = LOCAL,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Write the singular values of a job to a file, drawn or as numbers."""
    from service import commands  # noqa: PLC0415

    with _client(server, key) as client:
        commands.spectrum(client, job_id, layer, out, as_json=as_json)


@app.command()
def migrate(data: Data = None, as_json: AsJson = False) -> None:
    """Create the database or bring it up to date."""
    schema = _prepare(_settings(data))
    if as_json:
        typer.echo(orjson.dumps({"schema": schema}))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="whose key; the name owns what is made with it")],
    as_json: AsJson = False,
) -> None:
    """Make an API key: give the key to its user, and the entry to RANKSCOPE_API_KEYS."""
    from service.access import fingerprint, new_key  # noqa: PLC0415

    made = new_key()
    entry = f"{name}:{fingerprint(made)}"
    if not re.fullmatch(KEY_ENTRY, entry):
        raise _usage(f"{name!r} is no name: take 1 to 64 of a-z, 0-9, _ and -")
    if as_json:
        typer.echo(orjson.dumps({"key": made, "entry": entry}))
    else:
        typer.echo(f"key:    {made}\nentry:  {entry}")


@app.command()
def doctor(data: Data = None, as_json: AsJson = False) -> None:
    """Tell what is wrong with this deployment and what to do about it; nothing is changed."""
    from service.doctor import run  # noqa: PLC0415

    raise typer.Exit(run(_settings(data), as_json=as_json))


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from service.app import create_app  # noqa: PLC0415

    typer.echo(orjson.dumps(create_app(Settings()).state.openapi(), option=orjson.OPT_INDENT_2))


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
