"""`python -m worker`: run the jobs of a database until told to stop by SIGTERM or SIGINT."""

import argparse
import json
import os
import sys

from service import logs
from service.errors import AddressUnusable, DatabaseUnusable
from service.settings import Settings

USAGE, DATABASE_UNUSABLE = 2, 5


def main() -> int:
    """Entry point; the answer is the exit code."""
    parser = argparse.ArgumentParser(prog="python -m worker", description=__doc__)
    parser.add_argument("--tied", action="store_true", help="stop when standard input ends, as when the parent dies")
    parser.add_argument("--devices", action="store_true", help="print the devices found as JSON, and do nothing else")
    options = parser.parse_args()
    if options.devices:
        return _print_devices()
    settings = Settings()
    logs.configure(settings)
    # Before the fork server loads any BLAS: one that has started threads must not be forked.
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"
    # Large matrices go back to the system when they are freed. By default the allocator learns to keep them: 25 MB more
    # for a job that reads one layer of a language model after another.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 << 20))
    from worker.loop import Supervisor  # noqa: PLC0415  (numpy reads the variables when it is loaded)

    try:
        Supervisor(settings, tied=options.tied).run()
    except DatabaseUnusable as error:
        sys.stderr.write(f"{error.detail}\n")
        return DATABASE_UNUSABLE
    except AddressUnusable as error:
        sys.stderr.write(f"{error.detail}\n")
        return USAGE
    return 0


def _print_devices() -> int:
    from worker.devices import found_devices  # noqa: PLC0415  (torch, which the worker itself never loads)

    sys.stdout.write(json.dumps(found_devices()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
