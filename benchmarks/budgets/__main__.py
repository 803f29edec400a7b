"""`python -m benchmarks.budgets [minilm efficientnet smollm2 smollm2-channels] [--seeds N] [--unrefined]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from benchmarks.budgets.found import Found, load
from benchmarks.budgets.results import report
from benchmarks.budgets.running import Case, compare, predict, refine
from benchmarks.budgets.studies import STUDIES, Study
from benchmarks.rivals.rivals import STUDIES as STUDIES_OF

SEEDS = 3

Step = Callable[[Case, Found], None]


def main() -> None:
    """Measure what is not kept, and report; the report is written when it is of all models and seeds."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(STUDIES))
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"splits of the data (default {SEEDS})")
    parser.add_argument("--unrefined", action="store_true", help="refine nothing now: that takes most of the time")
    asked = parser.parse_args()
    if unknown := set(asked.models) - set(STUDIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")
    names, refined = asked.models or list(STUDIES), not asked.unrefined
    found = [[find(STUDIES[name], seed, refined=refined) for seed in range(asked.seeds)] for name in names]
    report(found, keep=refined and set(names) == set(STUDIES) and asked.seeds >= SEEDS)


def find(study: Study, seed: int, *, refined: bool) -> Found:
    """What is kept of a study at a seed, and what is found now of what is not; beside groups of channels, what others
    find by whole layers."""
    found = load(study, seed) or Found(study, seed)
    rivals = [rival for rival, studies in STUDIES_OF.items() if study.name in studies]
    steps: dict[str, Step] = {"unrefined": predict} | {rival: partial(compare, rival=rival) for rival in rivals}
    if refined:
        steps["refined"] = refine
    missing = [step for method, step in steps.items() if method not in found.losses]
    if missing:
        case = Case(study, seed)
        for step in missing:
            step(case, found)
            found.save()
    if not study.layers:
        return found
    layers = find(study.layers, seed, refined=False)
    others = {method: losses for method, losses in layers.losses.items() if method not in ("unrefined", "refined")}
    return replace(found, losses=others | found.losses, seconds=layers.seconds | found.seconds)


if __name__ == "__main__":
    main()
