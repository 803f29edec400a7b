"""One search from claim to frontier: profile, sensitivity, baselines, optimize, measure, refine or evolve, accept.

Every stage can be done again: what was finished is found by its content.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
from sqlalchemy import Engine

from db import queue
from db.searches import get_search
from db.studies import study_name, study_storage
from search.agreement import spearman
from search.candidate import Candidate
from search.evolution import Evolution
from search.ilp import frontier
from search.proposals import Drafts, baselines, shared
from search.reference import reference
from search.refinement import TOGETHER, Refinement, Trial, first
from search.request import SearchRequest
from search.surrogate import Features, Surrogate
from search.sweep import Choice, Sweep
from workers.cluster import Pool
from workers.evaluator import EvaluatorSpec
from workers.measuring import Measuring
from workers.profiling import Profile, evaluator_spec, profile_model
from workers.run import Run
from workers.sensitivity import Table
from workers.sensitivity.rounding import relative_errors
from workers.tables import fill_tables

GAP = 1e-4
"""To which the frontiers of the predictions are proved: they are not as exact themselves."""


def run_search(
    engine: Engine, claim: queue.Claim, pool_for: Callable[[EvaluatorSpec], Pool], check: Callable[[], None]
) -> None:
    """Do what is left of a claimed search, and finish it.

    Raises BitfrontierError with the reason when it cannot be done, what `check` raises when it must stop, and
    queue.LeaseLost when the search is no longer ours.
    """
    search = get_search(engine, claim.search_id)
    request = SearchRequest.model_validate(search.request)
    run = Run(engine, claim, request, pool_for(evaluator_spec(engine, request)), check)
    profile = profile_model(run)
    tables = fill_tables(run, profile)
    measuring, refinement = begin(run, profile, tables)
    measure_baselines(measuring, refinement)
    proposals = optimize(run, profile, tables, measuring, refinement)
    measure_proposals(measuring, refinement, proposals)
    if request.optimizer.method == "evolution":
        evolve(measuring, refinement)
    elif request.optimizer.method != "ilp":
        refine(measuring, refinement)
    measuring.accept()
    look_back(measuring, refinement.surrogate())
    tell_if_nothing_fits(run, measuring.candidates)
    run.summary["agreement"] = agreement(measuring.candidates)
    run.summary["evaluations"] = refinement.spent
    queue.succeed(engine, claim, run.summary)


def begin(run: Run, profile: Profile, tables: dict[str, Table]) -> tuple[Measuring, Refinement]:
    """What measures, and what decides what is measured; nothing is measured yet."""
    request, space = run.request, profile.space
    uniform = list(baselines(space).values())
    sweep = Sweep.of(profile.costs, profile.bounds, profile.axes[0], request.optimizer.points, uniform)
    measuring = Measuring(run, profile, sweep, Drafts(space, profile.costs, predicting(profile, tables, [])))
    refinement = Refinement(
        sweep,
        Features.of(space, {metric: table.values.to_numpy() for metric, table in tables.items()}),
        measuring.measure,
        profile.batch_sizes,
        # A search whose baselines all miss the budget has nothing to show without one proposal.
        max(request.optimizer.evaluations, len(uniform) + (not any(map(sweep.admits, uniform)))),
        seed=request.calibration.seed,
        most_loss=request.budgets.loss_increase or np.inf,
        together=max(len(run.pool), TOGETHER),
        expand=measuring.expand,
    )
    return measuring, refinement


def measure_baselines(measuring: Measuring, refinement: Refinement) -> None:
    """The uniform configurations: what everything is compared with, and what first corrects the predictions."""
    uniform = baselines(measuring.profile.space)
    measuring.enter("baselines", len(uniform))
    for label, choice in uniform.items():
        measuring.propose([(label, choice)], "uniform")
        measuring.add(refinement.whole([choice], "uniform"))


def optimize(
    run: Run, profile: Profile, tables: dict[str, Table], measuring: Measuring, refinement: Refinement
) -> list[Choice]:
    """The frontier of every metric's predictions, corrected by the baselines: who proposes what to measure."""
    run.enter("optimize", len(tables))
    fitted, sweeps, sweep = predicting(profile, tables, list(measuring.trials.values())), {}, measuring.sweep
    for done, (metric, surrogate) in enumerate(fitted.items(), start=1):
        solutions = frontier(surrogate.table, profile.costs, profile.bounds, sweep.axis, sweep.levels, gap=GAP)
        unproved = sum(solution.status != "optimal" for solution in solutions)
        if unproved:
            run.notice(f"{unproved} of the {len(solutions)} integer programs on {metric} hit their time limit")
        sweeps[metric] = [solution.choice for solution in solutions if solution.choice is not None]
        queue.progress(run.engine, run.claim, "optimize", done, len(tables))
    measuring.predict_with(Drafts(profile.space, profile.costs, fitted))
    count = refinement.left if run.request.optimizer.method == "ilp" else first(refinement.left)[0]
    known = [trial.choice for trial in measuring.trials.values()]
    bits = profile.costs["avg_bits"]
    chosen = [(f"{metric}, {bits.total(choice):.2f} bits", choice) for metric, choice in shared(sweeps, count, known)]
    measuring.propose(chosen, "ilp")
    return [choice for _, choice in chosen]


def measure_proposals(measuring: Measuring, refinement: Refinement, proposals: Sequence[Choice]) -> None:
    """The points of the predicted frontiers, and, where the predictions are going to be corrected, some that would be
    best if they erred."""
    request = measuring.run.request
    drawn, bits = first(refinement.left)[1], measuring.profile.costs["avg_bits"]
    if request.optimizer.method == "ilp":
        drawn = 0
    measuring.enter("measure", len(proposals) + drawn)
    for start in range(0, len(proposals), refinement.together):
        measuring.add(refinement.whole(proposals[start : start + refinement.together], "ilp"))
    if drawn:
        choices = refinement.drawn(drawn)
        measuring.propose([(f"drawn, {bits.total(choice):.2f} bits", choice) for choice in choices], "ilp")
        measuring.add(refinement.whole(choices, "ilp"))


def refine(measuring: Measuring, refinement: Refinement) -> None:
    """Correct the predictions with what is measured, and measure what then promises most, until the evaluations are
    spent or nothing promises anything."""
    measuring.enter("refine", refinement.left)
    for trials in refinement.rounds():
        measuring.add(trials)
    if refinement.left:
        measuring.run.notice(
            f"refinement ended after {refinement.spent:.0f} of {refinement.evaluations} evaluations: "
            "nothing that is left promises to move the frontier"
        )


def evolve(measuring: Measuring, refinement: Refinement) -> None:
    """Breed new configurations from the measured ones, until the evaluations are spent or none is new."""
    run, profile = measuring.run, measuring.profile
    measuring.enter("evolve", refinement.left)
    evolution = Evolution(
        profile.space,
        profile.costs,
        profile.bounds,
        measuring.sweep.axis,
        seeds=[trial.choice for trial in measuring.trials.values()],
        seed=run.request.calibration.seed,
        storage=study_storage(run.engine),
        name=study_name(run.claim.search_id),
    )
    # What an attempt before this one has told is known to the study, and kept by its content.
    told = evolution.told
    for start in range(0, len(told), refinement.together):
        measuring.add(refinement.whole(told[start : start + refinement.together], "evolved"))
    losses = {trial.choice.tobytes(): trial.loss for trial in measuring.trials.values()}
    while choices := evolution.ask(refinement.together):
        new = [choice for choice in choices if choice.tobytes() not in losses][: refinement.left]
        trials = refinement.whole(new, "evolved")
        measuring.add(trials)
        losses |= {trial.choice.tobytes(): trial.loss for trial in trials}
        for choice in choices:
            if choice.tobytes() in losses:
                evolution.tell(choice, losses[choice.tobytes()])
        if not refinement.left:
            return


def look_back(measuring: Measuring, surrogate: Surrogate) -> None:
    """With all that is known now: what more of each resource would buy, and what no allocation can do better."""
    run, space = measuring.run, measuring.profile.space
    measuring.price(surrogate)
    weights_only = not any(scheme.quantizes_activations for scheme in space.schemes)
    errors = relative_errors(measuring.compute, space) if weights_only else None
    run.summary["reference"] = asdict(reference(surrogate, measuring.sweep, space, errors))


def predicting(profile: Profile, tables: dict[str, Table], trials: Sequence[Trial]) -> dict[str, Surrogate]:
    """Each metric's predictions, corrected by what is measured."""
    space = profile.space
    choices = np.array([trial.choice for trial in trials], dtype=np.int64).reshape(len(trials), len(space.units))
    losses = np.array([trial.loss for trial in trials])
    return {
        metric: Surrogate.fit(Features.of(space, {metric: table.values.to_numpy()}), choices, losses)
        for metric, table in tables.items()
    }


def tell_if_nothing_fits(run: Run, candidates: Sequence[Candidate]) -> None:
    """A loss budget may turn out too tight only once everything is measured."""
    losses = [candidate.loss for candidate in candidates if candidate.loss is not None]
    if not any(candidate.fits for candidate in candidates) and losses:
        limit = run.request.budgets.loss_increase
        asked = f", and loss_increase = {limit:g} was asked for" if limit is not None else ""
        run.notice(f"no measured configuration keeps every budget; the least measured loss is {min(losses):.3g}{asked}")


def agreement(candidates: Sequence[Candidate]) -> dict[str, dict[str, float | int | None]]:
    """Rank correlation of each metric's predictions with the losses measured on the calibration data.

    Without the uniform baselines: their measurements have corrected the predictions.
    """
    measured = [one for one in candidates if one.source != "uniform"]
    losses = [candidate.metrics["calibration_loss"] for candidate in measured]
    metrics = candidates[0].predicted if candidates else {}
    return {
        metric: {
            "spearman": spearman([candidate.predicted[metric] for candidate in measured], losses),
            "points": len(measured),
        }
        for metric in metrics
    }
