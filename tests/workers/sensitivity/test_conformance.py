"""What every metric promises, on every kind of model."""

import json
from typing import get_args

import numpy as np
import pytest
import torch

from search.agreement import spearman
from search.metrics import METRICS, MetricName
from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator
from workers.loss import has_labels
from workers.sensitivity import FILLS, Table

NEEDS_LABELS = {name for name in FILLS if "labels" in METRICS[name].needs}
SIGNED = {"pqi", "pqi_single"}
WEAKEST_RANK = {"autoscheme": 0.65, "gradient": 0.6, "lrp": 0.6, "pqi_absolute": 0.3, "size": -1.0, "weight_mse": 0.3}
"""Rank correlation with the measurement that a metric must reach, where that is not 0.85."""


def test_every_metric_that_may_be_asked_for_is_described_and_computed() -> None:
    assert set(get_args(MetricName)) == set(METRICS) >= set(FILLS)
    assert all(metric.name == name for name, metric in METRICS.items())


@pytest.mark.parametrize("metric", sorted(set(FILLS) - {"kl", *NEEDS_LABELS}))
def test_on_a_real_encoder_a_metric_agrees_with_what_is_measured(metric: str, minilm: Evaluator) -> None:
    """Near full precision what is in units of the loss must be close to the measured divergence."""
    space = space_of(minilm, "w6a16g64", target="vllm")
    found, measured = (fill(name, minilm, space).values["w6a16g64"] for name in (metric, "kl"))
    rank = spearman(list(found), list(measured))
    assert rank is not None
    assert rank > WEAKEST_RANK.get(metric, 0.85)
    if METRICS[metric].in_loss_units:
        assert 0.6 < found.sum() / measured.sum() < 1.7


@pytest.mark.parametrize("metric", sorted(FILLS))
def test_every_metric_keeps_the_protocol_on_every_kind_of_model(metric: str, any_evaluator: Evaluator) -> None:
    evaluator = any_evaluator
    if metric in NEEDS_LABELS and not has_labels(evaluator.loaded.task, evaluator.batches("calibration")[0]):
        pytest.skip("refused before it starts: there are no labels")
    space = space_of(evaluator, "w2a16", "w8a16", ignore=())
    before = {name: layer.parameter.detach().clone() for name, layer in evaluator.layers.items()}

    table = fill(metric, evaluator, space)
    assert table.values.shape == table.stderr.shape == space.allowed.shape
    assert np.isfinite(table.values.to_numpy()).all()
    assert metric in SIGNED or (table.values.to_numpy() >= 0).all()
    assert (table.stderr.to_numpy() >= 0).all()
    assert table.values["w2a16"].sum() > table.values["w8a16"].sum()

    for name, weight in before.items():
        assert torch.equal(evaluator.layers[name].parameter, weight), name
        assert not evaluator.layers[name].parameter.requires_grad
    again = fill(metric, evaluator, space)
    assert again.values.equals(table.values)


def test_a_scheme_that_is_not_allowed_has_no_prediction(minilm: Evaluator) -> None:
    space = space_of(minilm, "w4a16g64", "w8a16g64", target="vllm", pin={"*.3.*.output.dense": "w8a16g64"})
    for metric in set(FILLS) - NEEDS_LABELS:
        table = fill(metric, minilm, space)
        assert (np.isinf(table.values.to_numpy()) == ~space.allowed).all()
        again = Table.from_json(json.loads(json.dumps(table.to_json())))
        assert again.values.equals(table.values)
        assert again.stderr.equals(table.stderr)
