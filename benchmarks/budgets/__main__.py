"""`python -m benchmarks.budgets [minilm efficientnet smollm2 smollm2-channels] [--seeds N]`."""

from __future__ import annotations

import argparse

from benchmarks.budgets.results import report
from benchmarks.budgets.running import Found, run
from benchmarks.budgets.studies import STUDIES

SEEDS = 3


def main() -> None:
    """Measure what is not kept, and report; the report is written when it is of all models and seeds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"splits of the data (default {SEEDS})")
    asked = parser.parse_args()
    if unknown := set(asked.models) - set(STUDIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    known: dict[str, list[Found]] = {}
    for name in asked.models or STUDIES:
        study = STUDIES[name]
        if study.layers and study.layers.name not in known:
            parser.error(f"{name} is compared with what {study.layers.name} finds: ask for that before it")
        of_layers = known[study.layers.name] if study.layers else [None] * asked.seeds
        known[name] = [run(study, seed, layers) for seed, layers in enumerate(of_layers)]
    report(list(known.values()), keep=len(known) == len(STUDIES) and asked.seeds >= SEEDS)


if __name__ == "__main__":
    main()
