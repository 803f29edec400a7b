"""What can be known of a search before it runs: refuse at once what cannot succeed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

from sqlalchemy import Engine

from api.auth import Asker
from db.latency import latency_of
from db.models import get_model, list_models
from db.searches import searched_models
from search.cost import cost_tables
from search.errors import InvalidRequest
from search.feasibility import Range, check_feasible, feasible_ranges
from search.inventory import Inventory
from search.limits import costs_and_bounds
from search.request import CostRequest, SearchRequest
from search.space import TooFine, build_space
from search.targets import find_target

Given = ParamSpec("Given")
Found = TypeVar("Found")

ADMISSIONS = 2
"""So many requests a process looks into at once: a large space is seconds of work, which all others would wait for."""
MOST_RANGED = 20_000
"""Units × schemes of the largest space whose ranges are worked out: for a form that is being filled in, a fraction of a
second."""


class Admission:
    """The threads that look into requests.

    They are its own, and not those that answer everything else: a thread that works for a request which is no longer
    waited for still counts, so that no client makes more than `ADMISSIONS` busy. Ranges, which start nothing, have one
    beside them: no search waits for them.
    """

    THREADS = ADMISSIONS + 1

    def __init__(self) -> None:
        self._admitting = ThreadPoolExecutor(ADMISSIONS, thread_name_prefix="admission")
        self._ranging = ThreadPoolExecutor(1, thread_name_prefix="ranges")

    async def admit(self, engine: Engine, request: SearchRequest, asker: Asker) -> None:
        """`admit`, in its turn. Raises what that raises."""
        await _within(self._admitting, admit, engine, request, asker)

    async def ranges(self, engine: Engine, request: CostRequest, asker: Asker) -> dict[str, Range] | None:
        """`ranges`, in its turn. Raises what that raises."""
        return await _within(self._ranging, ranges, engine, request, asker)

    def close(self) -> None:
        """Begin nothing more."""
        for threads in (self._admitting, self._ranging):
            threads.shutdown(wait=False, cancel_futures=True)


async def _within(
    threads: ThreadPoolExecutor, function: Callable[Given, Found], *about: Given.args, **rest: Given.kwargs
) -> Found:
    """What `function` returns, in a thread and with the context of who calls."""
    work = partial(copy_context().run, function, *about, **rest)
    return await asyncio.get_running_loop().run_in_executor(threads, work)


def admit(engine: Engine, request: SearchRequest, asker: Asker) -> None:
    """Raise a problem when the model or its latency profile is unknown or, where its layers are known, the space or a
    budget is impossible.

    A Hugging Face id (`org/name`) whose layers are not known to the asker is admitted unseen.
    """
    latency = latency_of(engine, request)
    inventory = known_layers(engine, request.model, asker)
    if inventory is None:
        return
    space = build_space(inventory, request.space, find_target(request.target))
    check_feasible(*costs_and_bounds(space, inventory, request.budgets, latency))


def ranges(engine: Engine, request: CostRequest, asker: Asker) -> dict[str, Range] | None:
    """Budget → what it can be, of the resources that the request counts; None where the layers are not known yet.

    Raises a problem when the model or its latency profile is unknown, the space impossible, or larger than
    `MOST_RANGED`.
    """
    latency = latency_of(engine, request)
    inventory = known_layers(engine, request.model, asker)
    if inventory is None:
        return None
    try:
        space = build_space(inventory, request.space, find_target(request.target), most=MOST_RANGED)
    except TooFine as error:
        told = f"ranges are not worked out for so fine a space: {error.detail}"
        raise TooFine(told, field=error.field, value=error.value, accepted=error.accepted) from error
    costs = cost_tables(space, inventory)
    if latency is not None:
        costs["latency_us"] = latency.cost(space)
    return feasible_ranges(space, costs)


def known_layers(engine: Engine, name: str, asker: Asker) -> Inventory | None:
    """What the model is made of; None for a Hugging Face id, or a registered model, that no worker has inspected, and
    for an id that only others have searched: which these are is not for everyone.

    Raises InvalidRequest for another name.
    """
    model = get_model(engine, name)
    if model is not None or "/" in name:
        told = model is not None and (
            model.added or asker.sees_all or name in searched_models(engine, key_id=asker.owner)
        )
        return model.inventory if model and told else None
    registered = [model.name for model in list_models(engine) if model.added]
    raise InvalidRequest(
        f"'{name}' is not a registered model; registered: {', '.join(registered) or 'none yet'}",
        field="model",
        value=name,
        accepted=[*registered, "a Hugging Face id such as org/name"],
    )
