import ast
import json

import pytest

from search.exports import render
from search.inventory import Layer
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

LINEAR = Layer("model.layers.0.mlp.down_proj", "linear", 64, 96)
SCHEMES = ("w3a16", "w6a16g32asym", "w4a8g32", "w8a8", "w16a16")


def layers(text):
    return json.loads(text)["_data"]["fqn_to_config"]


def test_layers_are_named_in_full_and_none_by_default():
    model = llama()
    allocation = dealt(model, SCHEMES)
    named = layers(render("torchao", exported(model, allocation)))
    assert list(named) == [layer.name for layer in model.layers if layer.kind == "linear"]
    assert {name for name, config in named.items() if config is None} == {
        "lm_head",
        *(name for name, scheme in allocation.items() if scheme == "w16a16"),
    }


def test_weights_and_activations():
    model = inventory([LINEAR])
    (grouped,) = layers(render("torchao", exported(model, {LINEAR.name: "w6a16g32asym"}))).values()
    assert grouped["_type"] == "IntxWeightOnlyConfig"
    assert grouped["_data"]["weight_dtype"] == {"_type": "torch.dtype", "_data": "int6"}
    assert grouped["_data"]["granularity"]["_data"] == {"group_size": 32}
    assert grouped["_data"]["mapping_type"]["_data"] == "ASYMMETRIC"
    (both,) = layers(render("torchao", exported(model, {LINEAR.name: "w5a8"}))).values()
    assert both["_type"] == "Int8DynamicActivationIntxWeightConfig"
    assert both["_data"]["weight_granularity"] == {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    (plain,) = layers(render("torchao", exported(model, {LINEAR.name: "w8a8"}))).values()
    assert plain == {"_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2, "_data": {}}


def test_an_embedding_is_named_where_it_is_quantized_and_so_are_its_aliases():
    layer = Layer("model.embed_tokens", "embedding", 96, 64, aliases=("lm_head",))
    named = layers(render("torchao", exported(inventory([layer]), {layer.name: "w6a16g32"})))
    assert list(named) == ["model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("task", ["causal-lm", "embedding", "sequence-classification", "image-classification"])
def test_the_code_is_python_for_the_task(task):
    model = inventory([LINEAR], task=task)
    tree = ast.parse(render("torchao-code", exported(model, {LINEAR.name: "w4a16g32asym"})))
    (table,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "LAYERS")
    assert ast.unparse(table) == f"{{'{LINEAR.name}': weights(4, 32, mapping=MappingType.ASYMMETRIC)}}"


@pytest.mark.parametrize("name", ["torchao", "torchao-code"])
@pytest.mark.parametrize(
    ("layer", "scheme", "nearest"),
    [
        (LINEAR, "w4a4", "w4a8"),
        (LINEAR, "w6a6g32", "w6a8g32"),
        (LINEAR, "w4a16g64", "w4a16g32"),
        (Layer("stem.convolution", "conv", 64, 64), "w8a16", "w16a16"),
        (Layer("model.layers.0.mlp.experts.down_proj", "experts", 64, 64), "w8a16", "w16a16"),
        (Layer("model.embed_tokens", "embedding", 96, 64), "w8a8", "w8a16"),
    ],
)
def test_refuses_what_torchao_has_no_configuration_for(name, layer, scheme, nearest):
    error = refused(name, inventory([layer]), {layer.name: scheme})
    assert (error.field, error.accepted) == (layer.name, nearest)
