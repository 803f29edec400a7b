"""The form that starts a search: what each budget can be and the equivalent commands change as it is filled in."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from pydantic import ValidationError
from sqlalchemy import Engine

from api.admission import Admission
from api.auth import Asker
from api.command_line import command_line, curl_line
from api.dependencies import CurrentAdmission, CurrentAsker, Database
from api.pages.form import Fields, document_of, errors_by_field, fields_of, new_fields, problem_of
from api.pages.render import page
from api.strict import PLAIN
from db.latency import list_profiles
from db.models import list_models
from db.searches import create_search, get_search
from search.budget import BUDGETS
from search.errors import BitfrontierError, InvalidRequest
from search.feasibility import Range
from search.latency_profile import LatencyProfile
from search.metrics import METRICS
from search.request import CostRequest, SearchRequest
from search.targets import TARGETS

router = APIRouter(prefix="/searches/new", include_in_schema=False, default_response_class=HTMLResponse)

MOST_FIELDS = 200
NONCE = "nonce"
"""A field that every form has its own of: what is sent twice starts one search."""
COSTS = ("model", "target", "space", "latency")

From = Annotated[int | None, Query(ge=1, lt=2**63, alias="from"), PLAIN]


@router.get("")
async def form(
    engine: Database, asker: CurrentAsker, admission: CurrentAdmission, request: Request, source: From = None
) -> HTMLResponse:
    """The form with every default in sight; or with the request of the search `from`, to be changed."""
    if source is not None:
        found = await run_in_threadpool(get_search, engine, source, key_id=asker.owner)
        fields = fields_of(found.request)
    else:
        added = [model.name for model in await run_in_threadpool(list_models, engine) if model.added]
        fields = new_fields(added[0] if added else "")
    return await _shown(engine, asker, admission, request, fields | {NONCE: secrets.token_urlsafe(12)}, source=source)


@router.post("")
async def start(
    engine: Database, asker: CurrentAsker, admission: CurrentAdmission, request: Request, source: From = None
) -> Response:
    """Start the search and go to its page; or show the form again, with what is wrong beside its fields."""
    fields = await _fields(request)
    try:
        asked = SearchRequest.model_validate(document_of(fields))
        await admission.admit(engine, asked, asker)
        make = partial(create_search, idempotency_key=_key(fields, asked), key=asker.key)
        search, _ = await run_in_threadpool(make, engine, asked)
    except (ValidationError, BitfrontierError) as error:
        return await _shown(engine, asker, admission, request, fields, source=source, problem=problem_of(error))
    return RedirectResponse(f"/searches/{search.id}", status_code=303)


@router.post("/preview")
async def preview(engine: Database, asker: CurrentAsker, admission: CurrentAdmission, request: Request) -> HTMLResponse:
    """What a form that is being filled in says: the ranges of its budgets and the equivalent commands."""
    fields = await _fields(request)
    return page("partials/preview.html", swapped=True, **await _told(engine, asker, admission, request, fields))


async def _shown(
    engine: Engine,
    asker: Asker,
    admission: Admission,
    request: Request,
    fields: Fields,
    *,
    source: int | None,
    problem: dict[str, Any] | None = None,
) -> HTMLResponse:
    models = await run_in_threadpool(list_models, engine)
    profiles = await run_in_threadpool(list_profiles, engine)
    return page(
        "new.html",
        status=problem["status"] if problem else 200,
        fields=fields,
        source=source,
        problem=problem,
        errors=errors_by_field(problem) if problem else {},
        models=[model for model in models if model.added or asker.sees_all],
        targets=list(TARGETS.values()),
        devices=[("", "latency is not counted"), *((name, name) for name in _devices(profiles, fields))],
        metrics=[METRICS[name] for name in dict.fromkeys([*_picked(fields), *METRICS])],
        budgets=BUDGETS,
        swapped=False,
        **await _told(engine, asker, admission, request, fields),
    )


async def _told(engine: Engine, asker: Asker, admission: Admission, request: Request, fields: Fields) -> dict[str, Any]:
    """The ranges, or why there are none; the commands, or why there are none yet."""
    document = document_of(fields)
    feasible: dict[str, Range] | None = None
    hint = "Name a model to see what its budgets can be."
    if "model" in document:
        try:
            asked = CostRequest.model_validate({name: document[name] for name in COSTS if name in document})
            feasible = await admission.ranges(engine, asked, asker)
            hint = (
                "Beside each is what it can be."
                if feasible
                else "Ranges are known once a worker has inspected the model."
            )
        except (ValidationError, BitfrontierError) as error:
            hint = problem_of(error)["detail"]
    try:
        wanted = SearchRequest.model_validate(document)
    except (ValidationError, InvalidRequest) as error:
        return {"ranges": feasible or {}, "hint": hint, "commands": [], "missing": problem_of(error)["detail"]}
    commands = [("Command line", command_line(wanted)), ("curl", curl_line(wanted, str(request.base_url)))]
    return {"ranges": feasible or {}, "hint": hint, "commands": commands, "missing": ""}


def _picked(fields: Fields) -> list[str]:
    """The metrics that the form names, in its order, in which they also stand in the request."""
    return [name for name in fields.get("sensitivity", "").split() if name in METRICS]


def _devices(profiles: Sequence[LatencyProfile], fields: Fields) -> list[str]:
    """The devices that were timed, and what the form names, which may be the key of a profile."""
    named = [fields["latency.profile"]] if fields.get("latency.profile") else []
    return list(dict.fromkeys([*(profile.device for profile in profiles), *named]))


async def _fields(request: Request) -> Fields:
    """The fields of a form, those that stand several times a line each; raises InvalidRequest for too many."""
    try:
        found = parse_qs((await request.body()).decode(errors="replace"), True, max_num_fields=MOST_FIELDS)
    except ValueError as error:
        raise InvalidRequest("the form has more fields than it can have", field="body", accepted="the form") from error
    return {name: "\n".join(values) for name, values in found.items()}


def _key(fields: Fields, asked: SearchRequest) -> str | None:
    """The idempotency key of a form and what it asks for: changed and sent again, it starts another search."""
    if not fields.get(NONCE):
        return None
    body = json.dumps([fields[NONCE], asked.model_dump(mode="json")], sort_keys=True)
    return "form-" + hashlib.sha256(body.encode()).hexdigest()
