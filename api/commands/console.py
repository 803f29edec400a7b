"""What the command line prints: documents and tables on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from search.budget import BUDGETS
from search.errors import BitfrontierError

out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
err = Console(stderr=True, highlight=False, soft_wrap=True)


class WrongUse(BitfrontierError):
    """What was asked of the command line cannot be done."""

    status = 422
    type = "wrong-use"
    title = "This cannot be done as asked"


class Interrupted(BitfrontierError):
    """Ctrl-C, while something goes on or was ended that the person should know of."""

    status = 409
    type = "interrupted"
    title = "Interrupted"


@contextmanager
def writing(path: Path, field: str = "--output") -> Iterator[None]:
    """Raise WrongUse where what is written at `path`, which `field` names, cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WrongUse(f"{path} cannot be written: {reason}", field=field, value=str(path)) from error


def print_json(document: BaseModel | Mapping[str, Any]) -> None:
    """The one document that a command with `--json` prints, with what the service left out left out."""
    typer.echo(json.dumps(_plain(document), ensure_ascii=False, indent=2, allow_nan=False))


def print_problem(problem: Mapping[str, Any], *, as_json: bool) -> None:
    """A problem document on standard error: in plain words, or as one line of JSON."""
    if as_json:
        typer.echo(json.dumps(problem, ensure_ascii=False), err=True)
        return
    if not problem.get("detail"):
        return
    err.print(f"[bold red]{escape(str(problem.get('title', 'Error')))}[/]: {escape(str(problem.get('detail', '')))}")
    if problem.get("type", "").endswith(":infeasible-budget"):
        err.print(_least(problem))
        return
    for name in ("field", "value", "accepted"):
        if problem.get(name) is not None and not problem.get("errors"):
            err.print(f"  [dim]{name}[/]  {escape(_text(problem[name]))}")


def _least(problem: Mapping[str, Any]) -> Table:
    """What was asked for and the smallest values that can be, of budgets that nothing meets."""
    accepted, value = problem.get("accepted") or {}, problem.get("value")
    name = str(problem.get("field") or "budgets").removeprefix("budgets.")
    asked = value if isinstance(value, dict) else {name: value}
    least = accepted.get("minimum_given_the_others") or accepted.get("minimum")
    least = least if isinstance(least, dict) else {name: least}
    table = Table("budget", box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("asked for", justify="right")
    table.add_column("smallest that can be", justify="right")
    table.add_column("unit")
    for budget, amount in asked.items():
        # A limit is called after its pattern and its budget: limits.*.down_proj.avg_bits.
        unit = BUDGETS.get(budget.rpartition(".")[2])
        table.add_row(escape(budget), _number(amount), _number(least.get(budget)), unit.unit if unit else "")
    return table


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else "—"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
