"""Where the bytes and microseconds of a point go, as rows with bars."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import Engine

from api.pages.views import percent
from api.resources import RESOURCES
from db.exports import searched_inventory
from db.latency import get_profile
from db.searches import Search
from search.candidate import Candidate
from search.latency import Latency
from search.spending import Spending, Spent, spending

OTHER = "norms, biases and all else"
OUTSIDE = "outside of the blocks"


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes or microseconds: in words, as a share of the model's and, for the bar, of the largest row's."""

    text: str
    share: float
    bar: float

    @property
    def percent(self) -> str:
        """The share in words."""
        return percent(self.share)


@dataclass(frozen=True, slots=True)
class SpentRow:
    """Some layers together: what they take, and how much of it are scales and zero points."""

    name: str
    layers: int
    size: Amount
    scales: float
    time: Amount | None


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer in network order."""

    name: str
    scheme: str
    size: str
    time: str


@dataclass(frozen=True, slots=True)
class SpendingView:
    """The same costs by kind of layer, by block and by layer; the totals, and what is not searched."""

    by_kind: list[SpentRow]
    by_block: list[SpentRow]
    layers: list[LayerRow]
    size: str
    scales: str
    kept: str
    time: str | None
    full_costs: dict[str, float]


def point_spending(engine: Engine, search: Search, point: Candidate) -> SpendingView | None:
    """Where a point's costs go; None where its model is no longer registered as it was searched."""
    inventory = searched_inventory(engine, search)
    if inventory is None:
        return None
    told = (search.summary or {}).get("latency")
    profile = get_profile(engine, told["key"]) if told else None
    latency = Latency(profile, told["tokens"], search.model) if told and profile else None
    if any(layer.kind == "experts" for layer in inventory.layers):
        latency = None
    return _view(spending(point.allocation, inventory, latency), spending({}, inventory, latency))


def _view(spent: Spending, full: Spending) -> SpendingView:
    blocks = {layer.layer.block for layer in spent.layers}
    searched = [layer for layer in spent.layers if layer.scheme.quantizes_weights]
    time = spent.latency_us
    return SpendingView(
        by_kind=_rows(spent, lambda layer: layer.kind),
        by_block=_rows(spent, lambda layer: layer.layer.block or OUTSIDE) if len(blocks - {None}) > 1 else [],
        layers=[_layer_row(layer, timed=time is not None) for layer in spent.layers],
        size=size_text(spent.size_bytes),
        scales=percent(sum(layer.scale_bytes for layer in spent.layers) / spent.size_bytes),
        kept=percent(1 - sum(layer.size_bytes for layer in searched) / spent.size_bytes),
        time=None if time is None else time_text(time),
        full_costs=_costs(full),
    )


def _costs(full: Spending) -> dict[str, float]:
    """What 16 bits everywhere cost."""
    bitops = sum(layer.layer.macs * layer.scheme.weight_bits * layer.scheme.activation_bits for layer in full.layers)
    known = {"avg_bits": 16.0, "size_bytes": full.size_bytes, "bitops": float(bitops)}
    return known | ({} if full.latency_us is None else {"latency_us": full.latency_us})


def _rows(spent: Spending, group: Callable[[Spent], str]) -> list[SpentRow]:
    groups: dict[str, list[Spent]] = {}
    for layer in spent.layers:
        groups.setdefault(group(layer), []).append(layer)
    sizes = {name: sum(layer.size_bytes for layer in members) for name, members in groups.items()}
    timed = bool(spent.latency_us)
    times = {name: _time(members) for name, members in groups.items()} if timed else {}
    total, total_time = spent.size_bytes, spent.latency_us or 0.0
    most = max([*sizes.values(), spent.other_bytes])
    most_time = max(times.values(), default=0.0)
    rows = [
        SpentRow(
            name,
            len(members),
            Amount(size_text(sizes[name]), sizes[name] / total, sizes[name] / most),
            sum(layer.scale_bytes for layer in members) / (sizes[name] or 1),
            Amount(time_text(times[name]), times[name] / total_time, times[name] / most_time) if timed else None,
        )
        for name, members in groups.items()
    ]
    if spent.other_bytes > 0:
        amount = Amount(size_text(spent.other_bytes), spent.other_bytes / total, spent.other_bytes / most)
        rows.append(SpentRow(OTHER, 0, amount, 0.0, None))
    return rows


def _layer_row(spent: Spent, *, timed: bool) -> LayerRow:
    time = time_text(spent.latency_us) if timed and spent.latency_us is not None else ""
    return LayerRow(spent.layer.name, str(spent.scheme), size_text(spent.size_bytes), time)


def _time(layers: Iterable[Spent]) -> float:
    return sum(layer.latency_us or 0.0 for layer in layers)


def size_text(size_bytes: float) -> str:
    """`31.0 MB`; kilobytes below one."""
    return RESOURCES["size_bytes"].text(size_bytes) if size_bytes >= 1e6 else f"{size_bytes / 1e3:,.1f} kB"


def time_text(microseconds: float) -> str:
    """`12.3 µs`; milliseconds from one on."""
    return RESOURCES["latency_us"].text(microseconds) if microseconds >= 1e3 else f"{microseconds:,.1f} µs"
