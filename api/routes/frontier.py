"""The results of a search: its frontier, its sensitivities, its points and their files."""

from __future__ import annotations

import io
from math import inf, nan
from typing import Annotated, Any, Literal

import pandas as pd
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from api.dependencies import Database, FoundFrontier, FoundPoint, FoundSearch
from api.documents import FrontierDocument, Point
from api.exporting import export_point
from api.frontier import Included
from api.pages.charts import standalone_page
from api.pages.views import best_verdict
from api.problems import READ, responses
from api.sensitivities import read_sensitivities, sensitivity_table
from api.strict import StrictRoute
from db.candidates import allocations
from search.budget import BUDGETS
from search.errors import InvalidRequest
from search.exports import EXPORTS

router = APIRouter(prefix="/v1/searches/{search_id}", tags=["results"], route_class=StrictRoute)

GROUPS: tuple[Included, ...] = ("dominated", "predicted", "baselines")
TEXT: dict[str, Any] = {"schema": {"type": "string"}}
PARQUET = "application/vnd.apache.parquet"
TABLE: dict[str, Any] = {"text/csv": TEXT, PARQUET: TEXT}
FRONTIER = TABLE | {"text/html": TEXT}
OBJECT: dict[str, Any] = {"schema": {"type": "object"}}
FILES = {export.media_type: TEXT for export in EXPORTS.values()} | {
    "application/json": OBJECT,
    "application/yaml": OBJECT,
}
# Only described: who is refused is told more than that a pattern did not match.
GROUP_LIST = f"^(({'|'.join(GROUPS)})(,({'|'.join(GROUPS)}))*)?$"
BUDGET = f"({'|'.join(BUDGETS)}):[1-9][0-9]{{0,8}}(\\.[0-9]{{1,9}})?"
BUDGET_LIST = f"^({BUDGET}(,{BUDGET})*)?$"

TableFormat = Annotated[Literal["json", "csv", "parquet"], Query(description="`json`, `csv` or `parquet`.")]
FrontierFormat = Annotated[
    Literal["json", "csv", "parquet", "html"], Query(description="`html` is a page that needs nothing else.")
]
Include = Annotated[
    str,
    Query(
        description="Further groups, separated by commas: `baselines`, `dominated`, `predicted`.",
        examples=["baselines,dominated"],
        json_schema_extra={"pattern": GROUP_LIST},
    ),
]
ExportFormat = Annotated[
    str,
    Query(max_length=100, description="The tool that loads the file.", json_schema_extra={"enum": list(EXPORTS)}),
]
Under = Annotated[
    str,
    Query(
        description="Other budgets, as NAME:VALUE separated by commas, in the units of a request's `budgets`: "
        "`best_under` of the JSON is then the best measured point that keeps them.",
        examples=["avg_bits:4.25,size_mb:70"],
        json_schema_extra={"pattern": BUDGET_LIST},
    ),
]


@router.get(
    "/frontier",
    response_model=FrontierDocument,
    response_model_exclude_unset=True,
    responses=responses(*READ, 404) | {200: {"content": FRONTIER}},
    summary="The measured frontier",
)
def frontier(
    engine: Database,
    found: FoundFrontier,
    format: FrontierFormat = "json",
    include: Include = "baselines",
    under: Under = "",
) -> Any:
    """Measured points that fit every budget and that no other dominates; uniform baselines beside them.

    While a search runs, this is the frontier of what has been measured so far.
    """
    groups, budgets = _groups(include), _budgets(under)
    if format == "json":
        spelled_out = [*found.points, *(found.baselines if "baselines" in groups else ())]
        known = allocations(engine, found.search.id, [point.number for point in spelled_out])
        return FrontierDocument.of(found, set(groups), known, budgets)
    name = f"search-{found.search.id}-frontier.{format}"
    if format == "html":
        return _file(standalone_page(found, best_verdict(found)), "text/html; charset=utf-8", name)
    return _table(found.table(groups), format, name, index=True)


@router.get(
    "/sensitivities",
    responses=responses(*READ, 404) | {200: {"content": TABLE}},
    summary="The sensitivity tables",
)
def sensitivities(search: FoundSearch, engine: Database, format: TableFormat = "json") -> Any:
    """Predicted increase of the loss when a unit takes a scheme, by metric, with its standard error.

    What rounding weights and activations contribute stands beside it. A metric that is not in units of the loss (see
    `/v1/metrics`) gives relative scores. JSON: units × schemes tables for each metric, null where a scheme is not
    allowed. CSV and Parquet: one row per metric, unit, scheme.
    """
    tables = read_sensitivities(engine, search)
    if format == "json":
        return JSONResponse({"search": search.id, "tables": tables})
    return _table(sensitivity_table(tables), format, f"search-{search.id}-sensitivities.{format}", index=False)


@router.get("/points/{number}", responses=responses(*READ, 404), summary="One point")
async def point(search: FoundSearch, chosen: FoundPoint) -> Point:
    """A configuration with its allocation, costs, metrics and predictions."""
    return Point.of(search.id, chosen, chosen.allocation)


@router.get(
    "/points/{number}/config",
    responses=responses(*READ, 404, 409) | {200: {"content": FILES, "description": "The file"}},
    response_class=Response,
    summary="The point as a file another tool loads",
)
def config(
    search: FoundSearch,
    chosen: FoundPoint,
    engine: Database,
    format: ExportFormat = "json",
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


def _table(table: pd.DataFrame, format: str, name: str, *, index: bool) -> Response:
    if format == "csv":
        return _file(table.to_csv(index=index), "text/csv; charset=utf-8", name)
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=index)
    return _file(buffer.getvalue(), PARQUET, name)


def _file(content: str | bytes, media_type: str, filename: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{filename}"'}
    return Response(content, media_type=media_type, headers=headers)
