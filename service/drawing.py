"""The drawing process: a pool of one, started with the first picture, so that matplotlib never enters the API."""

import asyncio
import contextlib
import importlib
import math
import multiprocessing
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from service import files
from service.errors import Draining
from service.processes import end_with_parent

_unpruned = {"bytes": math.inf}  # Written by the drawing process since it last pruned; of others' it knows nothing.
STOPPING = "the server is stopping and draws no more pictures"


class Drawing:
    """Draws each picture once: the process looks the cache up again, for a request that stood in line behind its like.

    Not for threads: all of it runs in the event loop.
    """

    def __init__(self, data: Path, cache_limit: int) -> None:
        self._cache = (data, cache_limit)
        self._pool: ProcessPoolExecutor | None = None
        self._closed = False
        self._loop = asyncio.get_running_loop()

    async def draw(self, path: Path, function: str, *arguments: Any) -> bytes:
        """The picture's bytes, from the file at `path` or drawn and kept there. Raises Draining.

        `function` names one of `service.render`: importing it here would bring matplotlib into this process.
        """
        # Not where it is written: an experiment that is deleted meanwhile shall not get its folder back.
        path.parent.mkdir(parents=True, exist_ok=True)
        task = (self._cache, path, function, arguments)
        pool = self._running()
        try:
            return await self._run(pool, task)
        except BrokenProcessPool:
            # The process was killed, perhaps for memory; a second death is the request's own fault.
            if self._pool is pool:  # Of several that failed together, the first has begun anew.
                self._end()
            return await self._run(self._running(), task)

    def _running(self) -> ProcessPoolExecutor:
        if self._closed:
            raise Draining(STOPPING)
        if self._pool is None:
            # Spawned: this process has threads, and a fork of one with threads can deadlock.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, initializer=_set_up)
        return self._pool

    async def _run(self, pool: ProcessPoolExecutor, task: tuple[Any, ...]) -> bytes:
        try:
            return await asyncio.wrap_future(pool.submit(_draw, *task))
        except BrokenProcessPool:
            if self._closed:
                raise Draining(STOPPING) from None
            raise

    def close_soon(self) -> None:
        """Close from a signal handler, which may have interrupted this very code under the pool's locks."""
        self._loop.call_soon_threadsafe(self.close)

    def close(self) -> None:
        """End the process at once; whoever waits for a picture gets Draining."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            # Not pool.shutdown: it waits for a drawing, and for a pipe that a dead process no longer empties. A pool
            # whose process has died fails all its tasks and cleans up by itself. From Python 3.14 on: kill_workers().
            for process in list((pool._processes or {}).values()):
                process.kill()


def _set_up() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends us.
    threading.Thread(target=end_with_parent, daemon=True).start()


def _draw(cache: tuple[Path, int], path: Path, function: str, arguments: tuple[Any, ...]) -> bytes:
    if (cached := files.read_cached(path)) is not None:
        return cached
    content: bytes = getattr(importlib.import_module("service.render"), function)(*arguments)
    with contextlib.suppress(FileNotFoundError):
        files.write(path, content)
    data, limit = cache
    _unpruned["bytes"] += len(content)
    if _unpruned["bytes"] > limit / 100:  # To look at all pictures takes a while once they are many.
        _unpruned["bytes"] = 0
        files.prune_pictures(data, limit)
    return content
