"""What formats share: saying why a point cannot be carried, and which scheme comes nearest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from search.errors import ExportRefused
from search.exports import Exported
from search.inventory import Layer
from search.scheme import ACTIVATION_BITS, FULL_PRECISION, GROUP_SIZES, WEIGHT_BITS, Scheme
from search.space import tie
from search.targets import Target

TRANSPOSED = "its weight is stored as inputs × outputs, as in GPT-2's Conv1D, and tools quantize no such layers"

Problem = Callable[[Layer, Scheme], str | None]
"""Why a tool cannot carry a layer at a scheme that is not full precision; None where it can."""


def all_schemes(exported: Exported) -> dict[str, Scheme]:
    """The scheme of every quantizable layer, in network order; those that were not searched keep full precision."""
    schemes = exported.schemes
    return {layer.name: schemes.get(layer.name, FULL_PRECISION) for layer in exported.inventory.layers}


def check_schemes(exported: Exported, problem: Problem) -> None:
    """Raise ExportRefused for the first layer that has a problem, naming the nearest scheme that has none."""
    schemes = all_schemes(exported)
    for layer in exported.inventory.layers:
        scheme = schemes[layer.name]
        if scheme == FULL_PRECISION:
            continue
        reason = TRANSPOSED if layer.transposed else problem(layer, scheme)
        if reason:
            closest = FULL_PRECISION if layer.transposed else nearest([layer], scheme, problem)
            raise ExportRefused(
                f"{layer.name} takes {scheme}, but {reason}; the nearest that it can take is {closest}",
                field=layer.name,
                value=str(scheme),
                accepted=str(closest),
            )


def nearest(layers: Sequence[Layer], wanted: Scheme, problem: Problem) -> Scheme:
    """The scheme closest to `wanted` that no layer has a problem with: in weight bits first, then activation bits,
    grouping and symmetry."""
    per_channel = 2 * max(GROUP_SIZES)

    def distance(scheme: Scheme) -> tuple[int, ...]:
        return (
            abs(scheme.weight_bits - wanted.weight_bits),
            abs(scheme.activation_bits - wanted.activation_bits),
            abs((scheme.group_size or per_channel) - (wanted.group_size or per_channel)),
            scheme.symmetric != wanted.symmetric,
            -scheme.weight_bits,
        )

    grid = itertools.product(WEIGHT_BITS, ACTIVATION_BITS, (*GROUP_SIZES, None), (True, False))
    choices = [Scheme(*choice) for choice in grid if choice[0] < FULL_PRECISION.weight_bits]
    fitting = [
        scheme
        for scheme in choices
        if all(scheme.fits(layer.columns) and problem(layer, scheme) is None for layer in layers)
    ]
    return min(fitting, key=distance, default=FULL_PRECISION)


def check_fused(exported: Exported, target: Target, tool: str, problem: Problem) -> None:
    """Raise ExportRefused for the first set of layers that `tool` merges, as `target` has it, and that differ.

    It names the scheme nearest to the widest of theirs that all of them can take.
    """
    schemes = all_schemes(exported)
    for unit in tie(list(exported.inventory.layers), target):
        taken = {layer.name: schemes[layer.name] for layer in unit.layers}
        if len(set(taken.values())) > 1:
            widest = max(taken.values(), key=lambda scheme: (scheme.weight_bits, str(scheme)))
            raise ExportRefused(
                f"{tool} fuses {', '.join(taken)} into one layer, which takes one scheme, but this point gives "
                f"{', '.join(sorted(set(map(str, taken.values()))))}; search with target '{target.name}' to tie them",
                field=unit.name,
                value={name: str(scheme) for name, scheme in taken.items()},
                accepted=str(widest if widest == FULL_PRECISION else nearest(unit.layers, widest, problem)),
            )


def check_generates(exported: Exported, tool: str) -> None:
    """Raise ExportRefused for a model that does not generate text, which `tool` does not quantize."""
    if exported.inventory.task != "causal-lm":
        raise ExportRefused(
            f"{tool} quantizes models that generate text",
            field="task",
            value=exported.inventory.task,
            accepted="causal-lm, or the export format 'json'",
        )


def check_quantized(exported: Exported, tool: str) -> None:
    """Raise ExportRefused for a point that keeps every layer at full precision."""
    if all(scheme == FULL_PRECISION for scheme in all_schemes(exported).values()):
        raise ExportRefused(
            f"every layer of this point keeps full precision: there is nothing for {tool} to quantize",
            accepted="a point that quantizes at least one layer, or the model as it is",
        )
