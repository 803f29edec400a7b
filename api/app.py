"""The HTTP application. `create_app` starts nothing; the lifespan connects, migrates and listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.gzip import GZipMiddleware
from sqlalchemy import Engine

from api.body_limit import BodyLimit
from api.followers import Followers
from api.problems import add_problem_handlers
from api.routes import catalog, events, frontier, health, latency, pages, searches
from api.settings import Settings
from db.engine import connect, migrate

DESCRIPTION = """
How many bits should each layer get? POST a model and a budget; a worker measures configurations of the real model and
the frontier of measured points comes out, beside the uniform baselines it has to beat.

Every error is an RFC 9457 problem document (`application/problem+json`) that names the field, its value and what is
accepted instead.
"""


def create_app(engine: Engine | None = None, settings: Settings | None = None) -> FastAPI:
    """The application on `engine`; without one it connects by `settings` when it starts, and closes what it opened."""
    settings = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.engine = engine or await run_in_threadpool(connect, settings.database_url)
        await run_in_threadpool(migrate, app.state.engine)
        app.state.followers = Followers(app.state.engine.url)
        listening = asyncio.create_task(app.state.followers.listen())
        yield
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
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
    app.add_middleware(BodyLimit, most=settings.max_body_bytes)
    app.add_middleware(GZipMiddleware, minimum_size=2000)
    add_problem_handlers(app)
    for room in (searches, events, frontier, catalog, latency, health, pages):
        app.include_router(room.router)
    return app
