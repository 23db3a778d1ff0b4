"""How much memory a job may take, how much it took, and whether the kernel ended it for taking too much."""

import re
import resource
from pathlib import Path

SIZE = re.compile(r"allocate (\d[\d.]*) ?(bytes|[KMGT]i?B)", re.IGNORECASE)
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def limit_memory(n_bytes: int) -> None:
    """Let this process allocate so many bytes more than it has; beyond them allocations fail with MemoryError."""
    most = _field(PROC / "self/status", "VmData:") * 1024 + n_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def peak_memory(pid: int) -> int:
    """The most bytes of memory that a live process has had at once; 0 where nobody tells."""
    return _field(PROC / str(pid) / "status", "VmHWM:") * 1024


def count_oom_kills() -> int:
    """How many processes the kernel has ended for want of memory: of our control group, or else of the machine."""
    group = CGROUPS / _own_group().lstrip("/") / "memory.events"
    return _field(group, "oom_kill") if group.exists() else _field(PROC / "vmstat", "oom_kill")


class OomKills:
    """Which of this process's children the kernel has ended for want of memory; each kill counts for one of them."""

    def __init__(self) -> None:
        self._told = 0

    def is_one(self, before: int) -> bool:
        """Whether a child that SIGKILL has ended is one of them; `before` was the count when it started."""
        if (now := count_oom_kills()) <= max(before, self._told):
            return False
        self._told = now
        return True


def wanted(error: BaseException) -> str | None:
    """The size of the allocation that failed, where numpy's or torch's message has it."""
    found = SIZE.search(str(error))
    return f"{found[1]} {found[2]}" if found else None


def _own_group() -> str:
    """The path of this process's group in the one hierarchy of control groups v2."""
    file = PROC / "self/cgroup"
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")


def _field(file: Path, name: str) -> int:
    """The number behind a name in one of the kernel's tables; 0 where there is none."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:  # The process has ended, or this is not Linux.
        return 0
    return next((int(row[1]) for row in rows if row[:1] == [name]), 0)
