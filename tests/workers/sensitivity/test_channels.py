"""What metrics say of groups of output channels: how it adds up to what they say of layers, and what is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from search.budget import cost_bounds
from search.cost import cost_tables
from search.ilp import solve
from search.inventory import by_whole, whole_and_channels
from search.metrics import METRICS
from search.request import Calibration
from search.scheme import Scheme
from search.space import Space
from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity import Table, hessian_trace, hessian_trace_labels, variants
from workers.sensitivity.kl import DIVERGENCE
from workers.tasks import Task

SUPPORTED = sorted(name for name, metric in METRICS.items() if "whole layers" not in metric.needs)
SUMS = ["autoscheme", "fisher", "pqi", "pqi_absolute", "size", "weight_mse"]
"""Metrics that add up over weights."""


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def text(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Evaluator:
    """A model of linear layers; GPT-2 stores output channels as columns."""
    return Evaluator.build(EvaluatorSpec(str(model_folder(request.param)), Calibration(samples=4, sequence_length=16)))


def spaces_of(evaluator: Evaluator) -> tuple[Space, Space]:
    """Of whole layers, and of groups of 40 channels, the last one of a layer being smaller."""
    asked: dict[str, object] = {"ignore": ["*embed*", "lm_head", "transformer.w[tp]e", "*.1.*"]}
    whole = space_of(evaluator, "w3a16g32", "w8a16", **asked)
    return whole, space_of(evaluator, "w3a16g32", "w8a16", granularity="channels", channels=40, **asked)


def added(values: pd.DataFrame) -> pd.DataFrame:
    """The sums over the parts of each layer."""
    return values.groupby([whole_and_channels(name)[0] for name in values.index], sort=False).sum()


@pytest.mark.parametrize("metric", SUMS)
def test_parts_add_up_to_their_layer(metric: str, text: Evaluator) -> None:
    whole, parts = spaces_of(text)
    assert len(parts.units) > len(whole.units)
    expected, found = fill(metric, text, whole).values, added(fill(metric, text, parts).values)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-5, check_names=False)


def test_the_sketches_rows_of_parts_add_up_to_those_of_their_layer(text: Evaluator) -> None:
    """r is linear in the change of weights; the prediction, ½ mean r², is not."""
    whole, parts = spaces_of(text)
    expected, found = (
        np.array(fill("gauss_newton", text, one).details["sketch"]["weight"], dtype=float) for one in (whole, parts)
    )
    layers = [unit.name for unit in whole.units]
    summed = np.zeros_like(expected)
    for row, unit in enumerate(parts.units):
        summed[:, layers.index(whole_and_channels(unit.name)[0])] += found[:, row]
    np.testing.assert_allclose(summed, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("probe", [hessian_trace.PROBE, hessian_trace_labels.PROBE], ids=lambda task: task.name)
def test_traces_of_parts_add_up_to_that_of_their_layer(probe: Task, text: Evaluator) -> None:
    """By the same probes."""
    item = {"batch": 0, "start": 0, "samples": 4, "seeds": [0, 1], "inputs": [], "activation_bits": []}

    def traces(space: Space) -> pd.DataFrame:
        averages = np.array(probe.run(text, item | {"layers": [layer.name for layer in space.layers]})["weight"])
        weights = np.array([layer.weights for layer in space.layers])
        return pd.DataFrame((averages * weights).T, [layer.name for layer in space.layers])

    whole, parts = map(traces, spaces_of(text))
    pd.testing.assert_frame_equal(added(parts), whole, rtol=1e-6)


def test_a_part_is_measured_with_everything_else_at_full_precision(text: Evaluator) -> None:
    _, parts = spaces_of(text)
    found = fill("kl", text, parts).values
    for unit in parts.units[:9]:
        for scheme in parts.schemes:
            measured = text.measure({unit.name: scheme}, "calibration")["loss"]
            assert found.loc[unit.name, str(scheme)] == pytest.approx(measured, rel=2e-3, abs=1e-8)
    text.apply({})


@pytest.mark.parametrize("metric", SUPPORTED)
def test_every_metric_that_a_request_may_name_keeps_the_weights_and_finds_something(
    metric: str, text: Evaluator
) -> None:
    asked: dict[str, object] = {"ignore": ["*embed*", "lm_head", "transformer.w[tp]e", "*.1.*", "*attn*"]}
    space = space_of(text, "w3a16", "w16a16", granularity="channels", channels=64, **asked)
    before = {name: layer.parameter.clone() for name, layer in text.layers.items()}
    table: Table = fill(metric, text, space)
    assert all(torch.equal(text.layers[name].parameter, weight) for name, weight in before.items())
    assert list(table.values.index) == [unit.name for unit in space.units]
    assert (table.values["w3a16"] != 0).all()
    assert (table.values["w16a16"] == 0).all()
    assert np.isfinite(table.stderr.to_numpy()).all()


@pytest.mark.parametrize("stack", [1, 4])
def test_several_parts_of_one_layer_vary_together(stack: int, text: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(variants.STACK, "cpu", stack)
    _, parts = spaces_of(text)
    first, _, last, *_ = max(by_whole(layer.name for layer in parts.layers).values(), key=len)
    schemes = ["w2a16", "w3a16g32", "w8a16"]
    unit = {"name": "both", "layers": [first, last], "schemes": schemes}
    found = DIVERGENCE.run(text, {"units": [unit], "relative_error": 0.0})["both"]
    for scheme in schemes:
        measured = text.measure(dict.fromkeys((first, last), Scheme.parse(scheme)), "calibration")["loss"]
        assert found[scheme][0] == pytest.approx(measured, rel=2e-3, abs=1e-8)
    text.apply({})


def test_finer_units_lose_no_more_within_the_same_budget(text: Evaluator) -> None:
    """Where losses add up, what blocks may take their layers may take together, and what layers may, their parts."""
    losses = []
    for granularity in ("block", "layer", "channels"):
        channels = {"channels": 16} if granularity == "channels" else {}
        asked: dict[str, object] = {"granularity": granularity, "ignore": ["*embed*", "lm_head", "transformer.w[tp]e"]}
        space = space_of(text, "w2a16", "w3a16", "w5a16", "w8a16", **asked, **channels)
        table = fill("weight_mse", text, space).values.to_numpy()
        found = solve(table, cost_tables(space, text.inventory), cost_bounds({"avg_bits": 5.0}))
        losses.append(found.objective)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
