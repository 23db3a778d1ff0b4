"""A service of somebody else's: how much weight decay does it take until a layer can be cut? rankscope does the work.

    STUDY_SERVER=http://127.0.0.1:8000 uvicorn --factory examples.decay_study:create_app --port 8001
    curl --json '{"name": "first", "weight_decays": [0, 0.005, 0.02]}' localhost:8001/studies
    curl localhost:8001/studies/first

A study is one experiment for each weight decay, with the study's name as a tag: rankscope remembers, this service does
not. It learns that an experiment is over by webhook where STUDY_PUBLIC_URL and STUDY_WEBHOOK_SECRET are set, and waits
for it otherwise. What a webhook says is only a reason to look: the numbers come from rankscope itself. The API key is
RANKSCOPE_API_KEY.
"""

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Annotated, Any

import anyio
from anyio.abc import TaskGroup
from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, Field, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict
from standardwebhooks import Webhook, WebhookVerificationError

from service.client import AsyncClient, ClientError, NotFound, Refused
from service.views import Experiment

log = logging.getLogger(__name__)
ENDS = ["succeeded", "failed", "canceled"]
R2_LOST = 0.01


class Settings(BaseSettings):
    """Where rankscope is, and where it finds us."""

    model_config = SettingsConfigDict(env_prefix="STUDY_")

    server: str = "http://127.0.0.1:8000"
    public_url: str = ""
    webhook_secret: str = ""


class Study(BaseModel):
    """What is asked."""

    name: Annotated[str, StringConstraints(pattern="^[a-z0-9-]{1,40}$")]
    weight_decays: list[Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1, max_length=20)
    epochs: int = Field(60, ge=1, le=1000)


class Row(BaseModel):
    """What one experiment has shown of its layer W2; the numbers are there once it has succeeded."""

    experiment: str
    weight_decay: float
    status: str
    entropy_rank: float | None = None
    validation_r2: float | None = None
    rank_that_suffices: int | None = None


class Studies:
    """The studies, and what is known of their experiments."""

    def __init__(self, rankscope: AsyncClient, settings: Settings, tasks: TaskGroup) -> None:
        self._rankscope = rankscope
        self._settings = settings
        self._tasks = tasks
        self._rows: dict[str, Row] = {}

    async def start(self, study: Study) -> list[Experiment]:
        """Queue the experiments; a study that is asked for again is the same one, as its idempotency keys are."""
        jobs = []
        for decay in study.weight_decays:
            key = f"{study.name}:{decay}"
            jobs.append(await self._rankscope.create_experiment(self._spec(study, decay), idempotency_key=key))
        if not self._settings.public_url:
            for job in jobs:
                self._tasks.start_soon(self._wait_for, job)
        return jobs

    def _spec(self, study: Study, decay: float) -> dict[str, Any]:
        spec = {"tags": {"study": study.name}, "training": {"weight_decay": decay, "epochs": study.epochs}}
        if not self._settings.public_url:
            return spec
        return {**spec, "webhook": {"url": f"{self._settings.public_url}/hooks/rankscope", "events": ENDS}}

    async def _wait_for(self, job: Experiment) -> None:
        try:
            await self._rankscope.wait(job)
            await self.look_at(job.id)
        except ClientError as error:
            log.warning("%s is not followed any more: %s", job.id, error)

    async def look_at(self, experiment_id: str) -> None:
        """Take note of an experiment that is over."""
        job = await self._rankscope.experiment(experiment_id)
        row = Row(experiment=job.id, weight_decay=job.spec.training.weight_decay, status=job.status)
        if job.status == "succeeded":
            report = await self._rankscope.compression(job, layer="W2")
            metrics = await self._rankscope.metrics(job, layer="W2", from_=job.spec.training.epochs)
            (last,) = metrics["epochs"]
            row.entropy_rank, row.validation_r2 = last["layers"][0]["entropy_rank"], last["validation_r2"]
            enough = last["validation_r2"] - R2_LOST
            row.rank_that_suffices = next(cut["rank"] for cut in report["curve"] if cut["validation_r2"] >= enough)
        self._rows[job.id] = row

    async def table(self, name: str) -> list[Row]:
        """What is known of a study, by weight decay."""
        rows = [
            self._rows.get(job.id)
            or Row(experiment=job.id, weight_decay=job.spec.training.weight_decay, status=job.status)
            async for job in self._rankscope.experiments(tag=f"study:{name}")
        ]
        return sorted(rows, key=lambda row: row.weight_decay)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the service: `uvicorn --factory examples.decay_study:create_app`."""
    settings = settings or Settings()

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncClient(settings.server) as rankscope, anyio.create_task_group() as tasks:
            app.state.studies = Studies(rankscope, settings, tasks)
            yield
            tasks.cancel_scope.cancel()

    app = FastAPI(title="Decay study", lifespan=lifespan)

    @app.post("/studies", status_code=202)
    async def start(study: Study) -> list[str]:
        """Begin a study; the answer has its experiments."""
        try:
            return [job.id for job in await app.state.studies.start(study)]
        except Refused as error:
            raise HTTPException(502, f"rankscope refused: {error}") from error

    @app.get("/studies/{name}")
    async def table(name: str) -> list[Row]:
        """What the study has shown so far."""
        rows: list[Row] = await app.state.studies.table(name)
        return rows

    @app.post("/hooks/rankscope", status_code=204)
    async def hook(request: Request) -> None:
        """Take a webhook. It may come twice, or late: to look again does no harm."""
        try:
            event = Webhook(settings.webhook_secret).verify(await request.body(), dict(request.headers))
        except (WebhookVerificationError, ValueError) as error:
            raise HTTPException(401, "the signature is not rankscope's") from error
        with contextlib.suppress(NotFound):  # deleted meanwhile
            await app.state.studies.look_at(event["data"]["id"])

    return app
