"""The Fisher diagonal against dense Gauss-Newton matrices, closed forms, and its own spread."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from search.request import Calibration
from search.scheme import Scheme
from tests import models
from tests.workers.sensitivity.support import TinyNet, fill, space_of, subject
from workers.calibration import Data
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.models import LoadedModel, load_model
from workers.quantizers.activation import round_activation
from workers.sensitivity import FILLS, Table, sampled
from workers.tasks import Content, Item, Result, Task

SCHEMES = ("w2a16", "w4a8")


@contextmanager
def every_label(label: int, scale: float = 1.0) -> Iterator[None]:
    """Instead of a random label, this one, weighted by the root of its probability, and by `scale`.

    The outer products of the scores of all labels of a sample add up to the Hessian of its divergence.
    """

    def score(_task: str, output: Tensor, _mask: object, _generator: object) -> Tensor:
        p = output.float().softmax(-1)
        unit = torch.eye(p.shape[-1])[label]
        return scale * p[..., label, None].sqrt() * (unit - p)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled, "score", score)
        yield


def expected(metric: str, evaluator: Evaluator, *schemes: str, labels: int, **space: object) -> list[Table]:
    """The metric's tables of all labels: their sum is the expectation of what is sampled."""
    tables = []
    for label in range(labels):
        with every_label(label):
            tables.append(fill(metric, evaluator, space_of(evaluator, *schemes, **space)))
    return tables


def gauss_newton_matrix(evaluator: Evaluator, name: str) -> Tensor:
    """JᵀCJ of the mean divergence with respect to a layer's weight, dense."""
    model = evaluator.loaded.model
    key = next(key for key, value in model.named_parameters() if value is evaluator.layers[name].parameter)
    weight = evaluator.layers[name].parameter.detach()
    matrices = []
    for batch in evaluator.batches("calibration"):
        for image in batch["pixel_values"]:
            output = partial(_output, model, key, image[None])
            jacobian = torch.autograd.functional.jacobian(output, weight).flatten(1)
            p = output(weight).softmax(-1)
            matrices.append(jacobian.T @ (p.diag() - p.outer(p)) @ jacobian)
    return torch.stack(matrices).mean(0)


def _output(model: nn.Module, key: str, image: Tensor, weight: Tensor) -> Tensor:
    output: Tensor = torch.func.functional_call(model, {key: weight}, image)[0]
    return output


def classifier(model: nn.Module, batches: Sequence[Tensor]) -> Evaluator:
    """Of images of TinyNet's size."""
    model.config = TinyNet().config  # type: ignore[assignment]
    data = [{"pixel_values": images} for images in batches]
    loaded = LoadedModel(model.eval().requires_grad_(False), "image-classification", "Net", "digest")
    return Evaluator(loaded, Data(data, data, data, "data"))


def test_over_all_labels_it_is_the_diagonal_of_the_dense_hessian(tiny: Evaluator) -> None:
    tables = expected("fisher", tiny, "w2a16", "w4a16", labels=5)
    for name in tiny.layers:
        diagonal = gauss_newton_matrix(tiny, name).diag()
        for scheme in ("w2a16", "w4a16"):
            change = tiny.rounding(name, Scheme.parse(scheme)).flatten()
            exact = float(diagonal @ change.square()) / 2
            assert sum(table.weight.loc[name, scheme] for table in tables) == pytest.approx(exact, rel=1e-4)


def test_with_sampled_labels_it_is_unbiased(tiny: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = sum(table.weight["w4a16"] for table in expected("fisher", tiny, "w4a16", labels=5))
    found = []
    for seed in range(200):
        monkeypatch.setattr(sampled, "SEED", seed)
        found.append(fill("fisher", tiny, space_of(tiny, "w4a16")).weight["w4a16"])
    error = np.std(found, axis=0, ddof=1) / len(found) ** 0.5
    assert (error < 0.1 * exact).all()
    assert (np.abs(np.mean(found, axis=0) - exact) < 4 * error).all()


class Linear(nn.Module):
    """y = W₂ W₁ x."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(49, 4, bias=False)
        self.second = nn.Linear(4, 3, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images.flatten(1)))


def test_a_linear_net_has_a_closed_form() -> None:
    """G₂ = c (W₁x)ᵀ, G₁ = W₂ᵀc xᵀ, and of the inputs W₁ᵀW₂ᵀc and W₂ᵀc, with E[c cᵀ] = diag p − ppᵀ."""
    torch.manual_seed(0)
    evaluator = classifier(Linear(), [torch.randn(3, 1, 7, 7), torch.randn(2, 1, 7, 7)])
    w1, w2 = (evaluator.layers[name].parameter.detach().double() for name in ("first", "second"))
    d1, d2 = (evaluator.rounding(name, Scheme.parse("w4a8")).double() for name in ("first", "second"))
    exact = np.zeros((2, 2))
    samples = torch.cat([batch["pixel_values"] for batch in evaluator.batches("calibration")]).flatten(1).double()
    for x in samples:
        hidden = w1 @ x
        p = (w2 @ hidden).softmax(0)
        at_output = p.diag() - p.outer(p)
        at_hidden = w2.T @ at_output @ w2
        e1, e2 = (round_activation(v.float(), 8) - v.float() for v in (x, hidden))
        exact += [
            [at_hidden.diag() @ d1.square() @ x.square(), (w1.T @ at_hidden @ w1).diag() @ e1.double().square()],
            [at_output.diag() @ d2.square() @ hidden.square(), at_hidden.diag() @ e2.double().square()],
        ]
    tables = expected("fisher", evaluator, "w4a8", labels=3)
    found = sum(np.stack([table.weight["w4a8"], table.activation["w4a8"]], axis=1) for table in tables)
    np.testing.assert_allclose(found, exact / 2 / len(samples), rtol=1e-3)


class Shared(nn.Module):
    """One weight used twice, and a layer whose output nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(49, 49), nn.Linear(49, 49)
        self.second.weight = self.first.weight
        self.head, self.unused = nn.Linear(49, 5), nn.Linear(49, 5)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(images.flatten(1))))
        self.unused(hidden)
        return self.head(torch.tanh(hidden))


@pytest.fixture(scope="module")
def shared() -> Evaluator:
    torch.manual_seed(0)
    return classifier(Shared(), [torch.randn(4, 1, 7, 7)])


def test_a_shared_weight_counts_once_with_its_total_gradient(shared: Evaluator) -> None:
    tables = expected("fisher", shared, "w4a16", labels=5)
    change = shared.rounding("first", Scheme.parse("w4a16")).flatten()
    exact = float(gauss_newton_matrix(shared, "first").diag() @ change.square()) / 2
    assert "second" not in tables[0].weight.index
    assert sum(table.weight.loc["first", "w4a16"] for table in tables) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("metric", ["fisher", "gauss_newton"])
def test_a_layer_that_the_loss_does_not_depend_on_is_worth_nothing(metric: str, shared: Evaluator) -> None:
    table = fill(metric, shared, space_of(shared, *SCHEMES))
    assert (table.values.loc["unused"] == 0).all()
    assert (table.stderr.loc["unused"] == 0).all()
    assert (table.values.drop("unused") > 0).all(axis=None)


@pytest.mark.parametrize("metric", ["fisher", "gauss_newton"])
def test_full_precision_costs_nothing(metric: str, tiny: Evaluator) -> None:
    for schemes in (["w16a16"], ["w4a16", "w16a16"]):
        table = fill(metric, tiny, space_of(tiny, *schemes))
        assert (table.values["w16a16"] == 0).all()
        assert (table.stderr["w16a16"] == 0).all()


@pytest.mark.parametrize("metric", ["fisher", "gauss_newton"])
def test_tokens_of_padding_do_not_count(metric: str, model_folder: Callable[[str], Path]) -> None:
    loaded = load_model(str(model_folder("tiny_llama")), torch.device("cpu"))
    tokens = torch.arange(5, 29).view(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    tables = []
    for filler in (0, 99):
        batch = {"input_ids": torch.where(mask == 1, tokens, filler), "attention_mask": mask}
        evaluator = Evaluator(loaded, Data([batch], [batch], [batch], "data"))
        space = space_of(evaluator, *SCHEMES, ignore=["lm_head", "*embed*"])
        tables.append(fill(metric, evaluator, space))
    np.testing.assert_allclose(tables[0].values, tables[1].values, rtol=1e-4)


@pytest.mark.parametrize("metric", ["fisher", "gauss_newton"])
def test_the_standard_error_is_the_spread_over_data_and_labels(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = TinyNet()
    values, errors = [], []
    for seed in range(60):
        monkeypatch.setattr(sampled, "SEED", seed)
        images = torch.randn(24, 1, 7, 7, generator=torch.Generator().manual_seed(seed))
        evaluator = classifier(model, images.split(8))
        table = fill(metric, evaluator, space_of(evaluator, *SCHEMES))
        values.append(table.values.to_numpy())
        errors.append(table.stderr.to_numpy())
    ratio = np.mean(errors, axis=0) / np.std(values, axis=0, ddof=1)
    assert (ratio > 0.5).all()
    assert (ratio < 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("metric", ["fisher", "gauss_newton"])
def test_half_precision_changes_little(metric: str, dtype: torch.dtype, model_folder: Callable[[str], Path]) -> None:
    """Even where gradients are below float16's smallest numbers.

    Labels and weights are the same, to the bit: rounded probabilities would now and then draw another label, and
    weights on the edge between two codes take the other one.
    """
    evaluator = Evaluator.build(
        EvaluatorSpec(str(model_folder("tiny_llama")), Calibration(samples=8, sequence_length=64))
    )
    tables = []
    for each in (dtype, torch.float32):
        evaluator.loaded.model.to(each)
        evaluator = Evaluator(evaluator.loaded, evaluator.data)
        space = space_of(evaluator, "w3a4", ignore=["lm_head", "*embed*"])
        with every_label(7, scale=1e-5):
            tables.append(fill(metric, evaluator, space).values["w3a4"])
    half, full = tables
    assert half.sum() == pytest.approx(full.sum(), rel=0.1)
    assert (half - full).abs().max() < 0.1 * full.max()


def test_both_metrics_of_a_search_share_one_pass(tiny: Evaluator) -> None:
    stored: dict[str, Result] = {}
    computed = []

    def compute(task: Task, items: Sequence[Item]) -> list[Result]:
        for item in items:
            key = Content("model", "data", "rtn").key(task, item)
            if key not in stored:
                computed.append(item)
                stored[key] = task.run(tiny, item)
        return [stored[Content("model", "data", "rtn").key(task, item)] for item in items]

    asked = subject(tiny, space_of(tiny, *SCHEMES), "fisher", "gauss_newton")
    FILLS["fisher"](compute, asked)
    assert len(computed) == 4
    FILLS["gauss_newton"](compute, asked)
    assert len(computed) == 4


SMOLLM2_IN_A_FRESH_PROCESS = """
import torch, torch._dynamo, transformers.models.llama.modeling_llama
from search.request import Calibration
from tests import models
from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator, EvaluatorSpec

def resident(peak):
    line = "VmHWM" if peak else "VmRSS"
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(line))

torch.nn.Linear(512, 512)(torch.randn(256, 512)).sum().backward()  # the libraries' own memory
before = resident(peak=False)
spec = EvaluatorSpec(str(models.smollm2()), Calibration(samples=16, sequence_length=256))
evaluator = Evaluator.build(spec)
model = sum(p.numel() * p.element_size() for p in evaluator.loaded.model.parameters())
space = space_of(evaluator, *(f"w{b}a16g64" for b in (2, 3, 4, 6, 8)), ignore=["lm_head", "*embed*"])
table = fill("METRIC", evaluator, space)
print(len(space.layers), (resident(peak=True) - before) / model)
"""


@pytest.mark.slow
@pytest.mark.skipif(models.smollm2() is None, reason="scripts/fetch_models.py has not fetched SmolLM2")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("metric", ["fisher", "gauss_newton"])
def test_the_peak_of_a_large_model_stays_below_two_and_a_half_times_its_size(metric: str) -> None:
    script = SMOLLM2_IN_A_FRESH_PROCESS.replace("METRIC", metric)
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=os.environ, capture_output=True, text=True, check=True
    )
    layers, peak = done.stdout.split()[-2:]
    assert int(layers) == 210
    assert float(peak) <= 2.5
