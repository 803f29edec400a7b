"""Searches: create, read, list, cancel."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool

from api.dependencies import CurrentAdmission, CurrentAsker, Database, FoundSearch
from api.documents import FINISHED, SearchDocument, SearchPage, SearchSummary
from api.problems import BODY, READ, responses
from api.strict import PLAIN, StrictRoute
from db.queue import cancel
from db.searches import Search, create_search, find_created, get_search, list_searches
from db.states import State
from search.request import SearchRequest

router = APIRouter(prefix="/v1/searches", tags=["searches"], route_class=StrictRoute)

RETRY_SECONDS = 2

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="The same idempotency key with the same body gives the same search, however often it is sent.",
    ),
]


@router.post("", status_code=202, responses=responses(*BODY), summary="Start a search")
async def create(
    request: SearchRequest,
    engine: Database,
    asker: CurrentAsker,
    admission: CurrentAdmission,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> SearchDocument:
    """Queue a search for a worker.

    What cannot succeed is refused at once: an unknown model, a space or a budget that is impossible. Follow the search
    at `Location`, or its events.
    """
    search: Search | None = None
    if idempotency_key is not None:
        # What was admitted once is not looked into again: since then the model may have gone.
        seen = partial(find_created, idempotency_key=idempotency_key, key=asker.key)
        search = await run_in_threadpool(seen, engine, request)
    if search is None:
        await admission.admit(engine, request, asker)
        make = partial(create_search, idempotency_key=idempotency_key, key=asker.key)
        search = (await run_in_threadpool(make, engine, request))[0]
    response.headers["Location"] = f"/v1/searches/{search.id}"
    response.headers["Retry-After"] = str(RETRY_SECONDS)
    return SearchDocument.of(search, of_all=asker.sees_all)


@router.get("", responses=responses(*READ), summary="List searches, newest first")
def list_all(
    engine: Database,
    asker: CurrentAsker,
    limit: Annotated[int, Query(ge=1, le=200), PLAIN] = 50,
    cursor: Annotated[int | None, Query(ge=1, lt=2**63, description="`next_cursor` of the page before."), PLAIN] = None,
    state: Annotated[State | None, Query(description="Only searches in this state.")] = None,
    model: Annotated[str | None, Query(max_length=200, description="Only searches of this model.")] = None,
) -> SearchPage:
    """A page of searches, without their requests and summaries: those that were started with the same API key.

    A key with the scope admin sees those of all keys.
    """
    found = list_searches(engine, limit=limit + 1, before=cursor, state=state, model=_text(model), key_id=asker.owner)
    page = found[:limit]
    return SearchPage(
        searches=[SearchSummary.of(search, of_all=asker.sees_all) for search in page],
        next_cursor=page[-1].id if len(found) > limit else None,
    )


@router.get("/{search_id}", responses=responses(*READ, 404), summary="Read a search")
async def read(search: FoundSearch, asker: CurrentAsker, response: Response) -> SearchDocument:
    """State, stage, progress, request and, when it failed, the problem."""
    if search.state not in FINISHED:
        response.headers["Retry-After"] = str(RETRY_SECONDS)
    return SearchDocument.of(search, of_all=asker.sees_all)


@router.post("/{search_id}/cancel", responses=responses(404), summary="Cancel a search")
def stop(search: FoundSearch, asker: CurrentAsker, engine: Database) -> SearchDocument:
    """A queued search is cancelled at once, a running one when its worker next looks; a finished one stays as it is."""
    cancel(engine, search.id)
    return SearchDocument.of(get_search(engine, search.id), of_all=asker.sees_all)


def _text(value: str | None) -> str | None:
    # Postgres text holds no NUL, so no model has it in its name.
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if value else value
