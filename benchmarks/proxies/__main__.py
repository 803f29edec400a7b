"""`python -m benchmarks.proxies [digits minilm efficientnet smollm2]`."""

from __future__ import annotations

import argparse
import math
import time

from benchmarks.proxies.measuring import OutOfTimeError, measure
from benchmarks.proxies.results import report
from benchmarks.proxies.subjects import STUDIES
from search.metrics import METRICS


def main() -> None:
    """Measure what is not kept, and report; the report is written when it is of all models."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxies", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="model", help=", ".join(STUDIES))
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; the next run goes on")
    parser.add_argument("--again", nargs="+", default=[], choices=METRICS, help="metrics whose tables are filled anew")
    parser.add_argument("--losses-only", action="store_true", help="measure configurations, and fill no table")
    asked = parser.parse_args()
    if unknown := set(asked.models) - set(STUDIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(STUDIES)}")

    until = time.monotonic() + asked.seconds
    found = []
    for name in asked.models or STUDIES:
        try:
            found.append(measure(STUDIES[name], until, asked.again, asked.losses_only))
        except OutOfTimeError as remains:
            print(f"{name}: {remains}; run again to go on", flush=True)
    report(found, keep=len(found) == len(STUDIES) and not asked.losses_only)


if __name__ == "__main__":
    main()
