"""What routes are given: the database engine, who asks, the search and the point that their path names."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Path, Request
from sqlalchemy import Engine

from api.admission import Admission
from api.auth import Asker, get_asker
from api.frontier import Frontier
from api.strict import PLAIN
from db.candidates import candidate, candidates
from db.searches import Search, get_search
from search.candidate import Candidate
from search.errors import NotFound

SearchId = Annotated[int, Path(ge=1, lt=2**63, description="Number of the search.", examples=[1]), PLAIN]
PointNumber = Annotated[
    int, Path(ge=0, lt=2**31, description="Number of the point in its search.", examples=[3]), PLAIN
]


# What asks no database runs in the event loop: every way to a thread and back costs more than it does.
async def get_engine(request: Request) -> Engine:
    """The application's database engine."""
    engine: Engine = request.app.state.engine
    return engine


Database = Annotated[Engine, Depends(get_engine)]


async def get_admission(request: Request) -> Admission:
    """The application's threads that look into requests."""
    admission: Admission = request.app.state.admission
    return admission


CurrentAdmission = Annotated[Admission, Depends(get_admission)]
CurrentAsker = Annotated[Asker, Depends(get_asker)]


def get_found_search(engine: Database, search_id: SearchId, asker: CurrentAsker) -> Search:
    """The search of the path. Raises NotFound, for searches that the asker may not see too."""
    return get_search(engine, search_id, key_id=asker.owner)


FoundSearch = Annotated[Search, Depends(get_found_search)]


def get_frontier(engine: Database, search: FoundSearch) -> Frontier:
    """The search of the path with its candidates, without their allocations."""
    return Frontier(search, tuple(candidates(engine, search.id, allocations=False)))


FoundFrontier = Annotated[Frontier, Depends(get_frontier)]


def get_point(engine: Database, search: FoundSearch, number: PointNumber) -> Candidate:
    """The point of the path, with its allocation. Raises NotFound."""
    found = candidate(engine, search.id, number)
    if found is None:
        raise NotFound(f"search {search.id} has no point {number}", field="number", value=number)
    return found


FoundPoint = Annotated[Candidate, Depends(get_point)]
