"""The form that starts a search: a request as the texts of its fields, and back.

A field is named by its path in the request, so that the field of a problem names it too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from api.validation import invalid
from search.errors import BitfrontierError
from search.request import SearchRequest

Fields = dict[str, str]
"""Path of a field → its text; of several values a line each."""


@dataclass(frozen=True, slots=True)
class Kind:
    """How the text of a field is read, and how its value is written. What cannot be read stays text: the request's own
    validation says what is accepted."""

    read: Callable[[str], Any]
    write: Callable[[Any], str]


def _integer(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _pairs(text: str) -> dict[str, str]:
    """`pattern = value` by line; a pattern may have an equals sign of its own."""
    pairs = [line.rpartition("=") for line in _lines(text)]
    return {(name or value).strip(): value.strip() if name else "" for name, _, value in pairs}


def _limits(text: str) -> dict[str, dict[str, Any]]:
    """`pattern: budget = value` by line; a pattern may have colons of its own."""
    limits: dict[str, dict[str, Any]] = {}
    for place, value in _pairs(text).items():
        pattern, _, name = place.rpartition(":")
        limits.setdefault(pattern.strip() or name, {})[name.strip()] = _number(value)
    return limits


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


TEXT = Kind(str, str)
INTEGER = Kind(_integer, str)
NUMBER = Kind(_number, lambda value: f"{value:.12g}")
WORDS = Kind(lambda text: re.split(r"[\s,]+", text), lambda values: " ".join(values))
LINES = Kind(_lines, lambda values: "\n".join(values))
PAIRS = Kind(_pairs, lambda value: "\n".join(f"{name} = {of}" for name, of in value.items()))
LIMITS = Kind(
    _limits,
    lambda value: "\n".join(
        f"{pattern}: {name} = {NUMBER.write(most)}"
        for pattern, limit in value.items()
        for name, most in limit.items()
        if most is not None
    ),
)

FIELDS = {
    "model": TEXT,
    "target": TEXT,
    "budgets.avg_bits": NUMBER,
    "budgets.size_mb": NUMBER,
    "budgets.gbitops": NUMBER,
    "budgets.latency_ms": NUMBER,
    "budgets.loss_increase": NUMBER,
    "budgets.limits": LIMITS,
    "space.schemes": WORDS,
    "space.quantizer": TEXT,
    "space.granularity": TEXT,
    "space.channels": INTEGER,
    "space.ignore": LINES,
    "space.pin": PAIRS,
    "latency.profile": TEXT,
    "latency.tokens": INTEGER,
    "calibration.dataset": TEXT,
    "calibration.samples": INTEGER,
    "calibration.sequence_length": INTEGER,
    "calibration.seed": INTEGER,
    "sensitivity": WORDS,
    "optimizer.method": TEXT,
    "optimizer.objective": TEXT,
    "optimizer.points": INTEGER,
    "optimizer.evaluations": INTEGER,
}
EMPTY = "space.ignore"
"""Where an empty text means none at all; elsewhere it means the default."""
FIRST_BUDGET = 5.25
"""Bits per weight in a new form: one above the cheapest of the default schemes."""


def new_fields(model: str) -> Fields:
    """A form with every default in sight, but the schemes, which are the target's."""
    request = SearchRequest.model_validate({"model": "x", "budgets": {"avg_bits": FIRST_BUDGET}})
    return fields_of(request.model_dump(mode="json")) | {"model": model, "space.schemes": ""}


def fields_of(request: Mapping[str, Any]) -> Fields:
    """The texts of a request as it is stored."""
    texts = {}
    for path, kind in FIELDS.items():
        value: Any = request
        for part in path.split("."):
            value = (value or {}).get(part)
        texts[path] = "" if value is None else kind.write(value)
    return texts


def document_of(fields: Mapping[str, str]) -> dict[str, Any]:
    """The request that the texts of a form say, to be validated."""
    document: dict[str, Any] = {"budgets": {}}
    for path, kind in FIELDS.items():
        text = fields.get(path, "").strip()
        if not (text or (path == EMPTY and path in fields)):
            continue
        *outer, name = path.split(".")
        place = document
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = kind.read(text) if text else []
    if "profile" not in document.get("latency", {}):
        document.pop("latency", None)
    return document


def problem_of(error: ValidationError | BitfrontierError) -> dict[str, Any]:
    """The problem document of what a request has wrong."""
    if isinstance(error, BitfrontierError):
        return error.problem()
    told: Sequence[Any] = error.errors()
    return {"status": 422} | invalid([one | {"loc": ("body", *one["loc"])} for one in told])


def errors_by_field(problem: Mapping[str, Any]) -> dict[str, list[str]]:
    """Path of a form's field → what is wrong there; what belongs to no field stands under an empty path."""
    found: dict[str, list[str]] = {}
    for one in problem.get("errors") or [problem]:
        accepted = one.get("accepted")
        told = not isinstance(accepted, str) or accepted in one["detail"]
        words = one["detail"] + ("" if told else f"; accepted: {accepted}")
        found.setdefault(_nearest(one.get("field") or "", [*FIELDS, "budgets"]), []).append(words)
    return found


def _nearest(field: str, names: Sequence[str]) -> str:
    """The field itself or the one it is a part of; else the first of its parts."""
    around = [name for name in names if field == name or field.startswith(name + ".")]
    inside = [name for name in names if field and name.startswith(field + ".")]
    return max(around, key=len, default=inside[0] if inside else "")
