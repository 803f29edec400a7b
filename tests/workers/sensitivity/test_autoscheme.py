"""AutoScheme's score against its formula, written out with autograd at the quantized model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from search.request import Calibration
from search.scheme import Scheme
from tests.workers.sensitivity.support import fill, space_of
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.loss import next_token_loss
from workers.quantizers.activation import round_activation


def by_hand(evaluator: Evaluator, schemes: dict[str, Scheme]) -> dict[str, tuple[float, float]]:
    """Layer of TinyNet → (Σ |g_W ⊙ (W − Q(W))|, Σ |g_x ⊙ (x − Q(x))|) over the calibration batches."""
    weights = {name: layer.parameter.detach() for name, layer in evaluator.layers.items()}
    biases = {name: layer.module.bias for name, layer in evaluator.layers.items()}
    found = dict.fromkeys(schemes, (0.0, 0.0))
    for batch in evaluator.batches("calibration"):
        rounded = {
            name: (evaluator.weight(name, schemes[name]) if name in schemes else weight).clone().requires_grad_()
            for name, weight in weights.items()
        }
        inputs: dict[str, torch.Tensor] = {}
        changes: dict[str, torch.Tensor] = {}

        def enter(
            name: str,
            x: torch.Tensor,
            dims: int,
            inputs: dict[str, torch.Tensor] = inputs,
            changes: dict[str, torch.Tensor] = changes,
        ) -> torch.Tensor:
            bits = schemes[name].activation_bits if name in schemes else 16
            changes[name] = x.detach() - round_activation(x.detach(), bits, dims) if bits < 16 else 0 * x.detach()
            inputs[name] = x - changes[name]
            if not inputs[name].requires_grad:
                inputs[name].requires_grad_()
            return inputs[name]

        y = F.conv2d(enter("conv", batch["pixel_values"], 3), rounded["conv"], biases["conv"], stride=2)
        logits = F.linear(enter("head", F.gelu(y).mean((2, 3)), 1), rounded["head"], biases["head"])
        loss = F.cross_entropy(logits, batch["labels"])
        of_weights = torch.autograd.grad(loss, [rounded[name] for name in schemes], retain_graph=True)
        of_inputs = torch.autograd.grad(loss, [inputs[name] for name in schemes])
        for name, g_w, g_x in zip(schemes, of_weights, of_inputs, strict=True):
            weight, activation = found[name]
            weight += float((g_w * (weights[name] - rounded[name])).abs().sum())
            activation += float((g_x * changes[name]).abs().sum())
            found[name] = weight, activation
    return found


@pytest.mark.parametrize("text", ["w2a16", "w4a4"])
def test_the_score_is_autoschemes_formula(text: str, tiny: Evaluator) -> None:
    table = fill("autoscheme", tiny, space_of(tiny, text))
    for name, (weight, activation) in by_hand(tiny, dict.fromkeys(tiny.layers, Scheme.parse(text))).items():
        assert table.weight.loc[name, text] == pytest.approx(weight, rel=1e-4)
        assert table.activation.loc[name, text] == pytest.approx(activation, rel=1e-4)
    assert (table.stderr.to_numpy() > 0).all()


def test_a_layer_that_may_not_take_the_scheme_keeps_full_precision(tiny: Evaluator) -> None:
    space = space_of(tiny, "w2a16", pin={"conv": "w8a16"})
    table = fill("autoscheme", tiny, space)
    (head,) = by_hand(tiny, {"head": Scheme(2)}).values()
    assert table.values.loc["head", "w2a16"] == pytest.approx(head[0], rel=1e-4)
    (conv,) = by_hand(tiny, {"conv": Scheme(8)}).values()
    assert table.values.loc["conv", "w8a16"] == pytest.approx(conv[0], rel=1e-4)


def test_a_large_model_is_scored_sample_by_sample(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration = Calibration(samples=3, sequence_length=16)
    evaluator = Evaluator.build(EvaluatorSpec(str(model_folder("tiny_llama")), calibration))
    space = space_of(evaluator, "w3a16")
    monkeypatch.setattr("workers.sensitivity.backward.LARGE", 0)
    table = fill("autoscheme", evaluator, space)

    name = space.units[0].layers[0].name
    evaluator.apply(dict.fromkeys((layer.name for layer in space.layers), Scheme(3)))
    layer = evaluator.layers[name]
    expected = 0.0
    for batch in evaluator.batches("calibration"):
        for sample in range(len(batch["input_ids"])):
            one = {key: value[sample : sample + 1] for key, value in batch.items()}
            layer.parameter.requires_grad_(True)
            loss = next_token_loss(evaluator.loaded(one), one["input_ids"], one["attention_mask"])
            (gradient,) = torch.autograd.grad(loss.mean(), layer.parameter)
            layer.parameter.requires_grad_(False)
            change = layer.parameter.detach() - evaluator.weight(name, Scheme(16))
            expected += float((gradient * change).abs().sum())
    evaluator.apply({})
    assert table.values.loc[name, "w3a16"] == pytest.approx(expected, rel=1e-4)


def test_without_labels_they_are_drawn_and_that_is_said(minilm: Evaluator) -> None:
    table = fill("autoscheme", minilm, space_of(minilm, "w4a16g64", target="vllm"))
    assert not table.details["labelled"]
    assert "no labels" in table.notes[0]
