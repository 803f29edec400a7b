"""Whether the process lives, and whether it can serve."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from api.problems import responses
from db.readiness import Readiness

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process lives, or is ready."""

    status: Literal["ok"] = "ok"


@router.get("/healthz", responses=responses(), summary="Is the process alive?")
async def alive(response: Response) -> Health:
    """Answers whenever the process does; touches nothing else."""
    response.headers["Cache-Control"] = "no-store"
    return Health()


@router.get("/readyz", responses=responses(), summary="Can it serve?")
async def ready(request: Request, response: Response) -> Health:
    """Answers when the database does, and has the schema of this version; 503 otherwise, within two seconds."""
    readiness: Readiness = request.app.state.readiness
    await readiness.check()
    response.headers["Cache-Control"] = "no-store"
    return Health()
