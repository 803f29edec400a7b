"""`python -m benchmarks.budgets [minilm efficientnet smollm2] [--seeds N]`."""

from __future__ import annotations

import argparse

from benchmarks.budgets.results import report
from benchmarks.budgets.running import run
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
    found = [[run(STUDIES[name], seed) for seed in range(asked.seeds)] for name in asked.models or STUDIES]
    report(found, keep=len(found) == len(STUDIES) and asked.seeds >= SEEDS)


if __name__ == "__main__":
    main()
