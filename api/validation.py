"""Pydantic's errors in our words: detail, field, value and what is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel

from search.request import SearchRequest

MOST_ERRORS = 20
"""A problem lists so many errors; a client that sends thousands is told how many there are."""


def invalid(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Members of a problem document that say what a request has wrong: of one error, or of several in `errors`."""
    # A list whose only item was refused is not also too short.
    paths = [item["loc"] for item in errors]
    outer = {path[:length] for path in paths for length in range(len(path))}
    inner = [item for item in errors if item["loc"] not in outer]
    if len(inner) == 1:
        return field_error(inner[0])
    found = [field_error(item) for item in inner[:MOST_ERRORS]]
    listed = f", of which {len(found)} are listed" if len(inner) > len(found) else ""
    told = "; ".join(item["detail"] for item in found)
    return {"detail": f"{len(inner)} fields are not accepted{listed}: {told}", "errors": found}


def field_error(error: dict[str, Any]) -> dict[str, Any]:
    """One error: detail, field, value and accepted."""
    kind, (place, *path) = error["type"], error["loc"]
    field = ".".join(str(part) for part in path if part != "[key]") or str(place)
    value, message = error.get("input"), str(error["msg"])
    if kind == "missing":
        found = {"detail": f"{field} is required", "field": field}
        return found | _accepted(_description(path) if place == "body" else None)
    if kind == "extra_forbidden":
        names = _names(path[:-1])
        detail = f"{field} is not a field; accepted: {', '.join(names)}"
        return {"detail": detail, "field": field, "value": value, "accepted": names}
    if kind == "value_error":
        return {"detail": f"{field}: {message.removeprefix('Value error, ')}", "field": field, "value": value}
    if " should have " in message:
        # Pydantic begins with the name of a Python type.
        accepted = message.partition(" should have ")[2].replace(" after validation", "")
        return {"detail": f"{field} should have {accepted}", "field": field, "value": value, "accepted": accepted}
    accepted = message.removeprefix("Input should be ").removeprefix("Input should ")
    if kind == "string_pattern_mismatch":
        accepted = _as_phrase(_description(path)) or accepted
    return {"detail": f"{field} should be {accepted}", "field": field, "value": value, "accepted": accepted}


def _accepted(text: str | None) -> dict[str, str]:
    return {"accepted": text} if text else {}


def _names(path: list[Any]) -> list[str]:
    """The fields accepted in the search request at `path`."""
    model: type[BaseModel] = SearchRequest
    for part in path:
        # What is no field is a name, of a limit.
        if part in model.model_fields:
            model = _document(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _document(annotation: Any) -> Any:
    """The document that a field holds, perhaps by name, or may hold."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _as_phrase(text: str | None) -> str | None:
    """A description's first sentence, to stand inside one."""
    if not text:
        return None
    sentence = text.split(". ")[0].rstrip(".")
    return sentence[0].lower() + sentence[1:]


def _description(path: list[Any]) -> str | None:
    """What the search request's field at `path` says of itself."""
    model: Any = SearchRequest
    description = None
    for part in path:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            return None
        description, model = fields[part].description, _document(fields[part].annotation)
    return description
