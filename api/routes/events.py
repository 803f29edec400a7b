"""The events of a search as a server-sent stream."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterable, AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.dependencies import Database, FoundSearch
from api.documents import FINISHED
from api.followers import POLL_SECONDS, Followers, Tail
from api.metrics import announcement
from api.middleware.gate import still_admitted
from api.problems import AWAY, responses
from api.strict import PLAIN, StrictRoute
from db.errors import DatabaseUnavailable
from db.events import Event
from db.searches import get_search

router = APIRouter(prefix="/v1/searches", tags=["searches"], route_class=StrictRoute)

EventId = Annotated[int | None, Header(ge=0, lt=2**63, description="Resume after this event."), PLAIN]
After = Annotated[
    int, Query(ge=0, lt=2**63, description="Start after this event, when there is no Last-Event-ID."), PLAIN
]


async def get_tail(search: FoundSearch, request: Request) -> AsyncIterator[Tail]:
    """The news of the search of the path, as long as the stream is open. Raises TooManyStreams."""
    followers: Followers = request.app.state.followers
    with followers.follow(search.id) as tail:
        yield tail


@router.get(
    "/{search_id}/events", responses=responses(404), response_class=EventSourceResponse, summary="Follow a search"
)
async def follow(
    search: FoundSearch,
    tail: Annotated[Tail, Depends(get_tail)],
    engine: Database,
    request: Request,
    last_event_id: EventId = None,
    after: After = 0,
) -> AsyncIterable[ServerSentEvent]:
    """`state`, `stage`, `stage_end`, `progress`, `measured` and `notice` events; ends after the event of the final
    state.

    A `stage` event of a metric has its estimated seconds, and `about`, the same in words. The id of an event is its
    row: a client that sends `Last-Event-ID` misses nothing and sees nothing twice. Comments keep an idle stream open,
    also while the database is away. A stream whose key is revoked ends.
    """
    seen = after if last_event_id is None else last_event_id
    finished, looked = search.state in FINISHED, time.monotonic()
    while True:
        news = tail.news
        try:
            events = await tail.after(seen)
            for event in events:
                seen = event.id
                yield ServerSentEvent(id=str(event.id), event=event.kind, raw_data=_text(event))
                if event.kind == "state" and event.data["state"] in FINISHED:
                    return
            if not await still_admitted(request):
                return
            if time.monotonic() > looked + POLL_SECONDS:
                looked = time.monotonic()
                finished = (await run_in_threadpool(get_search, engine, search.id)).state in FINISHED
        except (*AWAY, DatabaseUnavailable):
            # A browser never asks again once a stream was refused, so this one waits for the database.
            await tail.wait(news)
            continue
        if not events:
            if finished:
                return
            await tail.wait(news)


def _text(event: Event) -> str:
    about = announcement(event.data, passes=True) if event.kind == "stage" else ""
    data = event.data | ({"about": about} if about else {}) | {"at": event.created_at.isoformat()}
    return json.dumps(data, allow_nan=False)
