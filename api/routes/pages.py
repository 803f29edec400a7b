"""The results page: searches, a search, a point; and the files they load."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, HTMLResponse

from api.dependencies import Database, FoundFrontier, FoundPoint, FoundSearch
from api.documents import FINISHED
from api.frontier import Frontier
from api.metrics import announcement, is_relative
from api.pages import charts, heatmap, metrics, views
from api.pages.render import STATIC, page, plotly_script
from api.pages.strip import allocation_strip
from api.sensitivities import read_sensitivities
from db.candidates import candidates
from db.events import events_after
from db.searches import list_searches
from search.errors import NotFound
from search.exports import EXPORTS
from search.metrics import METRICS
from search.scheme import Scheme

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

PAGE_LENGTH = 25
MOST_EVENTS = 10_000
STAGES = ("profile", "sensitivity", "baselines", "optimize", "measure")
LOOPS = {"ilp": (), "evolution": ("evolve",)}
SHORTLY = {"Cache-Control": "public, max-age=300"}
FOR_A_YEAR = {"Cache-Control": "public, max-age=31536000, immutable"}
STATIC_FILES = {path.name: path for path in STATIC.iterdir() if path.suffix in (".css", ".js", ".svg")}


@router.get("/")
def searches(engine: Database, cursor: Annotated[int | None, Query(ge=1, lt=2**63)] = None) -> HTMLResponse:
    """All searches, newest first."""
    found = list_searches(engine, limit=PAGE_LENGTH + 1, before=cursor)
    listed = found[:PAGE_LENGTH]
    rows = [Frontier(search, tuple(candidates(engine, search.id))) for search in listed]
    more = listed[-1].id if len(found) > PAGE_LENGTH else None
    return page("searches.html", rows=rows, best_verdict=views.best_verdict, next_cursor=more, first=cursor is None)


@router.get("/searches/{search_id}")
def search_page(engine: Database, frontier: FoundFrontier) -> HTMLResponse:
    """A search: progress while it runs, and its frontier."""
    return page("search.html", **_search_values(engine, frontier))


@router.get("/searches/{search_id}/points/{number}")
def point_page(engine: Database, frontier: FoundFrontier, point: FoundPoint) -> HTMLResponse:
    """The permalink of a point."""
    search = frontier.search
    summary = search.summary or {}
    tables = read_sensitivities(engine, search)
    sensitivities = metrics.chosen_sensitivities(point, summary, tables)
    line = [other.number for other in frontier.points]
    place = line.index(point.number) if point.number in line else None
    return page(
        "point.html",
        search=search,
        frontier=frontier,
        point=point,
        verdict=views.verdict(frontier, point),
        comparison=frontier.compare(point),
        metrics=views.metric_rows(frontier, point),
        splits=views.split_rows(frontier, point),
        prices=views.price_sentences(point),
        knee=frontier.knee,
        strip=allocation_strip(point, summary.get("layers") or []),
        sensitivities=sensitivities,
        sensitivity_metrics=list(tables),
        negative=any(value.negative for row in sensitivities for value in row.values.values()),
        exports=list(EXPORTS.values()),
        previous=line[place - 1] if place else None,
        following=line[place + 1] if place is not None and place + 1 < len(line) else None,
    )


@router.get("/searches/{search_id}/sensitivities/{metric}")
def sensitivity_panel(engine: Database, search: FoundSearch, metric: str) -> HTMLResponse:
    """What the page of a search shows of one metric; its script asks for it."""
    tables = read_sensitivities(engine, search, only=metric)
    if metric not in tables:
        raise NotFound(f"search {search.id} has no sensitivities by {metric}")
    table, summary = tables[metric], search.summary or {}
    return page(
        "sensitivity.html",
        metric=metric,
        about=METRICS.get(metric),
        relative=is_relative(metric),
        activations=any(Scheme.parse(scheme).quantizes_activations for scheme in table["schemes"]),
        negative=any(value is not None and value < 0 for row in table["values"] for value in row),
        completeness=metrics.completeness(metric, table),
        payload=heatmap.payload(metric, table, summary.get("units") or []),
    )


@router.get("/static/plotly.min.js", response_class=FileResponse)
def plotly_file() -> FileResponse:
    """Plotly's script, from the installed package; its address carries the version."""
    return FileResponse(plotly_script(), media_type="text/javascript", headers=FOR_A_YEAR)


@router.get("/static/{name}", response_class=FileResponse)
def static_file(name: str) -> FileResponse:
    """A style sheet or script of ours."""
    if name not in STATIC_FILES:
        raise NotFound(f"nothing is at /static/{name}")
    return FileResponse(STATIC_FILES[name], headers=SHORTLY)


def _search_values(engine: Database, frontier: Frontier) -> dict[str, Any]:
    search = frontier.search
    best = frontier.best
    events = events_after(engine, search.id, 0, limit=MOST_EVENTS)
    reports = metrics.metric_reports(search)
    told = {f"{report.name}: {note}" for report in reports for note in report.notes}
    notices = dict.fromkeys(event.data["message"] for event in events if event.kind == "notice")
    stages = [event.data for event in events if event.kind == "stage" and event.data["stage"] == search.stage]
    return {
        "search": search,
        "frontier": frontier,
        "best": best,
        "best_verdict": views.best_verdict(frontier),
        "rows": frontier.measured,
        "knee": frontier.knee,
        "trust": views.trust_rows(search),
        "payload": charts.payload(frontier),
        "live": search.state not in FINISHED,
        "stages": (*STAGES, *LOOPS.get(search.request["optimizer"]["method"], ("refine",)), "accept"),
        "stage_about": announcement(stages[-1], passes=True) if stages else "",
        "last_event": events[-1].id if events else 0,
        "reports": reports,
        "drawable": [report.name for report in reports if report.name in ((search.summary or {}).get("tables") or {})],
        "notices": [notice for notice in notices if notice not in told],
    }
