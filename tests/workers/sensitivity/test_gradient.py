"""ModelOpt's score against its formula, written out with autograd."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search.request import Calibration
from search.scheme import Scheme
from tests.workers.sensitivity.support import fill, space_of
from workers.calibration import Data
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.models import LoadedModel
from workers.quantizers.activation import round_activation


class Grouped(nn.Module):
    """A grouped, strided, padded convolution and a biased head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
        self.head = nn.Linear(6, 3)
        self.config = SimpleNamespace(image_size=6, num_channels=4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.gelu(self.conv(images)).mean((2, 3)))


@pytest.fixture(scope="module")
def grouped() -> Evaluator:
    torch.manual_seed(1)
    loaded = LoadedModel(Grouped().eval().requires_grad_(False), "image-classification", "Grouped", "digest")
    batches = [{"pixel_values": torch.randn(n, 4, 6, 6), "labels": torch.randint(0, 3, (n,))} for n in (5, 2)]
    return Evaluator(loaded, Data(batches, batches, batches, "data"))


def by_hand(evaluator: Evaluator, name: str, scheme: Scheme, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Σ (g_y ⊙ Δy)² of every calibration batch, g_y being the gradient of its mean cross-entropy."""
    module = evaluator.layers[name].module
    weight, rounded = evaluator.layers[name].parameter.detach(), evaluator.weight(name, scheme)
    scores = []
    for batch in evaluator.batches("calibration"):
        kept: dict[str, Tensor] = {}

        def keep(_module: nn.Module, inputs: tuple[Tensor], output: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
            kept["x"], kept["y"] = inputs[0].detach(), output.detach().requires_grad_()
            return kept["y"]

        hook = module.register_forward_hook(keep)
        loss = F.cross_entropy(evaluator.loaded(batch), batch["labels"])
        hook.remove()
        (gradient,) = torch.autograd.grad(loss, kept["y"])
        x = kept["x"]
        if scheme.quantizes_activations:
            x = round_activation(x, scheme.activation_bits, 3 if isinstance(module, nn.Conv2d) else 1)
        change = operation(x, rounded) - operation(kept["x"], weight)
        scores.append((gradient * change).square().sum())
    return torch.stack(scores)


OPERATIONS: dict[str, dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "tiny": {"conv": lambda x, w: F.conv2d(x, w, stride=2), "head": F.linear},
    "grouped": {"conv": lambda x, w: F.conv2d(x, w, stride=2, padding=1, groups=2), "head": F.linear},
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("text", ["w3a16", "w4a4"])
def test_the_score_is_modelopts_formula(name: str, text: str, request: pytest.FixtureRequest) -> None:
    evaluator: Evaluator = request.getfixturevalue(name)
    table = fill("gradient", evaluator, space_of(evaluator, text))
    assert table.details["labelled"]
    for layer, operation in OPERATIONS[name].items():
        scores = by_hand(evaluator, layer, Scheme.parse(text), operation)
        assert table.values.loc[layer, text] == pytest.approx(float(scores.sum()), rel=1e-4)


def test_the_weights_part_is_the_score_of_the_weights_alone(tiny: Evaluator) -> None:
    table = fill("gradient", tiny, space_of(tiny, "w4a4", "w4a16"))
    assert table.weight["w4a4"].to_numpy() == pytest.approx(table.values["w4a16"].to_numpy())
    assert (table.activation["w4a4"] > 0).all()
    assert (table.activation["w4a16"] == 0).all()


def test_the_standard_error_is_that_of_a_sum_of_samples(tiny: Evaluator) -> None:
    """Twice the same samples: twice the score, and √2 times its error but for the lost degree of freedom."""
    once = fill("gradient", tiny, space_of(tiny, "w4a16"))
    data = tiny.data
    try:
        tiny.data = Data([*data.calibration, *data.calibration], data.held_out, data.held_out, data.digest)
        twice = fill("gradient", tiny, space_of(tiny, "w4a16"))
    finally:
        tiny.data = data
    assert (once.stderr.to_numpy() > 0).all()
    assert twice.values.to_numpy() == pytest.approx(2 * once.values.to_numpy())
    assert twice.stderr.to_numpy() == pytest.approx((2 * 16 * 7 / (15 * 8)) ** 0.5 * once.stderr.to_numpy())


def test_without_labels_they_are_drawn_from_the_model_and_that_is_said(minilm: Evaluator) -> None:
    table = fill("gradient", minilm, space_of(minilm, "w4a16g64", target="vllm"))
    assert not table.details["labelled"]
    assert "no labels" in table.notes[0]


def text_model(model_folder: Callable[[str], Path], name: str) -> Evaluator:
    return Evaluator.build(EvaluatorSpec(str(model_folder(name)), Calibration(samples=4, sequence_length=16)))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
def test_one_sample_at_a_time_gives_the_score_of_the_batch(
    name: str, model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large models are differentiated so, in checkpointed blocks; GPT-2's embedding is its head, too.

    GPT-2's positions are looked up once for all samples, and have one gradient.
    """
    evaluator = text_model(model_folder, name)
    space = space_of(evaluator, "w4a16", ignore=["*.wpe"] if name == "tiny_gpt2" else [])
    whole = fill("gradient", evaluator, space)
    monkeypatch.setattr("workers.sensitivity.backward.LARGE", 0)
    parts = fill("gradient", evaluator, space)
    assert parts.values.to_numpy() == pytest.approx(whole.values.to_numpy(), rel=1e-4)
    assert parts.stderr.to_numpy() == pytest.approx(whole.stderr.to_numpy(), rel=1e-3)


def test_fused_experts_are_scored_by_their_weights_gradients(model_folder: Callable[[str], Path]) -> None:
    evaluator = text_model(model_folder, "tiny_moe")
    table = fill("gradient", evaluator, space_of(evaluator, "w4a16"))
    experts = [name for name, layer in evaluator.layers.items() if layer.layer.kind == "experts"]
    assert experts
    assert "fused experts" in table.notes[0]
    name = experts[0]
    parameter = evaluator.layers[name].parameter
    change = evaluator.weight(name, Scheme(4)) - parameter.detach()
    expected = 0.0
    parameter.requires_grad_(True)
    for batch in evaluator.batches("calibration"):
        logits, mask = evaluator.loaded(batch)[:, :-1], batch["attention_mask"][:, 1:].float()
        tokens = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
        loss = ((tokens.view_as(mask) * mask).sum(1) / mask.sum(1)).mean()
        (gradient,) = torch.autograd.grad(loss, parameter)
        expected += float((gradient * change).square().sum())
    parameter.requires_grad_(False)
    unit = next(unit for unit in table.values.index if name.startswith(unit))
    if unit == name:
        assert table.values.loc[name, "w4a16"] == pytest.approx(expected, rel=1e-4)
    else:
        assert table.values.loc[unit, "w4a16"] > expected
