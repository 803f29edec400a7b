import json

import pytest

from search.exports import render
from search.inventory import Layer
from tests.search.exports import examples
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

# What AutoRound makes of these files is in tests/peers/test_autoround.py.


def config_of(model, allocation):
    return json.loads(render("autoround", exported(model, allocation, "generic")))


def test_it_names_every_layer_of_a_block_in_full():
    schemes = ("w6a16g32", "w3a16", "w8a16g64asym", "w16a16")
    config = config_of(llama(), dealt(llama(), schemes))
    assert list(config) == [layer.name for layer in llama().layers if layer.block]
    assert config["model.layers.0.self_attn.q_proj"] == {
        "bits": 6,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "act_bits": 16,
    }
    assert config["model.layers.0.self_attn.o_proj"]["group_size"] == -1
    assert config["model.layers.0.mlp.up_proj"]["sym"] is False
    assert config["model.layers.0.mlp.down_proj"] == {"bits": 16, "data_type": "float", "act_bits": 16}


@pytest.mark.parametrize(
    ("layer", "scheme", "nearest", "reason"),
    [
        (Layer("model.layers.0.up", "linear", 64, 64, block="model.layers.0"), "w8a8", "w8a16", "activations"),
        (Layer("model.layers.0.up", "linear", 64, 64, block="model.layers.0"), "w4a16g128", "w4a16g64", "not divide"),
        (Layer("model.layers.0.up", "linear", 48, 64, block="model.layers.0"), "w4a16", "w16a16", "48 × 64"),
        (Layer("lm_head", "linear", 96, 64), "w4a16", "w16a16", "in silence"),
        (Layer("model.embed_tokens", "embedding", 96, 64), "w4a16", "w16a16", "linear layers only"),
    ],
    ids=lambda value: value.name if isinstance(value, Layer) else None,
)
def test_it_refuses_what_autoround_would_keep_or_change(layer, scheme, nearest, reason):
    error = refused("autoround", inventory([layer]), {layer.name: scheme})
    assert (error.field, error.value, error.accepted) == (layer.name, scheme, nearest)
    assert reason in error.detail


def test_it_refuses_mixed_schemes_in_what_vllm_fuses():
    allocation = dealt(llama(), ("w4a16g32",)) | {"model.layers.1.self_attn.k_proj": "w8a16g32"}
    error = refused("autoround", llama(), allocation)
    assert (error.field, error.accepted) == ("model.layers.1.self_attn.q_proj+k_proj+v_proj", "w8a16g32")


def test_it_refuses_fused_experts():
    error = refused("autoround", examples.mixtral(), dealt(examples.mixtral(), ("w4a16g32", "w4a16g32", "w16a16")))
    assert error.field == "model.layers.0.mlp.experts.gate_up_proj"
    assert "llm-compressor" in error.accepted


def test_it_refuses_models_that_generate_no_text_and_points_that_quantize_nothing():
    assert refused("autoround", examples.bert(), dealt(examples.bert(), ("w4a16g32",))).field == "task"
    assert "nothing" in refused("autoround", llama(), dealt(llama(), ("w16a16",))).detail
