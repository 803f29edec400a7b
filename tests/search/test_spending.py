"""Where bytes and microseconds go: the sums are those that searches count by."""

import numpy as np
import pytest

from search.allocation import layer_schemes, to_json
from search.cost import cost_tables
from search.inventory import Layer
from search.latency import Latency
from search.spending import spending
from tests.search.profiles import profile_of
from tests.search.spaces import decoder, space

MODEL = decoder()
SCHEMES = ("w4a16g32", "w6a8", "w8a8")
SPACE = space(MODEL, target="generic", schemes=SCHEMES, ignore=("*.o_proj",), pin={"model.embed_tokens": "w8a16"})
CHOICE = np.array([np.flatnonzero(row)[place % row.sum()] for place, row in enumerate(SPACE.allowed)])
ALLOCATION = to_json(layer_schemes(SPACE, CHOICE))
LATENCY = Latency(profile_of(MODEL, (*SCHEMES, "w8a16"), (16,)), 16, "decoder")


def test_the_layers_add_up_to_what_the_search_counts() -> None:
    spent = spending(ALLOCATION, MODEL, LATENCY)
    assert [item.layer.name for item in spent.layers] == [layer.name for layer in MODEL.layers]
    assert spent.size_bytes == pytest.approx(cost_tables(SPACE, MODEL)["size_bytes"].total(CHOICE))
    assert spent.latency_us == pytest.approx(LATENCY.cost(SPACE).total(CHOICE))
    assert spent.other_bytes == 2 * 10, "the ten parameters that are in no layer"
    kept = {item.layer.name: item.scheme for item in spent.layers if not item.scheme.quantizes_weights}
    assert set(kept) == {layer.name for layer in SPACE.ignored}


def test_scales_are_told_apart_from_codes() -> None:
    layer = MODEL.layers[1]
    (item,) = [one for one in spending({layer.name: "w4a16g32asym"}, MODEL).layers if one.layer == layer]
    groups = layer.weights / 32
    assert (item.code_bytes, item.scale_bytes) == (layer.weights / 2, groups * (16 + 4) / 8)
    assert item.kind == "self_attn.q_proj"
    assert item.latency_us is None


def test_an_empty_allocation_is_the_model_in_16_bits() -> None:
    assert spending({}, MODEL).size_bytes == 2 * MODEL.parameters


def test_parts_of_a_layer_stand_for_themselves() -> None:
    layer = next(layer for layer in MODEL.layers if layer.name.endswith("down_proj"))
    halves = {f"{layer.name}[0:32]": "w4a16g32", f"{layer.name}[32:64]": "w8a8"}
    found = [item for item in spending(halves, MODEL).layers if item.kind == "mlp.down_proj"]
    assert [(item.layer.rows, str(item.scheme)) for item in found[:2]] == [(32, "w4a16g32"), (32, "w8a8")]
    assert found[0].layer.block == layer.block


def test_time_is_known_only_where_all_of_it_is() -> None:
    unknown = {layer.name: "w2a16" for layer in MODEL.layers if layer.kind == "linear"}
    assert spending(unknown, MODEL, LATENCY).latency_us is None
    assert isinstance(spending(unknown, MODEL, LATENCY).layers[0].layer, Layer)
