"""The HTTP application. `create_app` starts nothing; the lifespan connects, migrates and listens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.gzip import GZipMiddleware
from sqlalchemy import Engine

from api.admission import Admission
from api.followers import Followers
from api.keyring import Keyring
from api.middleware.access_log import AccessLog
from api.middleware.body_limit import BodyLimit
from api.middleware.etag import EntityTags
from api.middleware.gate import Gate
from api.middleware.problems import Problems
from api.middleware.request_id import RequestId
from api.middleware.security_headers import SecurityHeaders
from api.middleware.time_limit import TimeLimit
from api.openapi import describe_keys
from api.problems import add_problem_handlers
from api.routes import (
    catalog,
    compare_page,
    events,
    form_page,
    frontier,
    health,
    latency,
    login,
    pages,
    point_page,
    prometheus,
    ranges,
    search_page,
    searches,
    sensitivities_page,
)
from api.settings import Settings
from api.telemetry import Telemetry
from db import logs
from db.engine import connect, connections, migrate
from db.keys import any_keys
from db.readiness import Readiness

logger = logging.getLogger(__name__)

DESCRIPTION = """
How many bits should each layer get? POST a model and a budget; a worker measures configurations of the real model and
the frontier of measured points comes out, beside the uniform baselines it has to beat.

Every error is an RFC 9457 problem document (`application/problem+json`) that names the field, its value and what is
accepted instead.
"""

ROOMS = (
    searches,
    ranges,
    events,
    frontier,
    catalog,
    latency,
    health,
    prometheus,
    login,
    pages,
    form_page,
    search_page,
    point_page,
    sensitivities_page,
    compare_page,
)


def service() -> FastAPI:
    """The application of a process of its own: it writes the logs as `db.logs` says."""
    logs.configure()
    return create_app()


def create_app(engine: Engine | None = None, settings: Settings | None = None) -> FastAPI:
    """The application on `engine`; without one it connects by `settings` when it starts, and closes what it opened."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = engine or await run_in_threadpool(_connect, settings)
        # A request that could not get a connection waits for a thread, as long as it takes, instead.
        current_default_thread_limiter().total_tokens = max(1, connections() - Admission.THREADS)
        await run_in_threadpool(migrate, app.state.engine)
        app.state.followers = Followers(app.state.engine, settings.max_streams)
        app.state.readiness = Readiness(app.state.engine.url)
        app.state.keyring = Keyring()
        app.state.admission = Admission()
        if settings.auth == "keys" and not await run_in_threadpool(any_keys, app.state.engine):
            logger.warning("no key exists yet, and nobody gets in; make one with 'bitfrontier keys create NAME'")
        telemetry.watch(app.state.engine, app.state.followers, app.state.readiness)
        listening = asyncio.create_task(app.state.followers.listen())
        yield
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        app.state.admission.close()
        if engine is None:
            app.state.engine.dispose()

    app = FastAPI(
        title="Bitfrontier",
        version="1",
        summary="A mixed-precision bit-allocation search service.",
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.telemetry = telemetry = Telemetry()
    add_problem_handlers(app)
    for room in ROOMS:
        app.include_router(room.router)
    if settings.auth == "keys":
        describe_keys(app)
    _surround(app, settings)
    return app


def _connect(settings: Settings) -> Engine:
    return connect(
        settings.database_url, statement_timeout=settings.statement_seconds, application_name="bitfrontier-api"
    )


def _surround(app: FastAPI, settings: Settings) -> None:
    """Put the middleware around the routes, from the innermost to the outermost."""
    app.add_middleware(BodyLimit, most=settings.max_body_bytes, seconds=settings.body_seconds)
    app.add_middleware(EntityTags)
    app.add_middleware(GZipMiddleware, minimum_size=2000)
    app.add_middleware(Gate, access=settings.auth, hosts=settings.hosts)
    app.add_middleware(TimeLimit, seconds=settings.answer_seconds)
    app.add_middleware(Problems)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(AccessLog, telemetry=app.state.telemetry)
    app.add_middleware(RequestId)
