"""The two clients: the same methods, one that waits and one for asyncio. What they send is in `calls`."""

import asyncio
import contextlib
import functools
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import Any, BinaryIO, Concatenate, ParamSpec, Self, TypeVar

import httpx
from httpx_sse import aconnect_sse, connect_sse
from tenacity import AsyncRetrying, Retrying

from service.client import calls
from service.client.calls import Call, J, M, Page, Value
from service.client.errors import Refused, Unreachable, Unreadable, Unsendable, refusal
from service.client.events import Event, Following
from service.client.retries import policy
from service.schemas import TERMINAL
from service.views import AnalysisSummary, Experiment, Job, SweepSummary

P = ParamSpec("P")
T = TypeVar("T")
KEY = "RANKSCOPE_API_KEY"
RETRIES = 5
TIMEOUT_S = 60.0  # longer than a server waits for a job, and than it is silent on a stream
FIRST_LOOK_S, SLOWEST_LOOK_S = 0.05, 1.0


def _options(server: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    key = os.environ.get(KEY) if api_key is None else api_key
    if key and not re.fullmatch("[!-~]+", key):
        raise Unsendable("the API key has characters that are not visible ASCII")  # Which ones is the key's secret.
    return {
        "base_url": _address(server),
        "timeout": timeout_s,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
    }


def _address(server: str) -> httpx.URL:
    try:
        url = httpx.URL(server)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise Unsendable(f"{server!r} is no server: {error}") from error
    if url.scheme not in {"http", "https"} or not url.host:
        raise Unsendable(f"{server!r} is no server: write http://host:port")
    return url


@contextlib.contextmanager
def _reached(http: httpx.Client | httpx.AsyncClient) -> Iterator[None]:
    try:
        yield
    except httpx.TransportError as error:
        raise Unreachable(f"{http.base_url}: {error or type(error).__name__}") from error
    except httpx.DecodingError as error:
        raise Unreadable(f"{http.base_url}: {error}") from error
    except (UnicodeError, httpx.InvalidURL) as error:
        # Of a name that DNS cannot have, of a value with half a surrogate pair, of an endless id.
        raise Unsendable(f"{http.base_url}: {error}") from error


def _pauses(timeout_s: float | None, job: Job) -> Iterator[float]:
    """Seconds to wait before each look at a job. Raises TimeoutError."""
    deadline, pause = None if timeout_s is None else time.monotonic() + timeout_s, FIRST_LOOK_S
    while deadline is None or time.monotonic() < deadline:
        yield pause if deadline is None else min(pause, max(0, deadline - time.monotonic()))
        pause = min(1.3 * pause, SLOWEST_LOOK_S)
    raise TimeoutError(f"{job.object} {job.id} is not over after {timeout_s:g} s")


def _waiting(build: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    @functools.wraps(build)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    return method


def _awaited(build: Callable[P, Call[T]]) -> Callable[Concatenate["AsyncClient", P], Awaitable[T]]:
    @functools.wraps(build)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.send(build(*args, **kwargs))

    return method


class Client:
    """A client that waits. The API key is `api_key`, or the environment's RANKSCOPE_API_KEY.

    Every method raises Unreachable or Refused, after it has tried `retries` times more where that is safe. It raises
    Unsendable for an id, and the client itself for a server or a key, that no request can carry.
    """

    def __init__(
        self, server: str, *, api_key: str | None = None, retries: int = RETRIES, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.http = httpx.Client(**_options(server, api_key, timeout_s))
        self.retries = retries

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    create_experiment = _waiting(calls.create_experiment)
    experiment = _waiting(calls.experiment)
    label_experiment = _waiting(calls.label_experiment)
    create_sweep = _waiting(calls.create_sweep)
    sweep = _waiting(calls.sweep)
    analyze = _waiting(calls.analyze)
    analysis = _waiting(calls.analysis)
    create_factors = _waiting(calls.create_factors)
    factors = _waiting(calls.factors)
    factors_of = _waiting(calls.factors_of)
    cancel = _waiting(calls.cancel)
    delete = _waiting(calls.delete)
    metrics = _waiting(calls.metrics)
    compression = _waiting(calls.compression)
    spectrum = _waiting(calls.spectrum)
    spectrum_file = _waiting(calls.spectrum_file)
    summary = _waiting(calls.summary)
    summary_file = _waiting(calls.summary_file)
    weights = _waiting(calls.weights)
    factors_file = _waiting(calls.factors_file)
    presets = _waiting(calls.presets)
    limits = _waiting(calls.limits)
    ready = _waiting(calls.ready)

    def send(self, call: Call[T]) -> T:
        """Send a call, again where that is safe, and read its answer."""

        def once() -> T:
            with _reached(self.http):
                return call.result(self.http.send(call.request(self.http)))

        return Retrying(**policy(call, self.retries))(once)

    def download(self, call: Call[bytes], file: BinaryIO) -> None:
        """Write what a call answers with to a file as it comes; it is not sent again."""
        with _reached(self.http):
            answer = self.http.send(call.request(self.http), stream=True)
            with contextlib.closing(answer):
                if not answer.is_success:
                    answer.read()
                    raise refusal(answer)
                for chunk in answer.iter_bytes():
                    file.write(chunk)

    def refresh(self, job: J) -> J:
        """The job as it is now."""
        return self.send(calls.refresh(job))

    def watch(self, job: Job, timeout_s: float | None = None) -> Iterator[Job]:
        """How far the job is, each time it is looked at, until it is over. Raises TimeoutError."""
        for pause in _pauses(timeout_s, job):
            state = self.send(calls.look(job))
            yield state
            if state.status in TERMINAL:
                return
            time.sleep(pause)

    def wait(self, job: J, timeout_s: float | None = None) -> J:
        """The job once it is over, however it ended. Raises TimeoutError."""
        for _ in self.watch(job, timeout_s):
            continue
        return self.refresh(job)

    def experiments(self, **query: Value) -> Iterator[Experiment]:
        """All experiments, page by page. Values: order, status, tag, name_prefix, created_after, created_before."""
        return self._pages(calls.experiments_page, query)

    def sweeps(self, **query: Value) -> Iterator[SweepSummary]:
        """All sweeps, page by page, without their members; values as for experiments."""
        return self._pages(calls.sweeps_page, query)

    def members(self, sweep: SweepSummary) -> Iterator[Experiment]:
        """The experiments of a sweep as they are now, in the order of its grid; each is a request of its own."""
        for member in self.sweep(sweep.id).members:
            yield self.experiment(member["id"])

    def analyses(self, **query: Value) -> Iterator[AnalysisSummary]:
        """All analyses, page by page, without their tensors; values as for experiments."""
        return self._pages(calls.analyses_page, query)

    def _pages(self, build: Callable[..., Call[Page[M]]], query: dict[str, Value]) -> Iterator[M]:
        page = self.send(build(**query))
        yield from page.data
        while page.next is not None:
            page = self.send(build(**{**query, "after": page.next}))
            yield from page.data

    def events(self, job: Job, last_event_id: str | None = None) -> Iterator[Event]:
        """What happens to a job until it is over, from its beginning or after the event of that id."""
        at = Following(f"{calls.path_of(job)}/events", last_event_id, self.retries)
        while not at.over:
            error: Exception | None = None
            try:
                with connect_sse(self.http, "GET", at.path, headers=at.headers) as source:
                    if not source.response.is_success:
                        source.response.read()
                    at.check(source.response)
                    for sent in source.iter_sse():
                        if (event := at.take(sent)) is not None:
                            yield event
                        if at.over:
                            return
            except (Refused, httpx.RequestError, UnicodeError) as caught:
                error = caught
            if not at.over:
                time.sleep(at.broken(error))


class AsyncClient:
    """The same client for asyncio."""

    def __init__(
        self, server: str, *, api_key: str | None = None, retries: int = RETRIES, timeout_s: float = TIMEOUT_S
    ) -> None:
        self.http = httpx.AsyncClient(**_options(server, api_key, timeout_s))
        self.retries = retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()

    create_experiment = _awaited(calls.create_experiment)
    experiment = _awaited(calls.experiment)
    label_experiment = _awaited(calls.label_experiment)
    create_sweep = _awaited(calls.create_sweep)
    sweep = _awaited(calls.sweep)
    analyze = _awaited(calls.analyze)
    analysis = _awaited(calls.analysis)
    create_factors = _awaited(calls.create_factors)
    factors = _awaited(calls.factors)
    factors_of = _awaited(calls.factors_of)
    cancel = _awaited(calls.cancel)
    delete = _awaited(calls.delete)
    metrics = _awaited(calls.metrics)
    compression = _awaited(calls.compression)
    spectrum = _awaited(calls.spectrum)
    spectrum_file = _awaited(calls.spectrum_file)
    summary = _awaited(calls.summary)
    summary_file = _awaited(calls.summary_file)
    weights = _awaited(calls.weights)
    factors_file = _awaited(calls.factors_file)
    presets = _awaited(calls.presets)
    limits = _awaited(calls.limits)
    ready = _awaited(calls.ready)

    async def send(self, call: Call[T]) -> T:
        """Send a call, again where that is safe, and read its answer."""

        async def once() -> T:
            with _reached(self.http):
                return call.result(await self.http.send(call.request(self.http)))

        return await AsyncRetrying(**policy(call, self.retries))(once)

    async def download(self, call: Call[bytes], file: BinaryIO) -> None:
        """Write what a call answers with to a file as it comes; it is not sent again."""
        with _reached(self.http):
            answer = await self.http.send(call.request(self.http), stream=True)
            async with contextlib.aclosing(answer):
                if not answer.is_success:
                    await answer.aread()
                    raise refusal(answer)
                async for chunk in answer.aiter_bytes():
                    file.write(chunk)

    async def refresh(self, job: J) -> J:
        """The job as it is now."""
        return await self.send(calls.refresh(job))

    async def watch(self, job: Job, timeout_s: float | None = None) -> AsyncIterator[Job]:
        """How far the job is, each time it is looked at, until it is over. Raises TimeoutError."""
        for pause in _pauses(timeout_s, job):
            state = await self.send(calls.look(job))
            yield state
            if state.status in TERMINAL:
                return
            await asyncio.sleep(pause)

    async def wait(self, job: J, timeout_s: float | None = None) -> J:
        """The job once it is over, however it ended. Raises TimeoutError."""
        async for _ in self.watch(job, timeout_s):
            continue
        return await self.refresh(job)

    def experiments(self, **query: Value) -> AsyncIterator[Experiment]:
        """All experiments, page by page. Values: order, status, tag, name_prefix, created_after, created_before."""
        return self._pages(calls.experiments_page, query)

    def sweeps(self, **query: Value) -> AsyncIterator[SweepSummary]:
        """All sweeps, page by page, without their members; values as for experiments."""
        return self._pages(calls.sweeps_page, query)

    async def members(self, sweep: SweepSummary) -> AsyncIterator[Experiment]:
        """The experiments of a sweep as they are now, in the order of its grid; each is a request of its own."""
        for member in (await self.sweep(sweep.id)).members:
            yield await self.experiment(member["id"])

    def analyses(self, **query: Value) -> AsyncIterator[AnalysisSummary]:
        """All analyses, page by page, without their tensors; values as for experiments."""
        return self._pages(calls.analyses_page, query)

    async def _pages(self, build: Callable[..., Call[Page[M]]], query: dict[str, Value]) -> AsyncIterator[M]:
        page = await self.send(build(**query))
        for one in page.data:
            yield one
        while page.next is not None:
            page = await self.send(build(**{**query, "after": page.next}))
            for one in page.data:
                yield one

    async def events(self, job: Job, last_event_id: str | None = None) -> AsyncIterator[Event]:
        """What happens to a job until it is over, from its beginning or after the event of that id."""
        at = Following(f"{calls.path_of(job)}/events", last_event_id, self.retries)
        while not at.over:
            error: Exception | None = None
            try:
                async with aconnect_sse(self.http, "GET", at.path, headers=at.headers) as source:
                    if not source.response.is_success:
                        await source.response.aread()
                    at.check(source.response)
                    async for sent in source.aiter_sse():
                        if (event := at.take(sent)) is not None:
                            yield event
                        if at.over:
                            return
            except (Refused, httpx.RequestError, UnicodeError) as caught:
                error = caught
            if not at.over:
                await asyncio.sleep(at.broken(error))
