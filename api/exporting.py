"""A point as the file of another tool."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from db.models import get_model
from db.searches import Search
from search.candidate import Candidate
from search.errors import Conflict
from search.exports import EXPORTS, Exported, render


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """What a person downloads."""

    text: str
    media_type: str
    filename: str


def export_point(engine: Engine, search: Search, point: Candidate, name: str) -> ExportedFile:
    """Render `point` for the tool `name`.

    Raises InvalidRequest for an unknown tool, ExportRefused where it cannot load the point, Conflict when the model is
    no longer what was searched.
    """
    model = get_model(engine, search.model)
    inventory = model.inventory if model else None
    searched = (search.summary or {}).get("model_digest")
    if inventory is None or inventory.digest != searched:
        raise Conflict(
            f"'{search.model}' is no longer registered as it was searched; register it again to export its points",
            field="model",
            value=search.model,
        )
    quantizer = search.request["space"]["quantizer"]
    text = render(name, Exported(search.model, inventory, search.target, quantizer, point))
    return ExportedFile(text, EXPORTS[name].media_type, EXPORTS[name].filename)
