"""Keeping processes from outliving the one that started them."""

import multiprocessing
import os


def end_with_parent() -> None:
    """End this multiprocessing child at once when its parent dies; the target of a daemon thread.

    A parent that is killed cannot tell its children, and one that waits for work would wait for ever.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
