"""The application: routers, the error table, the edge, start and end."""

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Coroutine

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute

from service import files, openapi, problems, store
from service.context import Context
from service.drawing import Drawing
from service.edge import Edge
from service.http import declared_query
from service.monitoring import Requests, StoreCollector, new_registry
from service.replay import Replay
from service.routes import (
    analyses,
    analysis_views,
    compression,
    deliveries,
    events,
    experiments,
    factors,
    meta,
    metrics,
    spectrum,
    sweep_summary,
    sweeps,
    weights,
)
from service.schemas import ExperimentSpec, FactorsSpec
from service.settings import Settings
from service.store import Database
from service.streams import Streams
from service.sweeps import SweepSpec
from service.watch import Watch
from service.webhooks import Sender

log = logging.getLogger(__name__)
ROUTERS = (
    experiments,
    spectrum,
    metrics,
    compression,
    weights,
    sweeps,
    sweep_summary,
    analyses,
    analysis_views,
    factors,
    events,
    deliveries,
    meta,
)
BODIES = (ExperimentSpec, experiments.LabelChanges, FactorsSpec, SweepSpec)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application: `uvicorn --factory service.app:create_app`.

    The database is opened and brought up to date when the server starts. Raises DatabaseUnusable then.
    """
    settings = settings or Settings()
    app = FastAPI(
        title="rankscope",
        version=importlib.metadata.version("rankscope"),
        description="Watch the low-rank bias of neural networks: spectra at every epoch, and what they let you save.",
        openapi_url=None,  # Ours is made when it is first asked for, and not in the event loop.
        redirect_slashes=False,  # A path with a slash too many is not found, like any other that is none of ours.
        lifespan=_lifespan,
        generate_unique_id_function=openapi.operation_id,
        dependencies=[Depends(declared_query)],
    )
    app.state.settings = settings
    app.state.registry = new_registry()
    app.state.methods = [(route.path_regex, route.methods) for route in _routes()]
    app.state.openapi = functools.cache(lambda: openapi.document_of(app, _routes(), BODIES))
    problems.install(app)
    for module in ROUTERS:
        app.include_router(module.router)
    app.add_middleware(Replay)
    app.add_middleware(Edge, settings=settings)
    templates = [(route.path_regex, route.path_format) for route in _routes()]
    app.add_middleware(Watch, templates=templates, requests=Requests(app.state.registry))
    return app


def _routes() -> list[APIRoute]:
    return [route for module in ROUTERS for route in module.router.routes if isinstance(route, APIRoute)]


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    database = store.connect(settings)
    store.migrate(database, settings)
    _sweep(settings, database)
    drawing, streams = Drawing(settings.data, settings.cache_limit), Streams(database, settings.stream_limit)
    app.state.context = Context(settings, database, drawing, streams)
    app.state.registry.register(StoreCollector(settings, database))
    try:
        async with _running(streams.run(), Sender(settings, database).run()):
            yield
    finally:
        drawing.close()
        database.engine.dispose()


@contextlib.asynccontextmanager
async def _running(*endless: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Let these tasks run meanwhile."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one) for one in endless]
        yield
        for task in tasks:
            task.cancel()


def _sweep(settings: Settings, database: Database) -> None:
    """Remove what crashes have left: uploads whose job was never stored, and checkpoints of jobs that are over."""
    with database.read.begin() as session:
        gone = store.missing(session, files.abandoned(settings.data))
        over = store.over(session, files.with_checkpoints(settings.data))
    for job_id in over:
        files.remove_checkpoints(settings.data, job_id)
    for job_id in gone:
        log.warning("removing the upload of %s, which was never stored", job_id)
        files.remove_job(settings.data, job_id)
