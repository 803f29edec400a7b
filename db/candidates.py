"""The candidates of a search."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Double,
    Engine,
    Integer,
    Select,
    all_,
    any_,
    cast,
    delete,
    literal,
    or_,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB, insert

from db.queue import Claim, hold
from db.tables import CandidateRow
from search.candidate import Candidate

Group = Literal["costs", "metrics"]

_COLUMNS = [field.name for field in fields(Candidate)]


def put_candidates(
    engine: Engine, claim: Claim, candidates: Sequence[Candidate], stored: Sequence[Candidate] | None = None
) -> None:
    """Make `candidates` the candidates of the claimed search: new numbers come, known ones change, others go.

    `stored` are those that this claim has made them before: only what differs from it is written. Left out, all are.
    Raises LeaseLost when the search is no longer ours, ValueError when a number in a candidate is not finite.
    """
    known = {candidate.number: candidate for candidate in stored or ()}
    changed = [candidate for candidate in candidates if known.pop(candidate.number, None) != candidate]
    rows = [{"search_id": claim.search_id} | asdict(candidate) for candidate in changed]
    upsert = insert(CandidateRow)
    upsert = upsert.on_conflict_do_update(
        index_elements=[CandidateRow.search_id, CandidateRow.number],
        set_={name: upsert.excluded[name] for name in _COLUMNS if name != "number"},
    )
    others = delete(CandidateRow).where(CandidateRow.search_id == claim.search_id)
    if stored is None:
        kept = literal([candidate.number for candidate in candidates], ARRAY(Integer))
        others = others.where(CandidateRow.number != all_(kept))
    else:
        others = others.where(CandidateRow.number == any_(literal(list(known), ARRAY(Integer))))
    with engine.begin() as connection:
        hold(connection, claim)
        if stored is None or known:
            connection.execute(others)
        if rows:
            connection.execute(upsert, rows)


def candidates(engine: Engine, search_id: int, *, allocations: bool = True) -> list[Candidate]:
    """The candidates of a search by number; empty when there is no such search.

    Their allocations, by far the most of them, are empty where they are not asked for.
    """
    query = _of(search_id, allocations=allocations).order_by(CandidateRow.number)
    with engine.connect() as connection:
        return [Candidate(*row) for row in connection.execute(query)]


def candidate(engine: Engine, search_id: int, number: int) -> Candidate | None:
    """One candidate, with its allocation."""
    with engine.connect() as connection:
        row = connection.execute(_of(search_id).where(CandidateRow.number == number)).first()
    return None if row is None else Candidate(*row)


def allocations(engine: Engine, search_id: int, numbers: Collection[int]) -> dict[int, dict[str, str]]:
    """Number → allocation, of some candidates of a search."""
    wanted = CandidateRow.search_id == search_id, CandidateRow.number == any_(literal(list(numbers), ARRAY(Integer)))
    with engine.connect() as connection:
        return dict(connection.execute(select(CandidateRow.number, CandidateRow.allocation).where(*wanted)).all())


def best_and_uniform(engine: Engine, sought: Mapping[int, Sequence[tuple[Group, str]]]) -> dict[int, list[Candidate]]:
    """Of each search in `sought` the candidate that fits every budget and has least of the first quantity sought, and
    of equal ones of the next; and the measured uniform configurations. By number, without allocations."""
    found: dict[int, list[Candidate]] = {search_id: [] for search_id in sought}
    if not sought:
        return found
    query = union_all(*(_best_and_uniform(search_id, wanted) for search_id, wanted in sought.items()))
    with engine.connect() as connection:
        for *row, search_id in connection.execute(query):
            found[search_id].append(Candidate(*row))
    return {search_id: sorted(ours, key=lambda one: one.number) for search_id, ours in found.items()}


def _best_and_uniform(search_id: int, sought: Sequence[tuple[Group, str]]) -> Select[Any]:
    measured = CandidateRow.metrics.has_key("loss")
    order = [cast(CandidateRow.__table__.c[group][name].astext, Double) for group, name in sought]
    best = select(CandidateRow.number).where(CandidateRow.search_id == search_id, CandidateRow.fits, measured)
    best = best.order_by(*order, CandidateRow.number).limit(1)
    wanted = or_(CandidateRow.source == "uniform", CandidateRow.number == best.scalar_subquery())
    return _of(search_id, allocations=False).add_columns(CandidateRow.search_id).where(measured, wanted)


def _of(search_id: int, *, allocations: bool = True) -> Select[Any]:
    columns: dict[str, ColumnElement[Any]] = {name: CandidateRow.__table__.c[name] for name in _COLUMNS}
    if not allocations:
        columns["allocation"] = literal({}, JSONB)
    return select(*columns.values()).where(CandidateRow.search_id == search_id)
