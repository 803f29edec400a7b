"""One search from claim to frontier on a real classifier, in real Postgres; and what happens when it is cut short."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine, delete, func, select

from db import queue
from db.candidates import candidates
from db.events import events_after
from db.models import get_model, put_model
from db.results import get_results
from db.searches import Search, create_search, get_search
from db.tables import ResultRow
from search.errors import BitfrontierError, InfeasibleBudget, InvalidCalibration, InvalidRequest, UnsupportedModel
from search.metrics import METRICS
from search.request import SearchRequest, SpaceRequest
from search.space import build_space
from search.targets import find_target
from tests import models
from workers.__main__ import Worker
from workers.cluster import Function, InProcessPool, Pool
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.pipeline import run_search
from workers.profiling import evaluator_spec
from workers.sensitivity import Table
from workers.tables import check_finite
from workers.tasks import Item, Result

SCHEMES = ["w2a16", "w3a16", "w4a16", "w8a16"]


class Counting(InProcessPool):
    """Counts what it computes, and dies after so many results."""

    def __init__(self, spec: EvaluatorSpec, lives: float = float("inf")) -> None:
        super().__init__(spec)
        self.computed = 0
        self.lives = lives

    def map(self, function: Function, items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
        for result in super().map(function, items):
            if self.computed >= self.lives:
                raise KeyboardInterrupt
            self.computed += 1
            yield result


def ask(engine: Engine, **changes: object) -> Search:
    document = {
        "model": "digits-vit",
        "calibration": {"dataset": "digits", "samples": 64},
        "space": {"schemes": SCHEMES},
        "budgets": {"avg_bits": 4.5},
        "optimizer": {"points": 8, "evaluations": 14},
    }
    return create_search(engine, SearchRequest.model_validate(document | changes))[0]


def claim(engine: Engine, owner: str = "test", seconds: float = 60) -> queue.Claim:
    claimed = queue.claim(engine, owner, timedelta(seconds=seconds))
    assert claimed is not None
    return claimed


def work(engine: Engine, pool_for: Callable[[EvaluatorSpec], Pool] = InProcessPool) -> None:
    run_search(engine, claim(engine), pool_for, lambda: None)


def forget_results(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(delete(ResultRow))


def test_a_search_ends_in_a_measured_frontier_that_is_never_above_uniform(digits: Engine) -> None:
    search = ask(digits)
    work(digits)
    done, found = get_search(digits, search.id), candidates(digits, search.id)
    assert done.state == "succeeded"
    assert done.summary is not None
    assert done.summary["full_precision"]["accuracy"] > 0.9
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


def test_the_record_of_a_search_is_complete(digits: Engine) -> None:
    search = ask(digits)
    work(digits)
    kinds = [event.kind for event in events_after(digits, search.id, 0)]
    stages = [event.data["stage"] for event in events_after(digits, search.id, 0) if event.kind == "stage"]
    assert stages == ["profile", *["sensitivity"] * 2, "baselines", "optimize", "measure", "refine", "accept"]
    found = candidates(digits, search.id)
    assert kinds.count("measured") == len(found) + sum(candidate.loss is not None for candidate in found)
    summary = get_search(digits, search.id).summary
    assert summary is not None
    for metric, key in summary["tables"].items():
        table = get_results(digits, [key])[key]
        assert table["metric"] == metric
        assert np.array(table["values"]).shape == (len(summary["units"]), len(summary["schemes"]))
        assert summary["agreement"][metric]["spearman"] > 0.5
    model = get_model(digits, "digits-vit")
    assert model is not None
    assert model.inventory is not None


def test_another_budget_on_the_same_model_is_nearly_free(digits: Engine) -> None:
    """Its predicted points stand before anything new is computed; nothing that was measured is measured again."""
    pool: Counting | None = None

    def counting(spec: EvaluatorSpec) -> Pool:
        nonlocal pool
        pool = pool or Counting(spec)
        return pool

    first = ask(digits)
    work(digits, counting)
    assert pool is not None
    pool.computed = 0
    second, drafted = ask(digits, budgets={"avg_bits": 3.5}), set[str]()

    def look() -> None:
        if pool and not pool.computed:
            drafted.update(one.label for one in candidates(digits, second.id) if one.loss is None)

    run_search(digits, claim(digits), counting, look)
    assert any(label.startswith("kl") for label in drafted)
    summary = get_search(digits, second.id).summary
    assert summary is not None
    assert all(metric["reused"] for metric in summary["metrics"].values())
    known = [candidate.allocation for candidate in candidates(digits, first.id)]
    new = [candidate for candidate in candidates(digits, second.id) if candidate.allocation not in known]
    # Three parts of the calibration data each, and two more splits for those that are considered.
    assert pool.computed <= 3 * len(new) + 2 * summary["acceptance"]["finalists"]


@pytest.mark.parametrize(
    ("method", "stage", "source"),
    [("ilp", None, "ilp"), ("refine", "refine", "refined"), ("evolution", "evolve", "evolved")],
)
def test_every_method_measures_what_it_proposes_and_no_more_than_asked(
    digits: Engine, method: str, stage: str | None, source: str
) -> None:
    search = ask(digits, optimizer={"method": method, "points": 20, "evaluations": 16})
    work(digits)
    done, found = get_search(digits, search.id), candidates(digits, search.id)
    stages = [event.data["stage"] for event in events_after(digits, search.id, 0) if event.kind == "stage"]
    assert stages[3:] == [name for name in ("baselines", "optimize", "measure", stage, "accept") if name]
    assert done.summary is not None
    assert 12 < done.summary["evaluations"] <= 16
    assert {"uniform", "ilp", source} <= {candidate.source for candidate in found}
    assert all(candidate.costs["avg_bits"] <= 4.5 for candidate in found if candidate.source != "uniform")


def test_what_is_reported_was_accepted_on_data_that_was_not_searched(digits: Engine) -> None:
    search = ask(digits, optimizer={"points": 10, "evaluations": 28})
    work(digits)
    done, found = get_search(digits, search.id), candidates(digits, search.id)
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


def test_predictions_carry_intervals_that_hold_the_losses_on_held_out_data(digits: Engine) -> None:
    search = ask(digits, optimizer={"points": 20, "evaluations": 30}, budgets={"avg_bits": 8})
    work(digits)
    found, summary = candidates(digits, search.id), get_search(digits, search.id).summary
    assert summary is not None
    told = [one for one in found if one.expected and one.loss is not None and one.source != "uniform"]
    assert all(one.expected["low"] < one.expected["loss"] < one.expected["high"] for one in told)
    within = sum(one.expected["low"] <= (one.loss or 0) <= one.expected["high"] for one in told)
    assert summary["coverage"] == {"level": 0.9, "within": within, "points": len(told)}
    assert within >= 0.7 * len(told) > 3


def test_an_evolution_that_was_killed_goes_on_where_it_was(digits: Engine) -> None:
    asked = {"optimizer": {"method": "evolution", "points": 4, "evaluations": 20}}
    whole = ask(digits, **asked)
    work(digits)
    forget_results(digits)
    again, steps = ask(digits, **asked), 0

    def check() -> None:
        nonlocal steps
        steps += get_search(digits, again.id).stage == "evolve"
        if steps == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_search(digits, claim(digits, "killed", seconds=0.05), InProcessPool, check)
    time.sleep(0.1)
    run_search(digits, claim(digits, "next"), InProcessPool, lambda: None)
    assert [one.allocation for one in candidates(digits, again.id)] == [
        one.allocation for one in candidates(digits, whole.id)
    ]


def test_the_same_request_gives_the_same_frontier(digits: Engine) -> None:
    first, second = ask(digits), ask(digits)
    work(digits)
    forget_results(digits)
    work(digits)
    assert candidates(digits, first.id) == candidates(digits, second.id)


def test_a_killed_attempt_loses_at_most_the_task_it_was_in(digits: Engine) -> None:
    whole = Counting(EvaluatorSpec("", SearchRequest(model="m", budgets={"avg_bits": 4}).calibration))
    ask(digits)

    def counted(spec: EvaluatorSpec) -> Pool:
        whole.spec = spec
        return whole

    work(digits, counted)
    forget_results(digits)

    search, pools = ask(digits), []
    for lives in (5, 5, float("inf")):

        def dying(spec: EvaluatorSpec, lives: float = lives) -> Pool:
            pools.append(Counting(spec, lives))
            return pools[-1]

        attempt = claim(digits, f"worker with {lives} lives", seconds=0.05)
        try:
            run_search(digits, attempt, dying, lambda: None)
        except KeyboardInterrupt:
            time.sleep(0.1)
    assert get_search(digits, search.id).state == "succeeded"
    # Every attempt describes the model again; nothing else is computed twice.
    assert sum(pool.computed for pool in pools) - len(pools) == whole.computed - 1


def test_budgets_that_cannot_hold_are_refused_with_the_least_that_can(digits: Engine) -> None:
    ask(digits, budgets={"avg_bits": 1.5})
    with pytest.raises(InfeasibleBudget) as refused:
        work(digits)
    assert refused.value.problem()["accepted"]["minimum"] > 2


def test_a_limit_on_some_layers_holds_at_every_point_of_the_frontier(digits: Engine) -> None:
    search = ask(digits, budgets={"avg_bits": 4.5, "limits": {"*.fc2": {"avg_bits": 3.25}}})
    work(digits)
    done, found = get_search(digits, search.id), candidates(digits, search.id)
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


def test_a_loss_budget_is_a_hard_limit_on_what_was_measured(digits: Engine) -> None:
    search = ask(digits, budgets={"loss_increase": 0.05})
    work(digits)
    found = candidates(digits, search.id)
    assert any(not candidate.fits for candidate in found)
    assert all(candidate.loss is not None and candidate.loss <= 0.05 for candidate in found if candidate.fits)
    assert any(candidate.on_frontier for candidate in found)


def test_a_finished_search_says_what_more_would_buy_and_what_nothing_can_better(digits: Engine) -> None:
    search = ask(digits)
    work(digits)
    summary = get_search(digits, search.id).summary
    assert summary is not None
    reference = summary["reference"]
    assert reference["axis"] == "avg_bits"
    assert reference["levels"][0] == 4.5
    for line in ("lower_bound", "rate_distortion"):
        assert len(reference[line]) == len(reference["levels"])
        assert reference[line] == sorted(reference[line]), "less room, more loss"
        assert reference[line][0] > 0
    found = candidates(digits, search.id)
    assert all((set(one.shadow_prices) == {"avg_bits"}) == one.on_frontier for one in found)
    assert all(price >= 0 for one in found for price in one.shadow_prices.values())
    assert any(one.shadow_prices["avg_bits"] > 0.1 for one in found if one.on_frontier)


def test_rounded_activations_and_bit_operations_have_no_rate_distortion_limit(digits: Engine) -> None:
    rounded = ask(digits, space={"schemes": ["w3a16", "w4a8", "w8a8"]})
    work(digits)
    operations = ask(digits, budgets={"loss_increase": 0.05}, optimizer={"objective": "gbitops", "points": 8})
    work(digits)
    for search, axis in ((rounded, "avg_bits"), (operations, "bitops")):
        summary = get_search(digits, search.id).summary
        assert summary is not None
        assert summary["axes"] == [axis], "what is sought is swept"
        assert summary["reference"]["rate_distortion"] is None
        assert summary["reference"]["lower_bound"]


def test_pins_hold_in_every_candidate(digits: Engine) -> None:
    search = ask(digits, space={"schemes": SCHEMES, "pin": {"classifier": "w8a16"}})
    work(digits)
    assert {candidate.allocation["classifier"] for candidate in candidates(digits, search.id)} == {"w8a16"}


def test_a_search_in_which_everything_is_pinned_measures_that(digits: Engine) -> None:
    search = ask(digits, space={"schemes": SCHEMES, "pin": {"*": "w4a16"}})
    work(digits)
    (only,) = candidates(digits, search.id)
    assert (only.source, only.on_frontier, set(only.allocation.values())) == ("ilp", True, {"w4a16"})


def test_a_model_that_was_replaced_is_loaded_again(
    digits: Engine, worker: Worker, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "replaced"
    shutil.copytree(model_folder("digits_vit"), folder)
    put_model(digits, "replaced", str(folder), None)
    digests = []
    for _ in range(2):
        search = ask(digits, model="replaced", sensitivity=["hessian_trace"], space={"schemes": ["w4a16"]})
        wait_for(lambda search=search: get_search(digits, search.id).state == "succeeded")
        digests.append((get_search(digits, search.id).summary or {})["model_digest"])
        weights = load_file(folder / "model.safetensors")
        save_file(
            {name: weight * 1.01 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    assert digests[0] != digests[1]


def test_an_unregistered_name_never_means_a_folder_of_the_worker(
    digits: Engine, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model_folder("digits_vit"), tmp_path / "some" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ask(digits, model="some/model")
    with pytest.raises(BitfrontierError, match="hub"):
        work(digits)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this takes too long"
        time.sleep(0.05)


def test_a_worker_fails_what_cannot_be_done_and_goes_on(digits: Engine, worker: Worker) -> None:
    bad, good = ask(digits, model="nobody"), ask(digits)
    wait_for(lambda: get_search(digits, good.id).state == "succeeded")
    failed = get_search(digits, bad.id)
    assert failed.state == "failed"
    assert failed.error is not None
    assert failed.error["field"] == "model"
    assert "nobody" in failed.error["detail"]


def test_a_running_search_is_cancelled_within_seconds(digits: Engine, worker: Worker) -> None:
    search = ask(digits, optimizer={"points": 200, "evaluations": 1000})
    wait_for(lambda: get_search(digits, search.id).stage == "sensitivity")
    queue.cancel(digits, search.id)
    wait_for(lambda: get_search(digits, search.id).state == "cancelled", seconds=10)


def test_a_stopped_worker_hands_its_search_back(digits: Engine, worker: Worker) -> None:
    search = ask(digits, optimizer={"points": 200, "evaluations": 1000})
    wait_for(lambda: get_search(digits, search.id).stage == "sensitivity")
    worker.stop()
    wait_for(lambda: get_search(digits, search.id).state == "queued", seconds=10)


def test_invalid_request_is_what_a_contradictory_pin_raises(digits: Engine) -> None:
    ask(digits, space={"schemes": SCHEMES, "pin": {"classifier": "w8a16", "class*": "w4a16"}})
    with pytest.raises(InvalidRequest, match="several schemes"):
        work(digits)


def test_a_person_hears_what_a_metric_will_cost_before_it_runs_and_what_it_cost(digits: Engine) -> None:
    search = ask(digits)
    work(digits)
    said = [event.data for event in events_after(digits, search.id, 0) if event.kind == "stage"]
    summary = get_search(digits, search.id).summary
    assert summary is not None
    for metric in search.request["sensitivity"]:
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


def test_a_table_is_found_again_whatever_else_was_asked(digits: Engine) -> None:
    """Tables are keyed by metric, space, model and data: not by the search, its budget or its other metrics."""
    first = ask(digits, sensitivity=["kl"])
    work(digits)
    second = ask(digits, sensitivity=["size", "kl"], budgets={"avg_bits": 6})
    work(digits)
    summaries = [get_search(digits, search.id).summary or {} for search in (first, second)]
    assert summaries[0]["tables"]["kl"] == summaries[1]["tables"]["kl"]
    assert [summary["metrics"]["kl"]["reused"] for summary in summaries] == [False, True]
    third = ask(digits, sensitivity=["kl"], space={"schemes": SCHEMES[1:]})
    work(digits)
    assert (get_search(digits, third.id).summary or {})["tables"]["kl"] != summaries[0]["tables"]["kl"]


def test_a_prediction_that_is_not_finite_names_the_metric_and_the_unit(digits: Engine) -> None:
    search = ask(digits)
    work(digits)
    summary = get_search(digits, search.id).summary
    assert summary is not None
    stored = get_results(digits, [summary["tables"]["kl"]])[summary["tables"]["kl"]]
    table = Table.from_json(stored)
    table.weight.iloc[2, 1] = float("nan")
    spec = evaluator_spec(digits, SearchRequest.model_validate(search.request))
    space = build_space(Evaluator.build(spec).inventory, SpaceRequest(schemes=tuple(SCHEMES)), find_target("generic"))
    with pytest.raises(UnsupportedModel) as refused:
        check_finite(METRICS["kl"], table, space)
    assert refused.value.value == "kl"
    assert table.weight.index[2] in refused.value.detail


def test_every_metric_serves_a_search(digits: Engine) -> None:
    """All tables are stored and read back, all corrected by the baselines, and all propose and are judged."""
    asked = [name for name in METRICS if name != "pqi_single"]
    search = ask(digits, sensitivity=asked, optimizer={"points": 2, "evaluations": 12})
    work(digits)
    done = get_search(digits, search.id)
    assert done.state == "succeeded"
    assert done.summary is not None
    assert set(done.summary["tables"]) == set(asked)
    assert set(done.summary["agreement"]) == set(asked)
    tables = get_results(digits, list(done.summary["tables"].values()))
    for name, key in done.summary["tables"].items():
        assert Table.from_json(tables[key]).values.shape == (len(done.summary["units"]), len(SCHEMES)), name
    assert all(set(one.predicted) == set(asked) for one in candidates(digits, search.id))


def test_a_refinement_expands_the_loss_and_another_search_finds_it_again(digits: Engine) -> None:
    asked = {"optimizer": {"points": 8, "evaluations": 44}}
    first = ask(digits, **asked)
    work(digits)
    with digits.begin() as connection:
        assert connection.scalar(select(func.count()).where(ResultRow.kind == "expansion")) > 0
    again = ask(digits, **asked)
    work(digits)
    found = get_search(digits, again.id)
    assert found.summary is not None
    assert found.summary["computed"] == 0
    assert [one.allocation for one in candidates(digits, again.id)] == [
        one.allocation for one in candidates(digits, first.id)
    ]


def test_a_search_measures_through_kernels_where_it_is_told_to_and_shares_nothing_with_one_that_rounds(
    digits: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"space": {"schemes": ["w4a8", "w6a8", "w8a8"]}, "budgets": {"avg_bits": 7}}
    rounding = ask(digits, **asked)
    work(digits)
    monkeypatch.setenv("BITFRONTIER_KERNELS", "reference")
    packed = ask(digits, **asked)
    work(digits)
    told = [get_search(digits, search.id).summary or {} for search in (rounding, packed)]
    assert [one["arithmetic"] for one in told] == ["rounding", "kernels"]
    assert told[1]["computed"] >= 10
    losses = [
        {one.label: one.metrics["loss"] for one in candidates(digits, search.id) if one.source == "uniform"}
        for search in (rounding, packed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]
