"""An allocation names layers, and parts of layers whose output channels differ."""

import numpy as np

from search.allocation import from_json, layer_schemes, placed, to_json
from search.scheme import Scheme
from tests.search.spaces import decoder, space

MODEL = decoder(blocks=1)


def test_a_unit_gives_its_scheme_to_all_its_layers() -> None:
    tied = space(MODEL, schemes=("w4a16", "w8a16"))
    schemes = layer_schemes(tied, np.array([1, 0, 0, 0]))
    assert {name.rpartition(".")[2]: str(scheme) for name, scheme in schemes.items()} == {
        "q_proj": "w8a16",
        "k_proj": "w8a16",
        "v_proj": "w8a16",
        **dict.fromkeys(("o_proj", "gate_proj", "up_proj", "down_proj"), "w4a16"),
    }


def test_json_keeps_it() -> None:
    allocation = {"a": Scheme.parse("w4a16g32"), "b[0:8]": Scheme.parse("w3a16asym")}
    assert from_json(to_json(allocation)) == allocation


def test_each_name_has_its_place_among_the_layers_with_the_shape_it_stands_for() -> None:
    w4, w8 = Scheme(4), Scheme(8)
    up, down = (f"model.layers.0.mlp.{leaf}_proj" for leaf in ("up", "down"))
    found = placed({f"{down}[0:40]": w4, f"{down}[40:64]": w8, up: w8}, MODEL.layers)
    assert [(layer.name, layer.rows, layer.columns, scheme) for layer, scheme in found] == [
        (up, 128, 64, w8),
        (f"{down}[0:40]", 40, 128, w4),
        (f"{down}[40:64]", 24, 128, w8),
    ]


def test_a_layer_whose_parts_agree_is_whole_unless_some_of_it_has_no_scheme() -> None:
    name = "model.layers.0.mlp.down_proj"
    halves = {f"{name}[0:32]": Scheme(4), f"{name}[32:64]": Scheme(4)}
    assert [layer.name for layer, _ in placed(halves, MODEL.layers)] == [name]
    del halves[f"{name}[32:64]"]
    assert [layer.name for layer, _ in placed(halves, MODEL.layers)] == [f"{name}[0:32]"]
