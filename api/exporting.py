"""A point as the file of another tool."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Engine

from db.exports import exported
from db.searches import Search
from search.candidate import Candidate
from search.exports import EXPORTS, render


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
    text = render(name, exported(engine, search, point))
    return ExportedFile(text, EXPORTS[name].media_type, EXPORTS[name].filename)
