"""Every request that a client can make, each as a value: what to send, and how to read the answer.

Nothing is sent here: the clients do that, and have a method for each function. A POST carries an Idempotency-Key of its
own, so that the same call, sent any number of times, does what it asks for once. Queries take their values by name;
`from` is `from_`, as it is a word of Python's.
"""

import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar
from urllib.parse import quote

import anyio
import httpx
import orjson
from pydantic import BaseModel, RootModel, ValidationError

from service.client.errors import Refused, Unreachable, Unreadable, Unsendable, refusal
from service.schemas import ExperimentSpec, FactorsSpec
from service.sweeps import SweepSpec
from service.views import (
    Analysis,
    AnalysisList,
    Experiment,
    ExperimentList,
    Factors,
    FactorsList,
    Job,
    Sweep,
    SweepList,
    SweepSummary,
)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
M = TypeVar("M", bound=BaseModel)
J = TypeVar("J", bound=Job)
Value = str | int | float | bool | None
Json = dict[str, Any]
CHUNK = 1 << 20
REPEATABLE = {"GET", "POST"}  # A POST by its Idempotency-Key; what a DELETE or PATCH met the second time misleads.
PATHS = {
    "experiment": "/experiments/{id}",
    "sweep": "/sweeps/{id}",
    "analysis": "/analyses/{id}",
    "factors": "/analyses/{analysis}/factors/{id}",
}


@dataclass(frozen=True)
class Call(Generic[T_co]):
    """One request, and what its answer is read as."""

    method: str
    path: str
    read: Callable[[httpx.Response], T_co]
    query: Mapping[str, Value] = field(default_factory=dict)
    content: bytes | Path = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def result(self, answer: httpx.Response) -> T_co:
        """What the answer says. Raises Refused."""
        if not answer.is_success:
            raise refusal(answer)
        return self.read(answer)

    def may_be_repeated(self, error: BaseException) -> bool:
        """Whether to send it again is safe after this error, and may help."""
        passes = isinstance(error, Unreachable) or (isinstance(error, Refused) and error.passes)
        return passes and self.method in REPEATABLE

    @property
    def params(self) -> dict[str, str]:
        """The query as it is sent."""
        given = {name.rstrip("_"): value for name, value in self.query.items() if value is not None}
        return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()}

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The request, new each time; a file is read as it is sent, from its start."""
        if isinstance(self.content, bytes):
            return http.build_request(
                self.method, self.path, params=self.params, headers=self.headers, content=self.content or None
            )
        headers = {**self.headers, "content-length": str(self.content.stat().st_size)}
        request = http.build_request(self.method, self.path, params=self.params, headers=headers)
        request.stream = _FileStream(self.content)
        return request


class Page(Protocol[M]):
    """One page of a list."""

    data: list[M]
    next: str | None


class JsonObject(RootModel[Json]):
    """An answer of any fields."""


class _FileStream(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with await anyio.open_file(self._path, "rb") as file:
            while chunk := await file.read(CHUNK):
                yield chunk


def _model(kind: type[M]) -> Callable[[httpx.Response], M]:
    def read(answer: httpx.Response) -> M:
        try:
            # A newer server may say more than this version knows.
            return kind.model_validate_json(answer.content, extra="ignore")
        except ValidationError as error:
            raise Unreadable(f"{answer.url} is no {kind.__name__} as this version knows it: {error}") from error

    return read


def _json(answer: httpx.Response) -> Json:
    return _model(JsonObject)(answer).root


def _bytes(answer: httpx.Response) -> bytes:
    return answer.content


def _nothing(_answer: httpx.Response) -> None:
    return None


def _post(
    path: str,
    read: Callable[[httpx.Response], T],
    body: Any = None,
    *,
    wait_s: int = 0,
    key: str | None = None,
) -> Call[T]:
    headers = {"idempotency-key": key or str(uuid.uuid4())}
    headers |= {"prefer": f"wait={wait_s}" if wait_s else "respond-async"}
    headers |= {} if body is None else {"content-type": "application/json"}
    return Call("POST", path, read, content=b"" if body is None else _json_of(body), headers=headers)


def _body(spec: BaseModel | Mapping[str, Any] | None) -> Json:
    return spec.model_dump(exclude_unset=True) if isinstance(spec, BaseModel) else dict(spec or {})


def path_of(job: Job) -> str:
    """Where a job is."""
    return PATHS[job.object].format(**dict(job))


def _json_of(body: object) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError as error:
        raise Unsendable(f"the body is not JSON: {error}") from None


def _part(job_id: str) -> str:
    # Dots are resolved before a path is sent, and would read something else; stray bytes of a terminal have no UTF-8.
    if job_id in {"", ".", ".."} or not job_id.isprintable():
        raise Unsendable(f"{job_id!r} is no id")
    return quote(job_id, safe="")


def create_experiment(
    spec: ExperimentSpec | Mapping[str, Any] | None = None, *, wait_s: int = 0, idempotency_key: str | None = None
) -> Call[Experiment]:
    """Queue a training run, and wait for its end for up to `wait_s` seconds (30 at most)."""
    return _post("/experiments", _model(Experiment), _body(spec), wait_s=wait_s, key=idempotency_key)


def experiment(experiment_id: str) -> Call[Experiment]:
    """One experiment as it is now."""
    return Call("GET", f"/experiments/{_part(experiment_id)}", _model(Experiment))


def experiments_page(**query: Value) -> Call[ExperimentList]:
    """One page of experiments; `after=` its `next` for the one that follows."""
    return Call("GET", "/experiments", _model(ExperimentList), query)


def label_experiment(job: Experiment, changes: Mapping[str, Any]) -> Call[Experiment]:
    """Change `name` or `tags`; what is left out stays."""
    content = _json_of(dict(changes))
    return Call(
        "PATCH", path_of(job), _model(Experiment), content=content, headers={"content-type": "application/json"}
    )


def create_sweep(
    spec: SweepSpec | Mapping[str, Any], *, wait_s: int = 0, idempotency_key: str | None = None
) -> Call[Sweep]:
    """Queue a training run for every member of a grid, and wait for their end for up to `wait_s` seconds."""
    return _post("/sweeps", _model(Sweep), _body(spec), wait_s=wait_s, key=idempotency_key)


def sweep(sweep_id: str) -> Call[Sweep]:
    """One sweep as it is now, with every member's id, status and values."""
    return Call("GET", f"/sweeps/{_part(sweep_id)}", _model(Sweep))


def sweeps_page(**query: Value) -> Call[SweepList]:
    """One page of sweeps; `after=` its `next` for the one that follows."""
    return Call("GET", "/sweeps", _model(SweepList), query)


def analyze(
    file: Path | bytes, *, wait_s: int = 0, idempotency_key: str | None = None, **query: Value
) -> Call[Analysis]:
    """Analyse a weight file. Values: base, matricize, name, priority, reuse, top_k. A Path is sent as it is read."""
    call = _post("/analyze", _model(Analysis), wait_s=wait_s, key=idempotency_key)
    return Call("POST", call.path, call.read, query, file, call.headers)


def analysis(analysis_id: str, **query: Value) -> Call[Analysis]:
    """One analysis as it is now; `top_k` singular values of each tensor."""
    return Call("GET", f"/analyses/{_part(analysis_id)}", _model(Analysis), query)


def analyses_page(**query: Value) -> Call[AnalysisList]:
    """One page of analyses; `after=` its `next` for the one that follows."""
    return Call("GET", "/analyses", _model(AnalysisList), query)


def create_factors(
    analysis_id: str, spec: FactorsSpec | Mapping[str, Any] | None = None, *, idempotency_key: str | None = None
) -> Call[Factors]:
    """Queue the factors of an analysis."""
    return _post(f"/analyses/{_part(analysis_id)}/factors", _model(Factors), _body(spec), key=idempotency_key)


def factors(analysis_id: str, factors_id: str) -> Call[Factors]:
    """Factors as they are now, with their manifest once they are done."""
    return Call("GET", f"/analyses/{_part(analysis_id)}/factors/{_part(factors_id)}", _model(Factors))


def factors_of(analysis_id: str) -> Call[FactorsList]:
    """All factors made of an analysis."""
    return Call("GET", f"/analyses/{_part(analysis_id)}/factors", _model(FactorsList))


def refresh(job: J) -> Call[J]:
    """A job as it is now."""
    return Call("GET", path_of(job), _model(type(job)))


def look(job: Job) -> Call[Job]:
    """How far a job is, without what it has found."""
    return Call("GET", path_of(job), _model(Job), {"top_k": 1} if job.object == "analysis" else {})


def cancel(job: Job) -> Call[Job]:
    """Ask a job to stop; one that is over stays as it is."""
    return _post(f"{path_of(job)}/cancel", _model(Job))


def delete(job: Job) -> Call[None]:
    """Delete a job that does not run, with all that it has made."""
    return Call("DELETE", path_of(job), _nothing)


def metrics(job: Experiment, **query: Value) -> Call[Json]:
    """Losses, ranks and norms. Values: layer, from_, to, stride."""
    return Call("GET", f"{path_of(job)}/metrics", _json, query)


def compression(job: Experiment | Analysis, **query: Value) -> Call[Json]:
    """What a rule makes of the layers. Values: layer, rule, rank, threshold, fraction."""
    return Call("GET", f"{path_of(job)}/compression", _json, query)


def spectrum(job: Experiment | Analysis, **query: Value) -> Call[Json]:
    """Singular values. Values: layer, from_, to, stride, top_k, of, normalize."""
    return Call("GET", f"{path_of(job)}/spectrum", _json, query)


def spectrum_file(job: Experiment | Analysis, file_format: str, **query: Value) -> Call[bytes]:
    """Singular values as a file: png, svg, gif, npy, npz, csv or jsonl."""
    return Call("GET", f"{path_of(job)}/spectrum", _bytes, {**query, "format": file_format})


def summary(job: SweepSummary, **query: Value) -> Call[Json]:
    """A row for each member: varied fields, τ, losses, R² and ranks of one layer. Values: layer."""
    return Call("GET", f"{path_of(job)}/summary", _json, query)


def summary_file(job: SweepSummary, file_format: str, **query: Value) -> Call[bytes]:
    """The rows as csv, or drawn: png or gif. Values: layer, kind, x, y, metric, scale, width, height, frames, fps."""
    return Call("GET", f"{path_of(job)}/summary", _bytes, {**query, "format": file_format})


def weights(job: Experiment, at: Literal["initial", "final"] = "final") -> Call[bytes]:
    """The weights as safetensors."""
    return Call("GET", f"{path_of(job)}/weights", _bytes, {"at": at})


def factors_file(job: Factors) -> Call[bytes]:
    """The file of factors, in the format that they were made in."""
    return Call("GET", path_of(job), _bytes, {"format": job.request.format})


def presets() -> Call[Json]:
    """The named specifications, resolved."""
    return Call("GET", "/presets", _json)


def limits() -> Call[Json]:
    """Every limit that a request can meet."""
    return Call("GET", "/limits", _json)


def ready() -> Call[Json]:
    """Whether new work can be taken; Unavailable tells why not."""
    return Call("GET", "/readyz", _json)
