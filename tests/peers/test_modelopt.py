import json
import shlex
import subprocess
import sys

import pytest

pytest.importorskip("modelopt")
import modelopt.torch.quantization as mtq
import torch
from modelopt.recipe import load_recipe
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import get_quant_config
from modelopt.torch.quantization.nn import TensorQuantizer

from search.exports import EXPORTS, render
from search.scheme import Scheme
from tests.peers import tiny
from tests.search.exports.examples import dealt, exported

SCHEMES = ("w2a16g32", "w3a16", "w4a16g64", "w5a16g16", "w6a16g32", "w7a16", "w8a16", "w8a8", "w4a6g32")
TOKENS = torch.arange(24).reshape(2, 12)


def quantized(model, shown, tmp_path):
    """The model, after ModelOpt has read our recipe and quantized as it says."""
    path = tmp_path / EXPORTS["modelopt"].filename
    path.write_text(render("modelopt", shown))
    return mtq.quantize(model, load_recipe(path).quantize)


def assert_weights(quantizer, scheme):
    assert quantizer.is_enabled
    assert quantizer.num_bits == scheme.weight_bits
    if scheme.group_size is None:
        assert (quantizer.axis, quantizer.block_sizes) == (0, None)
    else:
        assert {axis: size for axis, size in quantizer.block_sizes.items() if size} == {-1: scheme.group_size}


def test_every_quantizer_is_as_asked(llama, tmp_path, found):
    """`load_recipe` reads the YAML, `mtq.quantize` applies it to a Llama of 12 blocks, which runs; every weight
    quantizer has the bits and blocks asked for, every input quantizer too, and all others are disabled."""
    inventory = tiny.inventory_of(llama)
    allocation = dealt(inventory, SCHEMES) | {"model.embed_tokens": "w6a16g32"}
    model = quantized(llama, exported(inventory, allocation), tmp_path)
    expected = set()
    for name, text in allocation.items():
        scheme, layer = Scheme.parse(text), model.get_submodule(name)
        assert_weights(layer.weight_quantizer, scheme)
        expected.add(f"{name}.weight_quantizer")
        if scheme.quantizes_activations:
            assert layer.input_quantizer.num_bits == scheme.activation_bits
            expected.add(f"{name}.input_quantizer")
    enabled = {name for name, one in model.named_modules() if isinstance(one, TensorQuantizer) and one.is_enabled}
    assert enabled == expected
    assert torch.isfinite(model(TOKENS).logits).all()
    found(layers=len(allocation), schemes=" ".join(SCHEMES))


def test_weights_take_as_many_values_as_the_bits_allow(llama, tmp_path):
    """What ModelOpt makes of a weight has at most 2^b values in every group, and of a token's inputs likewise."""
    inventory = tiny.inventory_of(llama)
    allocation = dealt(inventory, ("w3a16g32", "w4a6"))
    model = quantized(llama, exported(inventory, allocation), tmp_path)
    model(TOKENS)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer, scheme = model.get_submodule(name), Scheme.parse(allocation[name])
        rounded = layer.weight_quantizer(layer.weight).detach()
        for group in rounded.reshape(-1, scheme.group_size or rounded.shape[1]):
            assert len(group.unique()) <= 2**scheme.weight_bits
    name = next(name for name, text in allocation.items() if text == "w4a6")
    layer = model.get_submodule(name)
    tokens = torch.randn(2, 3, layer.in_features)
    most = tokens.abs().amax(-1, keepdim=True) / 31
    expected = (tokens / most).round() * most
    assert torch.allclose(layer.input_quantizer(tokens), expected, atol=1e-6)


def test_hf_quant_config_is_what_modelopt_writes_itself(tmp_path, found):
    """The same point, quantized by our recipe: ModelOpt's own `get_quant_config` of that model equals our
    `hf_quant_config.json`, and its converter knows every algorithm in it."""
    model = tiny.llama(hidden_size=128, intermediate_size=256)
    inventory = tiny.inventory_of(model)
    shown = exported(inventory, dealt(inventory, ("w4a16g64", "w8a16", "w4a16g128", "w16a16")))
    ours = json.loads(render("modelopt-hf", shown))
    theirs = get_quant_config(quantized(model, shown, tmp_path))
    assert ours == theirs
    groups = convert_hf_quant_config_format(ours)["config_groups"].values()
    assert sorted((group["weights"]["num_bits"], group["weights"].get("group_size")) for group in groups) == [
        (4, 64),
        (4, 128),
        (8, None),
    ]
    found(layers=len(ours["quantization"]["quantized_layers"]), algorithm=ours["quantization"]["quant_algo"])


def test_one_format_for_all_is_named_at_the_top(llama, tmp_path):
    """Where all quantized layers agree, ModelOpt names the format at the top and lists what is left out; so do we, with
    full names for its globs."""
    inventory = tiny.inventory_of(llama)
    shown = exported(inventory, dealt(inventory, ("w4a16g64",)))
    ours = json.loads(render("modelopt-hf", shown))["quantization"]
    theirs = get_quant_config(quantized(llama, shown, tmp_path))["quantization"]
    assert {**ours, "exclude_modules": None} == {**theirs, "exclude_modules": None}
    assert ours["exclude_modules"] == ["lm_head", "model.embed_tokens"]


def test_the_command_that_is_shown_runs(llama_folder, tmp_path):
    """The command shown beside the recipe, typed into a shell, quantizes a checkpoint."""
    inventory = tiny.inventory_of(tiny.llama(blocks=3))
    export = EXPORTS["modelopt"]
    (tmp_path / export.filename).write_text(render("modelopt", exported(inventory, dealt(inventory, SCHEMES))))
    (tmp_path / "a-model").symlink_to(llama_folder)
    command = shlex.split(export.command(search=1, point=3, model="a-model", source="a-model"))
    assert command[0] == "python"
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=tmp_path, check=True, timeout=600, capture_output=True, text=True
    )
    assert "model.layers.0.mlp.gate_proj.weight_quantizer" in done.stdout
