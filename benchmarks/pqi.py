"""Post-quantization integrals: how well shares add up to the measured loss change, and how fast they settle with N."""

from __future__ import annotations

import time

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
    minilm = evaluator(str(demo_model.folder()), samples=4, sequence_length=64)
    settling = [row for bits in BITS for row in scan(minilm, bits)]
    del minilm
    smollm2 = evaluator(str(cache_folder() / SMOLLM2.filename), samples=2, sequence_length=256)
    sums = [completeness(smollm2, bits, rule, 4) for bits in BITS for rule in ("midpoint", "gauss_legendre")]
    sums.append(completeness(smollm2, 2, "gauss_legendre", 16))
    write(
        "pqi",
        "Post-quantization integrals: completeness and error against N",
        "make bench-pqi",
        [
            "Symmetric `rtn`, groups of 64, weights only, every layer but a head, tokens of the Python reference. On "
            "the joint path of a scheme the layers' shares are to add up to the measured divergence.",
            "SmolLM2-135M, 2 × 256 tokens:",
            table(sums),
            "MiniLM, 4 × 64 tokens: error of the shares, Σ|share − exact| ÷ Σ|exact| over layers, in percent (in "
            "brackets that of their sum against the measured change), exact being Gauss–Radau with N = 16:",
            table(settling),
        ],
    )


def evaluator(source: str, **calibration: int) -> Evaluator:
    """A model with tokens of the Python reference."""
    return Evaluator.build(EvaluatorSpec(source, Calibration(**calibration)))


def completeness(model: Evaluator, bits: int, rule: str, nodes: int) -> dict[str, object]:
    """The sum of the shares against what is measured."""
    began = time.monotonic()
    found = PATH.run(model, item(model, bits, rule, nodes))
    measured, added = float(np.mean(found["losses"])), float(shares(found).sum())
    row: dict[str, object] = {
        "bits": bits,
        "rule": rule.replace("_", "–"),
        "N": nodes,
        "measured": measured,
        "Σ shares": added,
        "gap, %": 100 * (added / measured - 1),
        "negative shares": f"{(shares(found) < 0).sum()} of {len(shares(found))}",
        "seconds": time.monotonic() - began,
    }
    print(row, flush=True)
    return row


def scan(model: Evaluator, bits: int) -> list[dict[str, object]]:
    """The error of each rule with each N."""
    walks = {(rule, n): PATH.run(model, item(model, bits, rule, n)) for rule in RULES for n in NODES}
    exact = shares(walks[EXACT])
    rows: list[dict[str, object]] = []
    for rule in RULES:
        row: dict[str, object] = {"bits": bits, "rule": rule.replace("_", "–")}
        for n in NODES:
            found = walks[rule, n]
            error = np.abs(shares(found) - exact).sum() / np.abs(exact).sum()
            gap = shares(found).sum() / np.mean(found["losses"]) - 1
            row[f"N = {n}"] = f"{100 * error:.2g} ({100 * gap:+.2g})"
        rows.append(row)
        print(row, flush=True)
    return rows


def item(model: Evaluator, bits: int, rule: str, nodes: int) -> Item:
    """The joint path of all layers, with all samples as one piece."""
    space = build_space(model.inventory, SpaceRequest(schemes=(f"w{bits}a16g64",)), find_target("generic"))
    samples = sum(len(batch["input_ids"]) for batch in model.batches("calibration"))
    return {
        "layers": [layer.name for layer in space.layers],
        "scheme": str(space.schemes[0]),
        "rule": rule,
        "nodes": nodes,
        "samples": [[0, samples]],
    }


def shares(found: Result) -> np.ndarray:
    """By layer."""
    return np.array(found["weight"][0])


if __name__ == "__main__":
    main()
