"""How well each metric ranks configurations of equal size, on four real models.

Size alone ranks random configurations well (ρ 0.9 and more), so that only configurations of one size tell metrics
apart. Every model's configurations are measured once and kept in `benchmarks/.cache`; a metric added later costs its
table.
"""
