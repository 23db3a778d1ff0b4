"""Keeping processes from outliving the one that started them."""

import ctypes
import multiprocessing
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """End this multiprocessing child at once when its parent dies; the target of a daemon thread.

    A parent that is killed cannot tell its children, and one that waits for work would wait for ever.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; on Linux, and nothing elsewhere.

    For a process that is busy: one that imports for seconds looks at nothing else.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
