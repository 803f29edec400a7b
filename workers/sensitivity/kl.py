"""Measured divergence: the loss with one unit at a scheme and all others at full precision.

Blocks before the unit's own are not run again: their output is computed once per batch and entered (exact).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from search.scheme import Scheme
from search.space import Space, Unit
from workers.evaluator import Evaluator, standard_error
from workers.sensitivity.table import Entry, Subject, Table, metric
from workers.tasks import Compute, Item, Result, Task

RELATIVE_ERROR = 0.15
"""A block's batches stop, after two, when the mean relative standard error of its divergences is below this."""


@metric("kl")
def kl(compute: Compute, subject: Subject) -> Table:
    """The divergence of every unit at every allowed scheme, on the calibration split; one task per block."""
    space = subject.space
    groups = [list(group) for _, group in groupby(range(len(space.units)), key=lambda row: space.units[row].block)]
    results = compute(DIVERGENCE, [_item([space.units[row] for row in rows], rows, space) for rows in groups])
    found = {name: losses for result in results for name, losses in result.items()}

    def entry(unit: Unit, scheme: Scheme) -> Entry:
        mean, error = found[unit.name][str(scheme)]
        # What one measurement gives together is told apart by that of the same weights with activations kept.
        weights = found[unit.name].get(str(replace(scheme, activation_bits=16)), [mean])[0]
        return Entry(min(weights, mean), mean - min(weights, mean), error**2)

    return Table.of(space, entry)


def _item(units: list[Unit], rows: list[int], space: Space) -> Item:
    return {
        "block": units[0].block,
        "units": [
            {
                "name": unit.name,
                "layers": [layer.name for layer in unit.layers],
                "schemes": [
                    str(scheme) for scheme, open_ in zip(space.schemes, space.allowed[row], strict=True) if open_
                ],
            }
            for unit, row in zip(units, rows, strict=True)
        ],
    }


@torch.no_grad()
def _divergence(evaluator: Evaluator, item: Item) -> Result:
    chain = evaluator.chain
    start = chain.names.index(item["block"]) if chain and item["block"] else 0
    pairs = [(unit, text) for unit in item["units"] for text in unit["schemes"]]
    losses: list[list[Tensor]] = [[] for _ in pairs]
    for index, batch in enumerate(evaluator.batches("calibration")):
        evaluator.apply({})
        reference = evaluator.reference("calibration", index)
        with ExitStack() as stack:
            if chain and start:
                before = chain.output_of(start - 1, partial(evaluator.loaded, batch))
                stack.enter_context(chain.resumed(start, before))
            for (unit, text), found in zip(pairs, losses, strict=True):
                evaluator.apply(dict.fromkeys(unit["layers"], Scheme.parse(text)))
                found.append(evaluator.losses(batch, evaluator.loaded(batch), reference).double())
        if index and _relative_error(losses) < RELATIVE_ERROR:
            break
    evaluator.apply({})
    result: Result = {unit["name"]: {} for unit in item["units"]}
    for (unit, text), found in zip(pairs, losses, strict=True):
        samples = torch.cat(found)
        result[unit["name"]][text] = [max(float(samples.mean()), 0.0), standard_error(samples)]
    return result


def _relative_error(losses: list[list[Tensor]]) -> float:
    samples = torch.stack([torch.cat(found) for found in losses])
    error = samples.std(dim=1) / samples.shape[1] ** 0.5
    return float((error / samples.mean(dim=1).clamp_min(1e-300)).clamp(0, 1).mean())


DIVERGENCE = Task("kl", 1, _divergence)
"""Item: a block and its units with their schemes. Result: unit → scheme → [mean, standard error]."""
