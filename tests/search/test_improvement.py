"""Expected gains against sampling; what is proposed keeps budgets, is new, and finds a frontier in few measurements."""

import numpy as np
import pytest

from search.budget import Bound
from search.cost import Cost
from search.improvement import Measured, propose
from search.pareto import hypervolume
from search.space import Space
from search.surrogate import Features, Surrogate
from search.sweep import Sweep
from tests.search import spaces

BITS = np.array([2.0, 3.0, 4.0, 8.0])


@pytest.fixture(scope="module")
def space() -> Space:
    """8 units × 4 schemes: 65 536 configurations."""
    schemes = ("w2a16g32", "w3a16g32", "w4a16g32", "w8a16g32")
    return spaces.space(spaces.decoder(blocks=1), "generic", schemes=schemes)


@pytest.mark.parametrize("seed", range(3))
def test_the_expected_gain_is_the_mean_gain_of_samples(seed: int) -> None:
    rng = np.random.default_rng(seed)
    measured = Measured(rng.uniform(0, 10, 12), rng.normal(0, 1, 12), (9.0, 1.5))
    costs, means, deviations = rng.uniform(-1, 11, 20), rng.normal(-1, 1, 20), rng.uniform(0.1, 1, 20)

    def area(*points: tuple[float, float]) -> float:
        known = np.column_stack([measured.costs, measured.logs])
        return hypervolume(np.vstack([known, *points]), np.array(measured.corner))

    expected = measured.gain(costs, means, deviations)
    for index in range(8):
        samples = means[index] + deviations[index] * rng.normal(size=100)
        gains = [area((costs[index], one)) - area() for one in samples]
        assert expected[index] == pytest.approx(np.mean(gains), abs=5 * np.std(gains) / 10 + 0.005)


def test_a_point_that_is_surely_dominated_gains_nothing() -> None:
    measured = Measured(np.array([1.0, 2.0]), np.array([1.0, 0.0]), (5.0, 3.0))
    gains = measured.gain(np.array([2.5, 6.0, 1.5]), np.array([0.5, -9.0, 0.5]), np.zeros(3))
    assert gains[:2].tolist() == pytest.approx([0.0, 0.0])
    assert gains[2] == pytest.approx(0.5 * 0.5)


def test_under_a_limit_on_the_loss_the_cheapest_within_it_counts() -> None:
    """The point at the limit is what was asked for, though it adds next to no area."""
    measured = Measured(np.array([4.0, 5.0]), np.array([-0.1, -3.0]), (6.0, 0.0), height=2.0)
    below, above, dearer = (np.array(pair)[:, None] for pair in ((3.0, -1e-9), (3.0, 5.0), (4.5, -0.1)))
    gains = [float(measured.gain(*point, np.array([1e-9]))[0]) for point in (below, above, dearer)]
    assert gains == pytest.approx([2.0 * (4.0 - 3.0) * 0.84, 0.0, 0.0], rel=0.01, abs=1e-6)
    assert float(measured.gain(*below, np.array([1.0]))[0]) > 2.0 * 0.5


def world(space: Space, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A proxy, the truth, and costs."""
    rng, (units, schemes) = np.random.default_rng(seed), space.allowed.shape
    proxy = rng.lognormal(-5, 1, (units, 1)) * 4.0 ** -np.arange(schemes) * rng.lognormal(0, 0.2, (units, schemes))
    truth = proxy * np.exp(rng.normal(0, 0.5, schemes) + rng.normal(0, 0.6, (units, 1)))
    return proxy, truth, rng.lognormal(0, 0.5, units)[:, None] * BITS


def test_in_sixty_measurements_the_frontier_of_all_configurations_is_nearly_found(space: Space) -> None:
    proxy, truth, cost = world(space, 0)
    rows, rng = np.arange(len(proxy)), np.random.default_rng(0)
    everything = np.stack(np.meshgrid(*[np.arange(4)] * len(proxy), indexing="ij"), axis=-1).reshape(-1, len(proxy))
    points = np.column_stack([cost[rows, everything].sum(1), np.log(truth[rows, everything].sum(1))])
    corner = points.max(axis=0) + 1e-6
    points = points[points[:, 0].argsort(kind="stable")]
    everything_known = hypervolume(points[np.diff(np.minimum.accumulate(points[:, 1]), prepend=np.inf) < 0], corner)

    def found(choices: np.ndarray) -> float:
        own = np.column_stack([cost[rows, choices].sum(1), np.log(truth[rows, choices].sum(1))])
        return hypervolume(own, corner) / everything_known

    features = Features.of(space, {"proxy": proxy})
    costs = {"size": Cost("size", cost, 0.0)}
    sweep = Sweep.of(costs, [Bound("size", "size", float(points[:, 0].max()))], "size", 24)
    choices = np.vstack([np.full((1, len(proxy)), s) for s in range(4)] + [rng.integers(0, 4, (6, len(proxy)))])
    at_first = found(choices)
    while len(choices) < 60:
        losses = truth[rows, choices].sum(axis=1)
        fitted = Surrogate.fit(features, choices, losses)
        new, gain = propose(fitted, sweep, choices, losses, 5, rng)
        assert 0 <= gain <= 1
        choices = np.vstack([choices, *new])
    assert len(np.unique(choices, axis=0)) == len(choices)
    assert at_first < 0.9
    assert found(choices) > 0.985


@pytest.mark.parametrize("most", [np.inf, 0.05])
def test_every_budget_is_kept_and_closed_choices_are_not_proposed(space: Space, most: float) -> None:
    proxy, truth, cost = world(space, 1)
    other = np.random.default_rng(2).lognormal(0, 0.5, cost.shape) * BITS
    cost[2, 3] = np.inf
    rows, rng = np.arange(len(proxy)), np.random.default_rng(0)
    choices = rng.integers(0, 3, (12, len(proxy)))
    losses = truth[rows, choices].sum(axis=1)
    bounds = [
        Bound(name, name, float(np.median(table[rows, choices].sum(axis=1))))
        for name, table in (("size", cost), ("latency", other))
    ]
    sweep = Sweep.of({"size": Cost("size", cost, 0.0), "latency": Cost("latency", other, 0.0)}, bounds, "size", 12)
    fitted = Surrogate.fit(Features.of(space, {"proxy": np.where(np.isfinite(cost), proxy, np.inf)}), choices, losses)
    new, _ = propose(fitted, sweep, choices, losses, 10, rng, most)
    assert new
    for choice in new:
        assert np.isfinite(cost[rows, choice].sum())
        assert sweep.admits(choice)
        assert not (choices == choice).all(axis=1).any()


def test_what_lies_at_the_budget_counts_though_nothing_dearer_is_allowed(space: Space) -> None:
    proxy, truth, cost = world(space, 3)
    rows = np.arange(len(proxy))
    sweep = Sweep({"size": Cost("size", cost, 0.0)}, [], "size", np.array([cost[:, 1].sum()]))
    choices = np.full((1, len(proxy)), 1)
    fitted = Surrogate.fit(Features.of(space, {"proxy": proxy}), choices, truth[rows, choices].sum(axis=1))
    new, gain = propose(fitted, sweep, choices, truth[rows, choices].sum(axis=1), 1, np.random.default_rng(0))
    assert gain > 0
    assert sweep.totals(new)[0] <= sweep.limit * (1 + 1e-8)
