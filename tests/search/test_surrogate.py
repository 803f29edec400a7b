"""Corrected predictions agree with what was measured, and say how surely."""

from dataclasses import replace

import numpy as np
import pytest

from search.agreement import spearman
from search.space import Space
from search.surrogate import Features, Surrogate
from tests.search import spaces


@pytest.fixture(scope="module")
def space() -> Space:
    """57 units × 4 schemes."""
    return spaces.space(spaces.decoder(blocks=8), "generic", schemes=("w2a16g32", "w3a16g32", "w4a16g32", "w8a16g32"))


def world(space: Space, seed: int) -> tuple[np.ndarray, np.ndarray, float]:
    """A proxy; the truth, which differs from it by scheme, by kind and depth of the layer, and by unit; and the power
    to which the sum of the truth's entries is the loss."""
    rng = np.random.default_rng(seed)
    units, schemes = space.allowed.shape
    proxy = rng.lognormal(-5, 1, (units, 1)) * 4.0 ** -np.arange(schemes) * rng.lognormal(0, 0.2, (units, schemes))
    kinds = np.unique([unit.name.rpartition(".")[2] for unit in space.units], return_inverse=True)[1] % 5
    off = rng.normal(0, 0.5, 5)[kinds][:, None] + rng.normal(0, 0.5, schemes) + np.linspace(-0.4, 0.4, units)[:, None]
    return proxy, proxy * np.exp(off + rng.normal(0, 0.2, (units, 1))), 1.2


def measured(truth: np.ndarray, power: float, choices: np.ndarray) -> np.ndarray:
    return truth[np.arange(len(truth)), choices].sum(axis=1) ** power


def drawn(space: Space, count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, len(space.schemes), (count, len(space.units)))


@pytest.mark.parametrize("seed", range(3))
def test_measurements_correct_the_ranks_of_configurations_that_were_not_measured(seed: int, space: Space) -> None:
    proxy, truth, power = world(space, seed)
    known, unknown = drawn(space, 40, 1), drawn(space, 200, 2)
    fitted = Surrogate.fit(Features.of(space, {"proxy": proxy}), known, measured(truth, power, known))
    actual = measured(truth, power, unknown)
    before = spearman(list(proxy[np.arange(len(proxy)), unknown].sum(axis=1)), list(actual))
    after = spearman(list(fitted.predict(unknown)[0]), list(actual))
    assert before is not None
    assert after is not None
    assert 1 - after < 0.8 * (1 - before)


def test_intervals_hold_what_is_measured_about_as_often_as_they_say(space: Space) -> None:
    """Within one standard deviation about 68 %, within two about 95 %; over six worlds."""
    scores = []
    for seed in range(6):
        _, truth, power = world(space, seed)
        known, unknown = drawn(space, 40, 1), drawn(space, 100, 2)
        features = Features.of(space, {"proxy": world(space, seed)[0]})
        mean, deviation = Surrogate.fit(features, known, measured(truth, power, known)).predict(unknown)
        scores.append((np.log(measured(truth, power, unknown)) - mean) / deviation)
    inside = [float(np.mean(np.abs(np.concatenate(scores)) < width)) for width in (1, 2)]
    assert 0.5 < inside[0] < 0.95
    assert inside[1] > 0.85


def test_what_was_measured_is_predicted_better_than_the_noise_allows(space: Space) -> None:
    proxy, truth, power = world(space, 0)
    known = drawn(space, 30, 1)
    fitted = Surrogate.fit(Features.of(space, {"proxy": proxy}), known, measured(truth, power, known))
    errors = np.log(measured(truth, power, known)) - fitted.predict(known)[0]
    assert np.sqrt(np.mean(errors**2)) < 2 * fitted.noise


def test_one_measurement_moves_the_scale_and_not_how_layers_compare(space: Space) -> None:
    proxy, _, _ = world(space, 0)
    uniform = np.full((1, len(proxy)), 1)
    fitted = Surrogate.fit(Features.of(space, {"proxy": proxy}), uniform, np.array([7.0]))
    assert np.exp(fitted.predict(uniform)[0]) == pytest.approx(7.0, rel=0.3)
    ratios = np.log(fitted.table / proxy)
    assert np.ptp(ratios) < 0.5 * np.abs(ratios).mean()


def test_configurations_are_predicted_alike_together_and_a_few_at_a_time(
    space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of spaces so large that they do not fit into memory together."""
    proxy, truth, power = world(space, 0)
    known, unknown = drawn(space, 10, 1), drawn(space, 25, 2)
    fitted = Surrogate.fit(Features.of(space, {"proxy": proxy}), known, measured(truth, power, known))
    together = fitted.predict(unknown)
    monkeypatch.setattr("search.surrogate.AT_ONCE", 3 * len(space.units))
    assert np.array_equal(fitted.predict(unknown), together)
    assert all(len(part) == 0 for part in fitted.predict(unknown[:0]))


def test_draws_spread_as_the_prediction_says(space: Space) -> None:
    proxy, truth, power = world(space, 0)
    known, unknown = drawn(space, 30, 1), drawn(space, 20, 2)
    fitted = Surrogate.fit(Features.of(space, {"proxy": proxy}), known, measured(truth, power, known))
    rng = np.random.default_rng(0)
    draws = [replace(fitted, mode=fitted._parameters(rng)).predict(unknown)[0] for _ in range(300)]
    mean, deviation = fitted.predict(unknown)
    latent = np.sqrt(deviation**2 - fitted.noise**2)
    assert (np.abs(np.mean(draws, axis=0) - mean) < 2 * deviation).all()
    assert np.median(np.std(draws, axis=0) / latent) == pytest.approx(1.0, abs=0.25)


class TestTables:
    def test_full_precision_costs_nothing_and_a_closed_choice_is_never_looked_at(self, space: Space) -> None:
        proxy, truth, power = world(space, 0)
        proxy[:, 3], proxy[0, 0] = 0.0, np.inf
        truth[:, 3] = 0.0
        known = drawn(space, 20, 1)
        known[:, 0] = 1
        fitted = Surrogate.fit(Features.of(space, {"proxy": proxy}), known, measured(truth, power, known))
        assert (fitted.table[:, 3] == 0).all()
        assert np.isfinite(fitted.predict(known)).all()

    def test_a_loss_of_zero_tells_nothing(self, space: Space) -> None:
        proxy, truth, power = world(space, 0)
        features, known = Features.of(space, {"proxy": proxy}), drawn(space, 10, 1)
        losses = measured(truth, power, known)
        without = Surrogate.fit(features, known, losses)
        with_one = Surrogate.fit(features, np.append(known, known[:1], axis=0), np.append(losses, 0.0))
        np.testing.assert_allclose(without.table, with_one.table)

    def test_of_two_metrics_the_one_that_is_right_prevails(self, space: Space) -> None:
        proxy, truth, power = world(space, 0)
        wrong = np.random.default_rng(9).lognormal(-5, 1, proxy.shape[0])[:, None] * 4.0 ** -np.arange(proxy.shape[1])
        known, unknown = drawn(space, 60, 1), drawn(space, 100, 2)
        losses, actual = (measured(truth, power, choices) for choices in (known, unknown))
        errors = {
            name: np.std(np.log(actual) - Surrogate.fit(Features.of(space, tables), known, losses).predict(unknown)[0])
            for name, tables in {"right": {"a": proxy}, "wrong": {"b": wrong}, "both": {"a": proxy, "b": wrong}}.items()
        }
        assert errors["both"] < 0.7 * errors["wrong"]
        assert errors["both"] < 1.5 * errors["right"]

    def test_without_a_table_there_is_nothing_to_correct(self, space: Space) -> None:
        with pytest.raises(ValueError, match="at least one table"):
            Features.of(space, {})


def test_a_loss_where_none_was_predicted_does_not_spoil_the_rest(space: Space) -> None:
    """One unit that is said to lose nothing at some scheme, and does."""
    proxy, truth, _ = world(space, 3)
    rng = np.random.default_rng(0)
    proxy[:, -1] = 0.0
    choices = np.vstack([np.full((1, len(proxy)), 3), rng.integers(0, 3, (12, len(proxy)))])
    losses = truth[np.arange(len(proxy)), choices].sum(axis=1)
    losses[0] = 1e-9
    fitted = Surrogate.fit(Features.of(space, {"proxy": proxy}), choices, losses)
    assert 0.5 < fitted.power < 2
    means, _ = fitted.predict(choices[1:])
    assert np.abs(means - np.log(losses[1:])).max() < 0.5
