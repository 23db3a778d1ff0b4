"""A client for services that call rankscope, typed and safe to retry; it needs no torch.

    with Client("http://127.0.0.1:8000") as rankscope:
        job = rankscope.wait(rankscope.create_experiment({"preset": "memo"}))
        picture = rankscope.spectrum_file(job, "gif", layer="W2")

`AsyncClient` has the same methods to await.
"""

from service.client import calls
from service.client.clients import AsyncClient, Client
from service.client.errors import (
    BadRequest,
    ClientError,
    Conflict,
    NotAcceptable,
    NotFound,
    PreconditionFailed,
    Refused,
    RequestTimeout,
    ServerError,
    StorageFull,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unprocessable,
    Unreachable,
    Unreadable,
    Unsendable,
    UnsupportedMediaType,
)
from service.client.events import Event

__all__ = [
    "AsyncClient",
    "BadRequest",
    "Client",
    "ClientError",
    "Conflict",
    "Event",
    "NotAcceptable",
    "NotFound",
    "PreconditionFailed",
    "Refused",
    "RequestTimeout",
    "ServerError",
    "StorageFull",
    "TooLarge",
    "TooManyRequests",
    "Unauthorized",
    "Unavailable",
    "Unprocessable",
    "Unreachable",
    "Unreadable",
    "Unsendable",
    "UnsupportedMediaType",
    "calls",
]
