"""The time as it is stored."""

import time


def now() -> int:
    """Microseconds of the Unix epoch."""
    return time.time_ns() // 1000
