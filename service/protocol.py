"""HTTP/1.1 for clients that are slow or gone: uvicorn's httptools protocol with a deadline on what it waits for.

A request's head must be whole `header_s` after its first byte (or after the connection), and its body must never be
silent for `body_s`. Who passes a deadline is answered 408 where an answer can still be given, and is closed. A body
that nobody wants any more, because the answer has gone out, may follow for `header_s`. A client that takes nothing of
what is there for it for `answer_s` is cut off. What is no HTTP is answered with a problem document too, and so is a
head, a trailer or a chunk's extension that does not end: the parser would keep all of it in memory.
"""

import asyncio
import re

import uuid6
from starlette.requests import Request
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import IdempotencyKeyInvalid, MalformedRequest, RankscopeError, RequestTimeout
from service.http import HEAD_LIMIT
from service.problems import problem_response
from service.settings import Settings

BAD_KEY = re.compile(rb"^idempotency-key:[^\r\n]*[\0-\x08\x0b\x0c\x0e-\x1f\x7f]", re.IGNORECASE | re.MULTILINE)
OF_BODY = {b"content-length", b"transfer-encoding"}
LAST_CALL_S = 1.0  # Less than the server gives all that goes on when it stops.


class ImpatientProtocol(HttpToolsProtocol):
    """A connection with one timer: for the head, or for the next bytes of the body, or none while we work."""

    header_s = 10.0
    body_s = 30.0
    answer_s = 30.0
    _timer: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None
    _in_head = False
    _came = b""
    _between = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a head."""
        super().connection_made(transport)
        self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Begin to wait for a client that does not take what is there for it."""
        super().pause_writing()
        self._wait_for_reader(self.answer_s)

    def resume_writing(self) -> None:
        """Go on: it has taken most of it."""
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None
        super().resume_writing()

    def shutdown(self) -> None:
        """The server stops: a client that takes nothing has a moment to begin."""
        super().shutdown()
        if self._reader is not None:
            self._reader.cancel()
            self._wait_for_reader(min(self.answer_s, LAST_CALL_S))

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head, self._between = True, 0
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        """A part of the body has come."""
        self._between = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._between = 0
        if not self.transport.is_closing():
            super().on_message_complete()

    def on_headers_complete(self) -> None:
        """The head is whole; what has been waited for has come."""
        self._in_head = False
        self._stop()
        if self.parser.should_upgrade() and any(name in OF_BODY and value != b"0" for name, value in self.headers):
            # The parser takes all that follows an Upgrade for another protocol's.
            self.send_400_response("a request that asks for an Upgrade cannot have a body here; send it as HTTP/1.1")
        else:
            super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Take what came, and see what is still to come."""
        self._came = data
        self._between += len(data)
        super().data_received(data)
        self._came = b""
        if self._between > HEAD_LIMIT and not self.transport.is_closing():
            self.send_400_response(f"more than {HEAD_LIMIT} bytes came that are no body")
        if self.transport.is_closing():
            self._stop()
        elif self.cycle is None or self.cycle.response_complete:
            self._wait_for_head()
        elif self.cycle.more_body:
            self._wait_for_body()
        else:
            self._stop()

    def send_400_response(self, msg: str) -> None:
        """Say that what came is no HTTP, where nothing of another answer has gone out, and close."""
        if self._in_head and BAD_KEY.search(self._came):
            self._answer_head(IdempotencyKeyInvalid("the key has control characters"))
        elif self.cycle is None or self.cycle.response_complete or self._awaits_body():
            self._answer_head(MalformedRequest(msg))
        self.transport.close()

    def _awaits_body(self) -> bool:
        """Whether the request is not whole, and nothing of its answer or of one before it is still to go out."""
        return bool(self.cycle.more_body and not self.cycle.response_started and not self.pipeline)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: an offer of another protocol need not be taken."""

    def on_response_complete(self) -> None:
        """Begin to wait where the client has begun its next head, or still sends a body that was not wanted."""
        super().on_response_complete()
        if self.cycle.response_complete and (self._in_head or self.cycle.more_body):
            self._stop()
            self._wait_for_head()

    def _wait_for_head(self) -> None:
        if self._timer is None:  # The time does not begin anew with every byte.
            self._timer = self.loop.call_later(self.header_s, self._head_is_late)

    def _wait_for_body(self) -> None:
        self._stop()
        self._timer = self.loop.call_later(self.body_s, self._body_is_late)

    def _wait_for_reader(self, seconds: float) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._reader = self.loop.call_later(seconds, self._reader_is_late, waiting)

    def _reader_is_late(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() < waiting:
            self._wait_for_reader(self.answer_s)  # It is slow, but it reads.
        else:
            self.transport.abort()  # Nothing that is written now would arrive.

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _head_is_late(self) -> None:
        if self._in_head:
            self._answer_head(RequestTimeout(f"the head of the request was not whole after {self.header_s:g} s"))
        self.transport.close()

    def _body_is_late(self) -> None:
        if self.flow.read_paused:
            self._wait_for_body()  # It is us who do not read.
            return
        if self._awaits_body():
            late = RequestTimeout(f"nothing more of the body came for {self.body_s:g} s")
            self._answer(Request(dict(self.cycle.scope)), late)
        self.transport.close()

    def _answer_head(self, error: RankscopeError) -> None:
        """Answer what has not become a request."""
        scope = {"type": "http", "headers": [], "state": {"request_id": str(uuid6.uuid7())}}
        self._answer(Request(scope), error)

    def _answer(self, request: Request, error: RankscopeError) -> None:
        answer = problem_response(request, error, headers={"connection": "close"})
        head = b"".join(name + b": " + value + b"\r\n" for name, value in answer.raw_headers)
        self.transport.write(STATUS_LINE[answer.status_code] + head + b"\r\n" + bytes(answer.body))


def protocol_of(settings: Settings) -> type[ImpatientProtocol]:
    """The protocol with the deadlines of the settings: uvicorn makes its own objects of it."""
    deadlines = {"header_s": settings.header_s, "body_s": settings.body_s, "answer_s": settings.answer_s}
    return type("Protocol", (ImpatientProtocol,), deadlines)
