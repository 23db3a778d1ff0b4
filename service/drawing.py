"""The drawing process: a pool of one, started with the first picture, so that matplotlib never enters the API."""

import importlib
import multiprocessing
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from service import files
from service.processes import end_with_parent


class Drawing:
    """Draws each picture once: the cache is looked up again in the process, where requests stand in line."""

    def __init__(self, data: Path, cache_limit: int) -> None:
        self._data = data
        self._cache_limit = cache_limit
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def draw(self, path: Path, function: str, *arguments: Any) -> bytes:
        """The picture's bytes, from the file at `path` or drawn and kept there.

        `function` names one of `service.render`: importing it here would bring matplotlib into this process.
        """
        try:
            content = self._running().submit(_draw, path, function, arguments).result()
        except BrokenProcessPool:
            # The process was killed, perhaps for memory; a second death is the request's own fault.
            self.close()
            content = self._running().submit(_draw, path, function, arguments).result()
        files.prune_pictures(self._data, self._cache_limit)
        return content

    def _running(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                # Spawned: this process has threads, and a fork of one with threads can deadlock.
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, context, initializer=_set_up)
            return self._pool

    def close(self) -> None:
        """End the process; the next picture starts another."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _set_up() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server ends us.
    threading.Thread(target=end_with_parent, daemon=True).start()


def _draw(path: Path, function: str, arguments: tuple[Any, ...]) -> bytes:
    if path.exists():
        path.touch()  # The least recently used pictures are pruned first.
        return path.read_bytes()
    content: bytes = getattr(importlib.import_module("service.render"), function)(*arguments)
    files.write(path, content)
    return content
