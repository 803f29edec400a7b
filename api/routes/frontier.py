"""The results of a search: its frontier, its sensitivities, its points and their files."""

from __future__ import annotations

import io
from math import inf, nan
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from api.dependencies import Database, FoundFrontier, FoundPoint, FoundSearch
from api.documents import FrontierDocument, Point
from api.exporting import export_point
from api.frontier import Included
from api.pages.charts import standalone_page
from api.problems import responses
from api.sensitivities import read_sensitivities, sensitivity_table
from search.budget import BUDGETS
from search.errors import InvalidRequest
from search.exports import EXPORTS

router = APIRouter(prefix="/v1/searches/{search_id}", tags=["results"])

GROUPS: tuple[Included, ...] = ("dominated", "predicted", "baselines")
FILE_CONTENT: dict[str, Any] = {"text/csv": {"schema": {"type": "string"}}}

TableFormat = Annotated[Literal["json", "csv"], Query(description="`json` or `csv`.")]
FrontierFormat = Annotated[
    Literal["json", "csv", "parquet", "html"], Query(description="`html` is a page that needs nothing else.")
]
Include = Annotated[
    str,
    Query(
        description="Further groups, separated by commas: `baselines`, `dominated`, `predicted`.",
        examples=["baselines,dominated"],
    ),
]

Under = Annotated[
    str,
    Query(
        description="Other budgets, as NAME:VALUE separated by commas, in the units of a request's `budgets`: "
        "`best_under` of the JSON is then the best measured point that keeps them.",
        examples=["avg_bits:4.25,size_mb:70"],
    ),
]


@router.get(
    "/frontier",
    response_model=FrontierDocument,
    response_model_exclude_unset=True,
    responses=responses(404)
    | {200: {"content": FILE_CONTENT | {"application/vnd.apache.parquet": {"schema": {"type": "string"}}}}},
    summary="The measured frontier",
)
def frontier(
    found: FoundFrontier, format: FrontierFormat = "json", include: Include = "baselines", under: Under = ""
) -> Any:
    """Measured points that fit every budget and that no other dominates; uniform baselines beside them.

    While a search runs, this is the frontier of what has been measured so far.
    """
    groups, budgets = _groups(include), _budgets(under)
    if format == "json":
        return FrontierDocument.of(found, set(groups), budgets)
    name = f"search-{found.search.id}-frontier.{format}"
    if format == "html":
        return _file(standalone_page(found), "text/html; charset=utf-8", name)
    table = found.table(groups)
    if format == "csv":
        return _file(table.to_csv(), "text/csv; charset=utf-8", name)
    buffer = io.BytesIO()
    table.to_parquet(buffer)
    return _file(buffer.getvalue(), "application/vnd.apache.parquet", name)


@router.get(
    "/sensitivities", responses=responses(404) | {200: {"content": FILE_CONTENT}}, summary="The sensitivity tables"
)
def sensitivities(search: FoundSearch, engine: Database, format: TableFormat = "json") -> Any:
    """Predicted increase of the loss when a unit takes a scheme, by metric, with its standard error.

    What rounding weights and activations contribute stands beside it. A metric that is not in units of the loss (see
    `/v1/metrics`) gives relative scores. JSON: units × schemes tables for each metric, null where a scheme is not
    allowed. CSV: one row per metric, unit, scheme.
    """
    tables = read_sensitivities(engine, search)
    if format == "json":
        return JSONResponse({"search": search.id, "tables": tables})
    csv = sensitivity_table(tables).to_csv(index=False)
    return _file(csv, "text/csv; charset=utf-8", f"search-{search.id}-sensitivities.csv")


@router.get("/points/{number}", responses=responses(404), summary="One point")
def point(found: FoundFrontier, chosen: FoundPoint) -> Point:
    """A configuration with its allocation, costs, metrics and predictions."""
    return Point.of(found.search.id, chosen)


@router.get(
    "/points/{number}/config",
    responses=responses(404, 409)
    | {200: {"content": {"application/json": {"schema": {"type": "object"}}}, "description": "The file"}},
    response_class=Response,
    summary="The point as a file another tool loads",
)
def config(
    search: FoundSearch,
    chosen: FoundPoint,
    engine: Database,
    format: Annotated[str, Query(max_length=100, description="One of: " + ", ".join(EXPORTS))] = "json",
) -> Response:
    """The configuration as the named tool's own file; refused with the reason where that tool cannot load it."""
    exported = export_point(engine, search, chosen, format)
    return _file(exported.text, exported.media_type, exported.filename)


def _groups(include: str) -> set[Included]:
    names = [name.strip() for name in include.split(",") if name.strip()]
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise InvalidRequest(
            f"'{unknown[0]}' cannot be included; accepted: {', '.join(GROUPS)}",
            field="include",
            value=include,
            accepted=list(GROUPS),
        )
    return {group for group in GROUPS if group in names}


def _budgets(under: str) -> dict[str, float]:
    budgets: dict[str, float] = {}
    for part in filter(None, map(str.strip, under.split(","))):
        name, _, text = part.partition(":")
        try:
            value = float(text)
        except ValueError:
            value = nan
        if name not in BUDGETS or not 0 < value < inf:
            raise InvalidRequest(
                f"'{part}' is not a budget",
                field="under",
                value=under,
                accepted=f"NAME:VALUE separated by commas, of {', '.join(BUDGETS)}, each value a number above 0",
            )
        budgets[name] = min(value, budgets.get(name, inf))
    return budgets


def _file(content: str | bytes, media_type: str, filename: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(content, media_type=media_type, headers=headers)
