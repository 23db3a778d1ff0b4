"""When a request is sent again, and after how long. The loop itself is tenacity's."""

import random
from typing import Any

from tenacity import RetryCallState, retry_if_exception, stop_after_attempt

from service.client.calls import Call
from service.client.errors import Refused

FIRST_S, LONGEST_S = 0.25, 8.0
Policy = dict[str, Any]


def pause_s(failures: int, error: BaseException | None) -> float:
    """Seconds to wait: longer each time, by chance so that callers spread, and no less than Retry-After says."""
    backoff = random.uniform(0.5, 1) * min(LONGEST_S, FIRST_S * 2.0 ** (failures - 1))  # noqa: S311 - no secret
    asked = error.retry_after_s if isinstance(error, Refused) else None
    return max(backoff, asked or 0)


def policy(call: Call[Any], retries: int) -> Policy:
    """How tenacity repeats a call; the last error is the one that is raised."""

    def wait(state: RetryCallState) -> float:
        error = None if state.outcome is None else state.outcome.exception()
        return pause_s(state.attempt_number, error)

    return {
        "stop": stop_after_attempt(retries + 1),
        "retry": retry_if_exception(call.may_be_repeated),
        "wait": wait,
        "reraise": True,
    }
