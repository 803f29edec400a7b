"""Measured claims: each module prints a table and writes it, dated, to benchmarks/results/."""
