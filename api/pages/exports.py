"""What a point can be taken away as: every format with the one command that uses it, or why it cannot carry it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from db.exports import exported
from db.models import get_model
from db.searches import Search
from search.candidate import Candidate
from search.errors import Conflict, ExportRefused
from search.exports import EXPORTS, Export, loaded_from, refusal


@dataclass(frozen=True, slots=True)
class Offer:
    """A format, and the command that uses its file of this point; `refused` says why there is no such file."""

    export: Export
    command: str
    refused: ExportRefused | None

    @property
    def reason(self) -> str:
        """Why the format cannot carry the point, and what it would take instead; empty where it can."""
        if self.refused is None:
            return ""
        accepted = self.refused.accepted
        words = ", ".join(map(str, accepted)) if isinstance(accepted, list) else str(accepted or "")
        told = "" if words in self.refused.detail else f" It takes: {words}."
        return f"{self.refused.detail}.{told}"


def offers(engine: Engine, search: Search, point: Candidate) -> list[Offer]:
    """Every format: the target's own first, the others by name.

    Raises Conflict when the model is no longer what was searched.
    """
    subject = exported(engine, search, point)
    model = get_model(engine, search.model)
    source = loaded_from(model.source if model else None)
    found = [
        Offer(
            export,
            export.command(search=search.id, point=point.number, model=search.model, source=source),
            refusal(export.name, subject),
        )
        for export in EXPORTS.values()
    ]
    return sorted(found, key=lambda offer: (offer.export.name != search.target, offer.export.name))


def offers_or_reason(engine: Engine, search: Search, point: Candidate) -> tuple[list[Offer], str]:
    """The offers; or none, and why."""
    try:
        return offers(engine, search, point), ""
    except Conflict as error:
        return [], error.detail
