from dataclasses import replace

import pytest

from search.errors import ExportRefused, InvalidRequest
from search.exports import EXPORTS, loaded_from, refusal, render
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

WHOLE = sorted(name for name, export in EXPORTS.items() if not export.splits_layers)


def test_every_format_says_what_it_carries_and_what_uses_its_file():
    for name, export in EXPORTS.items():
        assert (export.name, export.carries[-1], export.description[-1] != ".") == (name, ".", True)
        command = export.command(search=7, point=3, model="a-model", source="MODEL_FOLDER")
        assert "{" not in command
        assert export.filename in command or "7 --point 3" in command


def test_a_tool_loads_a_model_by_its_hub_id_or_from_a_folder_of_the_persons():
    assert loaded_from("hub:org/name") == "org/name"
    assert loaded_from("tiny") == loaded_from(None) == "MODEL_FOLDER"
    assert (
        EXPORTS["olive"]
        .command(search=7, point=3, model="tiny", source="MODEL_FOLDER")
        .endswith("--model_name_or_path MODEL_FOLDER --output_path tiny-olive")
    )


def test_no_two_formats_are_downloaded_under_one_name():
    assert len({export.filename for export in EXPORTS.values()}) == len(EXPORTS)


def test_layers_whose_parts_agree_are_whole_in_every_format():
    model = llama()
    allocation = dealt(model, ("w4a16g32", "w8a16"))
    halves = {
        layer.part(range(start, start + layer.rows // 2)).name: allocation[layer.name]
        for layer in model.layers
        if layer.name in allocation
        for start in (0, layer.rows // 2)
    }
    for name in EXPORTS:
        whole, split = exported(model, allocation), exported(model, halves)
        assert str(refusal(name, whole)) == str(refusal(name, split))
        if refusal(name, whole) is None:
            assert render(name, whole) == render(name, split)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "LlamaForCausalLM"])
def test_only_our_own_formats_take_transposed_weights(name, architecture):
    whole = llama(blocks=1)
    layers = [replace(layer, transposed=layer.name.endswith("o_proj")) for layer in whole.layers]
    allocation = dealt(whole, ("w8a16g32",) if name == "olive" else ("w8a16",))
    error = refused(name, inventory(layers, architecture), allocation)
    # What llama.cpp does not know at all it refuses as a whole.
    assert "Conv1D" in error.detail or (name, architecture[:5]) in [("llama.cpp", "GPT2L"), ("llama.cpp", "OpenA")]
    kept = {name: scheme for name, scheme in allocation.items() if not name.endswith("o_proj")}
    if architecture == "LlamaForCausalLM" and name != "olive":
        render(name, exported(inventory(layers, architecture), kept))


@pytest.mark.parametrize("name", WHOLE)
def test_only_our_own_formats_take_parts_of_layers(name):
    part = "model.layers.3.mlp.down_proj[0:48]"
    with pytest.raises(ExportRefused, match="several schemes") as caught:
        render(name, exported(llama(), {part: "w4a16g64"}))
    assert (caught.value.field, caught.value.value) == (part, "w4a16g64")
    assert caught.value.accepted == "the formats csv, json"


def test_an_unknown_format_lists_the_known():
    with pytest.raises(InvalidRequest) as caught:
        render("onnx", exported(inventory([]), {}))
    assert caught.value.accepted == sorted(EXPORTS)
