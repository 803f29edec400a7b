"""HIGGS: measured coefficients against closed forms, and its predictions against measurements."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from search.scheme import Scheme
from tests.workers.sensitivity.support import fill, space_of
from workers.calibration import Data
from workers.evaluator import Evaluator
from workers.models import LoadedModel
from workers.sensitivity import higgs as module
from workers.sensitivity.higgs import slope


class Flat(nn.Module):
    """A linear layer of many inputs whose few outputs barely leave zero: the divergence is quadratic in its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(256, 4, bias=False)
        self.config = SimpleNamespace(image_size=16, num_channels=1)

    def forward(self, images: Tensor) -> Tensor:
        return 0.05 * self.head(images.flatten(1))


@pytest.fixture(scope="module")
def flat() -> Evaluator:
    torch.manual_seed(0)
    loaded = LoadedModel(Flat().eval().requires_grad_(False), "image-classification", "Flat", "digest")
    batches = [{"pixel_values": torch.randn(64, 1, 16, 16)} for _ in range(4)]
    return Evaluator(loaded, Data(batches, batches, batches, "data"))


def curvature(evaluator: Evaluator) -> Tensor:
    """The trace of diag p − ppᵀ of every sample, p being its full-precision probabilities."""
    p = torch.cat([evaluator.loaded(batch).softmax(-1) for batch in evaluator.batches("calibration")])
    return 1 - p.square().sum(-1)


def test_the_coefficient_of_a_quadratic_loss_has_a_closed_form(flat: Evaluator) -> None:
    """Noise t‖W‖/√n·N(0, 1) moves the logits by 0.05·t·‖W‖/√n·‖x‖·N(0, 1), and the loss by half the curvature times
    the square."""
    table = fill("higgs", flat, space_of(flat, "w6a16"))
    x = torch.cat([batch["pixel_values"] for batch in flat.batches("calibration")]).flatten(1)
    weight = flat.layers["head"].parameter
    moved = (0.05 * x.norm(dim=1)).square() * weight.square().mean()
    expected = float((0.5 * moved * curvature(flat)).mean())
    error = table.stderr.loc["head", "w6a16"] / table.values.loc["head", "w6a16"] * table.details["alpha"]["head"]
    assert error < 0.2 * expected
    assert abs(table.details["alpha"]["head"] - expected) < 4 * error

    relative = flat.rounding_error("head", Scheme(6)) / float(weight.square().sum())
    assert table.values.loc["head", "w6a16"] == pytest.approx(table.details["alpha"]["head"] * relative)


def test_a_rounded_input_is_predicted_by_noise_in_the_input(flat: Evaluator) -> None:
    """Noise t‖x‖/√d·N(0, 1) moves the logits by 0.05·t·‖x‖/√d·w·N(0, 1)."""
    table = fill("higgs", flat, space_of(flat, "w8a6", "w8a16"))
    assert table.activation.loc["head", "w8a16"] == 0
    assert table.weight.loc["head", "w8a6"] == table.weight.loc["head", "w8a16"]
    measured = fill("kl", flat, space_of(flat, "w8a6", "w8a16"))
    assert table.activation.loc["head", "w8a6"] == pytest.approx(measured.activation.loc["head", "w8a6"], rel=0.3)


def test_noise_is_drawn_from_what_the_item_says(flat: Evaluator) -> None:
    item = {"layers": {"head": []}, "levels": [0.1], "seed": 0}
    first, again, other = (module.RESPONSES.run(flat, item | {"seed": seed}) for seed in (0, 0, 1))
    assert first == again != other


@settings(deadline=None, max_examples=50)
@given(
    levels=st.lists(st.floats(0.01, 0.5), min_size=2, max_size=5, unique=True),
    alphas=st.lists(st.floats(0.1, 10), min_size=2, max_size=6),
)
def test_the_slope_of_exact_parabolas_is_their_mean_coefficient(levels: list[float], alphas: list[float]) -> None:
    x, coefficients = (torch.tensor(numbers, dtype=torch.float64) for numbers in (levels, alphas))
    alpha, variance = slope(x, x.square()[:, None] * coefficients)
    assert alpha == pytest.approx(np.mean(alphas))
    assert variance == pytest.approx(np.var(alphas, ddof=1) / len(alphas), rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(losses=st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_the_slope_is_the_least_squares_line_through_the_origin(losses: list[float]) -> None:
    levels, measured = np.array([0.04, 0.07, 0.1]), np.array(losses)
    alpha, variance = slope(torch.from_numpy(levels), torch.from_numpy(measured)[:, None])
    (expected,), residuals, *_ = np.linalg.lstsq(levels[:, None] ** 2, measured, rcond=None)
    assert alpha == pytest.approx(expected)
    assert variance == pytest.approx(residuals[0] / 2 / (levels**4).sum(), rel=1e-6, abs=1e-9)


def test_padding_does_not_count_in_the_rounding_error_of_an_input(bert: Evaluator) -> None:
    name = next(name for name, layer in bert.layers.items() if layer.layer.kind == "linear")
    tokens, mask = torch.randn(2, 5, 64), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    errors = []
    for padding in (torch.ones(64), torch.eye(64)[0]):
        x = torch.where(mask[..., None] == 1, tokens, padding)
        response = module._Response(bert, name, {"layers": {name: [4]}, "levels": [0.1], "seed": 0})
        response._noisy_input(0.1, torch.randn_like, {"attention_mask": mask}, x)
        errors.append(float(torch.stack(response._errors[4])))
    assert errors[0] == errors[1] > 0
