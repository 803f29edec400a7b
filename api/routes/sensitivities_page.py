"""The page of a search's sensitivities, and the panel of one metric."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse

from api.dependencies import Database, FoundSearch
from api.documents import FINISHED
from api.metrics import is_relative
from api.pages import heatmap, metrics
from api.pages.render import page
from api.pages.sensitivities import NETWORK_ORDER, outliers, rank_agreement, table_page
from api.sensitivities import read_sensitivities
from api.strict import PLAIN
from search.errors import NotFound
from search.metrics import METRICS
from search.outliers import FENCE
from search.scheme import Scheme

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/searches/{search_id}/sensitivities")
def sensitivities_page(
    engine: Database,
    search: FoundSearch,
    metric: Annotated[str | None, Query(max_length=100)] = None,
    sort: Annotated[str, Query(max_length=100)] = NETWORK_ORDER,
    number: Annotated[int, Query(alias="page", ge=1, lt=2**31), PLAIN] = 1,
) -> HTMLResponse:
    """Every metric of a search: one of them as a table and a heat map, and how they agree."""
    tables = read_sensitivities(engine, search)
    chosen = metric or next(iter(tables), None)
    if chosen is not None and chosen not in tables:
        raise NotFound(f"search {search.id} has no sensitivities by {chosen}", field="metric", value=chosen)
    return page(
        "sensitivities.html",
        search=search,
        live=search.state not in FINISHED,
        metric=chosen,
        names=list(tables),
        schemes=tables[chosen]["schemes"] if chosen else [],
        table=table_page(chosen, tables[chosen], sort, number) if chosen else None,
        agreement=rank_agreement(tables),
        outliers=outliers(chosen, tables) if chosen else [],
        fence=FENCE,
        reports=metrics.metric_reports(search),
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
