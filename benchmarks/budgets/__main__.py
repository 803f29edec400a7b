"""`python -m benchmarks.budgets [minilm efficientnet smollm2 smollm2-channels] [--seeds N]`."""

from __future__ import annotations

import argparse
from dataclasses import replace

from benchmarks.budgets.found import Found, load
from benchmarks.budgets.results import report
from benchmarks.budgets.running import run
from benchmarks.budgets.studies import STUDIES, Study

SEEDS = 3


def main() -> None:
    """Measure what is not kept, and report; the report is written when it is of all models and seeds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"splits of the data (default {SEEDS})")
    asked = parser.parse_args()
    if unknown := set(asked.models) - set(STUDIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    names = asked.models or list(STUDIES)
    found = [[find(STUDIES[name], seed) for seed in range(asked.seeds)] for name in names]
    report(found, keep=set(names) == set(STUDIES) and asked.seeds >= SEEDS)


def find(study: Study, seed: int) -> Found:
    """What is kept of a study at a seed, else what a run finds now, beside what others find by whole layers."""
    found = load(study, seed)
    if not found:
        found = run(study, seed)
        found.save()
    if not study.layers:
        return found
    layers = find(study.layers, seed)
    return replace(found, losses=layers.losses | found.losses, seconds=layers.seconds | found.seconds)


if __name__ == "__main__":
    main()
