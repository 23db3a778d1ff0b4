"""The weights themselves, as safetensors."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict

from service import files, store
from service.context import Here, only
from service.downloads import download
from service.errors import InvalidState, RangeNotSatisfiable, SpectrumNotReady
from service.http import validators
from service.openapi import NOT_MODIFIED, PARTIAL, raises

router = APIRouter(prefix="/experiments", tags=["experiments"])


class WeightsQuery(BaseModel):
    """Which weights."""

    model_config = ConfigDict(extra="forbid")

    at: files.At = "final"


@router.get(
    "/{experiment_id}/weights",
    dependencies=only("application/octet-stream"),
    response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, **PARTIAL, **NOT_MODIFIED},
    openapi_extra=raises(InvalidState, SpectrumNotReady, RangeNotSatisfiable),
)
def weights(here: Here, request: Request, experiment_id: str, query: Annotated[WeightsQuery, Query()]) -> Response:
    """Every layer's weight and bias (`W1.weight`, `W1.bias`, …) before or after training; takes Range."""
    with here.database.read.begin() as session:
        row = store.get_job(session, "experiment", here.owner, experiment_id)
    path = files.weights_path(here.settings.data, row.id, row.attempt, query.at)
    if not path.exists():
        if row.status in store.TERMINAL:
            raise InvalidState(f"the run {row.status} before it had {query.at} weights")
        raise SpectrumNotReady(f"the {query.at} weights are not written yet")
    return download(request, path, f"{row.id}-{query.at}.safetensors", validators(request, row, query.at))
