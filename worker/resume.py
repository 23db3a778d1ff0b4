"""Checkpoints: what a job goes on from when its process, its worker or its machine has died.

A checkpoint is a safetensors file in a folder of the job's own. It counts once the database names it, which happens in
the transaction that stores all that was recorded up to it; an attempt never touches the files of later ones.
"""

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from service import files, store
from service.settings import Settings
from worker.recorder import Recorder
from worker.trainer import Trainer

log = logging.getLogger("worker.resume")
COST_RATIO = 20  # At most a twentieth of the time goes into checkpoints.
NAME = re.compile(r"\d+-\d+")
State = dict[str, NDArray[Any]]


class Checkpoints:
    """The checkpoints of one attempt."""

    def __init__(self, settings: Settings, recorder: Recorder) -> None:
        self._folder = files.checkpoint_folder(settings.data, recorder.token.job_id)
        self._interval = settings.checkpoint_s
        self._recorder = recorder
        self._number = 0
        self._last, self._pause = time.monotonic(), self._interval

    def resume(self, trainer: Trainer) -> None:
        """Go on where an earlier attempt has left off; where there is nothing to go on from, at the start."""
        name = self._recorder.read(lambda session: store.checkpoint_of(session, self._recorder.token.job_id))
        if name is None:
            return
        try:
            trainer.restore(load((self._folder / name).read_bytes()))
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("the job starts anew, its checkpoint %s is of no use: %s", name, error)

    def offer(self, state: Callable[[], State]) -> None:
        """Keep the state if it is time to, or if the worker is to stop. Raises Drained, Canceled, LostJob."""
        began = time.monotonic()
        if self._recorder.draining or began - self._last >= self._pause:
            try:
                self._keep(state())
            except OSError as error:
                log.warning("no checkpoint can be written: %s", error)
            self._last = time.monotonic()
            self._pause = max(self._interval, COST_RATIO * (self._last - began))
        self._recorder.stop_if_draining()

    def _keep(self, state: State) -> None:
        self._number += 1
        path = self._folder / f"{self._recorder.token.attempt}-{self._number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, save(state))
        if not self._recorder.keep(path.name):
            path.unlink()  # The database is away: what it names is still the last.
            return
        for other in self._folder.iterdir():
            if _order(other) < _order(path):
                other.unlink()


def _order(path: Path) -> tuple[int, ...]:
    """Attempt and number; what is no checkpoint comes first: an earlier attempt died while it wrote."""
    return tuple(int(part) for part in path.name.split("-")) if NAME.fullmatch(path.name) else ()
