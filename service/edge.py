"""What every request passes: its id, the host check, HEAD, and the headers of every answer. Plain ASGI."""

import re

import uuid6
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import HostNotAllowed
from service.problems import HEADERS, problem_response

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Edge:
    """The outermost layer of ours; it holds no state."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else str(uuid6.uuid7())
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in {**HEADERS, "x-request-id": request_id}.items():
                    answer.setdefault(name, value)
            await send(message)

        if not self._serves(headers.get("host")):
            error = HostNotAllowed(f"host {headers.get('host', '')[:100]!r} is not one of ours")
            await problem_response(Request(scope), error)(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            # The server leaves the body of a HEAD out; routes need not know of it.
            scope = {**scope, "method": "GET"}
        await self.app(scope, receive, send_with_headers)

    def _serves(self, host: str | None) -> bool:
        name = re.sub(r":\d+$", "", host or "").lower()
        return bool(name) and ("*" in self.hosts or name in self.hosts)
