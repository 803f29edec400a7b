"""How other tools share out bits: each searches in an environment of its own, on the same data and within the same
budgets; its allocations are measured here like any other."""
