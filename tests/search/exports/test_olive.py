import json

import pytest

from search.exports import render
from search.inventory import Layer
from search.request import SpaceRequest
from search.space import build_space
from search.targets import find_target
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

TARGET = find_target("onnxruntime")
SCHEMES = ("w4a16g32", "w4a16g32", "w8a16g64asym", "w2a16g16")
LINEAR = Layer("model.layers.0.mlp.down_proj", "linear", 64, 128)


def quantize(model, allocation):
    return json.loads(render("olive", exported(model, allocation, "onnxruntime")))["passes"]["quantize"]


def test_every_layer_has_its_scheme_by_the_common_one_or_an_override():
    model = llama()
    allocation = dealt(model, SCHEMES, "onnxruntime") | {"model.embed_tokens": "w4a16g32", "lm_head": "w8a16g32"}
    config = quantize(model, allocation)
    common = {"bits": config["bits"], "group_size": config["group_size"], "symmetric": config["sym"]}
    assert common == {"bits": 4, "group_size": 32, "symmetric": True}
    written = {}
    for layer in model.layers:
        chosen = config["overrides"].get(layer.name, common)
        sign = "" if chosen["symmetric"] else "asym"
        written[layer.name] = f"w{chosen['bits']}a16g{chosen['group_size']}{sign}"
    assert written == allocation
    assert (config["lm_head"], config["embeds"]) == (True, True)


def test_the_head_and_the_embedding_may_keep_full_precision():
    model = llama(blocks=1)
    allocation = dealt(model, ("w8a16g32",))
    config = quantize(model, allocation)
    assert (config["lm_head"], config["embeds"], config["overrides"]) == (False, False, {})


def test_a_shared_embedding_is_quantized_under_both_names():
    layer = Layer("model.embed_tokens", "embedding", 96, 64, aliases=("lm_head",))
    config = quantize(inventory([layer]), {layer.name: "w4a16g32"})
    assert (config["lm_head"], config["embeds"]) == (True, True)


@pytest.mark.parametrize(
    ("layer", "scheme", "nearest"),
    [
        (LINEAR, "w6a16g32", "w8a16g32"),
        (LINEAR, "w3a16g64", "w4a16g64"),
        (LINEAR, "w4a8g64", "w4a16g64"),
        (LINEAR, "w4a16", "w4a16g128"),
        (Layer("model.embed_tokens", "embedding", 96, 64), "w2a16g32", "w4a16g32"),
        (Layer("model.position", "embedding", 96, 64), "w8a16g32", "w16a16"),
    ],
)
def test_refuses_what_onnx_runtime_does_not_run(layer, scheme, nearest):
    error = refused("olive", inventory([layer]), {layer.name: scheme})
    assert (error.field, error.accepted) == (layer.name, nearest)


def test_refuses_a_linear_layer_that_olive_would_quantize_unasked():
    model = llama(blocks=1)
    allocation = dealt(model, ("w4a16g32",), "onnxruntime") | {LINEAR.name: "w16a16"}
    error = refused("olive", model, allocation)
    assert (error.field, error.accepted) == (LINEAR.name, "w8a16g128")


def test_advises_the_scheme_of_what_the_layer_is_fused_with():
    model = llama(blocks=1)
    key = "model.layers.0.self_attn.k_proj"
    allocation = dealt(model, ("w4a16g32",), "onnxruntime") | {key: "w16a16"}
    advised = refused("olive", model, allocation).accepted
    assert advised == "w4a16g32"
    render("olive", exported(model, allocation | {key: advised}))


def test_refuses_attention_inputs_that_olive_would_widen():
    model = llama(blocks=1)
    allocation = dealt(model, ("w4a16g32",), "onnxruntime") | {"model.layers.0.self_attn.k_proj": "w8a16g32"}
    assert "q_proj" in refused("olive", model, allocation).detail
    gate = {name: scheme for name, scheme in allocation.items() if not name.endswith("k_proj")}
    render(
        "olive",
        exported(
            model, gate | {"model.layers.0.self_attn.k_proj": "w4a16g32", "model.layers.0.mlp.up_proj": "w8a16g32"}
        ),
    )


def test_refuses_models_that_generate_no_text():
    assert refused("olive", inventory([LINEAR], task="embedding"), {LINEAR.name: "w8a16g32"}).field == "task"


def test_whatever_a_search_for_the_target_chooses_is_carried():
    model = llama(blocks=2)
    space = build_space(model, SpaceRequest(schemes=("w4a16g32", "w8a16g32")), TARGET)
    for scheme in space.schemes:
        render("olive", exported(model, dict.fromkeys((layer.name for layer in space.layers), scheme), "onnxruntime"))
