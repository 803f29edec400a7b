"""What the numbers of single samples come to."""

import math

import pytest

from search.measurement import joined, metrics


def test_the_loss_is_a_mean_with_its_standard_error() -> None:
    found = metrics({"loss": [1.0, 2.0, 3.0]})
    assert found == {"loss": 2.0, "loss_stderr": pytest.approx(1 / math.sqrt(3))}


def test_of_the_spread_of_one_sample_nothing_is_known() -> None:
    assert metrics({"loss": [0.5]}) == {"loss": 0.5, "loss_stderr": 0.0}


def test_rounding_errors_below_zero_are_no_gain() -> None:
    assert metrics({"loss": [-1e-9, -3e-9]})["loss"] == 0.0


def test_perplexity_and_accuracy_where_they_exist() -> None:
    assert metrics({"loss": [0.0], "next_token_loss": [math.log(8.0)]})["perplexity"] == pytest.approx(8.0)
    assert metrics({"loss": [0.0, 0.0], "correct": [1.0, 0.0]})["accuracy"] == 0.5


def test_parts_of_a_split_come_to_what_the_whole_does() -> None:
    whole = {"loss": [0.1, 0.2, 0.4], "correct": [1.0, 0.0, 1.0]}
    parts = [{name: values[:1] for name, values in whole.items()}, {name: values[1:] for name, values in whole.items()}]
    assert joined(parts) == whole
