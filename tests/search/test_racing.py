"""Who loses on a part of the data is not measured on the rest, and who may still win is."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.racing import Choice, charged, race, stops

SIZES = [4] * 8
SAMPLES = sum(SIZES)


class Course:
    """Losses of configurations (the first unit's scheme says which) on every sample, and what was asked for."""

    def __init__(self, losses: np.ndarray) -> None:
        self.losses = losses
        self.asked: list[tuple[int, int, int]] = []

    def __call__(self, choices: Sequence[Choice], batches: range) -> list[np.ndarray]:
        ends = np.append(0, np.cumsum(SIZES))
        start, stop = ends[batches.start], ends[batches.stop]
        self.asked += [(int(choice[0]), batches.start, batches.stop) for choice in choices]
        return [self.losses[choice[0], start:stop] for choice in choices]


def runners(count: int) -> list[np.ndarray]:
    return [np.array([index]) for index in range(count)]


def test_a_clear_loser_is_out_after_a_quarter_and_a_winner_is_measured_wholly() -> None:
    rival = np.random.default_rng(0).lognormal(0, 1, SAMPLES)
    noise = np.random.default_rng(1).lognormal(0, 0.05, (2, SAMPLES))
    course = Course(np.array([2.0, 0.9])[:, None] * rival * noise)
    loser, winner = race(course, runners(2), [rival, rival], SIZES)
    assert (len(loser.samples), len(winner.samples)) == (8, SAMPLES)
    assert (charged(loser, SIZES), charged(winner, SIZES)) == (0.25, 1.0)
    assert winner.loss == pytest.approx(course.losses[1].mean())
    # Estimated by how much more it lost than its rival on the same samples, whatever samples these were.
    assert loser.loss == pytest.approx(course.losses[0].mean(), rel=0.1)


def test_without_a_rival_everything_is_measured_at_once() -> None:
    course = Course(np.ones((2, SAMPLES)))
    race(course, runners(2), [None, None], SIZES)
    assert course.asked == [(0, 0, 8), (1, 0, 8)]


@given(st.integers(0, 2**32 - 1))
def test_no_part_is_measured_twice_and_none_left_out_before_the_last(seed: int) -> None:
    rng = np.random.default_rng(seed)
    course = Course(rng.lognormal(0, 1, (5, SAMPLES)) * rng.lognormal(0, 1, (5, 1)))
    rivals = [None if rng.random() < 0.3 else rng.lognormal(0, 1, SAMPLES) for _ in range(5)]
    outcomes = race(course, runners(5), rivals, SIZES)
    for index, outcome in enumerate(outcomes):
        parts = [(start, end) for who, start, end in course.asked if who == index]
        assert parts[0][0] == 0
        assert all(first[1] == second[0] for first, second in pairwise(parts))
        assert outcome.samples.tolist() == course.losses[index, : len(outcome.samples)].tolist()


@pytest.mark.parametrize("batches", range(1, 12))
def test_a_race_pauses_at_most_twice_on_the_way_to_the_end(batches: int) -> None:
    found = stops(batches)
    assert found[0] == 0
    assert found[-1] == batches
    assert len(found) <= 4
    assert found == sorted(set(found))


def test_of_few_samples_nothing_is_told() -> None:
    course = Course(np.full((1, 3), 9.0))
    (outcome,) = race(course, runners(1), [np.ones(3)], [1, 1, 1])
    assert len(outcome.samples) == 3


@pytest.mark.parametrize(
    "rival", [np.zeros(32), np.append(np.zeros(8), np.full(24, 1e-6)), np.append(np.full(8, 1e-20), np.full(24, 1e-6))]
)
def test_a_rival_that_lost_nothing_on_the_first_samples_leaves_a_finite_estimate(rival: np.ndarray) -> None:
    (outcome,) = race(Course(np.full((1, SAMPLES), 1e-3)), runners(1), [rival], SIZES)
    assert len(outcome.samples) < SAMPLES
    assert outcome.loss == pytest.approx(1e-3, rel=0.01)
