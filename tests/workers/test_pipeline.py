"""One search from claim to frontier on a real classifier, in real Postgres.

What the searches of `shared` found is there for the next: most need no table and no baseline of their own.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy import Engine, update

from db.candidates import candidates
from db.events import events_after
from db.models import get_model
from db.results import get_results
from db.searches import Search, get_search
from db.tables import SearchRow
from search.errors import BitfrontierError, InfeasibleBudget, InvalidCalibration, InvalidRequest, UnsupportedModel
from search.metrics import METRICS
from search.request import SearchRequest, SpaceRequest
from search.space import build_space
from search.targets import find_target
from tests import models
from tests.workers.searching import SCHEMES, Counting, ask, claim, work
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.pipeline import run_search
from workers.pools import Pool
from workers.profiling import evaluator_spec
from workers.sensitivity import Table
from workers.tables import check_finite

pytestmark = pytest.mark.long

ROUNDED = {
    "space": {"schemes": ["w4a8", "w6a8", "w8a8"]},
    "budgets": {"avg_bits": 7},
    "optimizer": {"method": "ilp", "points": 4, "evaluations": 6},
}
"""A search in which activations are rounded, too."""


@pytest.fixture(scope="module")
def finished(lasting_digits: Engine) -> Search:
    """A search at its end. Read it only."""
    search = ask(lasting_digits)
    work(lasting_digits)
    return get_search(lasting_digits, search.id)


@pytest.fixture
def shared(lasting_digits: Engine, finished: Search) -> Engine:
    """The engine of `finished`, with nothing in the queue, whatever a test before has left there."""
    with lasting_digits.begin() as connection:
        left = SearchRow.state.in_(("queued", "running"))
        connection.execute(update(SearchRow).where(left).values(state="cancelled"))
    return lasting_digits


def test_a_search_ends_in_a_measured_frontier_that_is_never_above_uniform(shared: Engine, finished: Search) -> None:
    found = candidates(shared, finished.id)
    assert finished.state == "succeeded"
    assert finished.summary is not None
    assert finished.summary["full_precision"]["accuracy"] > 0.9
    frontier = [candidate for candidate in found if candidate.on_frontier]
    assert all(candidate.costs["avg_bits"] <= 4.5 and candidate.loss is not None for candidate in frontier)
    assert any(candidate.source != "uniform" for candidate in frontier)
    for uniform in (candidate for candidate in found if candidate.source == "uniform" and candidate.fits):
        assert uniform.loss is not None
        assert any(
            point.loss is not None
            and point.loss <= uniform.loss
            and point.costs["avg_bits"] <= uniform.costs["avg_bits"]
            for point in frontier
        )
    assert {candidate.label for candidate in found if candidate.source == "uniform"} == {
        f"uniform {scheme}" for scheme in SCHEMES
    }
    assert all(0 <= candidate.metrics["accuracy"] <= 1 for candidate in found if candidate.loss is not None)
    assert all(candidate.metrics["calibration_loss"] >= 0 for candidate in found)


def test_the_record_of_a_search_is_complete(shared: Engine, finished: Search) -> None:
    kinds = [event.kind for event in events_after(shared, finished.id, 0)]
    stages = [event.data["stage"] for event in events_after(shared, finished.id, 0) if event.kind == "stage"]
    assert stages == ["profile", *["sensitivity"] * 2, "baselines", "optimize", "measure", "refine", "accept"]
    found = candidates(shared, finished.id)
    assert kinds.count("measured") == len(found) + sum(candidate.loss is not None for candidate in found)
    summary = finished.summary
    assert summary is not None
    for metric, key in summary["tables"].items():
        table = get_results(shared, [key])[key].value
        assert table["metric"] == metric
        assert np.array(table["values"]).shape == (len(summary["units"]), len(summary["schemes"]))
        assert summary["agreement"][metric]["spearman"] > 0.5
    model = get_model(shared, "digits-vit")
    assert model is not None
    assert model.inventory is not None


def test_another_budget_on_the_same_model_is_nearly_free(shared: Engine, finished: Search) -> None:
    """Its predicted points stand before anything new is computed; nothing that was measured is measured again."""
    pool: Counting | None = None

    def counting(spec: EvaluatorSpec) -> Pool:
        nonlocal pool
        pool = pool or Counting(spec)
        return pool

    second, drafted = ask(shared, budgets={"avg_bits": 3.5}), set[str]()

    def look() -> None:
        if pool and not pool.computed:
            drafted.update(one.label for one in candidates(shared, second.id) if one.loss is None)

    run_search(shared, claim(shared), counting, look)
    assert any(label.startswith("kl") for label in drafted)
    summary = get_search(shared, second.id).summary
    assert summary is not None
    assert all(metric["reused"] for metric in summary["metrics"].values())
    known = [candidate.allocation for candidate in candidates(shared, finished.id)]
    new = [candidate for candidate in candidates(shared, second.id) if candidate.allocation not in known]
    # Three parts of the calibration data each, and two more splits for those that are considered.
    assert pool is not None
    assert 0 < pool.computed <= 3 * len(new) + 2 * summary["acceptance"]["finalists"]


@pytest.mark.parametrize(
    ("method", "stage", "source"),
    [("ilp", None, "ilp"), ("refine", "refine", "refined"), ("evolution", "evolve", "evolved")],
)
def test_every_method_measures_what_it_proposes_and_no_more_than_asked(
    shared: Engine, method: str, stage: str | None, source: str
) -> None:
    search = ask(shared, optimizer={"method": method, "points": 20, "evaluations": 16})
    work(shared)
    done, found = get_search(shared, search.id), candidates(shared, search.id)
    stages = [event.data["stage"] for event in events_after(shared, search.id, 0) if event.kind == "stage"]
    assert stages[3:] == [name for name in ("baselines", "optimize", "measure", stage, "accept") if name]
    assert done.summary is not None
    assert 12 < done.summary["evaluations"] <= 16
    assert {"uniform", "ilp", source} <= {candidate.source for candidate in found}
    assert all(candidate.costs["avg_bits"] <= 4.5 for candidate in found if candidate.source != "uniform")


def test_what_is_reported_was_accepted_on_data_that_was_not_searched(shared: Engine) -> None:
    search = ask(shared, optimizer={"points": 10, "evaluations": 28})
    work(shared)
    done, found = get_search(shared, search.id), candidates(shared, search.id)
    assert done.summary is not None
    considered = [candidate for candidate in found if "acceptance_loss" in candidate.metrics]
    reported = [candidate for candidate in found if candidate.loss is not None]
    assert done.summary["acceptance"]["finalists"] == len(considered)
    assert {one.number for one in reported} <= {one.number for one in considered}
    assert len(reported) < len(considered) < len(found)
    for one in (candidate for candidate in reported if candidate.source != "uniform"):
        for uniform in (candidate for candidate in reported if candidate.source == "uniform"):
            if uniform.costs["avg_bits"] <= one.costs["avg_bits"]:
                assert one.metrics["acceptance_loss"] < uniform.metrics["acceptance_loss"]
    splits = [{one.metrics[name] for name in ("calibration_loss", "acceptance_loss", "loss")} for one in reported]
    assert all(len(values) == 3 for values in splits)


def test_progress_ends_where_it_said(digits: Engine) -> None:
    search = ask(digits, optimizer={"method": "ilp", "points": 4, "evaluations": 8})
    work(digits)
    told = [event.data for event in events_after(digits, search.id, 0) if event.kind == "progress"]
    last = {data["stage"]: (data["done"], data["total"]) for data in told}
    assert last["baselines"] == (8, 8)
    assert all(data["done"] <= data["total"] for data in told)


def test_predictions_carry_intervals_that_hold_the_losses_on_held_out_data(shared: Engine) -> None:
    coverage = []
    for seed in range(3):
        calibration = {"dataset": "digits", "samples": 64, "seed": seed}
        optimizer, budgets = {"points": 20, "evaluations": 30}, {"avg_bits": 8}
        search = ask(shared, calibration=calibration, optimizer=optimizer, budgets=budgets)
        work(shared)
        found, summary = candidates(shared, search.id), get_search(shared, search.id).summary
        assert summary is not None
        told = [one for one in found if one.expected and one.loss is not None and one.source != "uniform"]
        assert all(one.expected["low"] < one.expected["loss"] < one.expected["high"] for one in told)
        within = sum(one.expected["low"] <= (one.loss or 0) <= one.expected["high"] for one in told)
        assert summary["coverage"] == {"level": 0.9, "within": within, "points": len(told)}
        coverage.append((within, len(told)))
    within, points = np.sum(coverage, axis=0)
    assert within >= 0.75 * points > 20


def test_where_held_out_data_is_harder_all_is_expected_to_lose_more_as_the_uniform_configurations_do(
    digits: Engine, datasets_folder: Path
) -> None:
    images, generator = models.digits_arrays()[0][-192:], np.random.default_rng(0)
    uneven, order = np.empty_like(images), generator.permutation(192)
    uneven[order[:128]], uneven[order[128:]] = images[:128], images[128:] + generator.normal(0, 1.5, images[128:].shape)
    np.savez(datasets_folder / "uneven.npz", images=uneven)
    search = ask(digits, calibration={"dataset": "uneven", "samples": 64}, optimizer={"points": 8, "evaluations": 20})
    work(digits)
    found = [one for one in candidates(digits, search.id) if one.loss is not None and one.source != "uniform"]
    harder = [np.log(one.metrics["loss"] / one.metrics["calibration_loss"]) for one in found]
    missed = [np.log(one.metrics["loss"] / one.expected["loss"]) for one in found]
    assert np.median(harder) > 1 > 2 * abs(np.median(missed))
    summary = get_search(digits, search.id).summary
    assert summary is not None
    assert summary["coverage"]["within"] >= 0.7 * summary["coverage"]["points"] > 2


def test_where_one_sample_carries_most_of_the_loss_intervals_are_wide_and_finite(
    changed: Callable[..., object], digits: Engine
) -> None:
    changed(lambda weights: [weight.mul_(20) for name, weight in weights.items() if name.startswith("classifier")])
    calibration = {"dataset": "digits", "samples": 4}
    search = ask(digits, model="changed", calibration=calibration, optimizer={"points": 8, "evaluations": 24})
    work(digits)
    assert get_search(digits, search.id).state == "succeeded"
    ends = [one.expected["high"] / one.expected["low"] for one in candidates(digits, search.id) if one.expected]
    assert 1 < max(ends) < 1e15


def test_uniform_configurations_that_break_a_limit_stand_in_the_way_of_none(shared: Engine) -> None:
    budgets = {"avg_bits": 7, "limits": {"classifier": {"avg_bits": 2.4}}}
    search = ask(shared, optimizer={"points": 10, "evaluations": 40}, budgets=budgets)
    work(shared)
    heard = [one for one in candidates(shared, search.id) if "acceptance_loss" in one.metrics]
    breaking = [one for one in heard if one.allocation["classifier"] != "w2a16"]
    assert {one.source for one in breaking} == {"uniform"}
    assert any(
        uniform.costs["avg_bits"] < one.costs["avg_bits"]
        and uniform.metrics["acceptance_loss"] < one.metrics["acceptance_loss"]
        for one in heard
        if one.on_frontier
        for uniform in breaking
    )


def test_where_no_loss_is_small_enough_the_least_within_the_other_budgets_is_told(shared: Engine) -> None:
    search = ask(shared, budgets={"avg_bits": 4.5, "loss_increase": 1e-9}, optimizer={"points": 4, "evaluations": 8})
    work(shared)
    kept = [one.loss for one in candidates(shared, search.id) if one.loss and one.costs["avg_bits"] <= 4.5]
    assert f"the least measured loss of those that keep the others is {min(kept):.3g}" in _notices(shared, search.id)


def test_evaluations_that_the_uniform_configurations_use_up_are_told_of(shared: Engine) -> None:
    search = ask(shared, optimizer={"points": 4, "evaluations": 2})
    work(shared)
    assert "optimizer.evaluations is 2: the 4 uniform configurations" in _notices(shared, search.id)


def _notices(engine: Engine, search_id: int) -> str:
    return "; ".join(str(event.data) for event in events_after(engine, search_id, 0) if event.kind == "notice")


def test_the_same_request_gives_the_same_frontier(shared: Engine, finished: Search, digits: Engine) -> None:
    """Where nothing of the first is known, too."""
    second = ask(digits)
    work(digits)
    assert get_search(digits, second.id).summary["reused"] == 0  # type: ignore[index]
    assert candidates(shared, finished.id) == candidates(digits, second.id)


def test_budgets_that_cannot_hold_are_refused_with_the_least_that_can(digits: Engine) -> None:
    ask(digits, budgets={"avg_bits": 1.5})
    with pytest.raises(InfeasibleBudget) as refused:
        work(digits)
    assert refused.value.problem()["accepted"]["minimum"] > 2


def test_a_limit_on_some_layers_holds_at_every_point_of_the_frontier(shared: Engine) -> None:
    search = ask(shared, budgets={"avg_bits": 4.5, "limits": {"*.fc2": {"avg_bits": 3.25}}})
    work(shared)
    done, found = get_search(shared, search.id), candidates(shared, search.id)
    assert done.summary is not None
    assert done.summary["axes"] == ["avg_bits"]
    assert any(candidate.on_frontier for candidate in found)
    for candidate in found:
        within = candidate.costs["avg_bits"] <= 4.5 and candidate.costs["avg_bits of *.fc2"] <= 3.25
        assert within or (candidate.source == "uniform" and not candidate.fits)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": "nobody"}, "model"),
        ({"model": "nobody/nothing"}, "model"),
        ({"calibration": {"dataset": "nothing"}}, "calibration.dataset"),
        ({"calibration": {"dataset": "python-docs"}}, "calibration.dataset"),
        ({"calibration": {"dataset": "digits", "samples": 4000}}, "calibration.samples"),
        ({"space": {"schemes": SCHEMES, "pin": {"nowhere": "w8a16"}}}, "space.pin"),
        ({"space": {"schemes": ["w4a16g128"]}}, "space.schemes"),
    ],
)
def test_a_bad_request_fails_with_a_problem_that_names_the_field(
    digits: Engine, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], field: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ask(digits, **changes)
    with pytest.raises(BitfrontierError) as refused:
        work(digits)
    problem = refused.value.problem()
    assert problem["status"] == 422
    assert problem["field"] == field
    assert problem["detail"]


def test_a_loss_budget_is_a_hard_limit_on_what_was_measured(shared: Engine) -> None:
    search = ask(shared, budgets={"loss_increase": 0.05})
    work(shared)
    found = candidates(shared, search.id)
    assert any(not candidate.fits for candidate in found)
    assert all(candidate.loss is not None and candidate.loss <= 0.05 for candidate in found if candidate.fits)
    assert any(candidate.on_frontier for candidate in found)


def test_a_finished_search_says_what_more_would_buy_and_what_nothing_can_better(
    shared: Engine, finished: Search
) -> None:
    summary = finished.summary
    assert summary is not None
    reference = summary["reference"]
    assert reference["axis"] == "avg_bits"
    assert reference["levels"][0] == 4.5
    for line in ("lower_bound", "rate_distortion"):
        assert len(reference[line]) == len(reference["levels"])
        assert reference[line] == sorted(reference[line]), "less room, more loss"
        assert reference[line][0] > 0
    found = candidates(shared, finished.id)
    assert all((set(one.shadow_prices) == {"avg_bits"}) == one.on_frontier for one in found)
    assert all(price >= 0 for one in found for price in one.shadow_prices.values())
    assert any(one.shadow_prices["avg_bits"] > 0.1 for one in found if one.on_frontier)


def test_rounded_activations_and_bit_operations_have_no_rate_distortion_limit(shared: Engine) -> None:
    rounded = ask(shared, **ROUNDED)
    work(shared)
    operations = ask(
        shared,
        budgets={"loss_increase": 0.05},
        optimizer={"objective": "gbitops", "method": "ilp", "points": 4, "evaluations": 8},
    )
    work(shared)
    for search, axis in ((rounded, "avg_bits"), (operations, "bitops")):
        summary = get_search(shared, search.id).summary
        assert summary is not None
        assert summary["axes"] == [axis], "what is sought is swept"
        assert summary["reference"]["rate_distortion"] is None
        assert summary["reference"]["lower_bound"]


def test_pins_hold_in_every_candidate(shared: Engine) -> None:
    search = ask(shared, space={"schemes": SCHEMES, "pin": {"classifier": "w8a16"}})
    work(shared)
    assert {candidate.allocation["classifier"] for candidate in candidates(shared, search.id)} == {"w8a16"}


def test_a_search_in_which_everything_is_pinned_measures_that(shared: Engine) -> None:
    search = ask(shared, space={"schemes": SCHEMES, "pin": {"*": "w4a16"}})
    work(shared)
    (only,) = candidates(shared, search.id)
    assert (only.source, only.on_frontier, set(only.allocation.values())) == ("ilp", True, {"w4a16"})


def test_an_unregistered_name_never_means_a_folder_of_the_worker(
    digits: Engine, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder("digits_vit"), tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ask(digits, model="some/model")
    with pytest.raises(BitfrontierError, match="hub"):
        work(digits)


def test_invalid_request_is_what_a_contradictory_pin_raises(digits: Engine) -> None:
    ask(digits, space={"schemes": SCHEMES, "pin": {"classifier": "w8a16", "class*": "w4a16"}})
    with pytest.raises(InvalidRequest, match="several schemes"):
        work(digits)


def test_a_person_hears_what_a_metric_will_cost_before_it_runs_and_what_it_cost(
    shared: Engine, finished: Search
) -> None:
    said = [event.data for event in events_after(shared, finished.id, 0) if event.kind == "stage"]
    summary = finished.summary
    assert summary is not None
    for metric in finished.request["sensitivity"]:
        (stage,) = (data for data in said if data.get("metric") == metric)
        found = summary["metrics"][metric]
        assert stage["forward_passes"] == found["forward_passes"] > 0
        assert stage["estimated_seconds"] == found["estimated_seconds"] > 0
        assert found["seconds"] > 0


def test_a_metric_that_needs_labels_is_refused_before_anything_is_computed(
    digits: Engine, datasets_folder: Path
) -> None:
    images, _ = models.digits_arrays()
    np.savez(datasets_folder / "unlabelled.npz", images=images[-models.HELD_OUT :])
    ask(
        digits,
        calibration={"dataset": "unlabelled", "samples": 64},
        sensitivity=["kl", "hessian_trace_labels"],
    )
    with pytest.raises(InvalidCalibration) as refused:
        work(digits)
    assert (refused.value.field, refused.value.value) == ("sensitivity", "hessian_trace_labels")
    assert "fisher" in refused.value.accepted


def test_a_table_is_found_again_whatever_else_was_asked(shared: Engine, finished: Search) -> None:
    """Tables are keyed by metric, space, model and data: not by the search, its budget or its other metrics."""
    asked = {"sensitivity": ["size", "kl"], "optimizer": {"method": "ilp", "points": 2, "evaluations": 6}}
    second = ask(shared, **asked, budgets={"avg_bits": 6})
    work(shared)
    third = ask(shared, **asked, space={"schemes": SCHEMES[1:]})
    work(shared)
    summaries = [get_search(shared, search.id).summary or {} for search in (finished, second, third)]
    assert [summary["metrics"]["kl"]["reused"] for summary in summaries] == [False, True, False]
    tables = [summary["tables"]["kl"] for summary in summaries]
    assert tables[0] == tables[1] != tables[2]


def test_a_prediction_that_is_not_finite_names_the_metric_and_the_unit(shared: Engine, finished: Search) -> None:
    summary = finished.summary
    assert summary is not None
    stored = get_results(shared, [summary["tables"]["kl"]])[summary["tables"]["kl"]].value
    table = Table.from_json(stored)
    table.weight.iloc[2, 1] = float("nan")
    spec = evaluator_spec(shared, SearchRequest.model_validate(finished.request))
    space = build_space(Evaluator.build(spec).inventory, SpaceRequest(schemes=tuple(SCHEMES)), find_target("generic"))
    with pytest.raises(UnsupportedModel) as refused:
        check_finite(METRICS["kl"], table, space)
    assert refused.value.value == "kl"
    assert table.weight.index[2] in refused.value.detail


def test_a_search_measures_through_kernels_where_it_is_told_to_and_shares_nothing_with_one_that_rounds(
    shared: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounding = ask(shared, **ROUNDED)
    work(shared)
    monkeypatch.setenv("BITFRONTIER_KERNELS", "reference")
    packed = ask(shared, **ROUNDED)
    work(shared)
    told = [get_search(shared, search.id).summary or {} for search in (rounding, packed)]
    assert [one["arithmetic"] for one in told] == ["rounding", "kernels"]
    assert told[1]["computed"] >= 10
    losses = [
        {one.label: one.metrics["loss"] for one in candidates(shared, search.id) if one.source == "uniform"}
        for search in (rounding, packed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
