"""`rankscope serve`: the API in this process, workers as its subprocesses, all ending together."""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.protocol import protocol_of
from service.settings import Settings, environment

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

    def stop(self) -> None:
        """Ask all to stop; they have the time until `__exit__`."""
        if self._stopping.is_set():
            return  # A second signal would make them drop their jobs.
        self._stopping.set()
        for process in list(self._processes.values()):
            process.terminate()

    def __exit__(self, *_: object) -> None:
        self.stop()
        for thread in self._threads:
            thread.join(EXIT_S)
        for process in self._processes.values():
            process.kill()


class Server(uvicorn.Server):
    """A server that tells its helpers of the end when the signal comes, not when the last request is done."""

    def __init__(self, app: FastAPI, settings: Settings, address: tuple[str, int], workers: Workers) -> None:
        # h11, the other choice, took a request with both Content-Length and Transfer-Encoding.
        config = uvicorn.Config(
            app,
            *address,
            http=protocol_of(settings),
            server_header=False,
            proxy_headers=bool(settings.proxies),  # By default any caller on this machine could name itself.
            forwarded_allow_ips=settings.proxies,
            timeout_graceful_shutdown=5,
            log_config=None,  # `service.logs` has it all.
            access_log=False,
        )
        super().__init__(config)
        self._app = app
        self._workers = workers

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop: workers give their jobs back, and nobody waits for pictures or events any more."""
        if not self.should_exit:  # The event loop may have ended before a second signal comes.
            self._workers.stop()
            if (context := getattr(self._app.state, "context", None)) is not None:
                context.drawing.close_soon()
                context.streams.close_soon()
        super().handle_exit(sig, frame)


def serve(settings: Settings, host: str, port: int, workers: int, *, tied: bool) -> None:
    """Run until SIGTERM, SIGINT or, if `tied`, the end of standard input."""

    def stop_at_end_of_input() -> None:
        # Not sys.stdin.read: a thread inside it holds a lock that the interpreter wants when it exits.
        while os.read(sys.stdin.fileno(), 4096):
            continue
        os.kill(os.getpid(), signal.SIGTERM)

    if tied:
        threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    with Workers(settings, workers) as running:
        server = Server(create_app(settings), settings, (host, port), running)
        for number in (signal.SIGTERM, signal.SIGINT):
            # uvicorn raises the signal again when it has stopped: the default action would end us before the workers.
            signal.signal(number, server.handle_exit)
        server.run()
