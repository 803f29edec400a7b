"""The signed sketch against dense quadratic forms and finite differences."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from search.request import Calibration
from search.scheme import Scheme
from search.space import Unit
from tests.workers.sensitivity.support import fill, space_of
from tests.workers.sensitivity.test_fisher import classifier, expected, gauss_newton_matrix
from workers.calibration import Batch, sample_count
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.sensitivity import Table, sampled
from workers.sensitivity.gauss_newton import interactions, joint

NAMES = ("w2a16", "w3a16", "w4a16")
STEP = "w8a16"


def quadratic_form(evaluator: Evaluator, allocation: dict[str, str]) -> float:
    """½ΔᵀHΔ of the mean divergence, Δ being the change of all layers' weights together."""
    keys = {value: key for key, value in evaluator.loaded.model.named_parameters()}
    layers = [evaluator.layers[name].parameter for name in allocation]
    weights = tuple(layer.detach() for layer in layers)
    changes = tuple(evaluator.rounding(name, Scheme.parse(scheme)) for name, scheme in allocation.items())
    total, samples = 0.0, 0
    for batch in evaluator.batches("calibration"):

        def output(*weights: Tensor, images: Tensor = batch["pixel_values"]) -> Tensor:
            given = {keys[layer]: weight for layer, weight in zip(layers, weights, strict=True)}
            result: Tensor = torch.func.functional_call(evaluator.loaded.model, given, images)
            return result

        logits, change = torch.func.jvp(output, weights, changes)
        p = logits.softmax(-1)
        total += float((p * change.square()).sum() - (p * change).sum(-1).square().sum()) / 2
        samples += len(logits)
    return total / samples


@pytest.fixture(scope="module")
def every_label(tiny: Evaluator) -> list[Table]:
    return expected("gauss_newton", tiny, *NAMES, labels=5)


def test_over_all_labels_a_unit_has_the_quadratic_form_of_its_dense_hessian(
    tiny: Evaluator, every_label: list[Table]
) -> None:
    for name in tiny.layers:
        hessian = gauss_newton_matrix(tiny, name)
        for scheme in NAMES:
            change = tiny.rounding(name, Scheme.parse(scheme)).flatten()
            exact = float(change @ hessian @ change) / 2
            assert sum(table.values.loc[name, scheme] for table in every_label) == pytest.approx(exact, rel=1e-4)
            assert quadratic_form(tiny, {name: scheme}) == pytest.approx(exact, rel=1e-4)


@given(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)))
@settings(deadline=None, max_examples=9)
def test_over_all_labels_an_allocation_has_the_quadratic_form_of_all_weights_together(
    tiny: Evaluator, every_label: list[Table], schemes: tuple[str, str]
) -> None:
    allocation = dict(zip(tiny.layers, schemes, strict=True))
    exact = quadratic_form(tiny, allocation)
    assert sum(joint(table, allocation)[0] for table in every_label) == pytest.approx(exact, rel=1e-4)


def test_with_sampled_labels_units_and_allocations_are_unbiased(
    tiny: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocation = {"conv": "w2a16", "head": "w3a16"}
    exact = [quadratic_form(tiny, part) for part in ({"conv": "w2a16"}, {"head": "w3a16"}, allocation)]
    assert abs(exact[2] - exact[0] - exact[1]) > 0.1 * exact[2], "the interaction is worth testing"
    draws = []
    for seed in range(400):
        monkeypatch.setattr(sampled, "SEED", seed)
        table = fill("gauss_newton", tiny, space_of(tiny, "w2a16", "w3a16"))
        alone = [table.values.loc[unit, scheme] for unit, scheme in allocation.items()]
        draws.append([*alone, joint(table, allocation)[0]])
    error = np.std(draws, axis=0, ddof=1) / len(draws) ** 0.5
    assert (error < 0.1 * np.array(exact)).all()
    assert (np.abs(np.mean(draws, axis=0) - exact) < 4 * error).all()


def test_interactions_add_up_to_the_joint_prediction_and_have_the_table_as_diagonal(tiny: Evaluator) -> None:
    table = fill("gauss_newton", tiny, space_of(tiny, *NAMES))
    table = Table.from_json(json.loads(json.dumps(table.to_json())))
    allocation = {"head": "w2a16", "conv": "w4a16"}
    found = interactions(table, allocation)
    assert list(found.index) == list(found.columns) == ["head", "conv"]
    loss, error = joint(table, allocation)
    assert found.to_numpy().sum() == pytest.approx(loss)
    for unit, scheme in allocation.items():
        assert found.loc[unit, unit] == pytest.approx(table.values.loc[unit, scheme], rel=1e-4)
        alone = joint(table, {unit: scheme})
        assert alone == pytest.approx((table.values.loc[unit, scheme], table.stderr.loc[unit, scheme]), rel=1e-4)
    assert error > 0
    assert joint(table, {}) == (0.0, 0.0)


def test_a_scheme_that_a_unit_may_not_take_is_refused(tiny: Evaluator) -> None:
    table = fill("gauss_newton", tiny, space_of(tiny, "w2a16", "w3a16", pin={"conv": "w4a16"}))
    assert joint(table, {"conv": "w4a16", "head": "w2a16"})[0] > 0
    with pytest.raises(ValueError, match="conv at w2a16"):
        joint(table, {"conv": "w2a16"})
    with pytest.raises(ValueError, match="w9"):
        joint(table, {"conv": "w9"})


def test_rounded_inputs_have_rows_of_their_own(tiny: Evaluator) -> None:
    tables = [
        fill("gauss_newton", tiny, space_of(tiny, *schemes)) for schemes in (["w4a16"], ["w4a8"], ["w4a16", "w4a8"])
    ]
    kept, rounded, both = tables
    assert kept.details["sketch"]["activation"] is None
    np.testing.assert_array_equal(kept.weight["w4a16"], rounded.weight["w4a8"])
    np.testing.assert_array_equal(rounded.activation["w4a8"], both.activation["w4a8"])
    assert (both.activation["w4a16"] == 0).all()
    rows = np.array(rounded.details["sketch"]["weight"]) + np.array(rounded.details["sketch"]["activation"])
    assert joint(rounded, {"conv": "w4a8", "head": "w4a8"})[0] == pytest.approx(
        float((rows.sum(axis=(1, 2)) ** 2).mean()) / 2
    )


class Grouped(nn.Module):
    """Grouped and strided convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.depthwise = nn.Conv2d(4, 8, 3, stride=2, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.depthwise(torch.nn.functional.gelu(self.stem(images))))
        return self.head(hidden.mean((2, 3)))


@pytest.fixture(params=["grouped", "tiny_gpt2", "tiny_moe", "tiny_bert"])
def every_kind(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Evaluator:
    if request.param == "grouped":
        torch.manual_seed(0)
        return classifier(Grouped(), [torch.randn(4, 1, 7, 7)])
    spec = EvaluatorSpec(str(model_folder(request.param)), Calibration(samples=4, sequence_length=16))
    return Evaluator.build(spec)


def test_a_row_of_the_sketch_is_the_slope_of_the_score_along_a_units_rounding(
    every_kind: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cᵀ(output(W + Δ/2) − output(W − Δ/2)), for every kind of layer: of embeddings and fused experts too."""
    cotangents: list[Tensor] = []
    draw = sampled.score

    def score(*arguments: object) -> Tensor:
        cotangents.append(draw(*arguments).clone())  # type: ignore[arg-type]
        return cotangents[-1].clone()

    evaluator = every_kind
    monkeypatch.setattr(sampled, "score", score)
    space = space_of(evaluator, STEP, ignore=())
    table = fill("gauss_newton", evaluator, space)
    samples = [
        {key: value[at : at + 1] for key, value in batch.items()}
        for batch in evaluator.batches("calibration")
        for at in range(sample_count(batch))
    ]
    for column, unit in enumerate(space.units):
        found = np.array(table.details["sketch"]["weight"])[:, column, 0]
        ahead, behind = (moved(evaluator, unit, samples, step) for step in (0.5, -0.5))
        slopes = [float((c * (a - b)).double().sum()) for c, a, b in zip(cotangents, ahead, behind, strict=True)]
        close = np.isclose(found, slopes, rtol=0.05, atol=0.02 * np.abs(slopes).max() + 1e-6)
        # A step may send a token to another expert, across which there is no slope.
        routed = any(layer.layer.kind == "experts" for layer in evaluator.layers.values())
        assert close.sum() >= len(close) - routed, (unit.name, found, slopes)


@torch.no_grad()
def moved(evaluator: Evaluator, unit: Unit, samples: list[Batch], step: float) -> list[Tensor]:
    """The outputs with a unit's weights moved by `step` of their rounding."""
    layers = [evaluator.layers[layer.name] for layer in unit.layers]
    originals = [layer.parameter.data for layer in layers]
    for layer, original in zip(layers, originals, strict=True):
        layer.parameter.data = original + step * evaluator.rounding(layer.layer.name, Scheme.parse(STEP))
    outputs = [evaluator.loaded(sample) for sample in samples]
    for layer, original in zip(layers, originals, strict=True):
        layer.parameter.data = original
    return outputs
