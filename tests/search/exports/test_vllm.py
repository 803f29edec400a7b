import json

import pytest

from search.exports import render
from search.inventory import Layer
from tests.search.exports import examples
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

SCHEMES = ("w4a16g64", "w6a16g32asym", "w8a8", "w3a8", "w16a16", "w8a16")
# What compressed-tensors makes of these files is in tests/peers/test_compressed_tensors.py.


def config_of(model, allocation):
    return json.loads(render("vllm", exported(model, allocation)))


def test_it_names_every_layer_once_in_full():
    model = llama()
    allocation = dealt(model, SCHEMES)
    config = config_of(model, allocation)
    named = {name: key for key, group in config["config_groups"].items() for name in group["targets"]}
    assert named == {name: scheme for name, scheme in allocation.items() if scheme != "w16a16"}
    assert config["ignore"] == [
        *(name for name, scheme in allocation.items() if scheme == "w16a16"),
        "lm_head",
    ]
    assert sum(len(group["targets"]) for group in config["config_groups"].values()) == len(named)


def test_it_says_the_format_of_every_group():
    model = llama()
    mixed = config_of(model, dealt(model, SCHEMES))
    assert mixed["format"] == "mixed-precision"
    assert {name: group["format"] for name, group in mixed["config_groups"].items()} == {
        "w3a8": "pack-quantized",
        "w4a16g64": "pack-quantized",
        "w6a16g32asym": "pack-quantized",
        "w8a16": "pack-quantized",
        "w8a8": "int-quantized",
    }
    assert config_of(model, dealt(model, ("w4a16g64", "w6a16g64")))["format"] == "pack-quantized"


def test_it_names_berts_attention_as_vllm_builds_it():
    model = examples.bert()
    config = config_of(model, dealt(model, ("w4a16g64",)))
    (group,) = config["config_groups"].values()
    assert {f"encoder.layer.0.attention.output.{name}" for name in ("query", "key", "value")} <= set(group["targets"])
    assert "pooler.dense" in config["ignore"]


def test_it_names_roberta_as_bert():
    names = [f"roberta.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")]
    layers = [Layer(name, "linear", 64, 64) for name in names]
    model = inventory(layers, "RobertaForSequenceClassification", "sequence-classification")
    targets = config_of(model, dealt(model, ("w8a16",)))["config_groups"]["w8a16"]["targets"]
    assert "bert.encoder.layer.0.attention.output.query" in targets


def test_it_names_the_experts_as_vllm_and_as_the_tools_that_take_them_apart():
    model = examples.mixtral()
    # Attention, its output, then the experts of the one block.
    groups = config_of(model, dealt(model, ("w4a16g32", "w6a16g32", "w5a16g32")))["config_groups"]
    assert groups["w5a16g32"]["targets"] == [
        r"re:model\.layers\.0\.block_sparse_moe\.experts\.\d+\.(w1|w3)$",
        r"re:model\.layers\.0\.mlp\.experts\.\d+\.(gate_proj|up_proj)$",
        r"re:model\.layers\.0\.block_sparse_moe\.experts\.\d+\.(w2)$",
        r"re:model\.layers\.0\.mlp\.experts\.\d+\.(down_proj)$",
    ]


def test_it_refuses_mixed_schemes_in_a_fused_set():
    model = llama()
    allocation = dealt(model, ("w4a16g64",))
    error = refused("vllm", model, allocation | {"model.layers.1.self_attn.k_proj": "w6a16g64"})
    assert "q_proj" in error.detail
    assert error.field == "model.layers.1.self_attn.q_proj+k_proj+v_proj"
    assert error.accepted == "w6a16g64"
    without = {name: scheme for name, scheme in allocation.items() if name != "model.layers.0.mlp.up_proj"}
    assert "gate_proj" in refused("vllm", model, without).detail


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        ("w4a8", "w4a16"),
        ("w6a6", "w6a8"),
        ("w4a4", "w4a16"),
        ("w8a8g64", "w8a8"),
        ("w8a8asym", "w8a8"),
        ("w4a16g256", "w4a16g64"),
    ],
)
def test_it_refuses_what_vllm_would_not_run_as_measured(scheme, nearest):
    model = llama()
    error = refused("vllm", model, dealt(model, ("w4a16g64",)) | {"model.layers.0.self_attn.o_proj": scheme})
    assert error.field == "model.layers.0.self_attn.o_proj"
    assert error.accepted == nearest
    assert error.status == 422


@pytest.mark.parametrize(
    "layer",
    [
        Layer("embeddings.word_embeddings", "embedding", 96, 64),
        Layer("stem.convolution", "conv", 64, 64),
        Layer("lm_head", "linear", 96, 64),
        Layer("pooler.dense", "linear", 64, 64),
        Layer("classifier.out_proj", "linear", 64, 64),
        Layer("model.layers.0.mlp.shared_expert_gate", "linear", 1, 64),
        Layer("linear", "linear", 64, 64),
    ],
    ids=lambda layer: layer.name,
)
def test_it_refuses_layers_that_vllm_keeps_at_full_precision(layer):
    error = refused("vllm", inventory([layer]), {layer.name: "w8a16"})
    assert (error.field, error.accepted) == (layer.name, "w16a16")


def test_it_refuses_sizes_that_do_not_pack():
    layer = Layer("model.layers.0.mlp.down_proj", "linear", 63, 48)
    assert refused("vllm", inventory([layer]), {layer.name: "w5a16g16"}).accepted == "w6a16g16"
    assert refused("vllm", inventory([layer]), {layer.name: "w4a16g16asym"}).accepted == "w4a16g16"


def test_it_refuses_experts_per_channel_and_unknown_experts():
    model = examples.mixtral()
    assert refused("vllm", model, dealt(model, ("w4a16",))).accepted == "w4a16g64"
    unknown = inventory(model.layers, "NovelForCausalLM")
    assert "MixtralForCausalLM" in refused("vllm", unknown, dealt(unknown, ("w4a16g32",))).accepted


def test_it_refuses_image_classifiers():
    model = inventory([Layer("blocks.0.dense", "linear", 64, 64)], "ViTForImageClassification", "image-classification")
    assert refused("vllm", model, {"blocks.0.dense": "w8a16"}).value == "ViTForImageClassification"


def test_it_refuses_a_point_that_quantizes_nothing():
    assert "nothing" in refused("vllm", llama(), dealt(llama(), ("w16a16",))).detail
