"""`list`, `show`, `cancel`, `sensitivities`: looking at what searches found."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from api.client import DEFAULT_URL, Client, SearchCancelled, SearchFailed
from api.commands import request as asked
from api.commands.console import WrongUse, out, print_json, writing
from api.commands.exits import ExitCode
from api.commands.options import File, Json, SearchId, Url, complete_model, examples, one_of
from api.commands.report import show_frontier
from api.documents import SearchSummary
from api.metrics import value_text
from api.resources import budget_text
from api.times import moment
from db.states import State
from search.errors import InvalidRequest
from search.metrics import METRICS

if TYPE_CHECKING:
    import pandas as pd

ENDINGS: dict[str, Literal["json", "csv", "parquet"]] = {".csv": "csv", ".json": "json", ".parquet": "parquet"}

LIST_EXAMPLES = examples(
    ("the latest searches", "bitfrontier list"),
    ("what runs now", "bitfrontier list --state running"),
    ("the numbers of a model's searches", "bitfrontier list --model my-model --json | jq '.searches[].id'"),
)
SHOW_EXAMPLES = examples(
    ("the frontier of search 1", "bitfrontier show 1"),
    ("its best point of 4 bits and at most 60 MB", "bitfrontier show 1 --under avg_bits=4 --under 60MB"),
    ("the number of its best point, for a script", "bitfrontier show 1 --json | jq .frontier.best"),
)
CANCEL_EXAMPLES = examples(("end search 1; what it measured stays", "bitfrontier cancel 1"))
SENSITIVITIES_EXAMPLES = examples(
    ("the layers that suffer most", "bitfrontier sensitivities 1"),
    ("by another metric", "bitfrontier sensitivities 1 --metric kl --top 50"),
    ("the whole table", "bitfrontier sensitivities 1 --output sensitivities.parquet"),
)


def list_searches(
    state: Annotated[State | None, typer.Option(help="Only searches in this state.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Only searches of this model.", autocompletion=complete_model)
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", help="So many at most.", min=1)] = 20,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """The searches, newest first."""
    with Client(url) as client:
        found = list(islice(client.searches(state=state, model=model, page_size=min(limit, 200)), limit))
    if as_json:
        print_json({"searches": found})
        return
    if not found:
        out.print("There is no such search. Start one with 'bitfrontier search MODEL --budget avg_bits=4.25'.")
        return
    table = Table("search", "state", "model", "target", "budgets", "created")
    for one in found:
        budgets = ", ".join(budget_text(*budget) for budget in one.budgets.items())
        texts = (_standing(one), one.model, one.target, budgets, moment(one.created_at))
        table.add_row(str(one.id), *map(escape, texts), style="dim" if one.state == "cancelled" else "")
    out.print(table)


def show(
    search_id: SearchId,
    under: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="Mark the best point that keeps this budget, too. Several hold together."
        ),
    ] = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Print a search: its state, its frontier, where its page is."""
    other = asked.numbers(under or [], "--under")
    with Client(url) as client:
        found = client.search(search_id)
        frontier = client.frontier(search_id, under=other)
        if as_json:
            print_json({"search": found, "frontier": frontier})
        else:
            out.print(f"Search {search_id} of {escape(found.model)}: {_standing(found)}")
            show_frontier(found, frontier, other)
            out.print(f"Results page: {client.url}{found.links['page']}")
    if found.state == "failed":
        raise SearchFailed(found)
    if found.state == "cancelled":
        raise SearchCancelled(found)
    if other and frontier.best_under is None:
        raise typer.Exit(ExitCode.INFEASIBLE)


def cancel(search_id: SearchId, as_json: Json = False, url: Url = DEFAULT_URL) -> None:
    """Cancel a search. A finished one stays as it is."""
    with Client(url) as client:
        found = client.cancel(search_id)
    if as_json:
        print_json(found)
        return
    waiting = found.state == "running" and found.cancel_requested
    out.print(f"Search {search_id}: {'being cancelled' if waiting else found.state}")


def sensitivities(
    search_id: SearchId,
    metric: Annotated[
        str | None,
        typer.Option(help="Metric to show. Default: the first.", autocompletion=one_of(METRICS)),
    ] = None,
    top: Annotated[int, typer.Option(help="So many units.", min=1)] = 20,
    output: File = None,
    as_json: Json = False,
    url: Url = DEFAULT_URL,
) -> None:
    """What each unit's rounding is predicted to do: those that suffer most, or all as .csv, .parquet or .json."""
    with Client(url) as client:
        if as_json or output is not None:
            _write_sensitivities(client, search_id, output, as_json=as_json)
            return
        table = client.sensitivities(search_id)
    if table.empty:
        out.print(f"Search {search_id} has no sensitivities yet.")
        return
    known = list(dict.fromkeys(table["metric"]))
    if metric is not None and metric not in known:
        raise InvalidRequest(f"search {search_id} has no '{metric}'", field="--metric", value=metric, accepted=known)
    out.print(_sensitivity_table(table, metric or known[0], top))


def _standing(search: SearchSummary) -> str:
    """Its state and, while it runs, how far it is."""
    if search.state != "running":
        return search.state
    done, total = search.progress.done, search.progress.total
    return f"running, {search.stage or 'starting'}" + (f" {done} of {total}" if total else "")


def _write_sensitivities(client: Client, search_id: int, output: Path | None, *, as_json: bool) -> None:
    if output is None:
        print_json(json.loads(client.sensitivities_file(search_id, "json").content))
        return
    format = ENDINGS.get(output.suffix)
    if format is None:
        accepted = list(ENDINGS)
        raise WrongUse(f"{output} has no ending that says what to write", field="--output", accepted=accepted)
    file = client.sensitivities_file(search_id, format)
    with writing(output):
        file.save(output)
    if as_json:
        print_json({"search": search_id, "file": str(output)})
    else:
        out.print(f"Wrote {output}")


def _sensitivity_table(table: pd.DataFrame, metric: str, top: int) -> Table:
    """Units × schemes of a metric, those that suffer most first."""
    chosen = table[table["metric"] == metric]
    values = chosen.pivot(index="unit", columns="scheme", values="sensitivity")
    schemes = sorted(values.columns, key=lambda scheme: -values[scheme].abs().sum())
    values = values.loc[values[schemes[0]].abs().sort_values(ascending=False).index]
    left = f", {top} of {len(values)} units" if len(values) > top else ""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=f"{metric}{left}", title_justify="left")
    shown.add_column("unit")
    for scheme in schemes:
        shown.add_column(scheme, justify="right", no_wrap=True)
    for unit, row in values.head(top).iterrows():
        # Where a scheme is not allowed there is no value.
        cells = ("" if row[scheme] != row[scheme] else value_text(metric, row[scheme]) for scheme in schemes)
        shown.add_row(escape(str(unit)), *cells)
    return shown
