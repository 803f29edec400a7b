"""Measured claims: each module prints a table and writes it, dated, to benchmarks/results/."""

from scripts.model_roots import open_roots

open_roots()
