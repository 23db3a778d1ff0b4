"""A Ray cluster whose nodes are processes of this machine, each with a loopback address of its own."""

import contextlib
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.conftest import free_port, wait_for

MISSING = "Ray is not installed: `make soak` installs it"
QUICK = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",  # A node leaves so long after its head; by default a minute.
    "RAY_raylet_start_wait_time_s": "120",  # A busy machine takes more than Ray's 30.
    "RAY_worker_niceness": "0",  # Ray's 15 leaves it nothing beside tests that run at the same time.
}


def installed() -> bool:
    """Whether there can be a cluster."""
    return importlib.util.find_spec("ray") is not None


class Node:
    """A running `ray start --block`, and all that it started."""

    cpus, gpus = 0, 0

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--object-store-memory=80000000", *arguments],
                stdout=output, stderr=output, stdin=subprocess.DEVNULL, env={**os.environ, **QUICK},
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Return once it takes work; on a busy machine that takes a while."""

        def ready() -> bool:
            text = self.log.read_text()
            assert self.process.poll() is None, text
            return "will now block" in text

        wait_for(ready, "a Ray node", limit_s=180)

    def family(self) -> list[psutil.Process]:
        """All its processes."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [*(own := psutil.Process(self.process.pid)).children(recursive=True), own]
        return []

    def job_processes(self) -> list[psutil.Process]:
        """The processes that run jobs: children of the fork servers of Ray's workers."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if "forkserver" in " ".join(process.cmdline()):
                    found += process.children()
        return found

    def kill(self) -> None:
        """What a machine does that loses its power."""
        everyone = self.family()
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait()
        psutil.wait_procs(everyone, timeout=5)


class Cluster:
    """One head without CPUs, and nodes with what they are given."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.nodes: list[Node] = []
        self._names = itertools.count(1)
        self.start_head()

    @property
    def address(self) -> str:
        """Where the head is."""
        return f"127.0.0.1:{self.port}"

    def start_head(self) -> None:
        """Start the head, the first or another one in its place."""
        given = ["--head", f"--port={self.port}", "--num-cpus=0", "--include-dashboard=false"]
        self.head = Node(self.folder / "head.log", *given, f"--temp-dir={self.folder}")

        self.head.wait_until_ready()

    def add_node(self, cpus: int = 1, gpus: int = 0) -> Node:
        """Start a node and wait for it: of nodes that start together on one machine all may die."""
        given = [f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}"]
        given += [f"--temp-dir={self.folder}/{(number := next(self._names))}"]
        node = Node(self.folder / f"{number}.log", *given, f"--node-ip-address=127.0.1.{number}")
        node.cpus, node.gpus = cpus, gpus
        self.nodes.append(node)
        node.wait_until_ready()
        return node

    def replace(self, node: Node) -> None:
        """Kill the node and start another in its place, with as many CPUs and GPUs."""
        node.kill()
        self.nodes.remove(node)
        self.add_node(node.cpus, node.gpus)

    def stop(self) -> None:
        """End every process."""
        for node in [*self.nodes, self.head]:
            node.kill()


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster that has a head; its folder's path is short, since it is that of sockets."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        running = Cluster(Path(name))
        try:
            yield running
        finally:
            running.stop()
