"""Post-quantization integrals: how well shares add up to the measured loss change, and how fast they settle with N."""

from __future__ import annotations

import time
from functools import cache

import numpy as np

from benchmarks.report import table, write
from scripts import demo_model
from scripts.fetch_models import SMOLLM2, cache_folder
from search.request import Calibration, SpaceRequest
from search.space import build_space
from search.targets import find_target
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity.pqi import PATH, RULES
from workers.tasks import Item, Result

BITS = (2, 3, 4)
NODES = (1, 2, 4, 8, 16)
EXACT = "gauss_radau", 16


def main() -> None:
    """Measure both models and write the tables."""
    minilm = evaluator(str(demo_model.folder()), samples=8, sequence_length=64)
    smollm2 = str(cache_folder() / SMOLLM2.filename)
    settling = [scan(minilm, bits, "MiniLM") for bits in BITS]
    sums = [completeness(minilm, bits, "MiniLM, 8 × 64 tokens") for bits in BITS]
    del minilm
    one = evaluator(smollm2, samples=2, sequence_length=128)
    settling += [scan(one, bits, "SmolLM2-135M", samples=1, nodes=NODES[:-1]) for bits in (2, 3)]
    del one
    four = evaluator(smollm2, samples=4, sequence_length=256)
    sums += [completeness(four, bits, "SmolLM2-135M, 4 × 256 tokens") for bits in BITS]
    write(
        "pqi",
        "Post-quantization integrals: completeness and error against N",
        "make bench-pqi",
        [
            "Symmetric `rtn`, groups of 64, weights only, every layer that is not the head, tokens of the Python "
            "reference. On the joint path of a scheme the layers' shares are to add up to the measured divergence.",
            "Gauss–Legendre with N = 4:",
            table(sums),
            "Error of the shares, Σ|share − exact| ÷ Σ|exact| over layers, in percent (in brackets that of their sum "
            f"against the measured change), exact being Gauss–Radau with N = {EXACT[1]}. MiniLM on 8 × 64 tokens, "
            "SmolLM2 on 1 × 128:",
            table([row for rows in settling for row in rows]),
        ],
    )


def evaluator(source: str, **calibration: int) -> Evaluator:
    """A model with tokens of the Python reference."""
    return Evaluator.build(EvaluatorSpec(source, Calibration(**calibration)))  # type: ignore[arg-type]


def completeness(model: Evaluator, bits: int, name: str) -> dict[str, object]:
    """The sum of the shares with the default rule against what is measured."""
    began = time.monotonic()
    found = PATH.run(model, item(model, bits, "gauss_legendre", 4))
    measured, added = float(np.mean(found["losses"])), float(shares(found).sum())
    return {
        "model": name,
        "bits": bits,
        "measured": measured,
        "Σ shares": added,
        "gap, %": 100 * (added / measured - 1),
        "negative shares": int((shares(found) < 0).sum()),
        "layers": len(shares(found)),
        "seconds": time.monotonic() - began,
    }


def scan(
    model: Evaluator, bits: int, name: str, samples: int | None = None, nodes: tuple[int, ...] = NODES
) -> list[dict[str, object]]:
    """The error of each rule with each N."""

    @cache
    def walk(rule: str, n: int) -> Result:
        return PATH.run(model, item(model, bits, rule, n, samples))

    exact = shares(walk(*EXACT))
    rows: list[dict[str, object]] = []
    for rule in RULES:
        row: dict[str, object] = {"model": name, "bits": bits, "rule": rule.replace("_", "–")}
        for n in nodes:
            found = walk(rule, n)
            error = np.abs(shares(found) - exact).sum() / np.abs(exact).sum()
            gap = shares(found).sum() / np.mean(found["losses"]) - 1
            row[f"N = {n}"] = f"{100 * error:.2g} ({100 * gap:+.2g})"
        rows.append(row)
        print(row, flush=True)
    return rows


def item(model: Evaluator, bits: int, rule: str, nodes: int, samples: int | None = None) -> Item:
    """The joint path of all layers, with all samples or the first ones as one piece."""
    space = build_space(model.inventory, SpaceRequest(schemes=(f"w{bits}a16g64",)), find_target("generic"))
    count = samples or sum(len(batch["input_ids"]) for batch in model.batches("calibration"))
    return {
        "layers": [layer.name for layer in space.layers],
        "scheme": str(space.schemes[0]),
        "rule": rule,
        "nodes": nodes,
        "samples": [[0, count]],
    }


def shares(found: Result) -> np.ndarray:
    """By layer."""
    return np.array(found["weight"][0])


if __name__ == "__main__":
    main()
