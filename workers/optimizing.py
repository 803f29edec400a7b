"""The optimize stage: the frontier of every metric's predictions, corrected by the baselines, proposes what to measure.

Solvers stop when their time is over, so that the same program may end otherwise on a busier machine: what was found is
kept by the program, and a search that is taken up again goes on with the same proposals.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from search.ilp import frontier
from search.knapsack import Solution
from search.proposals import Drafts, shared
from search.refinement import Refinement, first
from search.surrogate import Features, Surrogate
from search.sweep import Choice, Sweep
from workers.measuring import Measuring
from workers.profiling import Profile
from workers.run import Run
from workers.sensitivity import Table
from workers.tasks import content_key

GAP = 1e-4
"""To which the frontiers of the predictions are proved: they are not as exact themselves."""

VERSION = 1
"""Raised when the solutions change."""


def optimize(run: Run, tables: Mapping[str, Table], measuring: Measuring, refinement: Refinement) -> list[Choice]:
    """What to measure: the frontiers of all metrics, a part of each."""
    run.enter("optimize", len(tables))
    profile, known = measuring.profile, list(measuring.trials.values())
    choices = np.array([trial.choice for trial in known], dtype=np.int64)
    losses = np.array([trial.loss for trial in known])
    fitted = predicting(profile, tables, choices, losses)
    sweeps: dict[str, list[Choice]] = {}
    for done, (metric, surrogate) in enumerate(fitted.items(), start=1):
        solutions = solved(run, surrogate, profile, measuring.sweep)
        unproved = sum(solution["status"] != "optimal" for solution in solutions)
        if unproved:
            run.notice(f"{unproved} of the {len(solutions)} integer programs on {metric} hit their time limit")
        sweeps[metric] = [np.array(one["choice"], dtype=np.int64) for one in solutions if one["choice"] is not None]
        run.progress("optimize", done, len(tables))
    measuring.predict_with(Drafts(profile.space, profile.costs, fitted))
    count = refinement.left if run.request.optimizer.method == "ilp" else first(refinement.left)[0]
    bits = profile.costs["avg_bits"]
    proposed = shared(sweeps, count, [trial.choice for trial in known])
    measuring.propose([(f"{metric}, {bits.total(choice):.2f} bits", choice) for metric, choice in proposed], "ilp")
    return [choice for _, choice in proposed]


def predicting(
    profile: Profile, tables: Mapping[str, Table], choices: NDArray[np.int64], losses: NDArray[np.float64]
) -> dict[str, Surrogate]:
    """Each metric's predictions, corrected by the measured losses of some choices."""
    space = profile.space
    measured = choices.reshape(len(losses), len(space.units))
    return {
        metric: Surrogate.fit(Features.of(space, {metric: table.values.to_numpy()}), measured, losses)
        for metric, table in tables.items()
    }


def solved(run: Run, surrogate: Surrogate, profile: Profile, sweep: Sweep) -> list[dict[str, Any]]:
    """`choice` and `status` of every level's program, solved once."""
    key = _program_key(surrogate, profile, sweep)
    found = run.find("frontier", [key])
    if not found:
        began = time.monotonic()
        asked = profile.costs, profile.bounds, sweep.axis, sweep.levels
        solutions = run.aside(lambda: frontier(surrogate.table, *asked, gap=GAP))
        found = {key: run.keep(key, "frontier", list(map(_plain, solutions)), time.monotonic() - began)}
    solutions_found: list[dict[str, Any]] = found[key]
    return solutions_found


def _program_key(surrogate: Surrogate, profile: Profile, sweep: Sweep) -> str:
    costs = {name: [_digest(cost.table), cost.constant] for name, cost in profile.costs.items()}
    bounds = [[bound.resource, bound.limit] for bound in profile.bounds]
    levels = [sweep.axis, _digest(sweep.levels)]
    return content_key(["frontier", VERSION, GAP, _digest(surrogate.table), costs, bounds, levels])


def _digest(array: NDArray[np.float64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _plain(solution: Solution) -> dict[str, Any]:
    return {"choice": None if solution.choice is None else solution.choice.tolist(), "status": solution.status}
