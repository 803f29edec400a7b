import json

import pytest
import yaml

from search.exports import render
from search.exports.llm_compressor import OBSERVERS
from tests.search.exports import examples
from tests.search.exports.examples import dealt, exported, llama, refused

# What llm-compressor makes of these files is in tests/peers/test_llm_compressor.py.


def modifier_of(point):
    recipe = yaml.safe_load(render("llm-compressor", point))
    (modifier,) = recipe["quant_stage"]["quant_modifiers"].values()
    return modifier


@pytest.mark.parametrize("model", [llama(), examples.bert()], ids=lambda model: model.architecture)
def test_its_groups_are_those_of_the_checkpoint_that_vllm_loads(model):
    point = exported(model, dealt(model, ("w4a16g32", "w8a8", "w6a16g32asym", "w16a16")))
    modifier, config = modifier_of(point), json.loads(render("vllm", point))
    assert modifier["ignore"] == config["ignore"]
    assert modifier["config_groups"].keys() == config["config_groups"].keys()
    for name, group in config["config_groups"].items():
        weights = modifier["config_groups"][name]["weights"]
        assert weights.pop("observer") == "memoryless_mse"
        assert modifier["config_groups"][name] == {key: value for key, value in group.items() if key != "format"}


@pytest.mark.parametrize(("quantizer", "observer"), OBSERVERS.items())
def test_weights_are_rounded_as_the_point_was_measured(quantizer, observer):
    point = exported(llama(), dealt(llama(), ("w4a16g32",)), quantizer=quantizer)
    (group,) = modifier_of(point)["config_groups"].values()
    assert group["weights"]["observer"] == observer


def test_it_refuses_what_vllm_would():
    allocation = dealt(llama(), ("w4a16g64",)) | {"model.layers.1.self_attn.k_proj": "w6a16g64"}
    assert refused("llm-compressor", llama(), allocation).accepted == "w6a16g64"
