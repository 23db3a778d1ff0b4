"""Idempotency-Key: a POST that is sent again does what it asks for only once.

The scope of a key is its owner, method and path. What was made under it is recorded in the transaction that makes it,
so a request that was answered, refused or cut off half-way can be told from one that was not. A replay answers with
what was made as it is now. Without a key nothing is recorded.
"""

import hashlib
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from sqlalchemy.orm import Session

from service import store
from service.context import Context, Here
from service.errors import IdempotencyInProgress, IdempotencyKeyInvalid, IdempotencyKeyReused, MalformedJson

LONGEST_KEY = 255
VISIBLE = r"^[!-~]+$"


class Once:
    """One request under its key; a route asks for `earlier`, and records in its transaction what it makes."""

    def __init__(self, here: Context, scope: str | None) -> None:
        self._here = here
        self._scope = scope
        self._content = ""
        self._replayed = False

    @property
    def headers(self) -> dict[str, str]:
        """What the answer tells of a replay."""
        return {"idempotency-replayed": "true"} if self._replayed else {}

    def earlier(self, content: Any = None) -> str | None:
        """The id of what this key has made before; `content` is the body in a form that JSON can carry.

        Raises IdempotencyKeyReused where that was of another body.
        """
        if self._scope is None:
            return None
        self._content = _digest(content)
        with self._here.database.read.begin() as session:
            record = store.remembered(session, self._scope)
        if record is None:
            return None
        if record.content != self._content:
            raise IdempotencyKeyReused("the key has been used with another body; take a new key for a new request")
        self._replayed = True
        self.release()
        return record.made

    def record(self, session: Session, made: str) -> None:
        """Record the id of what is made in this transaction. Raises IdempotencyInProgress where another was faster."""
        if self._scope is not None:
            store.remember(session, self._scope, self._content, made)
            self.release()  # From here on the database tells.

    def release(self) -> None:
        """Let others with the same key go on."""
        if self._scope is not None and self._here.in_flight.get(self._scope) is self:
            del self._here.in_flight[self._scope]


def _digest(content: Any) -> str:
    """The SHA-256 of a body: the order of keys, white space and escapes do not count."""
    try:
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        raise MalformedJson("the brackets are nested too deeply") from None


async def _once(
    here: Here,
    request: Request,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="names this request: sent again with the same key it does nothing twice; kept for 24 hours",
            json_schema_extra={"minLength": 1, "maxLength": LONGEST_KEY, "pattern": VISIBLE},
        ),
    ] = None,
) -> AsyncIterator[Once]:
    if key is None:
        yield Once(here, None)
        return
    if not re.fullmatch(VISIBLE, key) or len(key) > LONGEST_KEY or len(request.headers.getlist("idempotency-key")) > 1:
        raise IdempotencyKeyInvalid(f"the key must be one value of 1 to {LONGEST_KEY} visible ASCII characters")
    parts = (here.owner, request.method, request.url.path, key)
    scope = hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
    once = Once(here, scope)
    # What is made is guarded by the database; this spares a second upload that could only lose.
    if here.in_flight.setdefault(scope, once) is not once:
        raise IdempotencyInProgress("a request with this key is being received; send it again when that has ended")
    try:
        yield once
    finally:
        once.release()


OnceOnly = Annotated[Once, Depends(_once, scope="function")]
