"""The loss at a budget, on data that nobody has seen: uniform configurations, other tools' allocations, and ours.

Every allocation is of the same layers, rounded by the same quantizer and measured on the same samples. What is measured
is kept in `benchmarks/.cache`, so that a run goes on where it was stopped; what a study found at a seed, in
`benchmarks/results/budgets`, so that the next run starts with the next one. To measure anew, delete both.
"""
