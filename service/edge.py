"""What every request passes: its id, the checks of host, key and rate, HEAD, every answer's headers. Plain ASGI."""

import re

import uuid6
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.access import PUBLIC, RateLimit, is_open, owner_of
from service.errors import HostNotAllowed, RankscopeError, Unauthorized
from service.problems import HEADERS, problem_response
from service.settings import Settings

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Edge:
    """The outermost layer of ours; its only state is the count of requests."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.hosts = settings.host_names
        self.keys = settings.keys
        self.limit = RateLimit(settings.rate_limit)
        self.open_metrics = settings.metrics == "open"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else str(uuid6.uuid7())
        scope.setdefault("state", {})["request_id"] = request_id
        logs.bind(request_id=request_id)  # Every request is a task of its own: nothing has to be unbound.

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "x-request-id": request_id}.items():
                    answer.setdefault(name, value)
            await send(message)

        try:
            scope["state"]["owner"] = self._admit(scope, headers)
        except RankscopeError as error:
            await problem_response(Request(scope), error)(scope, receive, send)
            return
        scope["state"]["is_head"] = scope["method"] == "HEAD"
        if scope["method"] == "HEAD":
            # The server leaves the body of a HEAD out; routes need not know of it unless their answer has no end.
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send_with_headers)

    def _admit(self, scope: Scope, headers: Headers) -> str:
        """Whose request it is. Raises HostNotAllowed, Unauthorized, RateLimited."""
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._serves(hosts[0]):
            raise HostNotAllowed(f"host {', '.join(hosts)[:100]!r} is not one of ours")
        if is_open(scope["path"]) or (self.open_metrics and scope["path"] == "/metrics"):
            return PUBLIC
        address = scope["client"][0] if scope["client"] else ""
        try:
            owner = owner_of(headers.get("authorization"), self.keys)
        except Unauthorized:
            self.limit.count(f"stranger {address}")
            raise
        self.limit.count(owner if self.keys else address)
        return owner

    def _serves(self, host: str) -> bool:
        name = re.sub(r":\d+$", "", host).lower()
        return bool(name) and ("*" in self.hosts or name in self.hosts)
