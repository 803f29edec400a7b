import io

import pandas
import pytest

from search.exports import render
from search.inventory import Layer
from search.scheme import Scheme
from tests.search.exports.examples import dealt, exported, inventory, llama


def table_of(model, allocation, target="vllm"):
    return pandas.read_csv(io.StringIO(render("csv", exported(model, allocation, target))))


def test_it_has_a_row_for_every_layer():
    model, allocation = llama(), dealt(llama(), ("w4a16g64", "w6a8asym", "w16a16"))
    table = table_of(model, allocation).set_index("name")
    assert list(table.index) == [layer.name for layer in model.layers]
    for layer in model.layers:
        row, scheme = table.loc[layer.name], Scheme.parse(allocation.get(layer.name, "w16a16"))
        assert (row["rows"], row["columns"], row["weights"]) == (layer.rows, layer.columns, layer.weights)
        assert row["scheme"] == str(scheme)
        assert (row["weight_bits"], row["activation_bits"]) == (scheme.weight_bits, scheme.activation_bits)
        assert row["symmetric"] == scheme.symmetric
        assert (row["group_size"] == scheme.group_size) or (
            scheme.group_size is None and pandas.isna(row["group_size"])
        )
        assert row["bytes"] == scheme.storage_bits(layer.rows, layer.columns) / 8
        assert row["searched"] == (layer.name in allocation)
    assert table.loc["model.layers.11.self_attn.k_proj", "unit"] == "model.layers.11.self_attn.q_proj+k_proj+v_proj"
    assert table.loc["model.layers.11.self_attn.k_proj", "block"] == "model.layers.11"
    assert table_of(model, allocation, "generic").set_index("name").loc["lm_head", "unit"] == "lm_head"


def test_parts_of_a_layer_are_rows():
    name = "model.layers.3.mlp.down_proj"
    table = table_of(llama(), {f"{name}[0:48]": "w4a16g64", f"{name}[48:64]": "w8a16"}, "generic").set_index("name")
    assert list(table.loc[[f"{name}[0:48]", f"{name}[48:64]"], "rows"]) == [48, 16]
    assert name not in table.index


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r"])
def test_a_spreadsheet_runs_no_name(begin):
    name = f'{begin}cmd|"/c calc"!A1.dense'
    model = inventory([Layer(name, "linear", 64, 64, block=f"{begin}block")])
    text = render("csv", exported(model, {name: "w8a16"}, "generic"))
    row = pandas.read_csv(io.StringIO(text, newline="")).iloc[0]
    assert (row["name"], row["unit"], row["block"]) == (f"'{name}", f"'{name}", f"'{begin}block")
