"""How far off a mean may be: with samples of one document alike, by documents; with each its own, by samples."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from workers.margin import margin


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


@pytest.mark.parametrize("losses", [[1.0], [0.0, 0.0], [-1e-9, 0.0]])
def test_where_nothing_is_known_it_is_0(losses: list[float]) -> None:
    assert margin(np.array(losses), range(len(losses)), 0.9) == 0.0


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
