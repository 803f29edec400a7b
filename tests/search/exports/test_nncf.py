import ast
import re

import pytest

from search.exports import render
from search.inventory import Layer
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

LINEAR = Layer("model.layers.0.mlp.down_proj", "linear", 64, 128)


def program(text):
    """`PASSES`, and the function `named`, without NNCF."""
    tree = ast.parse(text)
    kept = [node for node in tree.body if getattr(node, "name", "") == "named" or isinstance(node, ast.Assign)]
    names = {"re": re}
    exec(compile(ast.Module(kept, []), "compress_with_nncf.py", "exec"), names)
    return names


def test_one_pass_for_each_scheme_names_its_layers():
    model = llama()
    allocation = dealt(model, ("w4a16g64", "w8a16asym", "w2a16g32", "w16a16"))
    passes = program(render("nncf", exported(model, allocation)))["PASSES"]
    assert [(mode, group) for mode, group, _ in passes] == [("int2_sym", 32), ("int4_sym", 64), ("int8_asym", -1)]
    written = {name: mode for mode, _, names in passes for name in names}
    assert written == {
        name: {"w4": "int4_sym", "w8": "int8_asym", "w2": "int2_sym"}[scheme[:2]]
        for name, scheme in allocation.items()
        if scheme != "w16a16"
    }


def test_a_pass_finds_its_own_layers_and_no_others():
    named = program(render("nncf", exported(llama(), {LINEAR.name: "w8a16"})))["named"]
    pattern = re.compile(named(["model.layers.1.mlp.down_proj"]))
    assert pattern.match("__module.model.layers.1.mlp.down_proj/aten::linear/MatMul")
    assert pattern.match("self.model.layers.1.mlp.down_proj.weight")
    assert pattern.match("model/layers/1/mlp/down_proj/linear/0")
    assert not pattern.match("__module.model.layers.11.mlp.down_proj/aten::linear/MatMul")
    assert not pattern.match("__module.other.model.layers.1.mlp.down_proj/aten::linear/MatMul")


@pytest.mark.parametrize(
    ("layer", "scheme", "nearest"),
    [
        (LINEAR, "w6a16", "w8a16"),
        (LINEAR, "w5a16g64", "w4a16g64"),
        (LINEAR, "w3a16g64", "w4a16g64"),
        (LINEAR, "w2a16g64asym", "w2a16g64"),
        (LINEAR, "w8a16g64", "w8a16"),
        (LINEAR, "w8a8", "w8a16"),
        (Layer("model.embed_tokens", "embedding", 96, 64), "w2a16", "w4a16"),
        (Layer("stem.convolution", "conv", 64, 64), "w8a16", "w16a16"),
    ],
)
def test_refuses_what_no_mode_stands_for(layer, scheme, nearest):
    error = refused("nncf", inventory([layer]), {layer.name: scheme})
    assert (error.field, error.accepted) == (layer.name, nearest)
