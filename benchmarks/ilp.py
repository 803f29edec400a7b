"""Times of the integer program: one budget, and a frontier of 50, on random allocation problems."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.report import table, write
from search.budget import Bound
from search.cost import Cost
from search.ilp import frontier, solve

SHAPES = ((36, (3, 4, 6, 8)), (224, (2, 3, 4, 5, 6, 8)), (560, (2, 3, 4, 5, 6, 7, 8, 16)))


def main() -> None:
    """Solve each shape and write the table."""
    generator, rows = np.random.default_rng(0), []
    for units, widths in SHAPES:
        bits, size = np.array(widths, dtype=float), generator.lognormal(0, 1, units)
        noise = generator.lognormal(0, 0.2, (units, len(bits)))
        loss = generator.lognormal(-6, 2, units)[:, None] * 4.0**-bits * noise
        costs = {"avg_bits": Cost("avg_bits", size[:, None] * bits / size.sum(), 0.0)}
        began = time.perf_counter()
        one = solve(loss, costs, [Bound("avg_bits", "avg_bits", 4.25)])
        between = time.perf_counter()
        many = frontier(loss, costs, [], "avg_bits", 50)
        rows.append(
            {
                "units × schemes": f"{units} × {len(bits)}",
                "one budget, s": between - began,
                "status": one.status,
                "50 budgets, s": time.perf_counter() - between,
                "proved optimal": f"{sum(point.status == 'optimal' for point in many)} of {len(many)}",
            }
        )
    text = "One budget at a time, solved as a knapsack to a gap of 1e-6. Losses fall as 4^−bits, with noise."
    write("ilp", "Times of the integer program", "make bench-ilp", [text, table(rows)])


if __name__ == "__main__":
    main()
