"""The page of a search. What it shows is in its address: a live page and a person's choices ask for it anew."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse

from api.dependencies import CurrentAsker, Database, FoundFrontier, FoundSearch, SearchId
from api.documents import FINISHED
from api.pages import charts, metrics, views
from api.pages.journal import KINDS, journal
from api.pages.points import GROUPS, View, points_table
from api.pages.render import page
from api.pages.selected import selected_point
from api.pages.timeline import timeline
from api.strict import PLAIN
from db.events import events_after, last_event, last_of_kind
from db.queue import cancel

router = APIRouter(prefix="/searches/{search_id}", include_in_schema=False, default_response_class=HTMLResponse)

MOST_EVENTS = 10_000


def get_last_event(engine: Database, search_id: SearchId) -> int:
    """The newest event of the search of the path."""
    return last_event(engine, search_id)


def get_view(
    show: Annotated[list[str], Query(max_length=len(GROUPS))] = [],  # noqa: B006 - FastAPI copies it
    sort: Annotated[str, Query(max_length=100)] = "",
    order: Literal["", "asc", "desc"] = "",
    after: Annotated[int, Query(ge=0, lt=2**31), PLAIN] = 0,
    point: Annotated[int | None, Query(ge=0, lt=2**31), PLAIN] = None,
) -> View:
    """What a person has chosen to see."""
    return View(tuple(name for name in GROUPS if name in show) or None, sort, order == "desc", after, point)


@router.get("")
def search_page(
    engine: Database,
    asker: CurrentAsker,
    newest: Annotated[int, Depends(get_last_event)],
    frontier: FoundFrontier,
    view: Annotated[View, Depends(get_view)],
) -> HTMLResponse:
    """A search: progress while it runs, its frontier, its points, what happened to it."""
    # `newest` is read first: what happens from then on, the page hears from the stream.
    search = frontier.search
    events = events_after(engine, search.id, 0, limit=MOST_EVENTS, kinds=KINDS)
    told = {f"{report.name}: {note}" for report in metrics.metric_reports(search) for note in report.notes}
    notices = dict.fromkeys(event.data["message"] for event in events if event.kind == "notice")
    return page(
        "search.html",
        search=search,
        frontier=frontier,
        view=view,
        live=search.state not in FINISHED,
        last_event=newest,
        swapped=False,
        timeline=timeline(search, events, last_of_kind(engine, search.id, "progress"), datetime.now(UTC)),
        journal=journal(events),
        notices=[notice for notice in notices if notice not in told],
        best=frontier.best,
        knee=frontier.knee,
        best_verdict=views.best_verdict(frontier),
        table=points_table(frontier, view),
        selected=selected_point(engine, frontier, view.point),
        trust=views.trust_rows(search),
        work=views.work_done(search, named=asker.owner is None),
    )


@router.get("/progress")
def progress(engine: Database, search: FoundSearch) -> HTMLResponse:
    """How far a live search is. Of one that is finished, its page is to be loaded anew."""
    if search.state in FINISHED:
        return HTMLResponse(headers={"HX-Refresh": "true"})
    events = events_after(engine, search.id, 0, limit=MOST_EVENTS, kinds=("stage", "stage_end"))
    step = last_of_kind(engine, search.id, "progress")
    told = timeline(search, events, step, datetime.now(UTC))
    return page("partials/progress.html", search=search, timeline=told, swapped=True)


@router.get("/chart.json", response_class=JSONResponse)
def chart(frontier: FoundFrontier) -> dict[str, Any]:
    """What the chart is drawn from."""
    return charts.chart_document(frontier)


@router.get("/selected")
def selected(engine: Database, frontier: FoundFrontier, view: Annotated[View, Depends(get_view)]) -> HTMLResponse:
    """The panel of a point that a person has selected; without one, of the best."""
    chosen = selected_point(engine, frontier, view.point)
    return page("partials/selected.html", search=frontier.search, frontier=frontier, view=view, selected=chosen)


@router.post("/cancel")
def cancel_on_page(engine: Database, search: FoundSearch) -> RedirectResponse:
    """Cancel a search, and go back to its page."""
    cancel(engine, search.id)
    return RedirectResponse(f"/searches/{search.id}", status_code=303)
