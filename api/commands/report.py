"""A search on the terminal: its frontier as a table, what to know of it, and the files of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from api.client import Client
from api.commands.console import out, writing
from api.documents import FrontierDocument, Point, SearchDocument
from api.resources import RESOURCES, budget_text, latency_text, loss_text


def show_frontier(search: SearchDocument, frontier: FrontierDocument, under: Mapping[str, float] | None = None) -> None:
    """Print the frontier of a search, and what to know of it."""
    if frontier.points or frontier.baselines:
        out.print(frontier_table(frontier, search.model))
    summary = search.summary or {}
    if search.state == "succeeded" and "acceptance" in summary:
        told, of = summary["acceptance"], summary.get("coverage") or {}
        within = f"; {of['within']} of {of['points']} losses within what was expected" if of.get("points") else ""
        out.print(
            f"[dim]Losses on held-out data. {summary['evaluations']:.4g} evaluations on the calibration data; "
            f"{told['accepted']} of {told['finalists']} finalists held on data that was not searched{within}.[/]"
        )
    if summary.get("latency"):
        out.print(f"[dim]{escape(latency_text(summary['latency']))}[/]")
    if search.state == "succeeded" and frontier.best is None:
        out.print("[yellow]No measured configuration fits every budget.[/]")
    if under and frontier.best_under is None:
        words = ", ".join(budget_text(name, value) for name, value in under.items())
        out.print(f"[yellow]No measured configuration keeps {escape(words)}.[/]")


def frontier_table(frontier: FrontierDocument, model: str) -> Table:
    """The frontier and the uniform baselines, the best point that fits marked."""
    points = {point.number: point for point in [*frontier.points, *(frontier.baselines or [])]}
    axis = frontier.axes[0]
    rows = sorted(points.values(), key=lambda point: (point.costs[axis], point.number))
    resources = [name for name in RESOURCES if all(name in point.costs for point in rows)]
    extra = [name for name in ("perplexity", "accuracy") if any(name in point.metrics for point in rows)]
    title = f"{model}: measured frontier"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
    table.add_column("point", justify="right", no_wrap=True)
    # Where the terminal is narrow, the configuration's name gives way, and nothing else.
    table.add_column("configuration", no_wrap=False)
    for name in resources:
        table.add_column(RESOURCES[name].unit, justify="right", no_wrap=True)
    for name in ("loss", *extra):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for point in rows:
        table.add_row(
            str(point.number),
            Text(point.label, no_wrap=True, overflow="ellipsis"),
            *(RESOURCES[name].number(point.costs[name]) for name in resources),
            loss_text(point.metrics.get("loss")),
            *(f"{point.metrics[name]:.4g}" if name in point.metrics else "" for name in extra),
            ", ".join(_remarks(point, frontier)),
            style="bold green" if point.number == frontier.best else "" if point.on_frontier else "dim",
        )
    return table


def _remarks(point: Point, frontier: FrontierDocument) -> list[str]:
    marks = {"★ best": frontier.best, "★ under": frontier.best_under, "knee": frontier.knee}
    remarks = [mark for mark, number in marks.items() if number == point.number]
    if not point.fits:
        remarks.append("over budget")
    elif not point.on_frontier:
        remarks.append("dominated")
    return remarks


def write_files(client: Client, search: SearchDocument, best: int | None, folder: Path) -> list[Path]:
    """Write frontier.html, .csv and .json and the best point's configuration; the paths written."""
    paths = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for format in ("html", "csv", "json"):
            file = client.frontier_file(search.id, format, include=("baselines", "dominated"))
            paths.append(file.save(folder / f"frontier.{format}"))
        if best is not None:
            paths.append(client.export(search.id, best, "vllm" if search.target == "vllm" else "json").save(folder))
    return paths
