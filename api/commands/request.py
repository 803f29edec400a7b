"""What the options of `search` ask for, as the body of a request."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any, TypeVar

import typer

from api.commands.console import WrongUse

Value = TypeVar("Value")

UNITS = {"bits": ("avg_bits", 1.0), "MB": ("size_mb", 1.0), "GB": ("size_mb", 1e3), "ms": ("latency_ms", 1.0)}
"""A budget may be its amount: 70MB is size_mb=70."""
MOST_DEPTH = 50
"""A request is nested so deep at most, far deeper than any that is accepted."""
AMOUNT = re.compile(rf"([0-9]+(?:\.[0-9]+)?) ?({'|'.join(UNITS)})")


def budgets(texts: list[str], option: str = "--budget") -> dict[str, float | str]:
    """Budgets by name, of `avg_bits=4.25` or `70MB`. Raises BadParameter for what is neither, and for a second one of
    the same name."""
    found: dict[str, float | str] = {}
    for text in texts:
        amount = AMOUNT.fullmatch(text)
        name, equals, value = text.partition("=")
        if amount:
            name, scale = UNITS[amount[2]]
            _add(found, name, float(amount[1]) * scale, option)
        elif name and equals and value:
            _add(found, name, number(value, name, option), option)
        else:
            accepted = f"NAME=VALUE such as avg_bits=4.25, or an amount in {', '.join(UNITS)}"
            raise typer.BadParameter(f"'{text}' is no budget; accepted: {accepted}", param_hint=option)
    return found


def numbers(texts: list[str], option: str) -> dict[str, float]:
    """Budgets whose amounts are numbers. Raises BadParameter for others."""
    found = budgets(texts, option)
    for name, value in found.items():
        if isinstance(value, str):
            raise typer.BadParameter(f"'{value}' is no number for {name}", param_hint=option)
    return {name: float(value) for name, value in found.items()}


def limits(texts: list[str]) -> dict[str, dict[str, float | str]]:
    """Limits by pattern and name, of `*.down_proj:avg_bits=6.25`. Raises BadParameter for what is none, and for a
    second one of the same."""
    found: dict[str, dict[str, float | str]] = {}
    for text in texts:
        # A pattern may have colons of its own: kind:embedding.
        place, _, value = text.rpartition("=")
        pattern, _, name = place.rpartition(":")
        if not (pattern and name and value):
            raise typer.BadParameter(f"'{text}' is not PATTERN:NAME=VALUE", param_hint="--limit")
        _add(found.setdefault(pattern, {}), name, number(value, name, "--limit"), "--limit", f"{pattern}:{name}")
    return found


def pins(texts: list[str]) -> dict[str, str]:
    """Schemes by pattern, of `*.down_proj=w8a16g64`. Raises BadParameter for what is none, and for a second one of the
    same pattern."""
    found: dict[str, str] = {}
    for text in texts:
        # A pattern may have an equals sign of its own; a scheme has none.
        pattern, equals, scheme = text.rpartition("=")
        if not (pattern and equals and scheme):
            raise typer.BadParameter(f"'{text}' is not PATTERN=SCHEME", param_hint="--pin")
        _add(found, pattern, scheme, "--pin")
    return found


def number(text: str, name: str, option: str) -> float | str:
    """`text` as a number. What is none goes to the service as it is: its answer names the field and what is accepted.
    Raises BadParameter for what JSON has no number for."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value):
        raise typer.BadParameter(f"'{text}' is no finite number for {name}", param_hint=option)
    return value


def listed(text: str | None) -> list[str] | None:
    """The parts of `text` between commas."""
    return [item.strip() for item in text.split(",") if item.strip()] if text is not None else None


def patterns(texts: list[str] | None) -> list[str] | None:
    """Patterns; an empty one says that there are none."""
    return None if texts is None else [text for text in texts if text]


def given(value: dict[str, Any]) -> dict[str, Any]:
    """`value` without what was left out, so that the service's defaults hold."""
    kept = {name: given(item) if isinstance(item, dict) else item for name, item in value.items()}
    return {name: item for name, item in kept.items() if item not in (None, {})}


def merged(body: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`body` with what `over` says otherwise."""
    both = {name: merged(body[name], over[name]) for name in body.keys() & over.keys() if _documents(body, over, name)}
    return body | over | both


def read_request(file: Path | None) -> dict[str, Any]:
    """The request in a JSON file, in standard input for `-`; empty for None. Raises WrongUse for anything else."""
    if file is None:
        return {}
    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text()
        body = json.loads(text, parse_float=_finite, parse_constant=_finite)
        _check_depth(body)
    except RecursionError as error:
        told = f"{file} cannot be read: it is nested more than {MOST_DEPTH} deep"
        raise WrongUse(told, field="--request", value=str(file)) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no JSON that can be read: {error}"
        raise WrongUse(f"{file} cannot be read: {reason}", field="--request", value=str(file)) from error
    if not isinstance(body, dict):
        raise WrongUse(f"{file} holds no request", field="--request", accepted='{"model": …, "budgets": {…}}')
    return body


def _check_depth(value: Any, left: int = MOST_DEPTH) -> None:
    if not left:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, left - 1)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _documents(body: dict[str, Any], over: dict[str, Any], name: str) -> bool:
    return isinstance(body[name], dict) and isinstance(over[name], dict)


def _add(found: dict[str, Value], name: str, value: Value, option: str, called: str = "") -> None:
    if name in found:
        told = f"{called or name} is given twice, {found[name]} and {value}; accepted: each once"
        raise typer.BadParameter(told, param_hint=option)
    found[name] = value
