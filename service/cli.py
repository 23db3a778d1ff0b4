"""The command `rankscope`. Exit codes: 0 ok, 1 failed, 2 usage, 3 no server, 4 refused, 5 database unusable."""

import importlib.util
import ipaddress
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer
from pydantic import ValidationError

from service.errors import DatabaseUnusable
from service.settings import KEY_ENTRY, Settings, environment

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
USAGE, UNUSABLE = 2, 5
Data = Annotated[Path | None, typer.Option(help="folder of database, weights and pictures [default: ./data]")]
Tied = Annotated[bool, typer.Option("--tied", hidden=True, help="stop when standard input ends")]


def _settings(data: Path | None) -> Settings:
    try:
        return Settings() if data is None else Settings(data=data)
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(["RANKSCOPE", *(str(part).upper() for part in first["loc"])])
        raise _stop(USAGE, f"{name}: {first['msg']}") from error


def _stop(code: int, message: str) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(code)


def _prepare(settings: Settings) -> None:
    """Set up the log, open and migrate the database, or end with one clear line."""
    from service import logs, store  # noqa: PLC0415  (SQLAlchemy is not for `rankscope --help`)

    logs.configure(settings)
    try:
        database = store.connect(settings)
        store.migrate(database, settings)
        database.engine.dispose()
    except DatabaseUnusable as error:
        raise _stop(UNUSABLE, error.detail) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _check_worker_extra() -> None:
    if importlib.util.find_spec("torch") is None:
        raise _stop(USAGE, "workers need torch: install rankscope[worker], or serve with --workers 0")


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
        raise _stop(USAGE, f"{host} is not loopback and anyone could call: {advice}")
    if workers:
        _check_worker_extra()
    if workers > 1 and (settings.worker_metrics_address or ("", 0))[1]:
        raise _stop(USAGE, f"{workers} workers cannot share RANKSCOPE_WORKER_METRICS={settings.worker_metrics}: port 0")
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
) -> None:
    """Run the memo's experiment over HTTP and leave its pictures and reports."""
    _check_worker_extra()
    from service.demo import run  # noqa: PLC0415

    raise typer.Exit(run(_settings(data), out))


@app.command()
def analyze(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, readable=True, help=".npy .npz .safetensors .pt")
    ],
    rule: Annotated[str, typer.Option(help="rank, energy, error, budget, entropy_rank, optimal, spikes, …")] = "energy",
    rank: Annotated[int | None, typer.Option(help="for --rule rank")] = None,
    threshold: Annotated[float | None, typer.Option(help="for --rule energy (0.99) and error (0.1)")] = None,
    fraction: Annotated[float | None, typer.Option(help="for --rule budget and global_budget (0.5)")] = None,
    server: Annotated[str | None, typer.Option(help="URL of a server; without one, a worker on this machine")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the reports as JSON")] = False,
) -> None:
    """Tell which layers of a weight file to factor, to what rank, at what error."""
    if server is None:
        _check_worker_extra()
    from service.analyze import run  # noqa: PLC0415

    given = {"rule": rule, "rank": rank, "threshold": threshold, "fraction": fraction}
    raise typer.Exit(run(_settings(None), file, given, server, as_json=as_json))


@app.command()
def migrate(data: Data = None) -> None:
    """Create the database or bring it up to date."""
    _prepare(_settings(data))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="whose key; the name owns what is made with it")],
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Make an API key: give the key to its user, and the entry to RANKSCOPE_API_KEYS."""
    from service.access import fingerprint, new_key  # noqa: PLC0415

    made = new_key()
    entry = f"{name}:{fingerprint(made)}"
    if not re.fullmatch(KEY_ENTRY, entry):
        raise _stop(USAGE, f"{name!r} is no name: take 1 to 64 of a-z, 0-9, _ and -")
    if as_json:
        typer.echo(orjson.dumps({"key": made, "entry": entry}))
    else:
        typer.echo(f"key:    {made}\nentry:  {entry}")


@app.command()
def doctor(
    data: Data = None, as_json: Annotated[bool, typer.Option("--json", help="the findings as JSON")] = False
) -> None:
    """Tell what is wrong with this deployment and what to do about it; nothing is changed."""
    from service.doctor import run  # noqa: PLC0415

    raise typer.Exit(run(_settings(data), as_json=as_json))


@app.command()
def openapi() -> None:
    """Print the OpenAPI document."""
    from service.app import create_app  # noqa: PLC0415

    typer.echo(orjson.dumps(create_app(Settings()).openapi(), option=orjson.OPT_INDENT_2))


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
