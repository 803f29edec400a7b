"""What routes are given: the database engine, the search and the point that their path names."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request
from sqlalchemy import Engine

from api.frontier import Frontier
from db.candidates import candidates
from db.searches import Search, get_search
from search.candidate import Candidate
from search.errors import NotFound

SearchId = Annotated[int, Path(ge=1, lt=2**63, description="Number of the search.", examples=[1])]
PointNumber = Annotated[int, Path(ge=0, lt=2**31, description="Number of the point in its search.", examples=[3])]


def get_engine(request: Request) -> Engine:
    """The application's database engine."""
    engine: Engine = request.app.state.engine
    return engine


Database = Annotated[Engine, Depends(get_engine)]


def get_found_search(engine: Database, search_id: SearchId) -> Search:
    """The search of the path. Raises NotFound."""
    return get_search(engine, search_id)


FoundSearch = Annotated[Search, Depends(get_found_search)]


def get_frontier(engine: Database, search: FoundSearch) -> Frontier:
    """The search of the path with its candidates."""
    return Frontier(search, tuple(candidates(engine, search.id)))


FoundFrontier = Annotated[Frontier, Depends(get_frontier)]


def get_point(frontier: FoundFrontier, number: PointNumber) -> Candidate:
    """The point of the path. Raises NotFound."""
    for candidate in frontier.candidates:
        if candidate.number == number:
            return candidate
    raise NotFound(f"search {frontier.search.id} has no point {number}", field="number", value=number)


FoundPoint = Annotated[Candidate, Depends(get_point)]
