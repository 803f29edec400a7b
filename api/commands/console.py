"""What the command line prints, and how it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from search.errors import BitfrontierError

out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
err = Console(stderr=True, highlight=False, soft_wrap=True)


class Refused(Exception):
    """The service, or a process of ours, answered with a problem document."""

    def __init__(self, problem: dict[str, Any]) -> None:
        super().__init__(problem["detail"])
        self.problem = problem


def print_problem(problem: dict[str, Any]) -> None:
    """A problem document in plain words on standard error."""
    err.print(f"[bold red]{escape(str(problem.get('title', 'Error')))}[/]: {escape(str(problem.get('detail', '')))}")
    for name in ("field", "value", "accepted"):
        if problem.get(name) is not None and not problem.get("errors"):
            err.print(f"  [dim]{name}[/]  {escape(_text(problem[name]))}")


@contextmanager
def plain_words(url: str) -> Iterator[None]:
    """Turn what can go wrong while talking to the service at `url` into a message and exit code 1."""
    try:
        yield
    except Refused as error:
        print_problem(error.problem)
        raise typer.Exit(1) from None
    except BitfrontierError as error:
        print_problem(error.problem())
        raise typer.Exit(1) from None
    except httpx.HTTPError as error:
        detail = f"no answer from {url} ({error}); start it with 'bitfrontier up', or name another with --url"
        print_problem({"title": "The service cannot be reached", "detail": detail})
        raise typer.Exit(1) from None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
