"""Whether the process lives, and whether it can serve."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text

from api.dependencies import Database
from api.problems import responses

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The process lives, or is ready."""

    status: Literal["ok"] = "ok"


@router.get("/healthz", responses=responses(), summary="Is the process alive?")
def alive() -> Health:
    """Answers whenever the process does; touches nothing else."""
    return Health()


@router.get("/readyz", responses=responses(), summary="Can it serve?")
def ready(engine: Database) -> Health:
    """Answers when the database does; 503 otherwise."""
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    return Health()
