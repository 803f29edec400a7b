"""A point beside its neighbours: which layers would change, and what that would cost and buy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from api.frontier import Frontier
from api.pages.charts import baseline_name
from api.pages.views import percent, times
from api.resources import RESOURCES
from search.candidate import Candidate
from search.scheme import Scheme

Place = Literal["cheaper", "better", "uniform"]

# Ratios this close to 1 are "the same".
SAME = 0.0005


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Another point of the search, and why it stands beside this one."""

    place: Place
    point: Candidate

    @property
    def name(self) -> str:
        """`Cheaper: point 3`."""
        if self.place == "uniform":
            return f"Uniform {baseline_name(self.point)}"
        return f"{self.place.capitalize()}: point {self.point.number}"


@dataclass(frozen=True, slots=True)
class Change:
    """Layers that go from one scheme to another, by kind and block: `mlp.down_proj of blocks 0–3, 7`."""

    before: str
    after: str
    layers: int
    where: list[str]

    @property
    def bits(self) -> tuple[int, int]:
        """Weight bits before and after."""
        return Scheme.parse(self.before).weight_bits, Scheme.parse(self.after).weight_bits


@dataclass(frozen=True, slots=True)
class Difference:
    """What taking the neighbour instead would change; `amounts` are by column, as `columns` names them."""

    neighbour: Neighbour
    changes: list[Change]
    amounts: list[str]

    @property
    def layers(self) -> int:
        """How many change."""
        return sum(change.layers for change in self.changes)


def neighbours(frontier: Frontier, point: Candidate) -> list[Neighbour]:
    """The frontier's points next to `point` by cost on the main axis, and the best uniform one at no larger cost."""
    axis = frontier.axes[0]
    others = [other for other in frontier.points if other.number != point.number]
    cheaper = [other for other in others if other.costs[axis] <= point.costs[axis]]
    dearer = [other for other in others if other.costs[axis] > point.costs[axis]]
    found = [Neighbour("cheaper", cheaper[-1])] if cheaper else []
    found += [Neighbour("better", dearer[0])] if dearer else []
    comparison = frontier.compare(point)
    told = {neighbour.point.number for neighbour in found}
    if comparison and comparison.baseline.number not in told:
        found.append(Neighbour("uniform", comparison.baseline))
    return found


def columns(point: Candidate) -> list[str]:
    """The quantities a difference is told in."""
    return ["Loss", *(words.short for name, words in RESOURCES.items() if name in point.costs)]


def difference(
    point: Candidate, neighbour: Neighbour, allocation: Mapping[str, str], layers: Sequence[dict[str, Any]]
) -> Difference:
    """What going from `point` to a neighbour with this allocation changes. `layers` are as in a search's summary."""
    other = neighbour.point
    amounts = [_loss_change(point.loss, other.loss)]
    amounts += [
        _cost_change(name, point.costs[name], other.costs[name])
        for name in RESOURCES
        if name in point.costs and name in other.costs
    ]
    return Difference(neighbour, changes(point.allocation, allocation, layers), amounts)


def changes(before: Mapping[str, str], after: Mapping[str, str], layers: Sequence[dict[str, Any]]) -> list[Change]:
    """The layers whose scheme differs, by what it changes from and to, the most layers first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in layers:
        name = layer["name"]
        if name in before and name in after and before[name] != after[name]:
            found.setdefault((before[name], after[name]), []).append(layer)
    ordered = sorted(found.items(), key=lambda item: (-len(item[1]), *map(Scheme.parse, item[0])))
    return [Change(*schemes, len(members), places(members)) for schemes, members in ordered]


def places(layers: Iterable[dict[str, Any]]) -> list[str]:
    """Layers by kind, each with its blocks: `mlp.down_proj of blocks 0–3, 7`; those outside of blocks by name."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        block = layer["block"]
        kind = layer["name"].removeprefix(f"{block}.") if block else layer["name"]
        blocks.setdefault(kind, []).extend([block.rsplit(".", 1)[-1]] if block else [])
    return [
        f"{kind} of block{'s' if len(named) > 1 else ''} {ranges(named)}" if named else kind
        for kind, named in blocks.items()
    ]


def ranges(names: Sequence[str]) -> str:
    """`0–3, 7` of 0, 1, 2, 3, 7; names that are no numbers one by one."""
    if not all(name.isdecimal() for name in names):
        return ", ".join(names)
    numbers = sorted(map(int, names))
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda item: item[1] - item[0])]
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _loss_change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return "not measured"
    if before <= 0 or after <= 0:
        return "—"
    ratio = after / before
    if abs(ratio - 1) <= SAME:
        return "the same"
    if ratio < 1:
        return f"{percent(1 - ratio)} less"
    return f"{percent(ratio - 1)} more" if ratio < 2 else f"{times(ratio)} as much"


def _cost_change(resource: str, before: float, after: float) -> str:
    if abs(after - before) <= SAME * max(abs(before), abs(after)):
        return "the same"
    sign = "+" if after > before else "−"
    return f"{sign}{RESOURCES[resource].text(abs(after - before))} ({sign}{percent(abs(after / before - 1))})"
