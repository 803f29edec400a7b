"""Measured divergence: the loss with one unit at a scheme and all others at full precision.

Blocks before the unit's own are not run again: their output is computed once per batch and entered (exact).
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from search.scheme import Scheme
from search.space import Space, Unit
from workers.evaluator import Evaluator, standard_error
from workers.sensitivity.table import Table, metric
from workers.tasks import Compute, Item, Result, Task


@metric("kl")
def kl(compute: Compute, space: Space, _batch_sizes: list[int]) -> Table:
    """The divergence of every unit at every allowed scheme, on the calibration split; one task per block."""
    values = np.full(space.allowed.shape, np.inf)
    stderr = np.full(space.allowed.shape, np.inf)
    groups = [list(group) for _, group in groupby(range(len(space.units)), key=lambda row: space.units[row].block)]
    results = compute(DIVERGENCE, [_item([space.units[row] for row in rows], rows, space) for rows in groups])
    for rows, result in zip(groups, results, strict=True):
        for row in rows:
            for text, (mean, error) in result[space.units[row].name].items():
                column = space.schemes.index(Scheme.parse(text))
                values[row, column], stderr[row, column] = mean, error
    return Table(values, stderr)


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
    losses: dict[tuple[str, str], list[Tensor]] = {}
    start = chain.names.index(item["block"]) if chain and item["block"] else 0
    for index, batch in enumerate(evaluator.batches("calibration")):
        evaluator.apply({})
        reference = evaluator.reference("calibration", index)
        before = chain.output_of(start - 1, lambda b=batch: evaluator.loaded(b)) if chain and start else None  # type: ignore[misc]
        for unit in item["units"]:
            for text in unit["schemes"]:
                evaluator.apply(dict.fromkeys(unit["layers"], Scheme.parse(text)))
                if chain and start:
                    with chain.resumed(start, before):
                        output = evaluator.loaded(batch)
                else:
                    output = evaluator.loaded(batch)
                loss = evaluator.losses(batch, output, reference)
                losses.setdefault((unit["name"], text), []).append(loss)
    evaluator.apply({})
    result: Result = {unit["name"]: {} for unit in item["units"]}
    for (name, text), parts in losses.items():
        samples = torch.cat(parts).double()
        result[name][text] = [max(float(samples.mean()), 0.0), standard_error(samples)]
    return result


DIVERGENCE = Task("kl", 1, _divergence)
"""Item: a block and its units with their schemes. Result: unit → scheme → [mean, standard error]."""
