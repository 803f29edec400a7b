"""How choices become candidates, which of them are measured, and what the frontier may hold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.agreement import spearman
from search.budget import Bound
from search.candidate import Candidate
from search.cost import cost_tables
from search.proposals import Drafts, axes, baselines, judge, shared
from search.surrogate import Features, Surrogate
from tests.search.spaces import decoder, space

MODEL = decoder()
SPACE = space(MODEL)
COSTS = cost_tables(SPACE, MODEL)
TABLE = np.ones(SPACE.allowed.shape)


def sweep(*columns: int) -> list[np.ndarray]:
    return [np.full(len(SPACE.units), column) for column in columns]


def mixed(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 3, len(SPACE.units)) for _ in range(count)]


def test_the_baselines_are_the_uniform_configurations() -> None:
    assert list(baselines(SPACE)) == ["uniform w4a16g32", "uniform w6a16g32", "uniform w8a16g32"]
    assert [set(choice.tolist()) for choice in baselines(SPACE).values()] == [{0}, {1}, {2}]
    assert not baselines(space(MODEL, pin={"*": "w4a16g32"}))


def test_evaluations_are_shared_among_metrics_and_each_allocation_is_proposed_once() -> None:
    known = sweep(0, 1, 2)
    found = shared({"a": mixed(20), "b": [*mixed(20), *sweep(0), *mixed(40)]}, 30, known)
    assert [metric for metric, _ in found] == ["a"] * 15 + ["b"] * 15
    assert len({choice.tobytes() for _, choice in [*found, *(("", choice) for choice in known)]}) == 33


def test_what_one_metric_leaves_the_others_take() -> None:
    assert [metric for metric, _ in shared({"a": mixed(2), "b": mixed(40)}, 20)] == ["a"] * 2 + ["b"] * 18


def test_a_thinned_sweep_keeps_its_ends() -> None:
    whole = mixed(20)
    few = [choice.tobytes() for _, choice in shared({"kl": whole}, 3)]
    assert [few[0], few[-1]] == [whole[0].tobytes(), whole[-1].tobytes()]
    assert not shared({"kl": whole}, 0)


def test_a_candidate_says_what_it_costs_and_what_each_metric_predicts() -> None:
    features = Features.of(SPACE, {"kl": TABLE})
    surrogate = Surrogate.fit(features, np.empty((0, len(SPACE.units)), dtype=np.int64), np.empty(0))
    (choice,) = sweep(1)
    made = Drafts(SPACE, COSTS, {"kl": surrogate}).candidate(7, "ilp", "label", choice)
    assert (made.number, made.source, made.label, made.loss) == (7, "ilp", "label", None)
    assert set(made.allocation.values()) == {"w6a16g32"}
    assert made.costs == {name: cost.total(choice) for name, cost in COSTS.items()}
    assert made.predicted["kl"] == pytest.approx(len(SPACE.units))


def test_axes_are_the_budgeted_resources() -> None:
    assert axes([]) == ["size_bytes"]
    bounds = [Bound("avg_bits", "avg_bits", 4), Bound("gbitops", "bitops", 1)]
    assert axes(bounds) == ["avg_bits", "bitops"]
    assert axes(bounds, "gbitops") == ["bitops", "avg_bits"], "what is sought comes first"
    assert axes([], "avg_bits") == ["avg_bits"]


def candidate(number: int, loss: float | None, bits: float, source: str = "ilp") -> Candidate:
    metrics = {} if loss is None else {"loss": loss}
    return Candidate(number, source, "", {}, {}, {"avg_bits": bits}, metrics)  # type: ignore[arg-type]


losses = st.floats(0, 10) | st.none()


@given(st.lists(st.tuples(losses, st.floats(2, 8), st.booleans()), min_size=1, max_size=12), st.floats(2, 8))
def test_the_frontier_is_hard_measured_and_never_above_a_uniform_that_fits(
    drawn: list[tuple[float | None, float, bool]], limit: float
) -> None:
    candidates = [
        candidate(number, loss, bits, "uniform" if uniform else "ilp")
        for number, (loss, bits, uniform) in enumerate(drawn)
    ]
    bound = Bound("avg_bits", "avg_bits", limit)
    judged = judge(candidates, [bound], None, ["avg_bits"])
    frontier = [one for one in judged if one.on_frontier]
    assert all(one.loss is not None and bound.admits(one.costs["avg_bits"]) for one in frontier)
    for baseline in judged:
        if baseline.fits and baseline.loss is not None:
            assert any(
                one.loss is not None
                and one.loss <= baseline.loss
                and one.costs["avg_bits"] <= baseline.costs["avg_bits"]
                for one in frontier
            )


def test_a_loss_budget_is_as_hard_as_a_cost_budget() -> None:
    judged = judge([candidate(1, 0.2, 4.0), candidate(2, 0.05, 5.0)], [], 0.1, ["avg_bits"])
    assert [one.fits for one in judged] == [False, True]
    assert [one.on_frontier for one in judged] == [False, True]


def test_judging_again_forgets_the_last_judgement() -> None:
    first = judge([candidate(1, 0.2, 4.0)], [], None, ["avg_bits"])
    again = judge([*first, candidate(2, 0.1, 4.0)], [], None, ["avg_bits"])
    assert [one.on_frontier for one in again] == [False, True]
    assert replace(again[0], on_frontier=True) == first[0]


def test_rank_agreement() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1.0
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert spearman([1, 2], [1, 2]) is None
