"""`python -m worker`: run the jobs of a database until told to stop by SIGTERM or SIGINT."""

import argparse
import json
import os
import sys

from service import logs
from service.errors import AddressUnusable, ClusterLost, DatabaseUnusable, EngineUnusable, RankscopeError
from service.settings import Settings
from worker.allocation import prepare_environment

EXIT_CODES: dict[type[RankscopeError], int] = {
    AddressUnusable: 2,
    EngineUnusable: 2,
    ClusterLost: 3,
    DatabaseUnusable: 5,
}


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
    prepare_environment()
    from worker.loop import Supervisor  # noqa: PLC0415  (numpy reads the variables when it is loaded)

    try:
        Supervisor(settings, tied=options.tied).run()
    except tuple(EXIT_CODES) as error:
        sys.stderr.write(f"{error.detail}\n")
        code = EXIT_CODES[type(error)]
        if isinstance(error, ClusterLost):
            os._exit(code)  # The usual way out would let Ray wait a minute for its head.
        return code
    return 0


def _print_devices() -> int:
    from worker.devices import found_devices  # noqa: PLC0415  (torch, which the worker itself never loads)

    sys.stdout.write(json.dumps(found_devices()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
