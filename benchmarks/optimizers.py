"""Times and gaps of the optimizers: the knapsack and the integer program here, PuLP with CBC and HiGHS, HiGHS, CP-SAT.

All solve the same random allocation problems, from arrays to a choice for every unit; building the model counts. Gaps
are to the bound of the linear relaxation.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import highspy
import numpy as np
import pulp
from ortools.sat.python import cp_model

from benchmarks.report import table, write
from search import knapsack
from search.budget import Bound
from search.cost import Cost
from search.ilp import solve
from search.lagrangian import price
from search.switches import Choice, Floats

SHAPES = (
    (224, (2, 3, 4, 5, 6, 8)),
    (560, (2, 3, 4, 5, 6, 7, 8, 16)),
    (2_000, (2, 3, 4, 5, 6, 7, 8, 16)),
    (100_000, (2, 3, 4, 8)),
)
LIMIT = 60.0
"""Seconds an optimizer has for all budgets of a task."""

GRACE = 15.0
"""Seconds more until it is stopped from outside."""

SLOW = 10.0
"""Who needs more seconds for one budget is not asked for more."""

GAP = 1e-4
THREADS = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """Losses, units × schemes; costs, resources × units × schemes; and levels × resources of capacities."""

    name: str
    loss: Floats
    costs: Floats
    capacities: Floats

    def total(self, choice: Choice) -> float:
        """The loss of an allocation."""
        return float(self.loss[np.arange(len(choice)), choice].sum())

    def admits(self, choice: Choice, level: int) -> bool:
        """Whether it keeps all capacities of a level, but for a solver's tolerance."""
        spent = self.costs[:, np.arange(len(choice)), choice].sum(axis=1)
        return bool((spent <= self.capacities[level] * (1 + 1e-6)).all())

    def bound(self, level: int) -> float:
        """What no allocation within a level's capacities loses less than."""
        if len(self.costs) == 1:
            return knapsack.relax(self.loss, self.costs[0]).bound(self.capacities[level, 0])
        return price(self.loss, self.costs, self.capacities[level]).bound


Optimizer = Callable[[Problem], Iterator[Choice | None]]
"""Yields a choice for every level."""


def tasks(units: int, widths: tuple[int, ...]) -> list[Problem]:
    """One budget, 50 budgets and three budgets at once, on layers of uneven sizes whose losses fall as 4^−bits."""
    generator, bits = np.random.default_rng(0), np.array(widths, dtype=float)
    size = generator.lognormal(0, 1, units)
    noise = generator.lognormal(0, 0.2, (units, len(bits)))
    loss = generator.lognormal(-6, 2, units)[:, None] * 4.0**-bits * noise
    average = size[:, None] * bits / size.sum()
    operations = (size * generator.lognormal(0, 0.7, units))[:, None] * bits
    latency = generator.lognormal(0, 0.5, units)[:, None] * (1 + bits * generator.lognormal(0, 0.1, noise.shape))
    three = np.stack([average, operations, latency])
    least, most = three.min(axis=2).sum(axis=1), three.max(axis=2).sum(axis=1)
    return [
        Problem("one", loss, three[:1], np.array([[4.25]])),
        Problem("50", loss, three[:1], np.linspace(least[0], most[0], 52)[1:-1, None]),
        Problem("three at once", loss, three, (least + np.array([0.4, 0.42, 0.45]) * (most - least))[None]),
    ]


def ours(problem: Problem, *, prove: bool) -> Iterator[Choice | None]:
    """The knapsack for one budget; for several the integer program."""
    if len(problem.costs) == 1:
        found = knapsack.frontier(problem.loss, problem.costs[0], problem.capacities[:, 0], prove=prove, gap=GAP)
        yield from (solution.choice for solution in found)
    else:
        costs = {str(number): Cost(str(number), one, 0.0) for number, one in enumerate(problem.costs)}
        for capacities in problem.capacities:
            bounds = [Bound(name, name, float(limit)) for name, limit in zip(costs, capacities, strict=True)]
            yield solve(problem.loss, costs, bounds, time_limit=LIMIT, prove=prove, gap=GAP).choice


def with_pulp(problem: Problem, solver: Callable[[], pulp.LpSolver]) -> Iterator[Choice | None]:
    """One PuLP problem per level."""
    units, schemes = problem.loss.shape
    for level, capacities in enumerate(problem.capacities):
        program = pulp.LpProblem("allocation", pulp.LpMinimize)
        x = [[program.add_variable(f"x_{u}_{s}", cat=pulp.LpBinary) for s in range(schemes)] for u in range(units)]

        def weighted(numbers: Floats, x: list[list[pulp.LpVariable]] = x) -> pulp.LpAffineExpression:
            pairs = zip((one for row in x for one in row), numbers.ravel().tolist(), strict=True)
            return pulp.LpAffineExpression(pairs)

        program += weighted(_scaled(problem, level, 1000.0))
        for row in x:
            program += pulp.LpAffineExpression((one, 1) for one in row) == 1
        for cost, capacity in zip(problem.costs, capacities, strict=True):
            program += weighted(cost * 1000 / capacity) <= 1000
        program.solve(solver())
        yield _choice(np.array([[one.varValue for one in row] for row in x], dtype=float))


def cbc(problem: Problem) -> Iterator[Choice | None]:
    """PuLP's own solver."""
    return with_pulp(problem, lambda: pulp.PULP_CBC_CMD(msg=False, timeLimit=LIMIT, gapRel=GAP, threads=THREADS))


def pulp_highs(problem: Problem) -> Iterator[Choice | None]:
    """HiGHS through PuLP."""
    return with_pulp(problem, lambda: pulp.HiGHS(msg=False, timeLimit=LIMIT, gapRel=GAP, threads=THREADS))


def highs(problem: Problem) -> Iterator[Choice | None]:
    """HiGHS, its arrays filled at once."""
    (units, schemes), budgets = problem.loss.shape, len(problem.costs)
    columns = units * schemes
    for level, capacities in enumerate(problem.capacities):
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = columns, units + budgets
        model.col_cost_ = _scaled(problem, level, 1000.0).ravel()
        model.col_lower_, model.col_upper_ = np.zeros(columns), np.ones(columns)
        model.integrality_ = [highspy.HighsVarType.kInteger] * columns
        model.row_lower_ = np.append(np.ones(units), np.full(budgets, -highspy.kHighsInf))
        model.row_upper_ = np.append(np.ones(units), np.full(budgets, 1000.0))
        # A column has a one in its unit's row, and its costs in those of the budgets.
        own, rest = np.repeat(np.arange(units), schemes), np.tile(units + np.arange(budgets), (columns, 1))
        spent = (problem.costs.reshape(budgets, -1) * 1000 / capacities[:, None]).T
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.start_ = np.arange(columns + 1) * (1 + budgets)
        model.a_matrix_.index_ = np.column_stack([own, rest]).ravel()
        model.a_matrix_.value_ = np.column_stack([np.ones(columns), spent]).ravel()
        solver = highspy.Highs()
        options = {"output_flag": False, "time_limit": LIMIT, "mip_rel_gap": GAP, "threads": THREADS}
        for name, value in options.items():
            solver.setOptionValue(name, value)
        solver.passModel(model)
        solver.run()
        found = np.array(solver.getSolution().col_value)
        yield _choice(found.reshape(units, schemes)) if len(found) else None


def cp_sat(problem: Problem) -> Iterator[Choice | None]:
    """CP-SAT, on integers: losses to 10⁻¹² of their bound, costs rounded up to 10⁻¹² of their capacity."""
    units, schemes = problem.loss.shape
    for level, capacities in enumerate(problem.capacities):
        model = cp_model.CpModel()
        x = [[model.new_bool_var("") for _ in range(schemes)] for _ in range(units)]
        flat = [one for row in x for one in row]
        for row in x:
            model.add_exactly_one(row)
        for cost, capacity in zip(problem.costs, capacities, strict=True):
            whole = np.ceil(cost * 1e12 / capacity).astype(np.int64)
            model.add(cp_model.LinearExpr.weighted_sum(flat, whole.ravel().tolist()) <= 10**12)
        losses = np.rint(_scaled(problem, level, 1e12)).astype(np.int64)
        model.minimize(cp_model.LinearExpr.weighted_sum(flat, losses.ravel().tolist()))
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = LIMIT
        solver.parameters.relative_gap_limit = GAP
        solver.parameters.num_workers = THREADS
        found = solver.solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE)
        yield _choice(np.array([[solver.value(one) for one in row] for row in x], dtype=float)) if found else None


OURS: dict[str, Optimizer] = {
    "here, near": lambda problem: ours(problem, prove=False),
    "here, proved": lambda problem: ours(problem, prove=True),
}
RIVALS: dict[str, Optimizer] = {
    "PuLP with CBC": cbc,
    "PuLP with HiGHS": pulp_highs,
    "HiGHS": highs,
    "CP-SAT": cp_sat,
}


def _scaled(problem: Problem, level: int, bound: float) -> Floats:
    """The losses, such that their bound is `bound`: solvers stop at absolute tolerances."""
    return problem.loss * (bound / problem.bound(level))


def _choice(x: Floats) -> Choice | None:
    """The scheme chosen for each unit; None where the solver gave no integers."""
    whole = np.isfinite(x).all() and (np.abs(x - np.rint(x)) < 1e-4).all() and (np.rint(x).sum(axis=1) == 1).all()
    return x.argmax(axis=1) if whole else None


def timed(optimizer: Optimizer, problem: Problem) -> tuple[list[Choice | None], float]:
    """What it finds in a process of its own, which is stopped after the limit, and the seconds it takes."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=_run, args=(send, optimizer, problem))
    process.start()
    send.close()
    began, found, seconds = time.perf_counter(), [], LIMIT + GRACE
    with suppress(EOFError):
        while receive.poll(max(0.0, began + LIMIT + GRACE - time.perf_counter())):
            seconds, choice = receive.recv()
            found.append(choice)
        seconds = LIMIT + GRACE
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return found, seconds


def _run(send: Connection, optimizer: Optimizer, problem: Problem) -> None:
    # A group of its own, with the solvers it starts.
    os.setsid()
    began = time.perf_counter()
    for choice in optimizer(problem):
        send.send((time.perf_counter() - began, choice))
    send.close()


def row(
    name: str, problem: Problem, bounds: list[float], found: list[Choice | None], seconds: float
) -> dict[str, object]:
    """A line of the table."""
    gaps = [
        problem.total(choice) / bounds[level] - 1 if choice is not None and problem.admits(choice, level) else np.nan
        for level, choice in enumerate(found)
    ]
    solved = int(np.isfinite(gaps).sum())
    notes = ["limit hit"] if seconds >= LIMIT else []
    if solved < len(bounds):
        notes.append(f"{solved} of {len(bounds)} solved")
    return {
        "units × schemes": " × ".join(f"{length:,}".replace(",", " ") for length in problem.loss.shape),
        "budgets": problem.name,
        "optimizer": name,
        "seconds": seconds,
        "median gap": float(np.nanmedian(gaps)) if solved else np.nan,
        "largest gap": float(np.nanmax(gaps)) if solved else np.nan,
        "note": ", ".join(notes),
    }


def compared(units: int, widths: tuple[int, ...]) -> Iterator[dict[str, object]]:
    """The lines of a shape."""
    slow: set[str] = set()
    for problem in tasks(units, widths):
        bounds = [problem.bound(level) for level in range(len(problem.capacities))]
        for name, optimizer in (OURS | RIVALS).items():
            if name in slow:
                line = row(name, problem, bounds, [], np.nan)
                yield line | {"note": f"not asked: one budget took more than {SLOW:g} s"}
                continue
            found, seconds = timed(optimizer, problem)
            if name in RIVALS and problem.name == "one" and seconds > SLOW:
                slow.add(name)
            yield row(name, problem, bounds, found, seconds)
            print(".", end="", flush=True)


def main() -> None:
    """Compare on each shape and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most-units", type=int, help="only shapes of at most so many units; writes nothing")
    most = parser.parse_args().most_units
    shapes = [shape for shape in SHAPES if most is None or shape[0] <= most]
    rows = [line for shape in shapes for line in compared(*shape)]
    if most is not None:
        print("\n" + table(rows))
        return
    text = (
        "Random allocation problems: losses that fall as 4^−bits with noise, layers of uneven sizes. Seconds are from "
        "arrays to choices, the model's building included. Gaps are to the bound of the linear relaxation, above which "
        f"the best allocation may lie too. All prove a gap of {GAP:g} to the best allocation, but for “here, near”, "
        f"which proves the gap it states. Here one thread is used, by the others {THREADS}. Each has {LIMIT:g} s for "
        "all budgets of a line."
    )
    write("optimizers", "Times and gaps of the optimizers", "make bench-optimizers", [text, table(rows)])


if __name__ == "__main__":
    main()
