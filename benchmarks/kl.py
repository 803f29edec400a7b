"""Measured divergences with the prefix reused, against a full forward pass for every unit and scheme."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.report import table, write
from scripts.demo_model import folder
from scripts.fetch_models import SMOLLM2, cache_folder
from search.request import Calibration, SpaceRequest
from search.scheme import Scheme
from search.space import Space, build_space
from search.targets import find_target
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity.kl import DIVERGENCE, items
from workers.tasks import Item, Result

SCHEMES = ("w3a16g64", "w4a16g64")


def main() -> None:
    """Time both ways on the same batches, item by item in turn, and write the ratio."""
    minilm = EvaluatorSpec(str(folder()), Calibration(samples=16, sequence_length=128))
    smollm2 = EvaluatorSpec(str(cache_folder() / SMOLLM2.filename), Calibration(samples=2, sequence_length=256))
    rows = [
        compared("all-MiniLM-L6-v2, all blocks", Evaluator.build(minilm), every=1),
        compared("SmolLM2-135M, every fifth block", Evaluator.build(smollm2), every=5),
    ]
    write(
        "kl",
        "Measured divergence: reuse of the blocks before a unit",
        "make bench-kl",
        [
            "One unit at a scheme, all others at full precision, for linear layers in blocks at "
            f"{' and '.join(SCHEMES)}. Naive: a full forward pass over the same batches for each, compared with "
            "`Evaluator.reference`, which makes a language model's full-precision logits anew from its last block's "
            "output; the last ratio leaves that out. Neither way stops early. Both take their turns on one stretch of "
            "the network after the other. Of SmolLM2 blocks 2, 7, 12, 17, 22 and 27 are measured both ways, while the "
            "prefix still walks through all 30.",
            table(rows),
        ],
    )


def compared(name: str, evaluator: Evaluator, every: int) -> dict[str, object]:
    """Seconds of both ways over the units of each `every`th block, and the greatest difference of their results."""
    naive = references = reused = 0.0
    differences = []
    stretches = items(space_of(evaluator, every), relative_error=0.0)
    for item in stretches:
        plain, seconds = timed(naive_divergence, evaluator, item)
        naive += seconds
        _, seconds = timed(naive_references, evaluator, item)
        references += seconds
        found, seconds = timed(DIVERGENCE.run, evaluator, item)
        reused += seconds
        differences += [
            abs(found[unit][scheme][0] - mean) / mean
            for unit, schemes in plain.items()
            for scheme, (mean, _) in schemes.items()
        ]
    return {
        "model": name,
        "measurements": len(differences),
        "batches": len(evaluator.batches("calibration")),
        "items": len(stretches),
        "naive, s": naive,
        "reused, s": reused,
        "ratio": reused / naive,
        "ratio without references": reused / (naive - references),
        "greatest relative difference": max(differences),
    }


def space_of(evaluator: Evaluator, every: int) -> Space:
    """The linear layers of each `every`th block, tied as vLLM ties them."""
    blocks = list(dict.fromkeys(layer.block for layer in evaluator.inventory.layers if layer.block))
    kept = set(blocks[every // 2 :: every])
    ignored = [layer.name for layer in evaluator.inventory.layers if layer.block not in kept]
    request = SpaceRequest(schemes=list(SCHEMES), ignore=ignored)
    return build_space(evaluator.inventory, request, find_target("generic"))


@torch.no_grad()
def naive_divergence(evaluator: Evaluator, item: Item) -> Result:
    """What `DIVERGENCE` gives, by as many full passes; of standard errors nothing."""
    result: Result = {unit["name"]: {} for unit in item["units"]}
    for unit in item["units"]:
        for text in unit["schemes"]:
            evaluator.apply(dict.fromkeys(unit["layers"], Scheme.parse(text)))
            losses = [
                evaluator.losses(batch, evaluator.loaded(batch), evaluator.reference("calibration", index))
                for index, batch in enumerate(evaluator.batches("calibration"))
            ]
            result[unit["name"]][text] = [float(torch.cat(losses).double().mean()), 0.0]
    evaluator.apply({})
    return result


def naive_references(evaluator: Evaluator, item: Item) -> Result:
    """The references alone, as often as `naive_divergence` makes them."""
    for _ in range(sum(len(unit["schemes"]) for unit in item["units"])):
        for index in range(len(evaluator.batches("calibration"))):
            evaluator.reference("calibration", index)
    return {}


def timed(run: Callable[[Evaluator, Item], Result], evaluator: Evaluator, item: Item) -> tuple[Result, float]:
    """What `run` gives, and how long it takes."""
    began = time.perf_counter()
    result = run(evaluator, item)
    return result, time.perf_counter() - began


if __name__ == "__main__":
    main()
