"""Rank correlations against SciPy's, on all kinds of ties; bands against what size alone explains."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from search.agreement import Statistic, kendall, kendall_tau, spearman, spearman_rho, within_bands

ORACLES = [
    (spearman, spearman_rho, lambda x, y: stats.spearmanr(x, y).statistic),
    (kendall, kendall_tau, lambda x, y: stats.kendalltau(x, y).statistic),
]
both = pytest.mark.parametrize(("plain", "statistic", "oracle"), ORACLES, ids=["spearman", "kendall"])

tied = st.integers(3, 30).flatmap(lambda n: arrays(np.float64, (2, n), elements=st.integers(0, 6).map(float)))
smooth = st.integers(3, 30).flatmap(lambda n: arrays(np.float64, (2, n), elements=st.floats(-1e9, 1e9)))


def varies(values: np.ndarray) -> bool:
    return len(np.unique(values)) > 1


@both
@given(points=tied | smooth)
def test_a_rank_correlation_is_scipys(plain, statistic: Statistic, oracle, points: np.ndarray) -> None:
    x, y = points
    if varies(x) and varies(y):
        assert plain(list(x), list(y)) == pytest.approx(oracle(x, y), abs=1e-12)
    else:
        assert plain(list(x), list(y)) is None


@both
@given(points=tied, seed=st.integers(0, 1000))
def test_a_point_that_counts_twice_is_two_points(plain, statistic, oracle, points: np.ndarray, seed: int) -> None:
    x, y = points
    counts = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)))
    chosen = np.repeat(np.arange(len(x)), counts)
    found = statistic(x, y, counts[None].astype(float))[0]
    if varies(x[chosen]) and varies(y[chosen]):
        assert found == pytest.approx(oracle(x[chosen], y[chosen]), abs=1e-12)
    else:
        assert np.isnan(found)


@both
def test_two_points_say_nothing(plain, statistic, oracle) -> None:
    assert plain([1, 2], [1, 2]) is None
    assert plain([1, 1, 1], [1, 2, 3]) is None
    assert plain([1, 2, 3, 4], [4, 3, 2, 1]) == -1.0


@both
@given(points=smooth, scale=st.floats(0.1, 10))
def test_only_the_order_counts(plain, statistic, oracle, points: np.ndarray, scale: float) -> None:
    x, y = np.round(points)
    assert plain(list(x), list(y)) == plain(list(np.cbrt(x) * scale), list(y))


@both
def test_what_only_tells_bands_apart_ranks_nothing_within_them(plain, statistic, oracle) -> None:
    """The size of a configuration ranks configurations of all sizes, and none of one size."""
    generator = np.random.default_rng(0)
    bands = np.repeat([0, 1, 2], 100)
    loss = generator.normal(size=300) - 10 * bands
    size = bands + generator.normal(scale=0.01, size=300)
    assert plain(list(-size), list(loss)) > 0.6
    found = within_bands(statistic, -size, loss, bands)
    assert found.low < 0 < found.high
    assert abs(found.value) < 0.2


@both
def test_bands_count_alike_whatever_is_in_them(plain, statistic, oracle) -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 50))
    bands = np.array(["few"] * 10 + ["many"] * 40)
    mean = (oracle(x[:10], y[:10]) + oracle(x[10:], y[10:])) / 2
    assert within_bands(statistic, x, y, bands).value == pytest.approx(mean)


@both
def test_a_band_that_does_not_vary_is_left_out(plain, statistic, oracle) -> None:
    x, y, bands = np.array([0, 0, 0, 1, 2, 3.0]), np.arange(6.0), [0, 0, 0, 1, 1, 1]
    assert within_bands(statistic, x, y, bands).value == 1.0
    assert within_bands(statistic, np.zeros(6), y, bands) is None


@both
def test_the_interval_holds_the_truth_about_as_often_as_it_says(plain, statistic, oracle) -> None:
    """Of two normal variables with correlation r, ρ is 6/π·asin(r/2) and τ is 2/π·asin(r)."""
    r, generator, inside = 0.6, np.random.default_rng(2), 0
    truth = 6 / np.pi * np.arcsin(r / 2) if statistic is spearman_rho else 2 / np.pi * np.arcsin(r)
    bands = np.repeat([0, 1, 2], 50)
    for _ in range(200):
        x, noise = generator.normal(size=(2, 150))
        found = within_bands(statistic, x, r * x + np.sqrt(1 - r * r) * noise, bands, resamples=400)
        inside += found.low <= truth <= found.high
        assert found.low <= found.value <= found.high
    assert 0.88 <= inside / 200 <= 0.99


def test_equal_seeds_draw_equal_resamples() -> None:
    x, y = np.random.default_rng(3).normal(size=(2, 40))
    one, again = (within_bands(spearman_rho, x, y, np.zeros(40), seed=7) for _ in range(2))
    other = within_bands(spearman_rho, x, y, np.zeros(40), seed=8)
    assert one == again != other
