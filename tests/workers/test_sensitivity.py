"""Sensitivities against dense Hessians, against plain measurement, and against one protocol."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from search.agreement import spearman
from search.request import Calibration, SpaceRequest
from search.space import Space, build_space
from search.targets import find_target
from tests import models
from workers.calibration import Data
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.models import LoadedModel, load_model
from workers.sensitivity import METRICS
from workers.sensitivity.hessian_trace import PROBE
from workers.tasks import Compute, Item, Result, Task


def compute_on(evaluator: Evaluator) -> Compute:
    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        return [task.run(evaluator, item) for item in items]

    return compute


def batch_sizes(evaluator: Evaluator) -> list[int]:
    return [len(next(iter(batch.values()))) for batch in evaluator.batches("calibration")]


def space_of(evaluator: Evaluator, *schemes: str, target: str = "generic", **request: object) -> Space:
    asked = SpaceRequest.model_validate({"schemes": schemes, **request})
    return build_space(evaluator.inventory, asked, find_target(target))


class TinyNet(nn.Module):
    """A convolution, a nonlinearity and a classifier: 36 + 60 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.head = nn.Linear(4, 5)
        self.config = SimpleNamespace(image_size=7, num_channels=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(torch.nn.functional.gelu(self.conv(images)).mean((2, 3)))


@pytest.fixture(scope="module")
def tiny() -> Evaluator:
    torch.manual_seed(0)
    loaded = LoadedModel(TinyNet().eval().requires_grad_(False), "image-classification", "TinyNet", "digest")
    batches = [{"pixel_values": torch.randn(4, 1, 7, 7)} for _ in range(2)]
    return Evaluator(loaded, Data(batches, batches, "data"))


@pytest.fixture(scope="module")
def minilm() -> Evaluator:
    return Evaluator.build(EvaluatorSpec(str(models.minilm()), Calibration(samples=8, sequence_length=32)))


def test_hutchinsons_estimate_agrees_with_the_dense_hessian(tiny: Evaluator) -> None:
    """Averaged over probes, each layer's estimate is Tr(H_l)/n_l of the mean KL, within its standard error."""
    names = list(tiny.layers)
    batch = tiny.batches("calibration")[0]
    reference = tiny.reference("calibration", 0)
    exact = []
    for layer in tiny.layers.values():

        def loss(weight: torch.Tensor, module: nn.Module = layer.module) -> torch.Tensor:
            prefix = "conv" if isinstance(module, nn.Conv2d) else "head"
            output = torch.func.functional_call(tiny.loaded.model, {f"{prefix}.weight": weight}, batch["pixel_values"])
            return tiny.losses(batch, output, reference).mean()

        weight = layer.parameter.detach()
        hessian = torch.autograd.functional.hessian(loss, weight)
        exact.append(float(hessian.reshape(weight.numel(), -1).trace()) / weight.numel())

    item = {"batch": 0, "start": 0, "samples": 4, "layers": names, "inputs": [], "activation_bits": []}
    samples = np.array([PROBE.run(tiny, item | {"seed": seed})["weight"] for seed in range(600)])
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    assert (error < 0.1 * np.abs(exact)).all()
    assert (np.abs(samples.mean(axis=0) - exact) < 4 * error).all()


def test_the_prediction_is_half_the_average_trace_times_the_squared_perturbation(tiny: Evaluator) -> None:
    space = space_of(tiny, "w3a16", "w4a16")
    table = METRICS["hessian_trace"](compute_on(tiny), space, batch_sizes(tiny))
    for row, unit in enumerate(space.units):
        for column, scheme in enumerate(space.schemes):
            trace = table.details["average_trace"][unit.name]
            expected = 0.5 * trace * tiny.rounding_error(unit.name, scheme)
            assert table.values[row, column] == pytest.approx(expected)


def test_kl_with_reuse_is_the_plain_measurement_of_one_unit(minilm: Evaluator) -> None:
    space = space_of(minilm, "w2a16g64", "w4a16g64", target="vllm")
    table = METRICS["kl"](compute_on(minilm), space, batch_sizes(minilm))
    for row in (0, 9, len(space.units) - 1):
        layers = [layer.name for layer in space.units[row].layers]
        for column, scheme in enumerate(space.schemes):
            plain = minilm.measure(dict.fromkeys(layers, scheme), split="calibration")
            assert table.values[row, column] == pytest.approx(plain["loss"], rel=1e-4, abs=1e-7)
            assert table.stderr[row, column] == pytest.approx(plain["loss_stderr"], rel=1e-3, abs=1e-7)


def test_on_a_real_encoder_the_two_metrics_agree_and_are_calibrated(minilm: Evaluator) -> None:
    """Near full precision the second-order prediction must be close to the measured divergence."""
    space = space_of(minilm, "w6a16g64", target="vllm")
    tables = {name: METRICS[name](compute_on(minilm), space, batch_sizes(minilm)).values[:, 0] for name in METRICS}
    rank = spearman(list(tables["hessian_trace"]), list(tables["kl"]))
    assert rank is not None
    assert rank > 0.9
    assert 0.6 < tables["hessian_trace"].sum() / tables["kl"].sum() < 1.7


def test_activation_bits_are_predicted_apart_from_weight_bits(minilm: Evaluator) -> None:
    space = space_of(minilm, "w8a4", "w8a6", "w8a16", ignore=["embeddings.*"])
    table = METRICS["hessian_trace"](compute_on(minilm), space, batch_sizes(minilm))
    a4, a6, a16 = range(3)
    assert [str(scheme) for scheme in space.schemes] == ["w8a4", "w8a6", "w8a16"]
    weight, activation = np.array(table.details["weight"]), np.array(table.details["activation"])
    assert np.allclose(weight + activation, table.values)
    assert (weight[:, a6] == weight[:, a16]).all()
    assert (activation[:, a16] == 0).all()
    assert (activation[:, a4] > activation[:, a6]).all()
    measured = METRICS["kl"](compute_on(minilm), space, batch_sizes(minilm))
    assert 1 / 3 < table.values[:, a6].sum() / measured.values[:, a6].sum() < 3


@pytest.fixture(
    scope="module", params=["digits_vit", "digits_resnet", "tiny_llama", "tiny_gpt2", "tiny_moe", "tiny_bert"]
)
def any_evaluator(request: pytest.FixtureRequest, model_folder: Callable[[str], Path]) -> Evaluator:
    source = str(model_folder(request.param))
    if request.param.startswith("tiny"):
        return Evaluator.build(EvaluatorSpec(source, Calibration(samples=4, sequence_length=16)))
    images, labels = models.digits_arrays()
    batch = {"pixel_values": torch.from_numpy(images[-8:]), "labels": torch.from_numpy(labels[-8:])}
    return Evaluator(load_model(source, torch.device("cpu")), Data([batch, batch], [batch], "digits"))


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_every_metric_keeps_the_protocol_on_every_kind_of_model(metric: str, any_evaluator: Evaluator) -> None:
    evaluator = any_evaluator
    space = space_of(evaluator, "w2a16", "w8a16", ignore=())
    before = {name: layer.parameter.detach().clone() for name, layer in evaluator.layers.items()}

    table = METRICS[metric](compute_on(evaluator), space, batch_sizes(evaluator))
    assert table.values.shape == table.stderr.shape == space.allowed.shape
    assert np.isfinite(table.values).all()
    assert (table.values >= 0).all()
    assert (table.stderr >= 0).all()
    assert table.values[:, 0].sum() > table.values[:, 1].sum()

    for name, weight in before.items():
        assert torch.equal(evaluator.layers[name].parameter, weight), name
        assert not evaluator.layers[name].parameter.requires_grad
    again = METRICS[metric](compute_on(evaluator), space, batch_sizes(evaluator))
    assert np.array_equal(again.values, table.values)


def test_a_scheme_that_is_not_allowed_has_no_prediction(minilm: Evaluator) -> None:
    space = space_of(minilm, "w4a16g64", "w8a16g64", target="vllm", pin={"*.3.*.output.dense": "w8a16g64"})
    for metric in METRICS.values():
        table = metric(compute_on(minilm), space, batch_sizes(minilm))
        assert (np.isinf(table.values) == ~space.allowed).all()
