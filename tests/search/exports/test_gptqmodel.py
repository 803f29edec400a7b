import json
import re

import pytest

from search.exports import render
from search.inventory import Layer
from search.scheme import Scheme
from tests.search.exports import examples
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

# What GPTQModel makes of these files is in tests/peers/test_gptqmodel.py.


def config_of(model, allocation):
    return json.loads(render("gptqmodel", exported(model, allocation, "generic")))


def looked_up(config, name):
    """The first rule that matches the beginning of a name wins. False: excluded; None: the configuration's own."""
    for pattern, settings in config["dynamic"].items():
        if re.match(pattern[2:], name):
            return settings if pattern.startswith("+:") else False
    return None


def test_every_layer_has_a_rule_of_its_own():
    model = llama()
    allocation = dealt(model, ("w4a16g32", "w8a16", "w3a16g64asym", "w16a16", "w2a16g16"), "generic")
    config = config_of(model, allocation | {"model.embed_tokens": "w16a16"})
    for layer in model.layers:
        if layer.kind != "linear":
            continue
        scheme = Scheme.parse(allocation[layer.name])
        rule = looked_up(config, layer.name)
        if scheme.quantizes_weights:
            assert (rule["bits"], rule["group_size"], rule["sym"]) == (
                scheme.weight_bits,
                scheme.group_size or -1,
                scheme.symmetric,
            )
            # GPTQModel stops at a layer without groups that it is to sort by groups.
            assert ("act_group_aware" in rule) == (scheme.group_size is None)
        else:
            assert rule is False
    assert looked_up(config, "model.layers.111.mlp.up_proj") is None
    assert looked_up(config, "xmodel.layers.1.mlp.up_proj") is None


def test_rules_that_exclude_come_first():
    rules = list(config_of(llama(), dealt(llama(), ("w4a16g32", "w16a16")))["dynamic"])
    excluding = [rule.startswith("-:") for rule in rules]
    assert excluding == sorted(excluding, reverse=True)
    assert any(excluding)
    assert not all(excluding)


def test_it_names_fused_layers_too():
    config = config_of(llama(), dealt(llama(), ("w4a16g32", "w8a16g64", "w16a16")))
    assert looked_up(config, "model.layers.0.self_attn.qkv_proj") == {"bits": 4, "group_size": 32, "sym": True}
    assert looked_up(config, "model.layers.0.mlp.gate_up_proj") is False
    assert looked_up(config, "model.layers.11.self_attn.qkv_proj") == looked_up(
        config, "model.layers.11.self_attn.k_proj"
    )


def test_a_fused_set_that_differs_is_excluded_under_its_fused_name():
    # GPTQModel fuses nothing and gives every shard its own; vLLM stops, where it would have taken the wrong one.
    allocation = dealt(llama(), ("w4a16g32",)) | {"model.layers.1.self_attn.k_proj": "w8a16g32"}
    config = config_of(llama(), allocation)
    assert looked_up(config, "model.layers.1.self_attn.q_proj")["bits"] == 4
    assert looked_up(config, "model.layers.1.self_attn.k_proj")["bits"] == 8
    assert looked_up(config, "model.layers.1.self_attn.qkv_proj") is False
    assert looked_up(config, "model.layers.11.self_attn.qkv_proj")["bits"] == 4


def test_its_own_scheme_is_the_one_most_layers_take():
    config = config_of(llama(), dealt(llama(), ("w4a16g32",)) | {"model.layers.0.mlp.down_proj": "w8a16g64"})
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)
    assert config["lm_head"] is False


def test_it_quantizes_the_head_where_the_point_does():
    config = config_of(llama(), dealt(llama(), ("w4a16g32",)) | {"lm_head": "w8a16g32"})
    assert config["lm_head"] is True
    assert looked_up(config, "lm_head")["bits"] == 8


@pytest.mark.parametrize(("scheme", "layout"), [("w4a16g32", "gptq"), ("w6a16g32", "gptq_p"), ("w5a16", "gptq_p")])
def test_widths_that_only_gptq_p_has_make_the_checkpoint_gptq_p(scheme, layout):
    allocation = dealt(llama(), ("w4a16g32",)) | {"model.layers.0.mlp.down_proj": scheme}
    assert config_of(llama(), allocation)["checkpoint_format"] == layout


def test_it_names_the_experts_of_a_layer():
    model = examples.mixtral(blocks=12)
    allocation = dealt(model, ("w16a16",)) | {
        "model.layers.1.mlp.experts.gate_up_proj": "w4a16g32",
        "model.layers.1.mlp.experts.down_proj": "w4a16g32",
    }
    config = config_of(model, allocation)
    for name in ("mlp.experts.3.gate_proj", "mlp.experts.3.down_proj", "mlp.experts", "block_sparse_moe.experts"):
        assert looked_up(config, f"model.layers.1.{name}") == {"bits": 4, "group_size": 32, "sym": True}, name
        assert looked_up(config, f"model.layers.11.{name}") is False, name


@pytest.mark.parametrize(
    ("scheme", "nearest", "reason"),
    [
        ("w8a8", "w8a16", "activations"),
        ("w4a8g32", "w4a16g32", "activations"),
        ("w4a16g256", "w4a16g64", "does not divide"),
    ],
)
def test_it_refuses_what_a_gptq_checkpoint_cannot_hold(scheme, nearest, reason):
    name = "model.layers.0.self_attn.o_proj"
    error = refused("gptqmodel", llama(), dealt(llama(), ("w4a16g32",)) | {name: scheme})
    assert (error.field, error.value, error.accepted) == (name, scheme, nearest)
    assert reason in error.detail


@pytest.mark.parametrize(
    "layer",
    [
        Layer("model.embed_tokens", "embedding", 96, 64),
        Layer("model.projection", "linear", 64, 64),
        Layer("model.layers.0.mlp.gate", "linear", 64, 64, block="model.layers.0"),
        Layer("lm_head", "linear", 96, 64, aliases=("model.embed_tokens",)),
    ],
    ids=lambda layer: layer.name,
)
def test_it_refuses_layers_that_gptqmodel_does_not_quantize(layer):
    error = refused("gptqmodel", inventory([layer]), {layer.name: "w8a16"})
    assert (error.field, error.accepted) == (layer.name, "w16a16")


def test_it_refuses_sizes_that_do_not_pack():
    layer = Layer("model.layers.0.mlp.down_proj", "linear", 48, 48, block="model.layers.0")
    error = refused("gptqmodel", inventory([layer]), {layer.name: "w6a16g16"})
    assert "blocks of 32 rows" in error.detail
    assert error.accepted == "w8a16g16"


def test_it_refuses_models_that_generate_no_text():
    assert refused("gptqmodel", examples.bert(), dealt(examples.bert(), ("w4a16g32",))).field == "task"


def test_it_refuses_a_point_that_quantizes_nothing():
    assert "nothing" in refused("gptqmodel", llama(), dealt(llama(), ("w16a16",))).detail
