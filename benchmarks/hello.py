"""The least that FastAPI does for a request, under the service's own uvicorn settings: what answers are measured in.

python -m benchmarks.hello PORT
"""

import sys

import uvicorn
from fastapi import FastAPI

from service.protocol import protocol_of
from service.settings import Settings

app = FastAPI()


@app.get("/")
def hello() -> dict[str, str]:
    """Answer."""
    return {}


if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        http=protocol_of(Settings()),
        server_header=False,
        log_config=None,
        access_log=False,
    )
