"""The space of a search: the units of a model × the schemes allowed for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from math import ceil

import numpy as np
from numpy.typing import NDArray

from search.errors import InvalidRequest, UnsupportedModel
from search.inventory import Inventory, Layer, whole_and_channels
from search.request import SpaceRequest
from search.scheme import FULL_PRECISION, Scheme
from search.targets import Target

MOST_ENTRIES = 1_000_000
"""Units × schemes of the largest space. A request may ask for one as large as it likes by few channels a unit."""


class TooFine(InvalidRequest):
    """The space has more entries than it may have."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Layers, or a part of one, that must share a scheme; in network order."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def block(self) -> str | None:
        """The repeated module all its layers stand in."""
        return self.layers[0].block

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(layer.weights for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Space:
    """Units × schemes. `allowed[u, s]` says whether unit u may take scheme s; every row allows at least one.

    `pinned[u]` says whether the request settled unit u; `ignored` are the layers left at full precision.
    """

    units: tuple[Unit, ...]
    schemes: tuple[Scheme, ...]
    allowed: NDArray[np.bool_]
    pinned: NDArray[np.bool_]
    ignored: tuple[Layer, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All searched layers, or parts of them."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def layer_of(self) -> NDArray[np.int64]:
        """For each unit the number of its layer, counted from 0 in network order: the same for all parts of one. Where
        units are layers or more, their own numbers."""
        names = [whole_and_channels(unit.layers[0].name)[0] for unit in self.units]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        return np.array([numbers[name] for name in names], dtype=np.int64)

    @property
    def splits_layers(self) -> bool:
        """Whether parts of a layer are units."""
        return len(np.unique(self.layer_of)) < len(self.units)

    def uniform(self, scheme: Scheme) -> NDArray[np.int64] | None:
        """The choice that gives `scheme` to every unit that is not pinned; None where one cannot take it, or none is
        left to take it."""
        column = self.schemes.index(scheme)
        if self.pinned.all() or not (self.allowed[:, column] | self.pinned).all():
            return None
        return np.where(self.pinned, self.allowed.argmax(axis=1), column).astype(np.int64)


def build_space(inventory: Inventory, request: SpaceRequest, target: Target, *, most: int = MOST_ENTRIES) -> Space:
    """Tie layers into units as the request's granularity and `target` have it, apply ignores and pins.

    Raises InvalidRequest for a scheme or granularity the target refuses, a pin that matches no layer or contradicts
    another, or a group size that does not divide; TooFine for more units × schemes than `most`; UnsupportedModel when
    nothing is left to search.
    """
    _check_splits(request, target)
    schemes = [_accepted(Scheme.parse(text), target, "space.schemes") for text in request.schemes]
    pins = {pattern: _accepted(Scheme.parse(text), target, "space.pin") for pattern, text in request.pin.items()}
    columns = tuple(sorted({*schemes, *pins.values()}))

    searched: list[Layer] = []
    ignored: list[Layer] = []
    for layer in inventory.layers:
        (ignored if _ignored(layer, request, target) else searched).append(layer)
    for pattern in pins:
        if not any(matches(layer, pattern) for layer in searched):
            raise InvalidRequest(
                f"the pin '{pattern}' matches no searched layer",
                field="space.pin",
                value=pattern,
                accepted=f"a glob over {_some([layer.name for layer in searched])}",
            )
    _check_whole(searched, ignored, target)
    tied = tie(searched, target, blocks=request.granularity == "block")
    if not tied:
        raise UnsupportedModel(
            f"no layer of this {inventory.architecture} is left to search for target '{target.name}'",
            field="space.ignore",
            value=list(request.ignore),
            accepted=f"patterns that leave at least one of {_some([layer.name for layer in inventory.layers])}",
        )
    if request.channels is not None:
        _check_entries(tied, request.channels, len(columns), most)

    units: list[Unit] = []
    allowed: list[NDArray[np.bool_]] = []
    pinned: list[bool] = []
    for unit in tied:
        settled = _pinned(unit, pins)
        for scheme in settled or schemes:
            _check_takes(unit, scheme, target)
        parts = [unit] if request.channels is None else _cut(unit, request.channels)
        units += parts
        allowed += [np.isin(np.arange(len(columns)), [columns.index(one) for one in settled or schemes])] * len(parts)
        pinned += [bool(settled)] * len(parts)
    return Space(tuple(units), columns, np.array(allowed), np.array(pinned), tuple(ignored))


def tie(layers: list[Layer], target: Target, *, blocks: bool = False) -> list[Unit]:
    """Group layers into units: fused siblings of one parent, and the experts of one layer, together; with `blocks`, all
    layers of a block."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        block = layer.block if blocks else None
        groups.setdefault(block or _unit_name(layer.name, target), []).append(layer)
    return [_unit(name, members) for name, members in groups.items()]


def _unit(name: str, members: list[Layer]) -> Unit:
    alone = len(members) == 1 and name != members[0].block
    return Unit(members[0].name if alone else name, tuple(members))


def _cut(unit: Unit, channels: int) -> list[Unit]:
    """The groups of output channels of a linear layer that is tied to no other; every other unit stays whole."""
    layer = unit.layers[0]
    if _groups(unit, channels) == 1:
        return [unit]
    starts = range(0, layer.rows, channels)
    parts = [layer.part(range(start, min(start + channels, layer.rows))) for start in starts]
    return [Unit(part.name, (part,)) for part in parts]


def _groups(unit: Unit, channels: int) -> int:
    """Into how many units `_cut` makes a unit."""
    layer, *others = unit.layers
    return 1 if others or layer.kind != "linear" else ceil(layer.rows / channels)


def _check_entries(tied: list[Unit], channels: int, schemes: int, most: int) -> None:
    """Refuse what would take minutes and gigabytes to build, before anything of it is built."""
    units = sum(_groups(unit, channels) for unit in tied)
    if units * schemes > most:
        raise TooFine(
            f"{channels} channels to a unit make {units:,} units, and with {schemes} schemes {units * schemes:,} "
            f"entries of the space, of which there may be {most:,}",
            field="space.channels",
            value=channels,
            accepted=f"more channels to a unit, or fewer schemes: at most {most:,} units × schemes",
        )


def _unit_name(name: str, target: Target) -> str:
    parent, _, leaf = name.rpartition(".")
    if target.ties_experts and ".experts." in f"{name}.":
        return name[: name.index(".experts") + len(".experts")]
    for siblings in target.fused:
        if leaf in siblings:
            return f"{parent}.{'+'.join(siblings)}"
    return name


def _check_splits(request: SpaceRequest, target: Target) -> None:
    if request.granularity == "channels" and not target.splits_layers:
        raise InvalidRequest(
            f"target '{target.name}' loads one scheme for all output channels of a layer",
            field="space.granularity",
            value=request.granularity,
            accepted="'layer' or 'block', or target 'generic'",
        )


def _check_whole(searched: list[Layer], ignored: list[Layer], target: Target) -> None:
    """A runtime that merges layers cannot quantize some of them."""
    units = {_unit_name(layer.name, target) for layer in searched}
    for layer in ignored:
        if target.refuses(layer) is None and _unit_name(layer.name, target) in units:
            raise InvalidRequest(
                f"'{layer.name}' is ignored, but target '{target.name}' merges it with layers that are not",
                field="space.ignore",
                value=layer.name,
                accepted=f"patterns that ignore all of {_unit_name(layer.name, target)}, or none",
            )


def _ignored(layer: Layer, request: SpaceRequest, target: Target) -> bool:
    return target.refuses(layer) is not None or any(matches(layer, pattern) for pattern in request.ignore)


def matches(layer: Layer, pattern: str) -> bool:
    """Whether a name or glob names the layer, by its own name or by one of another module that shares its weight; a
    part, by the name of its layer."""
    named = _compiled(pattern)
    return any(named.match(name) for name in (whole_and_channels(layer.name)[0], *layer.aliases))


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    # `fnmatch` remembers 256 patterns, and a request may have a thousand, each asked of every layer.
    return re.compile(translate(pattern))


def _accepted(scheme: Scheme, target: Target, field: str) -> Scheme:
    reason = target.refuses_scheme(scheme)
    if reason:
        raise InvalidRequest(
            f"target '{target.name}' refuses {scheme}: {reason}",
            field=field,
            value=str(scheme),
            accepted=f"schemes that '{target.name}' runs (GET /v1/targets), or target 'generic'",
        )
    return scheme


def _pinned(unit: Unit, pins: dict[str, Scheme]) -> list[Scheme]:
    found = {scheme for pattern, scheme in pins.items() for layer in unit.layers if matches(layer, pattern)}
    if len(found) > 1:
        raise InvalidRequest(
            f"the pins give {unit.name} several schemes",
            field="space.pin",
            value=sorted(str(scheme) for scheme in found),
            accepted="one scheme for all layers of a unit: " + ", ".join(layer.name for layer in unit.layers),
        )
    return list(found)


def _check_takes(unit: Unit, scheme: Scheme, target: Target) -> None:
    for layer in unit.layers:
        if not scheme.fits(layer.columns):
            raise InvalidRequest(
                f"group size {scheme.group_size} of {scheme} does not divide the {layer.columns} columns "
                f"of {layer.name}",
                field="space.schemes",
                value=str(scheme),
                accepted=f"a group size that divides {layer.columns}, no group size (one scale per output channel), "
                f"or '{layer.name}' in space.ignore or pinned in space.pin",
            )
        reason = target.refuses_at(layer, scheme)
        if reason:
            raise InvalidRequest(
                f"{layer.name} cannot take {scheme} for target '{target.name}': {reason}",
                field="space.schemes",
                value=str(scheme),
                accepted=f"other schemes, or '{layer.name}' in space.ignore or pinned in space.pin",
            )
        if layer.kind in ("embedding", "experts") and scheme.quantizes_activations and scheme != FULL_PRECISION:
            raise InvalidRequest(
                f"{scheme} quantizes activations, which {layer.kind} layer {layer.name} cannot",
                field="space.schemes",
                value=str(scheme),
                accepted=f"a16 schemes, or '{layer.name}' in space.ignore or pinned in space.pin",
            )


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
