"""One search from claim to frontier: profile, sensitivity, baselines, optimize, measure, refine or evolve, accept.

Every stage can be done again: what was finished is found by its content.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
from optuna.exceptions import OptunaError
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from db import queue
from db.errors import DatabaseUnavailable
from db.retry import insist
from db.searches import get_search
from db.studies import study_name, study_storage
from search.agreement import spearman
from search.budget import Bound
from search.candidate import Candidate
from search.evolution import Evolution
from search.ladders import Ladders
from search.proposals import Drafts, baselines
from search.reference import reference
from search.refinement import TOGETHER, Refinement, first
from search.request import SearchRequest
from search.surrogate import Features, Surrogate
from search.sweep import Choice, Sweep
from workers.evaluator import EvaluatorSpec
from workers.measuring import Measuring
from workers.optimizing import optimize, predicting
from workers.pools import Pool
from workers.pools.protocol import always
from workers.profiling import Profile, profile_model
from workers.run import Run
from workers.sensitivity import Table
from workers.sensitivity.rounding import relative_errors
from workers.settings import patience
from workers.stopping import StoppableSweep
from workers.tables import fill_tables

log = logging.getLogger(__name__)


def run_search(
    engine: Engine,
    claim: queue.Claim,
    pool_for: Callable[[EvaluatorSpec], Pool],
    check: Callable[[], None],
    more: Callable[[], bool] = always,
) -> None:
    """Do what is left of a claimed search, and finish it.

    Raises BitfrontierError with the reason when it cannot be done, what `check` raises when it must stop at once,
    Shutdown once `more` says that nothing new is to be begun, queue.LeaseLost when the search is no longer ours, and
    what the database raises when it stays away.
    """
    search = insist(lambda: get_search(engine, claim.search_id), seconds=patience(), check=check)
    request = SearchRequest.model_validate(search.request)
    run = Run(engine, claim, request, check, more, dict(search.summary or {}))
    profile = profile_model(run, pool_for)
    tables = fill_tables(run, profile)
    measuring, refinement = begin(run, profile, tables)
    measure_baselines(measuring, refinement)
    proposals = optimize(run, tables, measuring, refinement)
    measure_proposals(measuring, refinement, proposals)
    if request.optimizer.method == "evolution":
        evolve(measuring, refinement)
    elif request.optimizer.method != "ilp":
        refine(measuring, refinement)
    surrogate = refinement.surrogate()
    look_back(measuring, surrogate)
    measuring.accept()
    measuring.price(surrogate)
    tell_if_nothing_fits(run, profile.bounds, measuring.candidates)
    run.summary["agreement"] = agreement(measuring.candidates)
    run.summary["evaluations"] = refinement.spent
    run.succeed()


def begin(run: Run, profile: Profile, tables: dict[str, Table]) -> tuple[Measuring, Refinement]:
    """What measures, and what decides what is measured; nothing is measured yet."""
    request, space = run.request, profile.space
    uniform = list(baselines(space).values())
    asked = profile.costs, profile.bounds, profile.axes[0], request.optimizer.points
    sweep = StoppableSweep.over(run.aside(lambda: Sweep.of(*asked, uniform)), run.pause)
    nothing = np.zeros((0, len(space.units)), dtype=np.int64)
    drafts = Drafts(space, profile.costs, predicting(profile, tables, nothing, np.zeros(0)))
    measuring = Measuring(run, profile, sweep, drafts)
    features = Features.of(space, {metric: table.values.to_numpy() for metric, table in tables.items()})
    by_cost = profile.costs[sweep.axis].table
    refinement = Refinement(
        sweep,
        features,
        measuring.measure,
        profile.batch_sizes,
        # A search whose baselines all miss the budget has nothing to show without one proposal.
        max(request.optimizer.evaluations, len(uniform) + (not any(map(sweep.admits, uniform)))),
        seed=request.calibration.seed,
        most_loss=request.budgets.loss_increase or np.inf,
        together=max(run.evaluators, TOGETHER),
        expand=measuring.expand,
        ladders=Ladders.of(features.predicted, by_cost, space.layer_of) if space.splits_layers else None,
    )
    return measuring, refinement


def measure_baselines(measuring: Measuring, refinement: Refinement) -> None:
    """The uniform configurations: what everything is compared with, and what first corrects the predictions."""
    uniform = baselines(measuring.profile.space)
    measuring.enter("baselines", 2 * len(uniform))
    if refinement.left <= len(uniform):
        asked = measuring.run.request.optimizer.evaluations
        measuring.run.notice(
            f"optimizer.evaluations is {asked}: the {len(uniform)} uniform configurations, which are measured in any "
            "case, leave none for others"
        )
    for label, choice in uniform.items():
        measuring.propose([(label, choice)], "uniform")
        measuring.add(refinement.whole([choice], "uniform"))
    measuring.anchor()


def measure_proposals(measuring: Measuring, refinement: Refinement, proposals: Sequence[Choice]) -> None:
    """The points of the predicted frontiers, and, where the predictions are going to be corrected, some that would be
    best if they erred; of thousands of groups a few would say nothing."""
    bits, predicted_only = measuring.profile.costs["avg_bits"], measuring.run.request.optimizer.method == "ilp"
    drawn = 0 if predicted_only or measuring.profile.space.splits_layers else first(refinement.left)[1]
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
    """Breed new configurations from the measured ones, until the evaluations are spent or none is new.

    An evolution gives the same again of the same losses: one that was cut off begins anew, and finds its losses stored.
    """
    run, profile = measuring.run, measuring.profile
    measuring.enter("evolve", refinement.left)
    evolution = Evolution(
        profile.space,
        profile.costs,
        profile.bounds,
        measuring.sweep.axis,
        seeds=[trial.choice for trial in measuring.trials.values()],
        seed=run.request.calibration.seed,
    )
    losses = {trial.choice.tobytes(): trial.loss for trial in measuring.trials.values()}
    while choices := evolution.ask(refinement.together):
        run.pause()
        new = [choice for choice in choices if choice.tobytes() not in losses][: refinement.left]
        trials = refinement.whole(new, "evolved")
        measuring.add(trials)
        losses |= {trial.choice.tobytes(): trial.loss for trial in trials}
        for choice in choices:
            if choice.tobytes() in losses:
                evolution.tell(choice, losses[choice.tobytes()])
        show(run, evolution)
        if not refinement.left:
            return


def show(run: Run, evolution: Evolution) -> None:
    """Bring the study to where optuna-dashboard finds it. Nothing waits for it, and nothing depends on it."""
    try:
        evolution.copy_to(study_storage(run.engine), study_name(run.claim.search_id))
    except (SQLAlchemyError, OptunaError, DatabaseUnavailable) as error:
        log.warning("the study was not brought up to date: %s", str(error).splitlines()[0])


def look_back(measuring: Measuring, surrogate: Surrogate) -> None:
    """With all that the search has found: what no allocation can do better."""
    run, space = measuring.run, measuring.profile.space
    weights_only = not any(scheme.quantizes_activations for scheme in space.schemes)
    errors = relative_errors(measuring.compute, space) if weights_only else None
    run.summary["reference"] = asdict(run.aside(lambda: reference(surrogate, measuring.sweep, space, errors)))


def tell_if_nothing_fits(run: Run, bounds: Sequence[Bound], candidates: Sequence[Candidate]) -> None:
    """A loss budget may turn out too tight only once everything is measured."""
    reported = [one for one in candidates if one.loss is not None]
    if not any(one.fits for one in candidates) and reported:
        kept = [one for one in reported if all(bound.admits(one.costs[bound.resource]) for bound in bounds)]
        least = min(one.loss for one in kept or reported if one.loss is not None)
        among = " of those that keep the others" if kept and bounds else ""
        limit = run.request.budgets.loss_increase
        asked = f", and loss_increase = {limit:g} was asked for" if limit is not None else ""
        run.notice(
            f"no measured configuration keeps every budget; the least measured loss{among} is {least:.3g}{asked}"
        )


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
