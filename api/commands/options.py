"""Options and arguments that several commands have, and what the shell completes them with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from api.client import URL_VARIABLE, Client, ClientError
from search.targets import TARGETS

COMMON = "Output and service"
"""The panel of what every command has."""
ANSWER_SECONDS = 1.0
"""A shell waits no longer for what it completes."""


def examples(*wishes: tuple[str, str]) -> str:
    """The end of a command's help: what a person may want, and the command that does it."""
    lines = [line for wish, command in wishes for line in (wish and f"[dim]# {escape(wish)}[/]", escape(command))]
    return "\n".join(["[bold]Examples[/]", *filter(None, lines)])


def one_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Completes a name."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


def some_of(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes the last of several names that are separated by commas."""

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        given = before.split(",")
        return [f"{before}{comma}{name}" for name in names() if name.startswith(last) and name not in given]

    return complete


def complete_model(incomplete: str) -> list[str]:
    """The registered models, where a service answers."""
    return [name for name in _told(lambda client: [model.name for model in client.models()]) if _fits(name, incomplete)]


def complete_search(incomplete: str) -> list[str]:
    """The latest searches, where a service answers."""
    latest = _told(lambda client: [str(search.id) for search in islice(client.searches(page_size=20), 20)])
    return [number for number in latest if _fits(number, incomplete)]


def complete_scheme(incomplete: str) -> list[str]:
    """The schemes that are shown as examples, the last of several."""
    return some_of(lambda: _told(lambda client: [one.scheme for one in client.schemes().examples]))(incomplete)


def complete_format(incomplete: str) -> list[str]:
    """The formats of a point."""
    from search.exports import EXPORTS  # Not above: other commands need not wait for it.

    return one_of(EXPORTS)(incomplete)


def _told(ask: Callable[[Client], list[str]]) -> list[str]:
    try:
        with Client(timeout=ANSWER_SECONDS, retries=0) as client:
            return ask(client)
    except ClientError:
        return []


def _fits(name: str, incomplete: str) -> bool:
    return name.startswith(incomplete)


Url = Annotated[str, typer.Option("--url", envvar=URL_VARIABLE, help="Where the service is.", rich_help_panel=COMMON)]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, and nothing else.", rich_help_panel=COMMON)
]
SearchId = Annotated[
    int, typer.Argument(metavar="ID", help="Number of the search.", min=1, autocompletion=complete_search)
]
Model = Annotated[
    str,
    typer.Argument(help="A registered model, or a Hugging Face id such as org/name.", autocompletion=complete_model),
]
Target = Annotated[
    str | None,
    typer.Option(help=f"Runtime that will load the result: {', '.join(TARGETS)}.", autocompletion=one_of(TARGETS)),
]
File = Annotated[Path | None, typer.Option("--output", "-o", help="File to write.", rich_help_panel=COMMON)]
Folder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder for the frontier and the best configuration.", rich_help_panel=COMMON),
]
Under = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Mark the best point that keeps this budget, too. Several hold together."),
]
