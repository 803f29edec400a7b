"""The list of searches, and the files that the pages load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse, HTMLResponse
from sqlalchemy import Engine

from api.dependencies import CurrentAsker, Database
from api.documents import FINISHED
from api.frontier import Frontier
from api.pages import views
from api.pages.render import STATIC, VENDOR, page, plotly_script
from api.strict import PLAIN
from db.candidates import best_and_uniform
from db.searches import Search, list_searches, searched_models
from db.states import State
from search.errors import NotFound

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

PAGE_LENGTH = 25
SHORTLY = {"Cache-Control": "public, max-age=300"}
FOR_A_YEAR = {"Cache-Control": "public, max-age=31536000, immutable"}
STATIC_FILES = {
    path.name: path
    for folder in (STATIC, VENDOR)
    for path in folder.iterdir()
    if path.suffix in (".css", ".js", ".svg")
}

ModelFilter = Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$")]


@router.get("/")
def searches(
    engine: Database,
    asker: CurrentAsker,
    cursor: Annotated[int | None, Query(ge=1, lt=2**63), PLAIN] = None,
    state: State | Literal[""] = "",
    model: ModelFilter = "",
) -> HTMLResponse:
    """The searches that the asker may see, newest first; those of a state and a model, where these are not empty."""
    most, owner = PAGE_LENGTH + 1, asker.owner
    found = list_searches(engine, limit=most, before=cursor, key_id=owner, state=state or None, model=model or None)
    listed = found[:PAGE_LENGTH]
    wanted: dict[str, str | int] = {name: value for name, value in (("state", state), ("model", model)) if value}
    older = {"cursor": listed[-1].id} if len(found) > PAGE_LENGTH else None
    return page(
        "searches.html",
        rows=_outlines(engine, listed),
        best_verdict=views.best_verdict,
        states=get_args(State),
        models=searched_models(engine, key_id=owner),
        state=state,
        model=model,
        here="/?" + urlencode(wanted | ({"cursor": cursor} if cursor else {})),
        newest="/?" + urlencode(wanted) if cursor else None,
        older="/?" + urlencode(wanted | older) if older else None,
        live=any(search.state not in FINISHED for search in listed),
    )


def _outlines(engine: Engine, searches: Sequence[Search]) -> list[Frontier]:
    """What the list says of each search: its best point, and what that is compared with."""
    found = best_and_uniform(engine, {search.id: Frontier(search, ()).sought for search in searches})
    return [Frontier(search, tuple(found[search.id])) for search in searches]


@router.get("/static/plotly.min.js", response_class=FileResponse)
def plotly_file() -> FileResponse:
    """Plotly's script, from the installed package; its address carries the version."""
    return FileResponse(plotly_script(), media_type="text/javascript", headers=FOR_A_YEAR)


@router.get("/static/{name}", response_class=FileResponse)
def static_file(name: str) -> FileResponse:
    """A style sheet or script of ours, or one that came with us."""
    if name not in STATIC_FILES:
        raise NotFound(f"nothing is at /static/{name}")
    return FileResponse(STATIC_FILES[name], headers=SHORTLY)
