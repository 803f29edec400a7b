"""The events of a search as a server-sent stream."""

from __future__ import annotations

from collections.abc import AsyncIterable
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.dependencies import Database, FoundSearch
from api.documents import FINISHED
from api.followers import Followers, wait
from api.metrics import announcement
from api.problems import responses
from db.events import Event, events_after
from db.searches import get_search

router = APIRouter(prefix="/v1/searches", tags=["searches"])

EventId = Annotated[int | None, Header(ge=0, lt=2**63, description="Resume after this event.")]
After = Annotated[int, Query(ge=0, lt=2**63, description="Start after this event, when there is no Last-Event-ID.")]


@router.get(
    "/{search_id}/events", responses=responses(404), response_class=EventSourceResponse, summary="Follow a search"
)
async def follow(
    search: FoundSearch, engine: Database, request: Request, last_event_id: EventId = None, after: After = 0
) -> AsyncIterable[ServerSentEvent]:
    """`state`, `stage`, `progress`, `measured` and `notice` events; ends after the event of the final state.

    A `stage` event of a metric has its estimated seconds, and `about`, the same in words. The id of an event is its
    row: a client that sends `Last-Event-ID` misses nothing and sees nothing twice. Comments keep an idle stream open.
    """
    followers: Followers = request.app.state.followers
    seen = after if last_event_id is None else last_event_id
    with followers.follow(search.id) as news:
        while True:
            finished = search.state in FINISHED
            events = await run_in_threadpool(events_after, engine, search.id, seen)
            for event in events:
                seen = event.id
                yield ServerSentEvent(id=str(event.id), event=event.kind, data=_data(event))
                if event.kind == "state" and event.data["state"] in FINISHED:
                    return
            if not events:
                if finished:
                    return
                await wait(news)
                search = await run_in_threadpool(get_search, engine, search.id)


def _data(event: Event) -> dict[str, Any]:
    about = announcement(event.data, passes=True) if event.kind == "stage" else ""
    return event.data | ({"about": about} if about else {}) | {"at": event.created_at.isoformat()}
