"""Budgets on some of the layers: what they count, what they refuse, and that they hold."""

from typing import Any

import numpy as np
import pytest

from search.errors import InfeasibleBudget, InvalidRequest
from search.feasibility import check_feasible
from search.ilp import solve
from search.limits import costs_and_bounds
from search.proposals import axes
from search.request import Budgets
from tests.search.spaces import decoder, space

MODEL = decoder()
SPACE = space(MODEL, "generic")
TIED = space(MODEL, "vllm")


def budgets(**limits: Any) -> Budgets:
    return Budgets.model_validate({"avg_bits": 6.5, "limits": limits["of"]})


def members(suffix: str) -> np.ndarray:
    return np.array([unit.name.endswith(suffix) for unit in SPACE.units])


def test_a_limit_counts_its_layers_alone() -> None:
    costs, bounds = costs_and_bounds(
        SPACE, MODEL, budgets(of={"*.down_proj": {"avg_bits": 6.5, "size_mb": 0.02}, "kind:linear": {"gbitops": 0.01}})
    )
    choice = np.arange(len(SPACE.units)) % 3
    down = members("down_proj")
    bits = np.array([4.5, 6.5, 8.5])[choice]
    weights = np.array([unit.weights for unit in SPACE.units])
    assert costs["avg_bits of *.down_proj"].total(choice) == pytest.approx(np.mean(bits[down])), "of equal size"
    assert costs["size_bytes of *.down_proj"].total(choice) == pytest.approx((bits * weights)[down].sum() / 8)
    linear = sum(
        layer.macs * SPACE.schemes[column].weight_bits * 16
        for unit, column in zip(SPACE.units, choice, strict=True)
        for layer in unit.layers
        if layer.kind == "linear"
    )
    assert costs["bitops of kind:linear"].total(choice) == pytest.approx(linear)
    assert [(bound.name, bound.resource, bound.limit) for bound in bounds] == [
        ("avg_bits", "avg_bits", 6.5),
        ("limits.*.down_proj.avg_bits", "avg_bits of *.down_proj", 6.5),
        ("limits.*.down_proj.size_mb", "size_bytes of *.down_proj", 20_000),
        ("limits.kind:linear.gbitops", "bitops of kind:linear", 1e7),
    ]


def test_a_limit_holds_and_the_other_layers_take_what_it_leaves() -> None:
    costs, bounds = costs_and_bounds(SPACE, MODEL, budgets(of={"*.down_proj": {"avg_bits": 4.5}}))
    loss = np.tile([4.0, 2.0, 1.0], (len(SPACE.units), 1))
    loss[members("down_proj")] *= 1000
    solution = solve(loss, costs, bounds)
    assert solution.choice is not None
    assert (solution.choice[members("down_proj")] == 0).all()
    assert (solution.choice[~members("down_proj")] > 0).any()
    assert all(bound.admits(costs[bound.resource].total(solution.choice)) for bound in bounds)


def test_a_limit_is_no_axis() -> None:
    _, bounds = costs_and_bounds(SPACE, MODEL, budgets(of={"*.down_proj": {"size_mb": 1}}))
    assert axes(bounds) == ["avg_bits"]
    alone = Budgets.model_validate({"limits": {"*.down_proj": {"avg_bits": 6.5}}})
    assert axes(costs_and_bounds(SPACE, MODEL, alone)[1]) == ["size_bytes"]


def test_what_is_closed_stays_closed_in_a_limit() -> None:
    pinned = space(MODEL, "generic", pin={"*.o_proj": "w8a16g32"})
    costs, _ = costs_and_bounds(pinned, MODEL, budgets(of={"*.down_proj": {"avg_bits": 6.5}}))
    assert (np.isinf(costs["avg_bits of *.down_proj"].table) == ~pinned.allowed).all()


def test_a_limit_that_cannot_be_met_is_refused_with_its_smallest_feasible_value() -> None:
    costs, bounds = costs_and_bounds(SPACE, MODEL, budgets(of={"*.down_proj": {"avg_bits": 4.4}}))
    with pytest.raises(InfeasibleBudget) as refused:
        check_feasible(costs, bounds)
    problem = refused.value.problem()
    assert (problem["field"], problem["accepted"]) == ("budgets.limits.*.down_proj.avg_bits", {"minimum": 4.5})


@pytest.mark.parametrize("pattern", ["*.fc1", "kind:conv"])
def test_a_pattern_that_matches_no_searched_layer_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        costs_and_bounds(SPACE, MODEL, budgets(of={pattern: {"avg_bits": 6.5}}))
    problem = refused.value.problem()
    assert (problem["field"], problem["value"]) == (f"budgets.limits.{pattern}", pattern)
    assert "kind:linear" in problem["accepted"]


def test_a_pattern_that_splits_a_unit_is_refused_with_its_layers() -> None:
    with pytest.raises(InvalidRequest) as refused:
        costs_and_bounds(TIED, MODEL, budgets(of={"*.q_proj": {"avg_bits": 6.5}}))
    assert "k_proj" in refused.value.problem()["accepted"]
    costs_and_bounds(TIED, MODEL, budgets(of={"*.self_attn.[qkv]_proj": {"avg_bits": 6.5}}))


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"kind:dense": {"avg_bits": 4}}, "'dense' is not a kind of layer; accepted: linear, conv, embedding, experts"),
        ({"*": {}}, "name at least one of avg_bits, size_mb, gbitops"),
        ({"*": {"avg_bits": 0}}, "greater than 0"),
        ({"*": {"loss_increase": 1}}, "Extra inputs"),
        ({"": {"avg_bits": 4}}, "pattern"),
    ],
)
def test_a_request_says_what_a_limit_takes(limits: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        budgets(of=limits)
