"""Parts of a layer are layers of their own, whose names say of which and what."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.inventory import Inventory, Layer, by_whole, whole_and_channels
from search.scheme import Scheme

HEAD = Layer("model.head", "linear", 100, 64, 3 * 100 * 64, "model", ("model.tied",))


@given(st.lists(st.integers(1, 99), unique=True), st.integers(1, 10**12))
def test_what_parts_cost_adds_up_to_their_layer(cuts: list[int], macs: int) -> None:
    layer = Layer("x", "linear", 100, 64, macs)
    edges = [0, *sorted(cuts), 100]
    parts = [layer.part(range(start, stop)) for start, stop in pairwise(edges)]
    assert sum(part.macs for part in parts) == macs
    assert sum(part.weights for part in parts) == layer.weights
    for scheme in map(Scheme.parse, ("w3a16", "w4a16g32", "w5a16g64asym", "w16a16")):
        whole = scheme.storage_bits(layer.rows, layer.columns)
        assert sum(scheme.storage_bits(part.rows, part.columns) for part in parts) == whole


@given(st.integers(0, 99), st.integers(1, 100))
def test_a_name_says_of_which_layer_and_which_channels(start: int, stop: int) -> None:
    if start >= stop:
        with pytest.raises(ValueError, match=r"no part \["):
            HEAD.part(range(start, stop))
        return
    part = HEAD.part(range(start, stop))
    assert part.name == f"model.head[{start}:{stop}]"
    assert whole_and_channels(part.name) == ("model.head", range(start, stop))
    assert HEAD.named(part.name) == part
    assert (part.kind, part.columns, part.block, part.aliases) == ("linear", 64, "model", ("model.tied",))


@pytest.mark.parametrize("name", ["model.head", "model.layers.0.fc", "a[0]", "a[0:]", "a[-1:2]", "a[0:2].b"])
def test_any_other_name_is_a_whole_layers(name: str) -> None:
    assert whole_and_channels(name) == (name, None)
    assert HEAD.named(name) is HEAD


@pytest.mark.parametrize("kind", ["conv", "embedding", "experts"])
def test_layers_of_other_kinds_have_no_parts(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind} layer x of 8 channels has no part"):
        Layer("x", kind, 8, 8).part(range(0, 4))  # type: ignore[arg-type]


def test_names_are_gathered_by_layer_in_their_order() -> None:
    names = ["b[4:8]", "a", "b[0:4]", "c[0:1]"]
    assert by_whole(names) == {"b": ["b[4:8]", "b[0:4]"], "a": ["a"], "c": ["c[0:1]"]}


def test_an_inventory_survives_json() -> None:
    inventory = Inventory("d", "Any", "causal-lm", 6400, (HEAD, HEAD.part(range(0, 4))))
    assert Inventory.from_json(inventory.to_json()) == inventory
