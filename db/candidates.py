"""The candidates of a search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields

from sqlalchemy import Engine, delete, select
from sqlalchemy.dialects.postgresql import insert

from db.queue import Claim, hold
from db.tables import CandidateRow
from search.candidate import Candidate

_COLUMNS = [field.name for field in fields(Candidate)]


def put_candidates(engine: Engine, claim: Claim, candidates: Sequence[Candidate]) -> None:
    """Make `candidates` the candidates of the claimed search: new numbers come, known ones change, others go.

    Raises LeaseLost when the search is no longer ours, ValueError when a number in a candidate is not finite.
    """
    rows = [{"search_id": claim.search_id} | asdict(candidate) for candidate in candidates]
    upsert = insert(CandidateRow)
    upsert = upsert.on_conflict_do_update(
        index_elements=[CandidateRow.search_id, CandidateRow.number],
        set_={name: upsert.excluded[name] for name in _COLUMNS if name != "number"},
    )
    others = delete(CandidateRow).where(
        CandidateRow.search_id == claim.search_id,
        CandidateRow.number.not_in([candidate.number for candidate in candidates]),
    )
    with engine.begin() as connection:
        hold(connection, claim)
        connection.execute(others)
        if rows:
            connection.execute(upsert, rows)


def candidates(engine: Engine, search_id: int) -> list[Candidate]:
    """The candidates of a search by number; empty when there is no such search."""
    columns = [CandidateRow.__table__.c[name] for name in _COLUMNS]
    query = select(*columns).where(CandidateRow.search_id == search_id).order_by(CandidateRow.number)
    with engine.connect() as connection:
        return [Candidate(*row) for row in connection.execute(query)]
