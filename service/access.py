"""Who asks, and how often they may: API keys and the rate limit.

A key is known by its SHA-256 only. Whoever has one owns what is made with it, and finds nothing of others. Without any
key everybody is `public`.
"""

import hashlib
import hmac
import math
import re
import secrets
import time

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from service.errors import RateLimited, Unauthorized

PUBLIC = "public"
OPEN = re.compile(r"/|/healthz|/readyz|/openapi\.json|/docs(/.*)?|/problems/.*")  # Paths that need no key.


def new_key() -> str:
    """A key that nobody guesses."""
    return f"rk_{secrets.token_urlsafe(32)}"


def fingerprint(key: str) -> str:
    """What the settings hold of a key. No salt: it has 256 random bits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def is_open(path: str) -> bool:
    """Whether anybody may read the path, as often as they like."""
    return OPEN.fullmatch(path) is not None


def owner_of(authorization: str | None, keys: dict[str, str]) -> str:
    """The name of the key in an Authorization header; `keys` is name → fingerprint. Raises Unauthorized."""
    if not keys:
        return PUBLIC
    scheme, _, key = (authorization or "").strip().partition(" ")
    given = fingerprint(key.strip())
    # All are compared, each in constant time: how long it takes tells nothing.
    found = [name for name, known in keys.items() if hmac.compare_digest(given, known)]
    if scheme.lower() == "bearer" and found:
        return found[0]
    challenge = 'Bearer realm="rankscope"'
    if authorization is None:
        detail = "no key came with the request"
    else:
        detail, challenge = "the key is none of ours", f'{challenge}, error="invalid_token"'
    raise Unauthorized(f"{detail}; send Authorization: Bearer <key>", headers={"www-authenticate": challenge})


class RateLimit:
    """How many requests each caller may send in a moving window; of this process alone."""

    def __init__(self, rate: str) -> None:
        self._rate = parse(rate) if rate else None
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    def count(self, caller: str) -> None:
        """Count one request. Raises RateLimited."""
        if self._rate is None or self._limiter.hit(self._rate, caller):
            return
        wait = self._limiter.get_window_stats(self._rate, caller).reset_time - time.time()
        headers = {"retry-after": str(max(1, math.ceil(wait)))}
        raise RateLimited(f"the limit is {self._rate}", limit=str(self._rate), headers=headers)
