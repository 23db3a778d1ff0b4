"""What the operator is told of every request: a line in the log, and its time. The outermost layer; plain ASGI."""

import logging
import re
import time
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.monitoring import Requests

log = logging.getLogger("service.access")
Templates = Sequence[tuple[re.Pattern[str], str]]
UNKNOWN = "other"  # for paths and methods that we do not have: strangers shall not make new time series
METHODS = {"GET", "HEAD", "POST", "PATCH", "DELETE", "PUT", "OPTIONS"}
PROBES = {"/healthz", "/readyz", "/metrics"}  # asked all the time, by machines


class Watch:
    """Tells of each request under the template of its path, never under the path itself."""

    def __init__(self, app: ASGIApp, templates: Templates, requests: Requests) -> None:
        self.app = app
        self.templates = templates
        self.requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 500  # what the server answers when an exception passes through here

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, note_status)
        finally:
            self._tell(scope, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"]
        route = next((template for pattern, template in self.templates if pattern.match(path)), UNKNOWN)
        method = scope["method"] if scope["method"] in METHODS else UNKNOWN
        self.requests.observe(route, method, status, seconds)
        level = logging.DEBUG if route in PROBES and status < 400 else logging.INFO
        fields = {"method": method, "route": route, "status": status, "duration_s": round(seconds, 6)}
        log.log(level, "request", extra=fields)
