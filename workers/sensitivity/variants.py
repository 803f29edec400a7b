"""Losses of variants of a few layers, with all others at full precision: no block before them is run again, nor any
layer before them in their own block.

Several variants are one forward pass over a batch stacked as many times: in the layers that vary each copy of the batch
meets its own variant, everywhere else they are one batch. Exact but for the order in which floats are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from search.inventory import by_whole, whole_and_channels
from search.space import Unit
from workers.calibration import Batch, Split, sample_count
from workers.evaluator import Evaluator, rounds_input
from workers.hooks import forward_replaced, removing

STACK = {"cuda": 8}
"""Variants that are run at once, by the kind of device; elsewhere one: on a processor a stack is no faster when a batch
has 256 tokens, and slower when it has 2048."""

STACKED = 2**28
"""Most numbers in the output of a stacked batch: 1 GiB in float32."""

STRETCHES = 8
"""Most parts of a network that are measured independently."""

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Variant:
    """What becomes of the weights of layers and parts, by name, and of the inputs of the modules that hold them; what
    has no entry stays as it is. Asked for when a layer runs, so that no copy is kept."""

    weights: Mapping[str, Change] = field(default_factory=dict)
    inputs: Mapping[str, Change] = field(default_factory=dict)

    @property
    def layers(self) -> list[str]:
        """The layers and parts that vary."""
        return list({**self.weights, **self.inputs})


class Walk:
    """A batch on its way through the blocks of a model at full precision; it only moves forward."""

    def __init__(self, evaluator: Evaluator, index: int, split: Split = "calibration") -> None:
        """Start before the first block, on batch `index` of `split`."""
        self.batch = evaluator.batches(split)[index]
        self.reference = evaluator.reference(split, index)
        self._evaluator = evaluator
        self._key = (split, index)
        self._block = 0
        self._before: Any = None
        self._after: Any = None
        self._outputs: dict[str, Tensor] | None = None

    def move(self, block: int) -> None:
        """Go on to the input of block `block` (the number of blocks: behind the last)."""
        if self._evaluator.chain is None or block <= self._block:
            return
        reached, output = self._evaluator.reached.get(self._key, (0, None))
        if self._block < reached <= block:
            self._block, self._before, self._after = reached, output, None
        if block > self._block:
            self._before = self._output_before(block)
        self._block = block
        self._after = self._outputs = None
        self._evaluator.reached[self._key] = (block, self._before)

    def _output_before(self, block: int) -> Any:
        chain = self._evaluator.chain
        assert chain is not None
        if block == self._block + 1 and self._after is not None:
            return self._after
        with self._resumed(1):
            return chain.output_of(block - 1, partial(self._evaluator.loaded, self.batch))

    def losses(self, variants: Sequence[Variant]) -> list[Tensor]:
        """The loss of every sample for each variant of layers that first run from here on; each (samples,).

        Variants are run one at a time where the layers do not keep samples apart.
        """
        most = STACK.get(self._evaluator.loaded.device.type, 1)
        stack = max(1, min(most, STACKED // self.reference.numel()))
        try:
            return self._losses_in_groups(variants, stack)
        except _Mixed:
            return self._losses_in_groups(variants, 1)

    def _losses_in_groups(self, variants: Sequence[Variant], size: int) -> list[Tensor]:
        groups = [variants[start : start + size] for start in range(0, len(variants), size)]
        return [loss for group in groups for loss in self._losses_at_once(group)]

    def _losses_at_once(self, variants: Sequence[Variant]) -> list[Tensor]:
        count = len(variants)
        batch: Batch = _repeated(self.batch, count)
        with ExitStack() as swaps:
            swaps.enter_context(self._resumed(count))
            for name, output in self._earlier({name for variant in variants for name in variant.layers}).items():
                # Copies: what follows may change them in place.
                given = partial(_copy, _repeated(output, count))
                swaps.enter_context(forward_replaced(self._evaluator.layers[name].module, given))
            swaps.enter_context(_varied(self._evaluator, variants))
            output = self._evaluator.loaded(batch)
        return [self._evaluator.losses(self.batch, one, self.reference).double() for one in output.chunk(count)]

    def _earlier(self, varied: set[str]) -> dict[str, Tensor]:
        """What those layers of the next block give that run before any that varies."""
        if self._outputs is None:
            self._outputs = self._outputs_of_block()
        order = list(self._evaluator.layers)
        first = min(map(order.index, by_whole(varied)), default=0)
        return {name: output for name, output in self._outputs.items() if order.index(name) < first}

    def _outputs_of_block(self) -> dict[str, Tensor]:
        """Layer → its output, of the next block's layers that run once; the block's own output is kept."""
        evaluator, chain = self._evaluator, self._evaluator.chain
        if chain is None or self._block >= len(chain):
            return {}
        found: dict[str, list[Tensor]] = {}

        def keep(name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
            # A copy: what follows may change it in place.
            found.setdefault(name, []).append(output.clone())

        hooks = [
            layer.module.register_forward_hook(partial(keep, name))
            for name, layer in evaluator.layers.items()
            if layer.layer.block == chain.names[self._block]
            and layer.layer.kind in ("linear", "conv")
            and not layer.layer.aliases
        ]
        with removing(hooks), self._resumed(1):
            self._after = chain.output_of(self._block, partial(evaluator.loaded, self.batch))
        return {name: outputs[0] for name, outputs in found.items() if len(outputs) == 1}

    def _resumed(self, count: int) -> Any:
        chain = self._evaluator.chain
        if chain is None or not self._block:
            return nullcontext()
        if count > 1 and len(_first(self._before)) != sample_count(self.batch):
            raise _Mixed
        return chain.resumed(self._block, _repeated(self._before, count))


def blocks_before(evaluator: Evaluator, layers: Iterable[str]) -> dict[str, int]:
    """Layer or part → how many blocks have run when it first runs; 0 where there is no chain of blocks."""
    names = evaluator.chain.names if evaluator.chain else []
    found: dict[str, int] = {}
    behind = 0
    # Layers stand in the order they first run: one outside the blocks runs after those whose layers ran before it.
    for name, weighted in evaluator.layers.items():
        block = weighted.layer.block
        if block is not None:
            found[name] = names.index(block)
            behind = max(behind, found[name] + 1)
        else:
            found[name] = behind
    return {name: found[whole_and_channels(name)[0]] for name in layers}


def stretches(units: Sequence[Unit], measurements: Sequence[int]) -> list[list[int]]:
    """The units (by index) cut at block boundaries into at most `STRETCHES` stretches of the network.

    They take about the same time: a measurement of a unit costs what is left of the network behind it.
    """
    blocks = [list(rows) for _, rows in groupby(range(len(units)), lambda row: units[row].block or units[row].name)]
    if len(blocks) <= STRETCHES:
        return blocks
    costs = [(1 - i / len(blocks)) * sum(measurements[row] for row in rows) for i, rows in enumerate(blocks)]
    found: dict[int, list[int]] = {}
    spent = 0.0
    for rows, cost in zip(blocks, costs, strict=True):
        found.setdefault(int((spent + cost / 2) / max(sum(costs), 1) * STRETCHES), []).extend(rows)
        spent += cost
    return list(found.values())


@contextmanager
def _varied(evaluator: Evaluator, variants: Sequence[Variant]) -> Iterator[None]:
    """Within, the modules of the layers that vary give each variant its part of a stacked input."""
    names: dict[nn.Module, list[str]] = {}
    for name in dict.fromkeys(name for variant in variants for name in variant.layers):
        for module in evaluator.modules(name):
            names.setdefault(module, []).append(name)
    stack = _Stack(evaluator, variants)
    with ExitStack() as swaps:
        for module in names:
            swaps.enter_context(forward_replaced(module, partial(stack.run, module, names[module], module.forward)))
        yield


class _Stack:
    def __init__(self, evaluator: Evaluator, variants: Sequence[Variant]) -> None:
        self._evaluator = evaluator
        self._variants = variants
        self._is_known = len(variants) == 1

    def run(
        self,
        module: nn.Module,
        names: list[str],
        forward: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if len(self._variants) == 1:
            return self._run_one(self._variants[0], module, names, forward, x, *args, **kwargs)
        # Fused experts take the routing along: their inputs are no stack of their own.
        if args or kwargs or len(x) % len(self._variants):
            raise _Mixed
        parts = x.chunk(len(self._variants))
        if not self._is_known and not _alike(parts[0], parts[-1]):
            raise _Mixed
        self._is_known = True
        return torch.cat(
            [
                self._run_one(variant, module, names, forward, part)
                for variant, part in zip(self._variants, parts, strict=True)
            ]
        )

    def _run_one(
        self,
        variant: Variant,
        module: nn.Module,
        names: list[str],
        forward: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        layers = {name: self._evaluator.layers[name] for name in names}
        kept = {name: layer.parameter.data for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                if name in variant.weights:
                    changed = variant.weights[name](layer.of(kept[name]))
                    layer.parameter.data = layer.replaced(layer.parameter.data, changed)
                if name in variant.inputs and rounds_input(module):
                    x = variant.inputs[name](x)
            return forward(x, *args, **kwargs)
        finally:
            for name, layer in layers.items():
                layer.parameter.data = kept[name]


class _Mixed(Exception):
    """An input's first dimension is not that of the samples."""


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether two inputs are one but for float rounding, as those of the first layer that varies must be."""
    return bool((x.float() - y.float()).norm() <= 0.01 * x.float().norm())


def _repeated(value: Any, count: int) -> Any:
    if count == 1:
        return value
    if isinstance(value, Tensor):
        return value.repeat(count, *[1] * (value.dim() - 1))
    if isinstance(value, dict):
        return {key: _repeated(one, count) for key, one in value.items()}
    return type(value)(_repeated(one, count) for one in value) if isinstance(value, (tuple, list)) else value


def _copy(output: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return output.clone()


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first
