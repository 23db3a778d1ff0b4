"""`rankscope serve`: the API in this process, workers as its subprocesses, all ending together."""

import os
import signal
import subprocess
import sys
import threading

import uvicorn

from service.app import create_app
from service.settings import Settings

RESTART_S = 1.0
EXIT_S = 10.0


class Workers:
    """Worker subprocesses, started again when one dies; each ends when its standard input does."""

    def __init__(self, settings: Settings, count: int) -> None:
        self._environment = {**os.environ, **environment(settings)}
        self._stopping = threading.Event()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._threads = [threading.Thread(target=self._keep, args=(index,)) for index in range(count)]

    def __enter__(self) -> "Workers":
        for thread in self._threads:
            thread.start()
        return self

    def _keep(self, index: int) -> None:
        command = [sys.executable, "-m", "worker", "--tied"]
        while not self._stopping.is_set():
            # A session of its own: Ctrl-C in a terminal shall reach it through us, once, and not beside us.
            process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, env=self._environment, start_new_session=True
            )
            self._processes[index] = process
            if self._stopping.is_set():
                process.terminate()
            process.wait()
            self._stopping.wait(RESTART_S)

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for process in list(self._processes.values()):
            process.terminate()
        for thread in self._threads:
            thread.join(EXIT_S)
        for process in self._processes.values():
            process.kill()


def environment(settings: Settings) -> dict[str, str]:
    """The settings as the environment variables that give them to a subprocess."""
    set_ones = settings.model_dump(exclude_none=True)
    return {f"RANKSCOPE_{name.upper()}": str(value) for name, value in set_ones.items()}


def serve(settings: Settings, host: str, port: int, workers: int, *, tied: bool) -> None:
    """Run until SIGTERM, SIGINT or, if `tied`, the end of standard input."""
    config = uvicorn.Config(
        create_app(settings),
        host=host,
        port=port,
        http="httptools",  # h11 took a request with both Content-Length and Transfer-Encoding.
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
        server.should_exit = True

    def stop_at_end_of_input() -> None:
        # Not sys.stdin.read: a thread inside it holds a lock that the interpreter wants when it exits.
        while os.read(sys.stdin.fileno(), 4096):
            continue
        stop()

    if tied:
        threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn raises the signal again when it has stopped: the default action would end us before the workers.
        signal.signal(number, stop)
    with Workers(settings, workers):
        server.run()
