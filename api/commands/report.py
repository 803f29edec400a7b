"""A search on the terminal: progress bars while it runs, the frontier as a table, files when it is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from api.commands.client import Client, Event
from api.commands.console import Refused, out
from api.metrics import announcement
from api.resources import RESOURCES, latency_text, loss_text


def follow(client: Client, search_id: int, check: Callable[[], None]) -> None:
    """Show a search's progress until it is finished: a bar per stage, and per metric in the sensitivity stage.

    `check` is called now and then meanwhile.
    """
    columns = (TextColumn("{task.description:<12}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=out) as bars:
        for event in client.follow(search_id, check):
            if event.kind in ("stage", "progress"):
                _advance(bars, event)
            elif event.kind == "notice":
                bars.print(f"[yellow]{escape(event.data['message'])}[/]")
            elif event.data.get("state") == "running":
                # A new attempt counts from the start.
                for task in bars.tasks:
                    bars.remove_task(task.id)


def _advance(bars: Progress, event: Event) -> None:
    """Move the last bar, or finish it and begin the next one."""
    stage, done, total = event.data["stage"], event.data.get("done", 0), event.data.get("total") or None
    last = bars.tasks[-1] if bars.tasks else None
    if last is None or event.kind == "stage" or last.fields["stage"] != stage:
        if last is not None:
            # These may end before they have spent what they might.
            if last.fields["stage"] not in ("refine", "evolve"):
                bars.update(last.id, completed=last.total)
            bars.stop_task(last.id)
        bars.add_task(announcement(event.data) or stage, completed=done, total=total, stage=stage)
    else:
        bars.update(last.id, completed=done, total=total)


def check_succeeded(client: Client, search_id: int) -> dict[str, Any]:
    """The finished search. Raises Refused when it did not succeed."""
    search: dict[str, Any] = client.get(f"/v1/searches/{search_id}").json()
    if search["state"] == "failed":
        raise Refused(search["error"])
    if search["state"] == "cancelled":
        raise Refused({"title": "Cancelled", "detail": f"search {search_id} was cancelled"})
    return search


def frontier_table(frontier: dict[str, Any], model: str) -> Table:
    """The frontier and the uniform baselines, the best point that fits marked."""
    points = {point["number"]: point for point in [*frontier["points"], *frontier["baselines"]]}
    axis = frontier["axes"][0]
    rows = sorted(points.values(), key=lambda point: (point["costs"][axis], point["number"]))
    resources = [name for name in RESOURCES if all(name in point["costs"] for point in rows)]
    extra = [name for name in ("perplexity", "accuracy") if any(name in point["metrics"] for point in rows)]
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
        best = point["number"] == frontier["best"]
        table.add_row(
            str(point["number"]),
            Text(point["label"], no_wrap=True, overflow="ellipsis"),
            *(RESOURCES[name].number(point["costs"][name]) for name in resources),
            loss_text(point["metrics"]["loss"]),
            *(f"{point['metrics'][name]:.4g}" if name in point["metrics"] else "" for name in extra),
            _remarks(point, best, knee=point["number"] == frontier["knee"]),
            style="bold green" if best else "" if point["on_frontier"] else "dim",
        )
    return table


def _remarks(point: dict[str, Any], best: bool, *, knee: bool) -> str:
    remarks = ["★ best"] * best + ["knee"] * knee
    if not point["fits"]:
        remarks.append("over budget")
    elif not point["on_frontier"]:
        remarks.append("dominated")
    return ", ".join(remarks)


def write_files(client: Client, search: dict[str, Any], best: int | None, folder: Path) -> list[Path]:
    """Write frontier.html, .csv and .json and the best point's configuration; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    base = f"/v1/searches/{search['id']}"
    files = {
        f"frontier.{format}": client.get(f"{base}/frontier", format=format, include="baselines,dominated").content
        for format in ("html", "csv", "json")
    }
    if best is not None:
        format = "vllm" if search["target"] == "vllm" else "json"
        config = client.get(f"{base}/points/{best}/config", format=format)
        files[filename_of(config.headers["content-disposition"])] = config.content
    paths = []
    for name, content in files.items():
        path = folder / name
        path.write_bytes(content)
        paths.append(path)
    return paths


def filename_of(disposition: str) -> str:
    """The bare file name in a Content-Disposition header."""
    return Path(disposition.partition('filename="')[2].rstrip('"')).name or "config.json"


def show(client: Client, search: dict[str, Any]) -> None:
    """Print the frontier of a search."""
    frontier = client.get(f"/v1/searches/{search['id']}/frontier").json()
    if frontier["points"] or frontier["baselines"]:
        out.print(frontier_table(frontier, search["model"]))
    summary = search.get("summary") or {}
    if search["state"] == "succeeded" and "acceptance" in summary:
        told, of = summary["acceptance"], summary.get("coverage") or {}
        within = f"; {of['within']} of {of['points']} losses within what was expected" if of.get("points") else ""
        out.print(
            f"[dim]Losses on held-out data. {summary['evaluations']:.4g} evaluations on the calibration data; "
            f"{told['accepted']} of {told['finalists']} finalists held on data that was not searched{within}.[/]"
        )
    if summary.get("latency"):
        out.print(f"[dim]{escape(latency_text(summary['latency']))}[/]")
    if search["state"] == "succeeded" and frontier["best"] is None:
        out.print("[yellow]No measured configuration fits every budget.[/]")
