"""What cannot change any more, from memory: answers about jobs that are over, as long as the job is as it was.

Plain ASGI, inside the edge. A route says with `service.http.settled` that its answer depends on nothing but the request
and a revision of a job; the next such request costs one look at that revision instead of the work.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import store
from service.http import matches

SPACE = 32 << 20  # Bytes of all bodies together.
LARGEST = SPACE // 2
OF_304 = {b"etag", b"vary", b"cache-control"}
RawHeaders = list[tuple[bytes, bytes]]
Key = tuple[str, str | None, str, bytes, str | None]


@dataclass
class Answer:
    """An answer, of which job and revision it is; without its body it still tells what has not changed."""

    headers: RawHeaders
    body: bytes | None
    job_id: str
    revision: int

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.body or b"") + 1024


class Replay:
    """Keeps the answers used last; not for threads: all but the look at the database runs in the event loop."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._answers: OrderedDict[Key, Answer] = OrderedDict()
        self._size = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "GET" or b"range" in dict(scope["headers"]):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, accept = headers.get("host"), headers.get("accept")  # Links in answers name the host.
        key = (scope["state"]["owner"], host, scope["path"], scope["query_string"], accept)
        known = self._answers.get(key)
        if known is not None and await run_in_threadpool(_holds, scope["app"].state.context.database, known):
            self._keep(key, known)
            tag = Headers(raw=known.headers)["etag"]
            if matches(headers.get("if-none-match"), tag):
                await _send(send, 304, [pair for pair in known.headers if pair[0] in OF_304], b"")
                return
            if known.body is not None:
                await _send(send, 200, list(known.headers), known.body)
                return
        await self.app(scope, receive, self._listening(key, scope["state"], send))

    def _listening(self, key: Key, state: dict[str, Any], send: Send) -> Send:
        """`send` that keeps what goes out, if a route has said that it is settled."""
        start: Message = {}  # of the answer, until the first piece of its body

        async def send_and_keep(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = {**message, "headers": list(message["headers"])}
            elif start:
                if "settled" in state and start["status"] in {200, 304}:
                    self._keep(key, Answer(start["headers"], _body(start, message), *state["settled"]))
                start = {}
            await send(message)

        return send_and_keep

    def _keep(self, key: Key, answer: Answer) -> None:
        """Keep it as the one used last, and forget what there is no space for."""
        if (before := self._answers.pop(key, None)) is not None:
            self._size -= before.size
        self._answers[key] = answer
        self._size += answer.size
        while self._size > SPACE:
            self._size -= self._answers.popitem(last=False)[1].size


def _body(start: Message, first: Message) -> bytes | None:
    """What is kept of the body: nothing of one in pieces, which is a file and as cheap from the disk."""
    whole = start["status"] == 200 and not first.get("more_body")
    return first["body"] if whole and len(first["body"]) <= LARGEST else None


def _holds(database: store.Database, answer: Answer) -> bool:
    """Whether the job is as it was. Where the database does not answer, the route shall say so."""
    return store.revision_of(database, answer.job_id) == answer.revision


async def _send(send: Send, status: int, headers: RawHeaders, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
