"""Relevance propagation: each rule against its formula, conservation, and what is left behind (nothing)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.activations import ACT2FN

from search.request import Calibration
from tests import models
from tests.workers.sensitivity.support import fill, space_of
from workers.calibration import Batch, Data, sample_count
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.models import LoadedModel
from workers.quantizers.activation import round_activation
from workers.sensitivity.lrp import operations
from workers.sensitivity.lrp.operations import Operations, Rules
from workers.sensitivity.lrp.propagation import convolutions, ruled_by
from workers.sensitivity.lrp.relevance import RULES, Relevance, answer, propagate, treatments

LIMIT = Rules(epsilon=1e-12, gamma=0.0)
"""ε → 0, no γ."""


def propagated(model: nn.Module, x: Tensor, rules: Rules = LIMIT, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(relevance of x, output) of a module, starting from `start` ⊙ output (all of it where None)."""
    model = model.eval().requires_grad_(False)
    ruling = Operations(rules, convolutions(model, lambda: model(x)), lambda _: None)
    leaf = x.clone().requires_grad_()
    with ruled_by(ruling, model):
        output = model(leaf)
        (output if start is None else output * start).sum().backward()
    assert leaf.grad is not None
    assert not ruling.plain
    return x * leaf.grad, output.detach()


class Calls(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Each rule against its formula.


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), epsilon=st.sampled_from([1e-6, 0.1, 1.0]), bias=st.booleans())
def test_epsilon_rule(seed: int, epsilon: float, bias: bool) -> None:
    """R_j = Σ_k x_j w_kj / (z_k + ε·sign z_k) · R_k."""
    torch.manual_seed(seed)
    layer = nn.Linear(5, 4, bias=bias).double()
    x, start = random(3, 5, seed=seed), random(3, 4, seed=seed + 1)
    found, z = propagated(layer, x, Rules(epsilon), start)
    upper = z * start
    contributions = layer.weight * x[:, None, :]
    expected = (contributions / (z + epsilon * z.sign())[..., None] * upper[..., None]).sum(1)
    assert torch.allclose(found, expected)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    gamma=st.sampled_from([0.1, 0.25, 2.0]),
    groups=st.sampled_from([1, 2, 4]),
    norm=st.booleans(),
    bias=st.booleans(),
)
def test_gamma_rule_of_convolutions_grouped_or_not_with_a_folded_batch_norm(
    seed: int, gamma: float, groups: int, norm: bool, bias: bool
) -> None:
    """R_j = Σ_k (c_jk + γ c_jk⁺) / Σ_j (c_jk + γ c_jk⁺) · R_k where z_k > 0, c⁻ where z_k < 0, the bias among the
    contributions c_jk = x_j w_kj of the folded layer."""
    torch.manual_seed(seed)
    convolution = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=groups, bias=bias).double()
    batch_norm = nn.BatchNorm2d(8).double()
    for tensor in (batch_norm.running_mean, batch_norm.weight, batch_norm.bias):
        nn.init.normal_(tensor)
    last = nn.Conv2d(8, 2, 1, bias=False).double()  # the first half of two convolutions is early
    model = nn.Sequential(convolution, *([batch_norm] if norm else []), last)
    x, start = random(1, 4, 5, 5, seed=seed), random(1, 2, 3, 3, seed=seed + 1)
    found, _ = propagated(model, x, Rules(1e-12, gamma), start)

    first = model[:-1].requires_grad_(False)
    b = first(torch.zeros_like(x)).flatten()
    matrix = torch.func.jacrev(first)(x).reshape(b.numel(), -1)
    z = matrix @ x.flatten() + b
    gradient = torch.func.vjp(last, z.view(1, 8, 3, 3))[1](start)[0].flatten()
    contributions = torch.cat([matrix * x.flatten(), b[:, None]], dim=1)
    own = torch.where(z[:, None] > 0, contributions.clamp(min=0), contributions.clamp(max=0))
    boosted = contributions + gamma * own
    expected = (boosted / boosted.sum(1, keepdim=True) * (z * gradient)[:, None]).sum(0)[:-1]
    assert torch.allclose(found.flatten(), expected)


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "silu", "mish"])
def test_activations_of_transformers_hand_relevance_on(name: str) -> None:
    """Whatever operations they are made of, R_x = R_y."""
    x = random(50)
    start = random(50, seed=1)
    found, y = propagated(nn.Sequential(ACT2FN[name]), x, start=start)
    assert torch.allclose(found, y * start, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "function",
    [F.relu, F.gelu, F.silu, torch.tanh, F.hardswish, F.elu, lambda x: F.relu(x + 0, inplace=True), Tensor.relu],
)
def test_activations_called_as_functions_hand_relevance_on(function: Callable[[Tensor], Tensor]) -> None:
    x = random(50)
    start = random(50, seed=1)
    found, y = propagated(Calls(function), x, start=start)
    assert torch.allclose(found, y * start, rtol=1e-3, atol=1e-5)


def test_what_a_sigmoid_gives_at_zero_is_kept_like_a_bias() -> None:
    x = random(50)
    found, y = propagated(nn.Sigmoid(), x)
    assert torch.allclose(found, y - 0.5, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "product",
    [lambda a, b: a * b, lambda a, b: a @ b.mT, lambda a, b: torch.einsum("bij,bkj->bik", a, b)],
)
def test_factors_of_a_product_get_half_each(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Of a product of what both depend on the input: y = f(x)·h(x), R = ½ (x ⊙ fᵀg + x ⊙ hᵀg)."""
    first, second = random(6, 6, seed=1), random(6, 6, seed=2)
    x, start = random(1, 4, 6), 0.7
    found, y = propagated(Calls(lambda x: product(x @ first, x @ second)), x, start=torch.tensor(start))
    assert float(found.sum()) == pytest.approx(float(y.sum()) * start)
    left, right = (x @ first).requires_grad_(), (x @ second).requires_grad_()
    product(left, right).sum().backward()
    expected = start / 2 * x * (left.grad @ first.T + right.grad @ second.T)
    assert torch.allclose(found, expected)


def test_squeeze_and_excite_and_gated_mlps_share_by_halves() -> None:
    up = random(6, 6)
    x = random(3, 6, seed=1)
    found, y = propagated(Calls(lambda x: F.silu(x) * (x @ up)), x)
    gate, value = F.silu(x), x @ up
    assert torch.allclose(found, 0.5 * (gate * value) + 0.5 * x * (gate @ up.T), rtol=1e-3, atol=1e-4)
    assert float(found.sum()) == pytest.approx(float(y.sum()), rel=1e-3)


def test_the_softmax_rule_of_attnlrp_is_its_plain_gradient() -> None:
    """x ⊙ softmax'(x)ᵀg = x (R′ − s·ΣR′)."""
    x, start = random(4, 7), random(4, 7, seed=1)
    found, s = propagated(nn.Softmax(-1), x, start=start)
    upper = s * start
    assert torch.allclose(found, x * (upper - s * upper.sum(-1, keepdim=True)))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_gives_query_and_key_a_quarter_and_value_a_half(fused: bool) -> None:
    """Fused or as two products around a softmax; with grouped queries."""
    q, k, v = (random(1, heads, 5, 8, seed=heads + seed) for heads, seed in ((4, 0), (2, 1), (2, 2)))
    start = random(1, 4, 5, 8, seed=9)

    def attend(x: Tensor) -> Tensor:
        query, key, value = x.split((4, 2, 2), dim=1)
        if fused:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return (query @ key.mT / 8**0.5).masked_fill(future, -torch.inf).softmax(-1) @ value

    found, _ = propagated(Calls(attend), torch.cat([q, k, v], 1), start=start)
    leaf = torch.cat([q, k, v], 1).requires_grad_()
    (attend(leaf) * start).sum().backward()
    plain = leaf.detach() * leaf.grad
    shares = torch.tensor([0.25] * 6 + [0.5] * 2).view(1, 8, 1, 1)
    assert torch.allclose(found, plain * shares)


class HandWrittenRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(8, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@pytest.mark.parametrize(
    ("norm", "centre"),
    [
        (nn.LayerNorm(8), True),
        (nn.GroupNorm(2, 8), True),
        (nn.GroupNorm(1, 8, affine=False), True),
        (nn.RMSNorm(8), False),
        (HandWrittenRMSNorm(), False),
    ],
)
def test_norms_pass_gradients_as_if_the_deviation_were_constant(norm: nn.Module, centre: bool) -> None:
    norm = norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x, start = random(3, 8), random(3, 8, seed=1)
    found, y = propagated(norm, x, start=start)
    groups = getattr(norm, "num_groups", 1)
    leaf = x.clone().requires_grad_()
    grouped = leaf.view(3, groups, -1)
    grouped = grouped - grouped.mean(-1, keepdim=True) if centre else grouped
    eps = norm.eps if getattr(norm, "eps", None) else 1e-6 if not isinstance(norm, nn.RMSNorm) else 2.3e-16
    deviation = (grouped.square().mean(-1, keepdim=True) + eps).sqrt().detach()
    weight = 1 if getattr(norm, "weight", None) is None else norm.weight
    bias = 0 if getattr(norm, "bias", None) is None else norm.bias
    expected = (grouped / deviation).view(3, 8) * weight + bias
    assert torch.allclose(y, expected)
    (expected * start).sum().backward()
    assert torch.allclose(found, x * leaf.grad)


def test_a_gated_norm_shares_between_what_it_norms_and_its_gate() -> None:
    class GatedRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return super().forward(x) * F.silu(gate)

    norm = GatedRMSNorm(6).double()
    up = random(6, 6)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, x @ up)

    found, output = propagated(Net(), random(3, 6, seed=1))
    assert float(found.sum()) == pytest.approx(float(output.sum()), rel=1e-3)


# Conservation.


def relu_net(*, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=bias),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=bias),
    ).double()


def test_relevance_is_conserved_exactly_without_biases() -> None:
    net, x = relu_net(bias=False), random(4, 1, 8, 8)
    for rules in (LIMIT, Rules(1e-12, 0.5)):
        found, output = propagated(net, x, rules)
        assert torch.allclose(found.flatten(1).sum(1), output.sum(1), rtol=1e-8)


def test_without_biases_relevance_is_gradient_times_input() -> None:
    net, x = relu_net(bias=False), random(4, 1, 8, 8)
    found, _ = propagated(net, x)
    leaf = x.clone().requires_grad_()
    net(leaf).sum().backward()
    assert torch.allclose(found, x * leaf.grad, rtol=1e-8)


def test_what_is_missing_at_the_input_is_what_the_biases_keep() -> None:
    net, x = relu_net(bias=True), random(1, 1, 8, 8)
    found, output = propagated(net, x)
    biases = [module.bias.requires_grad_() for module in net if getattr(module, "bias", None) is not None]
    net(x).sum().backward()
    kept = sum(float((bias * bias.grad).detach().sum()) for bias in biases)
    assert abs(kept) > 1e-3
    assert float(found.sum()) + kept == pytest.approx(float(output.sum()), rel=1e-8)


def test_residual_additions_written_in_place_conserve() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            y += x
            y.mul_(2.0)
            return F.relu(y, inplace=True)

    torch.manual_seed(0)
    found, output = propagated(nn.Sequential(Block(), Block()).double(), random(1, 2, 5, 5))
    assert float(found.sum()) == pytest.approx(float(output.sum()), rel=1e-8)


# Whole models.


def qwen(three: bool) -> Evaluator:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    }
    model = Qwen3ForCausalLM(Qwen3Config(head_dim=8, **sizes)) if three else Qwen2ForCausalLM(Qwen2Config(**sizes))
    tokens = torch.randint(0, 64, (4, 12))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    return evaluator_of(model, "causal-lm", {"input_ids": tokens, "attention_mask": mask})


def mobilenet() -> Evaluator:
    torch.manual_seed(0)
    model = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=5))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # as they are drawn, activations vanish on their way through 52 layers
            nn.init.kaiming_normal_(module.weight)
    return evaluator_of(model, "image-classification", {"pixel_values": torch.randn(2, 3, 32, 32)})


def efficientnet() -> Evaluator:
    model, preprocess = models.efficientnet_lite0()
    images = np.random.default_rng(0).random((1, 3, 64, 64), dtype=np.float32)
    return evaluator_of(model, "image-classification", {"pixel_values": preprocess(images)})


def evaluator_of(model: nn.Module, task: str, batch: Batch) -> Evaluator:
    loaded = LoadedModel(model.eval().requires_grad_(False), task, type(model).__name__, "digest")  # type: ignore[arg-type]
    return Evaluator(loaded, Data([batch], [batch], [batch], "data"))


@pytest.fixture(scope="session", params=["qwen2", "qwen3", "mobilenet", "efficientnet"])
def further_evaluator(request: pytest.FixtureRequest) -> Evaluator:
    """Families that `any_evaluator` lacks."""
    made = {"qwen2": lambda: qwen(False), "qwen3": lambda: qwen(True), "mobilenet": mobilenet}
    return made.get(request.param, efficientnet)()


def run(evaluator: Evaluator, rules: Rules = RULES, sample: int = 0) -> Relevance:
    batch = {key: value[sample : sample + 1] for key, value in evaluator.batches("calibration")[0].items()}
    return propagate(evaluator, list(evaluator.layers), batch, treatments(evaluator, batch), rules)


def check_rules_only_change_gradients(evaluator: Evaluator) -> None:
    model, batch = evaluator.loaded.model, evaluator.batches("calibration")[0]
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    with torch.no_grad():
        expected = evaluator.loaded(batch)
    ruling = Operations(Rules(), treatments(evaluator, batch), lambda _: None)
    with ruled_by(ruling, model):
        assert torch.allclose(evaluator.loaded(batch), expected, rtol=1e-6, atol=1e-6)
    assert not ruling.plain

    found = run(evaluator)
    assert found.answer == pytest.approx(
        float(answer(evaluator.loaded.task, expected, batch.get("attention_mask"))[0]), rel=1e-4
    )
    assert all(found.layers[layer] > 0 for layer in evaluator.layers)
    assert found == run(evaluator)
    with torch.no_grad():
        assert torch.equal(evaluator.loaded(batch), expected)
    assert hooks == {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_on_every_kind_of_model_the_rules_only_change_gradients(any_evaluator: Evaluator) -> None:
    check_rules_only_change_gradients(any_evaluator)


def test_on_further_families_the_rules_only_change_gradients(further_evaluator: Evaluator) -> None:
    check_rules_only_change_gradients(further_evaluator)


CONSERVED = {
    "BertModel": (0.95, 1.05),
    "GPT2LMHeadModel": (0.9, 1.1),
    "Qwen2ForCausalLM": (0.8, 1.05),
    "Qwen3ForCausalLM": (0.8, 1.05),
    "LlamaForCausalLM": (0.6, 0.9),
    "MixtralForCausalLM": (0.55, 0.9),
    "MobileNetV2ForImageClassification": (0.999, 1.001),
    "ViTForImageClassification": (0.0, 0.6),
    "ResNetForImageClassification": (-1.0, 2.0),
    "EfficientNet": (-0.5, 0.5),
}
"""ΣR of the pixels or embeddings ÷ the answer, within which every sample must lie. What is missing went to biases, to
positions that are parameters, and to the softmax; the tests below say how much to which."""


def share_entering(evaluator: Evaluator, rules: Rules = RULES) -> list[float]:
    samples = range(sample_count(evaluator.batches("calibration")[0]))
    return [found.entering / found.answer for found in (run(evaluator, rules, sample) for sample in samples)]


def check_conservation(evaluator: Evaluator) -> None:
    low, high = CONSERVED[evaluator.loaded.architecture]
    shares = share_entering(evaluator)
    assert low < min(shares)
    assert max(shares) < high


def test_every_kind_of_model_conserves_relevance_within_its_bounds(any_evaluator: Evaluator) -> None:
    check_conservation(any_evaluator)


def test_further_families_conserve_relevance_within_their_bounds(further_evaluator: Evaluator) -> None:
    check_conservation(further_evaluator)


def test_what_a_decoder_without_biases_loses_it_loses_to_the_softmax(
    model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the attention's weights taken as given, a Llama conserves all of it."""
    source = str(model_folder("tiny_llama"))
    llama = Evaluator.build(EvaluatorSpec(source, Calibration(samples=4, sequence_length=16)))

    def frozen(function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **kwargs: object) -> Tensor:
        return function(query.detach(), key.detach(), value, **kwargs)

    monkeypatch.setattr(operations, "_attention", frozen)
    assert share_entering(llama, LIMIT) == pytest.approx([1.0] * 4, abs=2e-3)


# The metric.


class Wave(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def test_an_operation_without_a_rule_is_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), Wave(), nn.Flatten(), nn.Linear(100, 3))
    net.config = SimpleNamespace(image_size=7, num_channels=1)
    evaluator = evaluator_of(net, "image-classification", {"pixel_values": torch.randn(4, 1, 7, 7)})
    table = fill("lrp", evaluator, space_of(evaluator, "w4a16", "w8a16"))
    assert table.details["plain_gradient"] == ["sin in Wave"]
    assert table.notes == ("no relevance rule for sin in Wave: its plain gradient was used",)


def test_the_prediction_is_importance_times_relative_rounding_error(tiny: Evaluator) -> None:
    space = space_of(tiny, "w3a16", "w4a6", "w4a16")
    table = fill("lrp", tiny, space)
    importance = table.details["importance"]
    assert sum(importance.values()) == pytest.approx(1.0)
    for unit in space.units:
        weight = tiny.layers[unit.name].parameter
        for scheme in space.schemes:
            relative = tiny.rounding_error(unit.name, scheme) / float(weight.square().sum())
            found = table.weight.loc[unit.name, str(scheme)]
            assert found == pytest.approx(importance[unit.name] * relative, rel=1e-5)
    assert (table.activation[["w3a16", "w4a16"]].to_numpy() == 0).all()
    assert (table.activation["w4a6"].to_numpy() > 0).all()

    images = torch.cat([batch["pixel_values"] for batch in tiny.batches("calibration")])
    rounded = torch.stack([round_activation(image, 6, 3) for image in images])
    ratios = (rounded - images).square().flatten(1).sum(1) / images.square().flatten(1).sum(1)
    shares = [relevance_shares(tiny, image)["conv"] for image in images]
    expected = np.mean([share * float(ratio) for share, ratio in zip(shares, ratios, strict=True)])
    assert table.activation.loc["conv", "w4a6"] == pytest.approx(expected, rel=1e-5)


def relevance_shares(evaluator: Evaluator, image: Tensor) -> dict[str, float]:
    batch = {"pixel_values": image[None]}
    found = propagate(evaluator, list(evaluator.layers), batch, treatments(evaluator, batch)).layers
    return {name: value / sum(found.values()) for name, value in found.items()}


def test_the_standard_error_is_that_of_the_mean_over_samples(tiny: Evaluator) -> None:
    space = space_of(tiny, "w4a16")
    table = fill("lrp", tiny, space)
    images = torch.cat([batch["pixel_values"] for batch in tiny.batches("calibration")])
    shares = np.array([relevance_shares(tiny, image)["head"] for image in images])
    relative = table.weight.loc["head", "w4a16"] / table.details["importance"]["head"]
    assert table.stderr.loc["head", "w4a16"] == pytest.approx(relative * shares.std(ddof=1) / 8**0.5, rel=1e-5)


def test_what_a_linear_layer_gives_may_be_written_over() -> None:
    def forward(x: Tensor) -> Tensor:
        y = F.linear(x, weight)
        y += x
        y.add_(x).mul_(2.0)
        return y

    weight = random(6, 6)
    found, output = propagated(Calls(forward), random(3, 6, seed=1))
    assert float(found.sum()) == pytest.approx(float(output.sum()), rel=1e-8)


def test_half_precision_agrees(model_folder: Callable[[str], Path]) -> None:
    source, calibration = str(model_folder("tiny_llama")), Calibration(samples=4, sequence_length=16)
    half, full = (Evaluator.build(EvaluatorSpec(source, calibration, dtype=d)) for d in ("bfloat16", "float32"))
    exact, rounded = run(full).layers, run(half).layers
    assert rounded == pytest.approx(exact, rel=0.1)


def in_another_thread(function: Callable[..., None]) -> Callable[..., None]:
    """As autograd does on a GPU: what holds for the calling thread alone does not hold there."""

    def run(*args: object) -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(function, *args).result()

    return run


def test_a_large_models_blocks_are_computed_again_with_the_same_result(
    any_evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert any_evaluator.chain is not None
    kept = run(any_evaluator)
    monkeypatch.setattr("workers.sensitivity.backward.is_large", lambda _: True)
    monkeypatch.setattr(torch.autograd, "backward", in_another_thread(torch.autograd.backward))
    again = run(any_evaluator)
    assert again.layers == pytest.approx(kept.layers, rel=1e-5)
    assert again.entering == pytest.approx(kept.entering, rel=1e-4)


def test_conserved_relevance_is_reported(tiny: Evaluator) -> None:
    table = fill("lrp", tiny, space_of(tiny, "w4a16"))
    batches = [
        {"pixel_values": image[None]} for batch in tiny.batches("calibration") for image in batch["pixel_values"]
    ]
    found = [propagate(tiny, list(tiny.layers), batch, treatments(tiny, batch)) for batch in batches]
    expected = sum(one.entering for one in found) / sum(one.answer for one in found)
    assert table.details["conservation"] == pytest.approx(expected)
