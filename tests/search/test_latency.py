"""Latency as a cost: the sum of what a profile has of the layers, and refused where it has nothing."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.allocation import layer_schemes
from search.budget import cost_bounds
from search.errors import InfeasibleBudget, InvalidRequest
from search.feasibility import check_feasible
from search.ilp import solve
from search.inventory import Inventory, Layer
from search.latency import Latency, chosen, product
from search.latency_profile import Shape
from search.limits import costs_and_bounds
from search.proposals import axes
from search.request import Budgets, SearchRequest
from search.scheme import FULL_PRECISION
from tests.search.profiles import DEVICE, microseconds, profile_of
from tests.search.spaces import decoder, space

MODEL = decoder()
SCHEMES = ("w4a16g32", "w6a8", "w8a8")
SPACE = space(MODEL, target="generic", schemes=SCHEMES, pin={"model.embed_tokens": "w8a16"}, ignore=())
PROFILE = profile_of(MODEL, (*SCHEMES, "w8a16"), (1, 16))
LATENCY = Latency(PROFILE, 16, "decoder")
COST = LATENCY.cost(SPACE)
choices = st.tuples(*(st.sampled_from(np.flatnonzero(row).tolist()) for row in SPACE.allowed)).map(np.array)


def request(**changes: Any) -> SearchRequest:
    return SearchRequest.model_validate({"model": "decoder", "budgets": {"latency_ms": 1}} | changes)


@given(choices)
def test_a_total_is_the_sum_of_its_layers_medians(choice: np.ndarray) -> None:
    schemes = layer_schemes(SPACE, choice)
    expected = sum(microseconds(Shape(layer.rows, layer.columns, 16), schemes[layer.name]) for layer in SPACE.layers)
    assert COST.total(choice) == pytest.approx(expected)
    assert COST.smallest <= COST.total(choice) <= COST.largest


def test_layers_that_are_not_searched_take_their_time_in_16_bits() -> None:
    ignoring = space(MODEL, target="generic", schemes=SCHEMES, ignore=("model.embed_tokens", "*.q_proj"))
    cost = LATENCY.cost(ignoring)
    unsearched = [layer for layer in MODEL.layers if layer.name.endswith(("q_proj", "embed_tokens"))]
    expected = sum(microseconds(Shape(layer.rows, layer.columns, 16), FULL_PRECISION) for layer in unsearched)
    assert cost.constant == pytest.approx(expected)


def test_what_a_unit_may_not_take_takes_forever() -> None:
    assert (np.isinf(COST.table) == ~SPACE.allowed).all()


def test_a_layer_multiplies_as_many_tokens_as_an_item_has_places() -> None:
    patches = Layer("patches", "linear", 64, 32, macs=17 * 64 * 32)
    shared = replace(patches, macs=3 * 17 * 64 * 32, calls=3)
    assert product(patches, 4) == product(shared, 4) == Shape(64, 32, 68)
    assert product(Layer("lookup", "embedding", 1000, 64, calls=0), 4) is None
    assert product(Layer("tied", "embedding", 1000, 64, macs=64_000), 4) == Shape(1000, 64, 4)

    def total(layer: Layer) -> float:
        model = Inventory("d", "A", "embedding", layer.weights, (layer,))
        return Latency(profile_of(model, ("w8a8",)), 1, "m").cost(space(model, "generic", schemes=("w8a8",))).smallest

    assert total(shared) == pytest.approx(3 * total(patches))


def test_products_without_a_time_are_named_with_the_command_that_measures_them() -> None:
    few = replace(PROFILE, times={key: times for key, times in PROFILE.times.items() if str(key[1]) != "w6a8"})
    with pytest.raises(InvalidRequest, match=r"no time of w6a8 of 32 × 64 by 16 tokens, w6a8 of 64 × 64") as refused:
        replace(LATENCY, profile=few).cost(SPACE)
    assert refused.value.field == "latency"
    assert "`bitfrontier latency profile decoder --tokens 16 --schemes w6a8`" in refused.value.accepted
    with pytest.raises(InvalidRequest, match=r"and \d+ more") as refused:
        replace(LATENCY, tokens=7).cost(SPACE)
    assert "--tokens 7 --schemes w4a16g32,w6a8,w8a8,w8a16" in refused.value.accepted


def test_experts_have_no_time() -> None:
    experts = Layer("block.experts.down", "experts", 256, 64, macs=2 * 64 * 64)
    model = Inventory("d", "A", "causal-lm", experts.weights, (experts,))
    with pytest.raises(InvalidRequest, match="other experts for every token"):
        Latency(PROFILE, 1, "m").cost(space(model, "generic", schemes=("w8a16",)))


def test_a_budget_below_what_the_device_can_do_is_refused_with_the_least_that_it_can() -> None:
    costs, bounds = costs_and_bounds(SPACE, MODEL, Budgets(latency_ms=0.001), LATENCY)
    with pytest.raises(
        InfeasibleBudget, match=r"latency_ms = 0\.001 is below .* smallest feasible value is .* ms"
    ) as no:
        check_feasible(costs, bounds)
    least = no.value.accepted["minimum"]
    assert least == pytest.approx(COST.smallest / 1e3, rel=1e-5)
    check_feasible(costs, cost_bounds({"latency_ms": least}))


def test_budgets_on_size_and_latency_hold_together_and_contradictions_are_told() -> None:
    costs, _ = costs_and_bounds(SPACE, MODEL, Budgets(latency_ms=1), LATENCY)
    size, time = costs["size_bytes"], costs["latency_us"]
    assert not np.isclose(*(np.argmin(table.table, axis=1).sum() for table in (size, time))), "they disagree"
    middle = {"size_mb": (size.smallest + size.largest) / 2e6, "latency_ms": (time.smallest + time.largest) / 2e3}
    bounds = cost_bounds(middle)
    found = solve(np.where(SPACE.allowed, -time.table - size.table, np.inf), costs, bounds)
    assert found.choice is not None
    assert all(bound.admits(costs[bound.resource].total(found.choice)) for bound in bounds)
    tight = {"size_mb": size.smallest / 1e6 * 1.0001, "latency_ms": time.smallest / 1e3 * 1.0001}
    with pytest.raises(InfeasibleBudget, match=r"size_mb ≥ .* while the others hold, latency_ms ≥ "):
        check_feasible(costs, cost_bounds(tight))


def test_some_layers_may_have_a_limit_on_their_time() -> None:
    limit = Budgets(latency_ms=1, limits={"*.down_proj": {"latency_ms": 0.01}})  # type: ignore[dict-item]
    costs, bounds = costs_and_bounds(SPACE, MODEL, limit, LATENCY)
    assert [bound.name for bound in bounds] == ["latency_ms", "limits.*.down_proj.latency_ms"]
    rows = [row for row, unit in enumerate(SPACE.units) if unit.name.endswith("down_proj")]
    part = costs["latency_us of *.down_proj"]
    assert part.smallest == pytest.approx(COST.table[rows].min(axis=1).sum())
    assert axes(bounds) == ["latency_us"]


@pytest.mark.parametrize("name", [DEVICE, PROFILE.key])
def test_a_profile_is_named_by_its_device_or_its_key(name: str) -> None:
    other = replace(PROFILE, device="another")
    newer = replace(PROFILE, driver="newer")
    found = chosen(request(latency={"profile": name, "tokens": 16}), [other, *[newer] * (name == DEVICE), PROFILE])
    assert found is not None
    assert found.profile == (newer if name == DEVICE else PROFILE), "of several of a device, the first"
    assert (found.tokens, found.model) == (16, "decoder")


@pytest.mark.parametrize(
    ("changes", "profiles", "told"),
    [
        ({"latency": {"profile": "H200"}}, [PROFILE], f"no latency profile 'H200'; there are: {DEVICE}"),
        ({"latency": {"profile": "H200"}}, [], "there is none yet"),
        ({}, [PROFILE, PROFILE], f"needs a profile; there are: {DEVICE}$"),
        ({"budgets": {"avg_bits": 5, "limits": {"*.fc": {"latency_ms": 1}}}}, [], "needs a profile; there is none yet"),
        (
            {"budgets": {"loss_increase": 1}, "optimizer": {"objective": "latency_ms"}},
            [PROFILE],
            "needs a profile; there are",
        ),
    ],
)
def test_a_budget_without_a_profile_is_refused_with_those_there_are(
    changes: dict[str, Any], profiles: list[Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told) as refused:
        chosen(request(**changes), profiles)
    assert str(refused.value.field).startswith("latency")
    assert refused.value.accepted


def test_a_request_that_counts_no_time_needs_no_profile() -> None:
    assert chosen(request(budgets={"avg_bits": 5}), []) is None


def test_time_may_be_counted_without_being_bounded() -> None:
    found = chosen(request(budgets={"avg_bits": 5}, latency={"profile": DEVICE}), [PROFILE])
    assert found is not None
    costs, bounds = costs_and_bounds(SPACE, MODEL, Budgets(avg_bits=6), found)
    assert "latency_us" in costs
    assert axes(bounds) == ["avg_bits"]


def test_groups_of_channels_have_no_time() -> None:
    with pytest.raises(InvalidRequest, match="latency is measured of whole layers"):
        request(latency={"profile": DEVICE}, space={"granularity": "channels", "channels": 64})


def test_the_summary_says_how_far_the_sums_are_from_forward_passes() -> None:
    (check,) = LATENCY.summary(MODEL.digest + ":bfloat16")["crosscheck"]
    assert (check["scheme"], check["layers_us"], check["forward_us"]) == ("w16a16", 80.0, 100.0)
    assert check["discrepancy"] == pytest.approx(-0.2)
    assert LATENCY.summary("another model")["crosscheck"] == []
    assert replace(LATENCY, tokens=2).summary(MODEL.digest)["crosscheck"] == []


def test_the_fastest_allocation_is_found_among_all() -> None:
    """The integer program against enumeration, on the first units."""
    small = Inventory(MODEL.digest, "A", "causal-lm", 0, MODEL.layers[1:5])
    few = space(small, target="generic", schemes=SCHEMES)
    cost = Latency(PROFILE, 16, "m").cost(few)
    every = itertools.product(range(len(SCHEMES)), repeat=len(few.units))
    assert min(cost.total(np.array(choice)) for choice in every) == pytest.approx(cost.smallest)
