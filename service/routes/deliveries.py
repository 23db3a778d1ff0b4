"""How the messages to an experiment's webhook went."""

from typing import Any

from fastapi import APIRouter

from service import store, views
from service.context import JSON_ONLY, Here
from service.routes import experiments

router = APIRouter(prefix="/experiments", tags=["events"])


@router.get("/{experiment_id}/deliveries", response_model=views.DeliveryList, dependencies=JSON_ONLY)
def index(here: Here, experiment_id: str) -> dict[str, Any]:
    """The messages that the experiment's webhook was sent or is to be sent, with every attempt; oldest first."""
    with here.database.read.begin() as session:
        job = store.get_job(session, experiments.KIND, here.owner, experiment_id)
        made = [views.delivery(job, row) for row in store.deliveries(session, job.id)]
    return {"object": "list", "data": made, "has_more": False, "next": None}
