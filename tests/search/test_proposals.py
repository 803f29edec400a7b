"""What is measured, and what the frontier may hold."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from search.agreement import spearman
from search.budget import Bound
from search.candidate import Candidate
from search.cost import cost_tables
from search.proposals import Drafts, axes, judge
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


def propose(sweeps: dict[str, list[np.ndarray]], evaluations: int) -> list[Candidate]:
    drafts = Drafts(SPACE, COSTS, dict.fromkeys(sweeps, TABLE))
    return drafts.proposals(drafts.baselines(), sweeps, evaluations)


def test_uniform_baselines_come_first_and_are_always_there() -> None:
    found = propose({"kl": mixed(5)}, evaluations=1)[:3]
    assert [candidate.label for candidate in found] == ["uniform w4a16g32", "uniform w6a16g32", "uniform w8a16g32"]


def test_evaluations_are_shared_among_metrics_and_each_allocation_is_proposed_once() -> None:
    found = propose({"a": mixed(20), "b": [*mixed(20), *sweep(0), *mixed(40)]}, evaluations=33)
    assert len(found) == 33
    assert sum(candidate.label.startswith("a,") for candidate in found) == 15
    assert len({tuple(candidate.allocation.items()) for candidate in found}) == len(found)
    assert [candidate.number for candidate in found] == list(range(1, len(found) + 1))


def test_a_thinned_sweep_keeps_its_ends() -> None:
    whole = propose({"kl": mixed(20)}, evaluations=100)
    few = propose({"kl": mixed(20)}, evaluations=6)
    assert [few[3].allocation, few[-1].allocation] == [whole[3].allocation, whole[-1].allocation]


def test_a_sweep_point_that_is_uniform_is_the_baseline() -> None:
    found = propose({"kl": sweep(0, 2)}, evaluations=10)
    assert [candidate.source for candidate in found] == ["uniform"] * 3


def test_a_budget_below_every_baseline_still_gets_its_proposal() -> None:
    drafts = Drafts(SPACE, COSTS, {"kl": TABLE})
    missed = drafts.proposals(drafts.baselines(), {"kl": mixed(9)}, evaluations=1)
    assert [one.source for one in missed] == ["uniform"] * 3 + ["ilp"]
    met = [replace(one, fits=True) for one in drafts.baselines()]
    assert len(drafts.proposals(met, {"kl": mixed(9)}, evaluations=1)) == 3


def test_axes_are_the_budgeted_resources() -> None:
    assert axes([]) == ["size_bytes"]
    assert axes([Bound("avg_bits", "avg_bits", 4), Bound("gbitops", "bitops", 1)]) == ["avg_bits", "bitops"]


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
