"""How far off a mean, or a ratio of two, may be: by documents where their samples are alike, else by samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from workers import margin as room


def margin(losses: np.ndarray, documents: Sequence[int], level: float) -> float:
    """Of the mean itself."""
    return ratio(losses, np.ones(len(losses)), documents, level)


def ratio(losses: np.ndarray, beside: np.ndarray, documents: Sequence[int], level: float) -> float:
    return room.margin(losses / losses.sum(), beside / beside.sum(), documents, level)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=40), st.sampled_from([0.5, 0.9, 0.99]))
def test_where_every_sample_is_a_document_it_is_that_of_student(losses: list[float], level: float) -> None:
    low, high = stats.t.interval(level, len(losses) - 1, np.mean(losses), stats.sem(losses) + 1e-300)
    expected = (high - low) / 2 / np.mean(losses)
    assert margin(np.array(losses), range(len(losses)), level) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=10), st.integers(1, 8))
def test_copies_of_a_sample_in_its_document_tell_nothing_new(losses: list[float], copies: int) -> None:
    repeated, documents = np.repeat(losses, copies), np.repeat(range(len(losses)), copies).tolist()
    assert margin(repeated, documents, 0.9) == pytest.approx(
        margin(np.array(losses), range(len(losses)), 0.9), abs=1e-9
    )


def test_of_one_document_the_samples_count() -> None:
    losses = np.array([1.0, 2.0, 4.0])
    assert margin(losses, [7, 7, 7], 0.9) == margin(losses, [0, 1, 2], 0.9) > 0


def test_of_one_sample_nothing_is_known() -> None:
    assert margin(np.ones(1), [0], 0.9) == 0.0


def test_it_holds_as_often_as_it_says_where_documents_differ_and_by_samples_alone_it_does_not() -> None:
    generator = np.random.default_rng(0)
    sizes = [1, 1, 2, 2, 3, 4, 5, 6, 8]
    documents = np.repeat(range(len(sizes)), sizes)
    by_documents = by_samples = 0
    for _ in range(2000):
        own = generator.normal(0, 0.2, len(sizes))[documents] + generator.normal(0, 0.2, len(documents))
        off = abs(own.mean())
        losses = 1 + own
        by_documents += bool(off <= margin(losses, documents.tolist(), 0.9) * losses.mean())
        by_samples += bool(off <= margin(losses, range(len(losses)), 0.9) * losses.mean())
    assert 0.86 <= by_documents / 2000 <= 0.94
    assert by_samples / 2000 < 0.75


@given(st.lists(st.floats(0.1, 10), min_size=4, max_size=20), st.floats(0.1, 10))
def test_what_loses_in_proportion_everywhere_is_known_exactly(losses: list[float], factor: float) -> None:
    documents = [sample // 2 for sample in range(len(losses))]
    assert ratio(factor * np.array(losses), np.array(losses), documents, 0.9) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("least", [0.1, 1e-3, 1e-6, 1e-17, 0.0])
def test_where_one_sample_carries_the_loss_little_is_known_and_no_less_the_more_it_carries(least: float) -> None:
    beside = np.array([1.0, least, least, least])
    told = ratio(np.ones(4), beside, range(4), 0.9)
    assert 1 < ratio(np.ones(4), np.array([1.0, 0.2, 0.2, 0.2]), range(4), 0.9) < told < 5


def test_a_ratio_holds_as_often_as_it_says_although_its_means_are_far_off_together() -> None:
    generator = np.random.default_rng(1)
    documents = np.repeat(range(10), 3)
    within = narrower = 0
    for _ in range(2000):
        hard = np.exp(generator.normal(0, 0.5, 10)[documents])
        one, other = (hard * np.exp(generator.normal(0, 0.1, 10)[documents]) for _ in range(2))
        told = ratio(one, other, documents.tolist(), 0.9)
        within += bool(abs(np.log(one.mean() / other.mean())) <= told)
        narrower += told < margin(one, documents.tolist(), 0.9) / 2
    assert 0.86 <= within / 2000 <= 0.94
    assert narrower > 1600
