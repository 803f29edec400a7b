"""The page that compares searches."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse
from sqlalchemy import Engine

from api.dependencies import CurrentAsker, Database
from api.frontier import Frontier
from api.pages.comparison import MOST, Comparison, cautions, shared_axes
from api.pages.render import page
from db.candidates import candidates
from db.searches import Search, get_search, list_searches
from search.errors import InvalidRequest, NotFound

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

OFFERED = 30
"""So many of the newest searches can be ticked; the address takes any."""
MOST_NAMED = 100
"""So many of the searches in the address are read."""


@router.get("/compare")
def compare_page(
    engine: Database,
    asker: CurrentAsker,
    searches: Annotated[list[str], Query(max_length=100)] = [],  # noqa: B006 - FastAPI copies it
    axis: Annotated[str | None, Query(max_length=100)] = None,
) -> HTMLResponse:
    """Up to four searches on one chart: `?searches=1,2,3`, or one `searches` for each."""
    numbers, notices = _numbers(searches)
    found, missing = _found(engine, numbers, asker.owner)
    notices += [f"There is no search {number} that you may see." for number in missing]
    frontiers = [Frontier(one, tuple(candidates(engine, one.id, allocations=False))) for one in found]
    axes = shared_axes(frontiers)
    if axis is not None and axes and axis not in axes:
        raise InvalidRequest(f"these searches do not all count {axis}", field="axis", value=axis, accepted=axes)
    offered = list_searches(engine, limit=OFFERED, key_id=asker.owner)
    chosen = [one.id for one in found]
    return page(
        "compare.html",
        chosen=chosen,
        numbers=",".join(map(str, chosen)),
        notices=[*notices, *cautions(frontiers)],
        axes=axes,
        axis=(axis or axes[0]) if axes else None,
        comparison=Comparison(frontiers, axis or axes[0]) if axes else None,
        offered=[one for one in found if one.id not in {other.id for other in offered}] + offered,
        most=MOST,
    )


def _numbers(given: list[str]) -> tuple[list[int], list[str]]:
    """The searches that are asked for, each once, and what to say of the rest."""
    named = dict.fromkeys(text.strip() for part in given for text in part.split(",") if text.strip())
    readable = {text: text.isascii() and text.isdigit() and len(text) < 19 for text in islice(named, MOST_NAMED)}
    unreadable = [text for text, read in readable.items() if not read]
    notices = [f"“{text[:40]}” is not the number of a search." for text in unreadable[:MOST]]
    numbers = list(dict.fromkeys(int(text) for text, read in readable.items() if read))
    if len(numbers) > MOST:
        more = " …" if len(numbers) > 2 * MOST else ""
        left = ", ".join(map(str, numbers[MOST : 2 * MOST]))
        notices.append(f"At most {MOST} searches are compared; left out: {left}{more}.")
    return numbers[:MOST], notices


def _found(engine: Engine, numbers: list[int], owner: int | None) -> tuple[list[Search], list[int]]:
    """The searches that are there and may be seen, and the numbers of the others."""
    found, missing = [], []
    for number in numbers:
        try:
            found.append(get_search(engine, number, key_id=owner))
        except NotFound:
            missing.append(number)
    return found, missing
