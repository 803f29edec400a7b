import json

import pytest
import yaml

from search.exports import render
from search.inventory import Layer
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

LINEAR = Layer("model.layers.0.mlp.down_proj", "linear", 64, 128)


def entries(text):
    return yaml.safe_load(text)["quantize"]["quant_cfg"]


def test_everything_is_disabled_first_and_layers_are_named_in_full():
    model = llama()
    allocation = dealt(model, ("w4a16g64", "w6a16", "w8a8", "w16a16"))
    first, *others = entries(render("modelopt", exported(model, allocation)))
    assert first == {"quantizer_name": "*", "enable": False}
    names = [entry["quantizer_name"] for entry in others]
    assert len(set(names)) == len(names)
    assert {name.removesuffix(".weight_quantizer") for name in names if name.endswith(".weight_quantizer")} == {
        name for name, scheme in allocation.items() if scheme != "w16a16"
    }
    assert {name.removesuffix(".input_quantizer") for name in names if name.endswith(".input_quantizer")} == {
        name for name, scheme in allocation.items() if scheme == "w8a8"
    }


def test_block_sizes_have_whole_numbers_as_keys():
    # ModelOpt refuses the string "-1", the only key that JSON could have here.
    (_, entry) = entries(render("modelopt", exported(inventory([LINEAR]), {LINEAR.name: "w4a16g64"})))
    assert entry["cfg"] == {"num_bits": 4, "block_sizes": {-1: 64}}


def test_per_channel_and_per_token():
    (_, weight, tokens) = entries(render("modelopt", exported(inventory([LINEAR]), {LINEAR.name: "w6a8"})))
    assert weight["cfg"] == {"num_bits": 6, "axis": 0}
    assert tokens["cfg"] == {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}


@pytest.mark.parametrize(
    ("layer", "scheme", "nearest"),
    [
        (LINEAR, "w4a16g64asym", "w4a16g64"),
        (LINEAR, "w4a16g256", "w4a16g128"),
        (Layer("stem.convolution", "conv", 64, 64), "w8a16g32", "w8a16"),
        (Layer("stem.convolution", "conv", 64, 64), "w8a8", "w8a16"),
        (Layer("model.layers.0.mlp.experts.down_proj", "experts", 64, 64), "w8a16", "w16a16"),
    ],
)
def test_refuses_what_modelopt_would_quantize_otherwise(layer, scheme, nearest):
    error = refused("modelopt", inventory([layer]), {layer.name: scheme})
    assert (error.field, error.accepted) == (layer.name, nearest)


def test_mixed_and_single_formats_of_tensorrt():
    model = inventory([LINEAR, Layer("model.layers.0.self_attn.o_proj", "linear", 128, 128)])
    mixed = json.loads(render("modelopt-hf", exported(model, dealt(model, ("w4a16g64", "w8a16")))))["quantization"]
    assert mixed["quant_algo"] == "MIXED_PRECISION"
    assert mixed["quantized_layers"]["model.layers.0.self_attn.o_proj"] == {"quant_algo": "W8A16"}
    assert mixed["quantized_layers"][LINEAR.name]["group_size"] == 64
    single = json.loads(render("modelopt-hf", exported(model, {LINEAR.name: "w8a16"})))["quantization"]
    assert single == {
        "quant_algo": "W8A16",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["model.layers.0.self_attn.o_proj"],
    }
    tied = inventory([LINEAR, Layer("model.embed_tokens", "embedding", 96, 64, aliases=("lm_head",))])
    single = json.loads(render("modelopt-hf", exported(tied, {LINEAR.name: "w8a16"})))["quantization"]
    assert single["exclude_modules"] == ["lm_head", "model.embed_tokens"]


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [("w6a16", "w8a16"), ("w8a8", "w8a16"), ("w8a16g64", "w8a16"), ("w4a16", "w4a16g128"), ("w4a16g32", "w4a16g64")],
)
def test_refuses_formats_that_tensorrt_has_not(scheme, nearest):
    error = refused("modelopt-hf", inventory([LINEAR]), {LINEAR.name: scheme})
    assert (error.field, error.accepted) == (LINEAR.name, nearest)


def test_refuses_several_schemes_in_what_tensorrt_fuses():
    model = llama(blocks=1)
    allocation = dealt(model, ("w8a16",)) | {"model.layers.0.self_attn.q_proj": "w16a16"}
    assert "q_proj" in refused("modelopt-hf", model, allocation).detail
    render("modelopt", exported(model, allocation))
