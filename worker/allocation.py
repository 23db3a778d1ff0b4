"""The environment of every process that runs jobs; it has to be there before numpy and torch are loaded."""

import os


def prepare_environment() -> None:
    """Set it for this process and all that it starts."""
    # A fork server whose BLAS has started threads must not be forked.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    # Large matrices go back to the system when they are freed. By default the allocator learns to keep them: 25 MB more
    # for a job that reads one layer of a language model after another.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 20))
