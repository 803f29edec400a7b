"""The loss at a budget, on data that nobody has seen: uniform configurations, other tools' allocations, and ours.

Every allocation is of the same layers, rounded by the same quantizer and measured on the same samples. What is measured
is kept in `benchmarks/.cache`, so that a run goes on where it was stopped.
"""
