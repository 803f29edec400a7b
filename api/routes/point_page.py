"""The permalink of a point."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from api.dependencies import Database, FoundFrontier, FoundPoint
from api.pages import metrics, point
from api.pages.difference import columns, difference, neighbours
from api.pages.exports import offers_or_reason
from api.pages.render import page
from api.pages.selected import whole_verdict
from api.pages.spending import point_spending
from api.pages.strip import allocation_strip
from api.sensitivities import read_sensitivities
from db.candidates import allocations

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

FIRST_UNITS, MOST_UNITS = 10, 50
"""So many units are listed with their sensitivities, and so many more on demand; the sensitivities page has all."""


@router.get("/searches/{search_id}/points/{number}")
def point_page(engine: Database, frontier: FoundFrontier, chosen: FoundPoint) -> HTMLResponse:
    """What is known of a point: measured and predicted, its layers, its neighbours, its costs, its files."""
    search = frontier.search
    summary = search.summary or {}
    layers = summary.get("layers") or []
    tables = read_sensitivities(engine, search)
    sensitivities = metrics.chosen_sensitivities(chosen, summary, tables)
    beside = neighbours(frontier, chosen)
    others = allocations(engine, search.id, [neighbour.point.number for neighbour in beside])
    by_place: dict[str, dict[str, str]] = {neighbour.place: others[neighbour.point.number] for neighbour in beside}
    spent = point_spending(engine, search, chosen)
    full_costs = spent.full_costs if spent else {}
    offers, no_offers = offers_or_reason(engine, search, chosen)
    return page(
        "point.html",
        search=search,
        frontier=frontier,
        point=chosen,
        verdict=whole_verdict(frontier, chosen),
        comparison=frontier.compare(chosen),
        cards=point.cards(frontier, chosen, full_costs),
        metrics=point.metric_rows(frontier, chosen, full_costs),
        splits=point.split_rows(frontier, chosen),
        prices=point.price_sentences(chosen),
        knee=frontier.knee,
        strip=allocation_strip(chosen, layers, by_place),
        columns=columns(chosen),
        differences=[difference(chosen, one, by_place[one.place], layers) for one in beside],
        spent=spent,
        sensitivities=sensitivities[:FIRST_UNITS],
        more_sensitivities=sensitivities[FIRST_UNITS:MOST_UNITS],
        units=len(sensitivities),
        sensitivity_metrics=list(tables),
        negative=any(value.negative for row in sensitivities for value in row.values.values()),
        offers=offers,
        no_offers=no_offers,
        pager={one.place: one.point.number for one in beside if one.place != "uniform" and chosen.on_frontier},
    )
