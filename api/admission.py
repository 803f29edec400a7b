"""What can be known of a search before it runs: refuse at once what cannot succeed."""

from __future__ import annotations

from sqlalchemy import Engine

from db.latency import latency_of
from db.models import get_model, list_models
from search.errors import InvalidRequest
from search.feasibility import check_feasible
from search.limits import costs_and_bounds
from search.request import SearchRequest
from search.space import build_space
from search.targets import find_target


def admit(engine: Engine, request: SearchRequest) -> None:
    """Raise a problem when the model or its latency profile is unknown or, where its layers are known, the space or a
    budget is impossible.

    A Hugging Face id (`org/name`) that is not registered is admitted unseen.
    """
    latency = latency_of(engine, request)
    model = get_model(engine, request.model)
    if model is None:
        if "/" in request.model:
            return
        registered = [model.name for model in list_models(engine)]
        raise InvalidRequest(
            f"'{request.model}' is not a registered model; registered: {', '.join(registered) or 'none yet'}",
            field="model",
            value=request.model,
            accepted=[*registered, "a Hugging Face id such as org/name"],
        )
    if model.inventory is None:
        return
    space = build_space(model.inventory, request.space, find_target(request.target))
    check_feasible(*costs_and_bounds(space, model.inventory, request.budgets, latency))
