"""Jobs on the nodes of a Ray cluster; this process is its driver, and Ray is asked for places and tidings alone.

A job is a plain task that Ray never retries (the database decides that), and inside it a child process of the local
engine: what kills a job does not kill the node's Ray worker, whose fork server serves the next job. The task dies with
this process, with its node and with Ray's connection to either; the lease and the token do the rest. Ray keeps no order
among what waits, so no more is submitted than the cluster can run now.
"""

import importlib.util
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import wait
from typing import Any

from sqlalchemy.exc import OperationalError

from service import files, logs, store
from service.errors import ClusterLost, DatabaseUnusable, EngineUnusable
from service.settings import Settings
from service.store import Token
from worker.allocation import prepare_environment
from worker.engines import NOT_RUN, SHARE, LocalEngine, Room, uses_cuda

# Silence here and in what we start: a task without a GPU sees none, as will be the default.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
try:
    import ray
    from ray.exceptions import RayError, TaskCancelledError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError as error:
    raise EngineUnusable("RANKSCOPE_ENGINE=ray needs Ray: install rankscope[ray]") from error

log = logging.getLogger("worker.ray")
Resources = dict[str, float]
LOOK_S = 0.2
STALE_S = 2.0
LOST_S = 15.0  # Heads are restarted faster; a lost one ends this process, which is started again and joins a new one.
REACH_S = 5.0
CHECK_S = 60.0  # How long a node may take to start its first task.
SLOW_S = 5.0  # A node may have to start a process first; a job that waits longer waits for room.
BEGIN_S = 30.0  # Room that another driver took, or that lies on two nodes: the job goes back in line after that.
PAUSE_S = 10.0
NEVER_S = 60.0  # A cluster may grow; a job for a GPU that none of its nodes has by then is told so.
END_S = 5.0
LISTEN_S = 0.1
SHARE_WORK = 5000  # Of `Tensor.work`: some seconds, where a task costs one at most.
GONE = -signal.SIGKILL


@dataclass(frozen=True)
class View:
    """The live nodes' resources in all, by node, and what is free of them together."""

    nodes: dict[str, Resources] = field(default_factory=dict)
    free: Resources = field(default_factory=dict)
    at: float = field(default_factory=time.monotonic)

    def total(self, name: str) -> float:
        """What all nodes have of a resource."""
        return sum(node.get(name, 0) for node in self.nodes.values())

    def has_place_for(self, needs: Resources) -> bool:
        """Whether some node, were it empty, could run what has these needs."""
        return any(all(node.get(name, 0) >= need for name, need in needs.items()) for node in self.nodes.values())


class RayJob:
    """A task and the job in it."""

    def __init__(self, results: Any, sent_away: Callable[[str], None], *, uses_gpu: bool) -> None:
        self.uses_gpu = uses_gpu
        self.tasks = [self]
        self.peak = 0
        self._sent_away = sent_away
        self.sentinel, tell = socket.socketpair()
        self._results = results
        self._exitcode: int | None = None
        self._submitted, self._killed = time.monotonic(), False
        self._over: Future[Any] = results.completed().future()
        self._over.add_done_callback(lambda _: tell.close())

    @property
    def exitcode(self) -> int | None:
        """What the job's process ended with, or SIGKILL where nobody lived to tell."""
        if self._exitcode is None and self._over.done():
            self._exitcode = self._result()
        return self._exitcode

    def _result(self) -> int:
        try:
            results = [ray.get(result, timeout=END_S) for result in self._results]
        except TaskCancelledError:
            return GONE if self._killed else NOT_RUN
        except RayError as error:
            log.warning("the task died: %s", _first_line(error))
            return GONE
        code = results[-1] if results else None  # Nothing at all comes of a task whose node dies as it begins.
        self.peak = results[1] if len(results) == 3 else 0
        if isinstance(code, str):
            self._sent_away(code)
        return code if isinstance(code, int) else NOT_RUN

    def terminate(self) -> None:
        """Have the task ask the job to end; one that waits for its turn just goes."""
        ray.cancel(self._results)

    def kill(self) -> None:
        """End the task's process, and with it the job's."""
        if not self._killed:
            self._killed = True
            ray.cancel(self._results, force=True)

    def waits_for(self, seconds: float) -> bool:
        """Whether Ray has had the job for so long without beginning it."""
        late = time.monotonic() - self._submitted > seconds
        return late and not (self._over.done() or self._results.next_ready())

    def join(self, timeout: float | None = None) -> None:
        """Wait so long for its end; without a limit not at all, since there is no process here to be reaped."""
        wait([self.sentinel], timeout or 0)

    def close(self) -> None:
        """Forget it."""
        self.sentinel.close()


class Shares:
    """One job as several tasks. A task that dies takes nothing from the others: the next attempt has less to do."""

    def __init__(self, tasks: list[RayJob]) -> None:
        self.tasks = tasks

    @property
    def exitcode(self) -> int | None:
        """None while any task runs; then what is worst."""
        codes = [code for task in self.tasks if (code := task.exitcode) is not None]
        if len(codes) < len(self.tasks):
            return None
        return next((code for code in codes if code not in {0, NOT_RUN}), max(codes))

    @property
    def peak(self) -> int:
        """The most memory that any task had."""
        return max(task.peak for task in self.tasks)

    @property
    def sentinel(self) -> Any:
        """That of a task that still runs."""
        return next((task for task in self.tasks if task.exitcode is None), self.tasks[0]).sentinel

    def terminate(self) -> None:
        """Ask all tasks to end."""
        for task in self.tasks:
            task.terminate()

    def kill(self) -> None:
        """End all tasks."""
        for task in self.tasks:
            task.kill()

    def join(self, timeout: float | None = None) -> None:
        """Wait so long for the end of all."""
        deadline = time.monotonic() + (timeout or 0)
        for task in self.tasks:
            task.join(max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Forget them."""
        for task in self.tasks:
            task.close()


class RayEngine:
    """The driver of a cluster. Its end says nothing about the jobs: they run elsewhere."""

    shares_fate = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.model_copy(update={"data": settings.data.absolute()})
        self._mark = ""
        self._view = View()
        self._free: Resources = {}
        self._gpu_seen = self._view.at
        self._refused = -PAUSE_S
        self._closing = threading.Event()

    def open(self) -> None:
        """Join the cluster, and see that its nodes share what jobs need. Raises ClusterLost, EngineUnusable."""
        _reach(self._settings.ray_address)
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(self._settings.ray_address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RayError, RuntimeError, ValueError) as error:
            raise ClusterLost(f"cannot join Ray at {self._settings.ray_address}: {_first_line(error)}") from error
        finally:
            signal.signal(signal.SIGTERM, before)  # Ray puts one of its own there.
        self._mark = files.mark(self._settings.data)
        self._view = _look()
        self._check_nodes()
        threading.Thread(target=self._watch, daemon=True).start()
        log.info("Ray has %g CPUs and %g GPUs", self._view.total("CPU"), self._view.total("GPU"))

    def _check_nodes(self) -> None:
        check = ray.remote(find_fault)
        faults = {}
        for node, resources in self._view.nodes.items():
            if "CPU" in resources:
                place = NodeAffinitySchedulingStrategy(node, soft=False)
                task = check.options(num_cpus=0, max_retries=0, scheduling_strategy=place)
                faults[node] = task.remote(self._settings, self._mark)
        for node, fault in faults.items():
            try:
                found = ray.get(fault, timeout=CHECK_S)
            except RayError as error:
                if node not in _look().nodes:
                    continue  # It has left meanwhile.
                found = f"cannot run a task of ours: {_first_line(error)}"
            if found is not None:
                raise EngineUnusable(f"Ray's node {node[:8]} {found}")

    def _watch(self) -> None:
        """Keep the view fresh. A thread of its own: without its head Ray gives no answer at all."""
        while not self._closing.wait(LOOK_S):
            try:
                self._view = _look()
            except RayError as error:
                log.warning("Ray does not tell of its nodes: %s", _first_line(error))

    def room(self, running: Sequence[RayJob | Shares]) -> Room:
        """What the cluster has in all less what we use, and no more than it says is free. Raises ClusterLost.

        Neither alone will do: others may use the cluster, and what it says is as old as its last report.
        """
        view, now = self._view, time.monotonic()
        if now - view.at > LOST_S:
            raise ClusterLost(f"Ray at {self._settings.ray_address} has not answered for {LOST_S:g} s")
        tasks = [task for job in running for task in job.tasks if task.exitcode is None]
        for task in tasks:
            if task.waits_for(BEGIN_S):
                log.warning("Ray found no place for a job in %g s", BEGIN_S)
                task.terminate()
        if now - view.at > STALE_S or now - self._refused < PAUSE_S or any(task.waits_for(SLOW_S) for task in tasks):
            return "none"
        cpus = self._settings.threads
        used = {"CPU": cpus * len(tasks), "GPU": sum(task.uses_gpu for task in tasks)}
        self._free = free = {name: min(view.free.get(name, 0), view.total(name) - n) for name, n in used.items()}
        if free["CPU"] < cpus or not view.has_place_for({"CPU": cpus}):
            return "none"
        if view.has_place_for({"CPU": cpus, "GPU": 1}):
            self._gpu_seen = now
        return "any" if free["GPU"] >= 1 or self._has_no_gpu() else "cpu"

    def _has_no_gpu(self) -> bool:
        return "cuda" not in self._settings.devices or time.monotonic() - self._gpu_seen > NEVER_S

    def start(self, token: Token, kind: str, spec: dict[str, Any], total: int) -> RayJob | Shares:
        """Submit the job. One for a GPU where there is none goes without, and finds out what to say about it."""
        uses_gpu = uses_cuda(self._settings, spec) and not self._has_no_gpu()
        n = self._shares(total, uses_gpu=uses_gpu) if kind == "analysis" else 1
        if n == 1:
            return self._submit(token, kind, spec, uses_gpu=uses_gpu)
        log.info("the analysis is shared by %d tasks", n)
        return Shares([self._submit(token, kind, {**spec, SHARE: (i, n)}, uses_gpu=uses_gpu) for i in range(n)])

    def _shares(self, work: int, *, uses_gpu: bool) -> int:
        """How many tasks an analysis is worth, and has room for."""
        room = self._free["GPU"] if uses_gpu else self._free["CPU"] / self._settings.threads
        return max(1, min(work // SHARE_WORK, int(room)))

    def _submit(self, token: Token, kind: str, spec: dict[str, Any], *, uses_gpu: bool) -> RayJob:
        task = ray.remote(run_on_node).options(
            num_cpus=self._settings.threads,
            num_gpus=int(uses_gpu),
            num_returns="streaming",
            max_retries=0,
            name=f"{kind}-{token.job_id}",
        )
        results = task.remote(self._settings, self._mark, logs.bound(), token, kind, spec)
        return RayJob(results, self._pause, uses_gpu=uses_gpu)

    def _pause(self, fault: str) -> None:
        """A node that sends jobs away always has room: give the operator time to see to it."""
        log.error("no job is started for %g s: node %s", PAUSE_S, fault)
        self._refused = time.monotonic()

    def close(self) -> None:
        """Leave the cluster; one that is lost cannot be left, Ray would wait for it."""
        self._closing.set()
        if time.monotonic() - self._view.at < LOST_S:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raise ClusterLost unless somebody listens there; Ray itself would try for a minute."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()
        except OSError as error:
            raise ClusterLost(f"cannot reach Ray's head at {address}: {error.strerror or error}") from error


def _look() -> View:
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    return View(nodes, ray.available_resources())


def _first_line(error: BaseException) -> str:
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"


def find_fault(settings: Settings, mark: str) -> str | None:
    """On a node: what keeps it from running jobs."""
    if importlib.util.find_spec("torch") is None:
        return "has no torch: install rankscope[worker,ray] there"
    if (fault := _misses_data(settings, mark)) is not None:
        return fault
    try:
        database = store.connect(settings)
        with database.read.begin() as session:
            store.anything_queued(session)
        database.engine.dispose()
    except (DatabaseUnusable, OperationalError) as error:
        return f"cannot reach the database of RANKSCOPE_DATABASE_URL: {_first_line(error)}"
    return None


def _misses_data(settings: Settings, mark: str) -> str | None:
    try:
        same = files.has_mark(settings.data, mark)
    except OSError as error:
        return f"cannot use the data folder {settings.data}: {error.strerror}"
    return None if same else f"has another folder at {settings.data}: mount the one that all share"


@lru_cache(maxsize=1)
def _local_engine(settings: Settings) -> LocalEngine:
    """The one of this Ray worker, with its fork server."""
    prepare_environment()
    # multiprocessing's children would run the main program again, which here is Ray's.
    sys.modules["__main__"].__dict__.pop("__file__", None)
    return LocalEngine(settings)


def run_on_node(
    settings: Settings, mark: str, ids: dict[str, Any], token: Token, kind: str, spec: dict[str, Any]
) -> Iterator[int | str | None]:
    """On a node: run the job; after None, a sign of life, comes what is wrong here, or peak memory and exit code."""
    yield None
    if (fault := _misses_data(settings, mark)) is not None:
        yield f"{socket.gethostname()} {fault}"
        return
    logs.bind(**ids)
    process = _local_engine(settings).start(token, kind, spec)
    try:
        # Ray cancels with a KeyboardInterrupt that no system call notices.
        while process.exitcode is None:
            process.join(LISTEN_S)
    except KeyboardInterrupt:
        process.terminate()
        process.join(END_S)
    finally:
        process.kill()
    process.join()
    exit_code = process.exitcode
    yield process.peak
    yield exit_code
