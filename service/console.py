"""What the commands that talk to a server have in common: exit codes, tables, bars, and JSON for scripts."""

import contextlib
import signal
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import orjson
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.client import Client, Refused, Unreachable, Unreadable, Unsendable
from service.client.calls import Json
from service.views import Experiment, Job

FAILED, USAGE, NO_SERVER, REFUSED, UNUSABLE, INTERRUPTED = 1, 2, 3, 4, 5, 130
PIPE_WIDTH = 160


def note(message: str) -> None:
    """Tell whoever sits at the terminal; standard output stays for what was asked for."""
    Console(stderr=True).print(message, markup=False, emoji=False, highlight=False, soft_wrap=True)


def stop(code: int, message: str) -> typer.Exit:
    """The end of the command, to be raised: its exit code, and why."""
    note(message)
    return typer.Exit(code)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """End the command with the exit code of what went wrong."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except Unsendable as error:
        raise stop(USAGE, str(error)) from error
    except Unreachable as error:
        raise stop(NO_SERVER, f"no server: {error}") from error
    except Refused as error:
        raise stop(REFUSED, str(error)) from error
    except Unreadable as error:
        raise stop(REFUSED, str(error).partition("\n")[0]) from error  # The rest lists every field.


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End a command that has processes of its own with INTERRUPTED once SIGINT has come, whatever became of it.

    A shell script starts what it puts in the background with SIGINT ignored, which Python leaves so; and an interrupt
    that is raised in a callback of the interpreter, as there are where modules are loaded, is dropped.
    """
    has_come = False

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal has_come
        has_come = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if has_come:
            raise typer.Exit(INTERRUPTED)


def check_end(job: Job) -> None:
    """End the command where the job did not succeed."""
    if job.status != "succeeded":
        reason = "" if job.error is None else f": {job.error.detail} ({job.error.type})"
        raise stop(FAILED, f"the {job.object} {job.status}{reason}")


def show_json(document: BaseModel | list[Any] | Mapping[str, Any], *, indented: bool = True) -> None:
    """Print a document as JSON."""
    option = orjson.OPT_INDENT_2 if indented else None
    print(orjson.dumps(document, default=_plain, option=option).decode(), flush=True)  # noqa: T201 - it was asked for


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON")


def show(*parts: Table | str) -> None:
    """Print tables and lines: folded to a terminal's width, a line a row to a file or a pipe."""
    console = Console(highlight=False)
    wide = console if console.is_terminal else Console(width=PIPE_WIDTH, highlight=False)
    for part in parts:
        wide.print(part, markup=False)


def shown_layer(job: Experiment) -> str:
    """The layer that a progress bar tells of: W2, where it is recorded."""
    layers = job.spec.recorded_layers
    return "W2" if "W2" in layers else layers[0]


def epochs(client: Client, job: Experiment) -> Iterator[Json]:
    """Losses and ranks of each recorded epoch, as soon as it is there, until the job is over."""
    return (event.data for event in client.events(job) if event.name == "epoch")


def follow_training(client: Client, job: Experiment) -> Experiment:
    """Show a bar with epoch, loss and entropy rank until the experiment is over; the answer is its last state."""
    columns = (TextColumn("epoch {task.completed:>3.0f}/{task.total:.0f}"), BarColumn(), TimeElapsedColumn())
    layer = shown_layer(job)
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("waiting for a worker", total=job.progress.total)
        for epoch in epochs(client, job):
            rank = next(one["entropy_rank"] for one in epoch["layers"] if one["name"] == layer)
            text = f"loss {epoch['train_loss']:.5f}   entropy rank of {layer} {rank:.1f}"
            progress.update(task, completed=epoch["epoch"], description=text)
    return client.refresh(job)


def follow_progress(client: Client, job: Job, doing: str) -> Job:
    """Show how much is done until a job is over; the answer is its last state, without what it has found.

    For jobs whose events do not tell how far they are.
    """
    columns = (TextColumn(doing), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=job.progress.total)
        for job in client.watch(job):  # noqa: PLR1704, B020 - the newest state of the same job
            progress.update(task, completed=job.progress.done, total=job.progress.total)
    return job
