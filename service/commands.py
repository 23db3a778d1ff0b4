"""The commands that talk to a running server: submit, ls, show, cancel, spectrum."""

import contextlib
import itertools
from pathlib import Path

import orjson
from rich.table import Table
from rich.text import Text

from service.client import Client, NotFound, TooManyRequests
from service.client.calls import Json
from service.console import USAGE, check_end, epochs, follow_progress, follow_training, note, show, show_json, stop
from service.views import Analysis, Experiment, Job, Sweep

SUFFIXES = ("png", "svg", "gif", "npy", "npz", "csv", "jsonl", "json")
SWEEP_PICTURES = {"png": "overlay", "gif": "animation"}
PAGE = 100
COLOURS = {"succeeded": "green", "failed": "red", "canceled": "yellow", "running": "cyan", "canceling": "yellow"}


def submit(client: Client, text: bytes, *, wait: bool, follow: bool, as_json: bool) -> None:
    """Post a specification; with `wait` or `follow`, end as the job does."""
    spec = _spec(text)
    is_sweep = not spec.keys().isdisjoint({"base", "grid"})  # No field of an experiment is called so.
    job = client.create_sweep(spec) if is_sweep else client.create_experiment(spec)
    if wait or follow:
        note(f"{job.object} {job.id}")  # At once: it goes on here, whatever becomes of this command.
    if follow:
        _follow(client, job, as_json=as_json)
    job = client.wait(job) if wait or follow else job
    if as_json:
        show_json(job, indented=not follow)
    else:
        show(f"{job.id} {job.status}")
    if wait or follow:
        check_end(job)


def _follow(client: Client, job: Experiment | Sweep, *, as_json: bool) -> None:
    """Show every epoch of an experiment, or how far all members of a sweep are together."""
    if isinstance(job, Experiment):
        try:
            _follow_epochs(client, job, as_json=as_json)
        except TooManyRequests as error:
            note(f"{error}; this shows how far it is, without its epochs")
        else:
            return
    if not as_json:
        follow_progress(client, job, "training")
    else:
        for progress, _ in itertools.groupby(state.progress for state in client.watch(job)):
            show_json(progress, indented=False)


def _follow_epochs(client: Client, job: Experiment, *, as_json: bool) -> None:
    if not as_json:
        follow_training(client, job)
        return
    for epoch in epochs(client, job):
        show_json(epoch, indented=False)


def _spec(text: bytes) -> Json:
    try:
        spec = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise stop(USAGE, f"the specification is not JSON: {error}") from error
    if not isinstance(spec, dict):
        raise stop(USAGE, "the specification must be a JSON object")
    return spec


def list_jobs(client: Client, kind: str, limit: int, query: dict[str, str | None], *, as_json: bool) -> None:
    """The newest jobs of a kind."""
    given = {name: value for name, value in query.items() if value is not None}
    listed = {"experiment": client.experiments, "analysis": client.analyses, "sweep": client.sweeps}[kind]
    jobs: list[Job] = list(itertools.islice(listed(limit=min(limit, PAGE), **given), limit))
    if as_json:
        show_json(jobs)
        return
    table = Table("id", "status", "done", "name", "created")
    for job in jobs:
        done = f"{job.progress.done / job.progress.total:.0%}" if job.progress.total else ""
        created = job.created_at.strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(job.id, _status(job), done, Text(job.name or ""), created)
    show(table)


def _status(job: Job) -> Text:
    return Text(job.status, COLOURS.get(job.status, ""))


def find(client: Client, job_id: str, *, whole: bool = False) -> Experiment | Analysis | Sweep:
    """The experiment, analysis or sweep of that id; an analysis has all it found if `whole`. Raises NotFound."""
    with contextlib.suppress(NotFound):
        return client.experiment(job_id)
    with contextlib.suppress(NotFound):
        return client.analysis(job_id, top_k=None if whole else 1)
    return client.sweep(job_id)


def show_job(client: Client, job_id: str, *, as_json: bool) -> None:
    """One job, whatever its kind."""
    job = find(client, job_id, whole=as_json)
    if as_json:
        show_json(job)
        return
    table = Table(show_header=False)
    for name in ("object", "id", "name", "status", "attempt", "device", "created_at", "started_at", "finished_at"):
        table.add_row(name, Text(str(getattr(job, name) or "")))
    table.add_row("progress", f"{job.progress.done} of {job.progress.total}")
    if job.error is not None:
        table.add_row("error", Text(f"{job.error.title}: {job.error.detail} ({job.error.type})"))
    for name, value in _found(job).items():
        table.add_row(name, Text(orjson.dumps(value).decode()))
    show(table)


def _found(job: Experiment | Analysis | Sweep) -> Json:
    """What is particular to the job's kind."""
    match job:
        case Experiment():
            return job.spec.model_dump(mode="json")
        case Sweep():
            return {"counts": job.counts, "base": job.base, **job.grid}
        case Analysis():
            return job.totals


def cancel(client: Client, job_id: str, *, as_json: bool) -> None:
    """Ask a job to stop."""
    job = client.cancel(find(client, job_id))
    if as_json:
        show_json(job)
    else:
        show(f"{job.id} {job.status}")


def spectrum(client: Client, job_id: str, layer: str | None, out: Path, *, as_json: bool) -> None:
    """Write the singular values of a job to a file, in the format that its name ends with."""
    suffix = out.suffix[1:].lower()
    if suffix not in SUFFIXES:
        raise stop(USAGE, f"{out.name}: the name must end with one of {', '.join(SUFFIXES)}")
    job = find(client, job_id)
    if not isinstance(job, Sweep):
        content = client.spectrum_file(job, suffix, layer=layer)
    elif suffix in SWEEP_PICTURES:
        content = client.summary_file(job, suffix, kind=SWEEP_PICTURES[suffix], layer=layer)
    else:
        raise stop(USAGE, f"the spectra of a sweep are drawn as png or gif; for a {suffix} take one of its members")
    try:
        out.write_bytes(content)
    except OSError as error:
        raise stop(USAGE, f"cannot write {out}: {error.strerror}") from error
    if as_json:
        show_json({"file": str(out), "format": suffix, "bytes": len(content)})
