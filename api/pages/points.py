"""The points of a search as a table: in groups that are shown or not, sorted, a page at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from urllib.parse import urlencode

from api.frontier import Frontier
from api.pages.charts import role, shown_loss
from api.resources import RESOURCES, loss_text
from search.budget import TOLERANCE
from search.candidate import Candidate

PAGE_LENGTH = 100

GROUPS = {
    "frontier": "Frontier",
    "uniform": "Uniform",
    "dominated": "Dominated",
    "over": "Over a budget",
    "rejected": "Rejected",
    "searched": "Searched only",
    "unmeasured": "Not measured",
}
EXPLAINED = {
    "rejected": "Rejected: on data that the search had not seen, they did not clearly beat what costs no more.",
    "searched": "Searched only: on the calibration data others did better at their cost. The losses are of that data.",
    "unmeasured": "Not measured: what is known of them is predicted.",
}
ALWAYS = ("frontier", "uniform")
MEASURED = (*ALWAYS, "dominated", "over")
EXTRA = ("perplexity", "accuracy")


@dataclass(frozen=True, slots=True)
class View:
    """What a person has chosen to see: groups (None: as many measured ones as fit a page), the column and direction
    they are sorted by, how many rows stand before, and the selected point."""

    groups: tuple[str, ...] | None = None
    sort: str = ""
    descending: bool = False
    after: int = 0
    point: int | None = None

    def query(self, **changes: object) -> str:
        """The query string of the first page of this view, with some of it changed; empty where nothing is chosen."""
        own = {"sort": self.sort, "order": "desc" if self.descending else "", "point": self.point}
        pairs = [*(("show", group) for group in self.groups or ()), *(own | changes).items()]
        return urlencode([(name, value) for name, value in pairs if value not in ("", None)])


@dataclass(frozen=True, slots=True)
class Group:
    """A group of points, how many there are, and whether they are shown."""

    name: str
    title: str
    count: int
    shown: bool


@dataclass(frozen=True, slots=True)
class Column:
    """A column that the table can be sorted by; `direction` is that of the present sorting, as `aria-sort` says it."""

    name: str
    title: str
    direction: str


@dataclass(frozen=True, slots=True)
class Row:
    """A point, its group, and, where it was rejected, why."""

    point: Candidate
    group: str
    loss: str
    reason: str


@dataclass(frozen=True, slots=True)
class PointsTable:
    """A page of rows; `next` is how many stand before the following page, None on the last."""

    groups: list[Group]
    columns: list[Column]
    rows: list[Row]
    count: int
    next: int | None
    explained: list[str]


def points_table(frontier: Frontier, view: View) -> PointsTable:
    """The points of a search as `view` has them; the main axis sorts where it names nothing."""
    group_of = {point.number: _group(point) for point in frontier.candidates}
    counts = Counter(group_of.values())
    shown = view.groups if view.groups is not None else default_groups(counts)
    points = [point for point in frontier.candidates if group_of[point.number] in shown]
    resources = [name for name in RESOURCES if all(name in point.costs for point in frontier.candidates)]
    extra = [name for name in EXTRA if any(name in point.metrics for point in points)]
    titles = {"number": "Point", "loss": "Loss"} | {name: RESOURCES[name].short for name in resources}
    titles |= {name: name.capitalize() for name in extra}
    sort = view.sort if view.sort in titles else frontier.axes[0]
    points.sort(key=lambda point: _worth(point, sort, view.descending))
    page = points[view.after : view.after + PAGE_LENGTH]
    direction = "descending" if view.descending else "ascending"
    rejecting = [point for point in frontier.measured if "acceptance_loss" in point.metrics]
    return PointsTable(
        [Group(name, title, counts[name], name in shown) for name, title in GROUPS.items() if counts[name]],
        [Column(name, title, direction if name == sort else "none") for name, title in titles.items()],
        [_row(point, group_of[point.number], rejecting) for point in page],
        len(points),
        view.after + PAGE_LENGTH if len(points) > view.after + PAGE_LENGTH else None,
        [words for name, words in EXPLAINED.items() if name in shown and counts[name]],
    )


def default_groups(counts: Counter[str]) -> tuple[str, ...]:
    """All measured points where they fit a page; else the frontier and the uniform baselines."""
    return MEASURED if sum(counts[name] for name in MEASURED) <= PAGE_LENGTH else ALWAYS


def rejection(point: Candidate, standing: Sequence[Candidate]) -> str:
    """Why a point that was considered for the frontier is not reported: what costs no more and has less loss, or about
    as much, on the acceptance data. `standing` are those that were accepted."""
    cheaper = [
        other
        for other in standing
        if all(other.costs[name] <= cost * (1 + TOLERANCE) for name, cost in point.costs.items())
    ]
    loss = point.metrics["acceptance_loss"]
    if not cheaper:
        return f"Loss {loss_text(loss)} on unseen data."
    rival = min(cheaper, key=lambda other: other.metrics["acceptance_loss"])
    theirs = rival.metrics["acceptance_loss"]
    words = "not clearly less than" if loss < theirs else "against"
    return (
        f"Loss {loss_text(loss)} on unseen data, {words} {loss_text(theirs)} of point {rival.number} at no more cost."
    )


def _group(point: Candidate) -> str:
    if shown_loss(point) is None:
        return "unmeasured"
    found = role(point)
    return {"baseline": "uniform", "fits": "frontier" if point.on_frontier else "dominated"}.get(found, found)


def _row(point: Candidate, group: str, standing: Sequence[Candidate]) -> Row:
    loss = shown_loss(point)
    return Row(point, group, loss_text(loss), rejection(point, standing) if group == "rejected" else "")


def _worth(point: Candidate, sort: str, descending: bool) -> tuple[float, int]:
    """What sorts a point; those that lack it stand last."""
    values = {"number": float(point.number), "loss": shown_loss(point), **point.costs}
    values |= {name: point.metrics.get(name) for name in EXTRA}
    value = values.get(sort)
    return (inf if value is None else -value if descending else value), point.number
