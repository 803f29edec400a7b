"""Which layers a model has, the matrices they are seen as, and the multiply-accumulates of one item."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from search.candidate import Candidate
from search.exports import EXPORTS, Exported, refusal
from search.inventory import Inventory, Layer
from tests import models
from tests.workers.conftest import Loader
from workers.calibration import one_item
from workers.layers import Layers, WeightedLayer, enumerate_layers, used_outside


def enumerated(model: nn.Module, *inputs: torch.Tensor) -> dict[str, WeightedLayer]:
    return {weighted.layer.name: weighted for weighted in enumerate_layers(model, lambda: model(*inputs))}


def layers_of(loaded: Loader, name: str) -> dict[str, Layer]:
    model = loaded(name)
    found = enumerate_layers(model.model, lambda: model(one_item(model)))
    return {weighted.layer.name: weighted.layer for weighted in found}


def test_layers_come_in_the_order_they_run_and_idle_ones_are_left_out() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.idle, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(3, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.first(x)))

    found = enumerated(Backwards(), torch.zeros(1, 3))
    assert list(found) == ["first", "last"]
    assert found["first"].layer == Layer("first", "linear", rows=4, columns=3, macs=12)


def test_a_layer_that_runs_several_times_says_how_often() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.step = nn.Embedding(10, 4), nn.Linear(4, 4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            states = self.table(tokens)
            for _ in range(3):
                states = self.step(states)
            return states @ self.table.weight.T

    found = enumerated(Recurrent(), torch.zeros(1, 5, dtype=torch.long))
    assert (found["step"].layer.calls, found["step"].layer.macs) == (3, 3 * 5 * 16)
    assert (found["table"].layer.calls, found["table"].layer.macs) == (0, 0)


convolutions = st.builds(
    dict,
    groups=st.sampled_from([1, 2, 4]),
    width=st.integers(1, 3),
    kernel_size=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
)


@settings(deadline=None)
@given(convolutions, st.integers(1, 3))
def test_a_convolutions_work_is_the_closed_formula(shape: dict[str, int], dimensions: int) -> None:
    groups, width, kernel = shape["groups"], shape.pop("width"), shape["kernel_size"]
    kind = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    channels_in, channels_out, side = 4 * width, 8, 7
    model = nn.Sequential(kind(channels_in, channels_out, **shape))
    layer = enumerated(model, torch.zeros(1, channels_in, *[side] * dimensions))["0"].layer
    out = (side + 2 * shape["padding"] - kernel) // shape["stride"] + 1
    assert (layer.kind, layer.rows, layer.columns) == ("conv", channels_out, channels_in // groups * kernel**dimensions)
    assert layer.macs == out**dimensions * channels_out * (channels_in // groups) * kernel**dimensions


def test_a_depthwise_convolution_has_a_row_of_its_own_for_every_channel() -> None:
    layer = enumerated(nn.Sequential(nn.Conv2d(6, 6, 3, groups=6)), torch.zeros(1, 6, 5, 5))["0"].layer
    assert (layer.rows, layer.columns, layer.macs) == (6, 9, 3 * 3 * 6 * 9)


def test_image_models_work_is_what_torch_counts() -> None:
    """FlopCounterMode counts two operations for a multiply-accumulate; attention's own products are no layer's."""
    model, _ = models.efficientnet_lite0()
    image = torch.zeros(1, 3, 224, 224)
    found = enumerated(model, image)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert 2 * sum(weighted.layer.macs for weighted in found.values()) == counter.get_total_flops()
    # Every weight but those of the normalizations, and the biases.
    assert sum(weighted.layer.weights for weighted in found.values()) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.dim() > 1
    )


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_a_linear_layer_multiplies_its_weights_once_a_token(loaded: Loader, name: str) -> None:
    linear = [layer for layer in layers_of(loaded, name).values() if layer.kind == "linear"]
    assert len(linear) >= 8
    assert all(layer.macs == layer.weights for layer in linear)


def test_embeddings_multiply_nothing(loaded: Loader) -> None:
    layers = layers_of(loaded, "tiny_bert")
    embeddings = [layer for layer in layers.values() if layer.kind == "embedding"]
    assert [layer.name.rpartition(".")[2] for layer in embeddings] == [
        "word_embeddings",
        "token_type_embeddings",
        "position_embeddings",
    ]
    assert all(layer.macs == 0 for layer in embeddings)


def test_gpt2_is_seen_as_outputs_by_inputs_with_its_head_an_alias(loaded: Loader) -> None:
    layers = layers_of(loaded, "tiny_gpt2")
    attention = layers["transformer.h.0.attn.c_attn"]
    assert (attention.kind, attention.rows, attention.columns, attention.transposed) == ("linear", 3 * 64, 64, True)
    tied = layers["transformer.wte"]
    assert tied.aliases == ("lm_head",)
    assert tied.kind == "embedding"
    # What the head multiplies for one token.
    assert tied.macs == tied.rows * tied.columns
    assert "lm_head" not in layers


def test_the_first_gpt_has_transposed_layers_that_only_our_own_formats_carry() -> None:
    config = OpenAIGPTConfig(vocab_size=96, n_positions=8, n_embd=32, n_layer=1, n_head=2)
    found = enumerated(OpenAIGPTLMHeadModel(config), torch.zeros(1, 1, dtype=torch.long))
    layers = tuple(weighted.layer for weighted in found.values())
    known = Inventory("0" * 64, "OpenAIGPTLMHeadModel", "causal-lm", 1, layers)
    assert Inventory.from_json(json.loads(json.dumps(known.to_json()))) == known
    linear = [layer for layer in layers if layer.kind == "linear"]
    assert len(linear) == 4
    assert all(layer.transposed for layer in linear)
    point = Candidate(1, "ilp", "8 bits", {layer.name: "w8a16" for layer in linear}, {}, {}, {})
    refused = {name for name in EXPORTS if refusal(name, Exported("gpt", known, "generic", "mse", point))}
    assert refused == EXPORTS.keys() - {"json", "csv"}


def test_an_inventory_without_the_mark_of_transposed_layers_is_read() -> None:
    known = Inventory("0" * 64, "LlamaForCausalLM", "causal-lm", 1, (Layer("fc", "linear", 7, 3),))
    document = known.to_json()
    del document["layers"][0]["transposed"]
    assert Inventory.from_json(document) == known


def test_fused_experts_are_two_layers_of_which_the_chosen_experts_work(loaded: Loader) -> None:
    layers = layers_of(loaded, "tiny_moe")
    experts, chosen, hidden, inner = 4, 2, 64, 128
    up = layers["model.layers.0.mlp.experts.gate_up_proj"]
    down = layers["model.layers.0.mlp.experts.down_proj"]
    assert (up.kind, up.rows, up.columns, up.macs) == (
        "experts",
        experts * 2 * inner,
        hidden,
        chosen * 2 * inner * hidden,
    )
    assert (down.kind, down.rows, down.columns, down.macs) == (
        "experts",
        experts * hidden,
        inner,
        chosen * hidden * inner,
    )
    assert list(layers).index(up.name) < list(layers).index(down.name)


@pytest.mark.parametrize(
    ("kind", "shape", "transposed"),
    [
        ("linear", (6, 4), False),
        ("linear", (4, 6), True),
        ("conv", (6, 2, 3, 3), False),
        ("experts", (3, 6, 4), False),
        ("experts", (3, 4, 6), True),
    ],
)
def test_matrix_and_weight_are_inverse(kind: str, shape: tuple[int, ...], transposed: bool) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    weighted = WeightedLayer(Layer("x", kind, 0, 0, transposed=transposed), nn.Module(), parameter)  # type: ignore[arg-type]
    matrix = weighted.matrix(parameter)
    assert torch.equal(weighted.unmatrix(matrix), parameter)
    assert weighted.unmatrix(matrix).is_contiguous()
    if kind == "experts":
        first = parameter[0].T if transposed else parameter[0]
        assert torch.equal(matrix[: len(first)], first)


class Loose(nn.Module):
    """A layer that runs, one whose weight is used without it, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.loose, self.tied, self.other = (nn.Linear(4, 4) for _ in range(4))
        self.other.weight = self.tied.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(self.loose(self.body(x.to(self.body.weight.dtype))))
        return nn.functional.linear(self.other(x), self.loose.weight.t())


def test_a_weight_that_is_used_without_its_layer_is_found() -> None:
    model = Loose()
    layers = enumerate_layers(model, lambda: model(torch.ones(1, 4)))
    assert used_outside(model, layers, lambda: model(torch.ones(1, 4))) == ["loose"]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_part_is_some_output_channels_of_a_layer_and_writes_to_no_others(transposed: bool) -> None:
    weight = torch.randn(3, 7) if transposed else torch.randn(7, 3)
    layer = Layer("fc", "linear", 7, 3, transposed=transposed)
    layers = Layers({"fc": WeightedLayer(layer, nn.Identity(), nn.Parameter(weight))})
    whole, part = layers["fc"], layers["fc[2:5]"]
    rows = whole.matrix(weight)
    assert torch.equal(part.matrix(part.weight), rows[2:5])
    assert torch.equal(part.unmatrix(part.matrix(part.weight)), part.weight)
    changed = part.replaced(weight, part.unmatrix(rows[2:5] + 1))
    assert torch.equal(whole.matrix(changed)[2:5], rows[2:5] + 1)
    assert torch.equal(whole.matrix(changed)[[0, 1, 5, 6]], rows[[0, 1, 5, 6]])
    assert torch.equal(whole.replaced(weight, weight + 1), weight + 1)


def test_parts_are_found_by_name_but_not_listed() -> None:
    linear = WeightedLayer(Layer("fc", "linear", 7, 3), nn.Identity(), nn.Parameter(torch.randn(7, 3)))
    layers = Layers({"fc": linear})
    assert layers["fc[0:7]"].layer.rows == 7
    assert list(layers) == ["fc"]
    for name in ("fd", "fd[0:2]", "fc[0]"):
        with pytest.raises(KeyError, match=name.partition("[")[0]):
            layers[name]
