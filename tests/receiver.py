"""A receiver of webhooks: a real HTTP server that keeps what it gets and answers as it is told."""

import contextlib
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Received:
    """One request."""

    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """`answers` are used up one by one, then it is 204: a status, or "hang", "endless" or the place of a redirect."""

    port: int
    got: list[Received] = field(default_factory=list)
    answers: list[int | str] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}/hook"

    def ids(self) -> list[str]:
        """The `webhook-id` of each request."""
        return [one.headers["webhook-id"] for one in self.got]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    receiver: Receiver

    def handle_error(self, *_: Any) -> None:
        """A sender that goes away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        receiver = self.server.receiver
        body = self.rfile.read(int(self.headers["content-length"]))
        receiver.got.append(Received({name.lower(): value for name, value in self.headers.items()}, body))
        answer = receiver.answers.pop(0) if receiver.answers else 204
        if answer == "hang":
            receiver.released.wait(60)
            return
        self.send_response(answer if isinstance(answer, int) else 200 if answer == "endless" else 307)
        if answer == "endless":
            self.send_header("content-length", str(10 << 30))
        else:
            self.send_header("location", str(answer))
            self.send_header("content-length", "0")
        self.end_headers()
        while answer == "endless":
            self.wfile.write(bytes(1 << 20))  # until the sender closes

    def log_message(self, *_: Any) -> None:
        """The tests' output is theirs."""


@contextlib.contextmanager
def receiving(tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    """A receiver on a free port."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.receiver = Receiver(server.server_port)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.receiver
        finally:
            server.receiver.released.set()
            server.shutdown()
            thread.join()
