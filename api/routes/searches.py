"""Searches: create, read, list, cancel."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Query, Response

from api.admission import admit
from api.dependencies import Database, FoundSearch
from api.documents import FINISHED, SearchDocument, SearchPage
from api.problems import responses
from db.queue import cancel
from db.searches import create_search, get_search, list_searches
from db.tables import State
from search.request import SearchRequest

router = APIRouter(prefix="/v1/searches", tags=["searches"])

RETRY_SECONDS = 2

Key = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[!-~]+$",
        description="The same key with the same body gives the same search, however often it is sent.",
    ),
]


@router.post("", status_code=202, responses=responses(400, 413), summary="Start a search")
def create(request: SearchRequest, engine: Database, response: Response, idempotency_key: Key = None) -> SearchDocument:
    """Queue a search for a worker.

    What cannot succeed is refused at once: an unknown model, a space or a budget that is impossible. Follow the search
    at `Location`, or its events.
    """
    admit(engine, request)
    search, _ = create_search(engine, request, idempotency_key=idempotency_key)
    response.headers["Location"] = f"/v1/searches/{search.id}"
    response.headers["Retry-After"] = str(RETRY_SECONDS)
    return SearchDocument.of(search)


@router.get("", responses=responses(), summary="List searches, newest first")
def list_all(
    engine: Database,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[int | None, Query(ge=1, lt=2**63, description="`next_cursor` of the page before.")] = None,
    state: Annotated[State | None, Query(description="Only searches in this state.")] = None,
    model: Annotated[str | None, Query(max_length=200, description="Only searches of this model.")] = None,
) -> SearchPage:
    """A page of searches, without their summaries."""
    found = list_searches(engine, limit=limit + 1, before=cursor, state=state, model=_text(model))
    page = found[:limit]
    return SearchPage(
        searches=[SearchDocument.of(search, with_summary=False) for search in page],
        next_cursor=page[-1].id if len(found) > limit else None,
    )


@router.get("/{search_id}", responses=responses(404), summary="Read a search")
def read(search: FoundSearch, response: Response) -> SearchDocument:
    """State, stage, progress, request and, when it failed, the problem."""
    if search.state not in FINISHED:
        response.headers["Retry-After"] = str(RETRY_SECONDS)
    return SearchDocument.of(search)


@router.post("/{search_id}/cancel", responses=responses(404), summary="Cancel a search")
def stop(search: FoundSearch, engine: Database) -> SearchDocument:
    """A queued search is cancelled at once, a running one when its worker next looks; a finished one stays as it is."""
    cancel(engine, search.id)
    return SearchDocument.of(get_search(engine, search.id))


def _text(value: str | None) -> str | None:
    # Postgres text holds no NUL, so no model has it in its name.
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if value else value
