import json
import shlex
import subprocess
import sys

import pytest

pytest.importorskip("torchao")
import torch
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, Int8Tensor, IntxUnpackedToInt8Tensor, quantize_

from search.exports import EXPORTS, render
from search.scheme import Scheme
from tests.peers import tiny
from tests.search.exports.examples import dealt, exported

SCHEMES = (
    "w2a16g32",
    "w3a16",
    "w4a16g64",
    "w5a16asym",
    "w6a16g32asym",
    "w7a16",
    "w8a16g64",
    "w6a8g32",
    "w4a8asym",
    "w8a8",
)
TOKENS = torch.arange(24).reshape(2, 12)


def point(model):
    inventory = tiny.inventory_of(model)
    allocation = dealt(inventory, SCHEMES) | {"model.embed_tokens": "w6a16g32"}
    return exported(inventory, allocation), allocation


def assert_stored(module, scheme):
    """The layer's tensor says what the scheme says, and no code of it lies outside the bits asked for."""
    weight = module.weight
    if scheme == Scheme(8, 8):
        assert isinstance(weight, Int8Tensor)
        assert weight.act_quant_kwargs is not None
        assert list(weight.block_size) == [1, weight.shape[1]]
        return
    assert isinstance(weight, IntxUnpackedToInt8Tensor)
    assert weight.target_dtype == getattr(torch, f"int{scheme.weight_bits}")
    assert weight.block_size == (1, scheme.group_size or weight.shape[1])
    assert (weight.activation_quantization is not None) == scheme.quantizes_activations
    most = 2 ** (scheme.weight_bits - 1)
    assert -most <= weight.qdata.min() < weight.qdata.max() <= most - 1
    assert (weight.zero_point != 0).any() != scheme.symmetric


def assert_as_asked(model, allocation):
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            if name in allocation:
                assert_stored(module, Scheme.parse(allocation[name]))
            else:
                assert type(module.weight) is torch.nn.Parameter
                assert name == "lm_head"


def test_the_json_is_a_config_and_quantizes_every_layer_as_asked(llama, found):
    """`config_from_dict` reads the JSON, `quantize_` applies it to a Llama of 12 blocks, which runs; every layer's
    tensor has the bits, groups, symmetry and activations asked for."""
    shown, allocation = point(llama)
    document = json.loads(render("torchao", shown))
    config = config_from_dict(document)
    assert isinstance(config, FqnToConfig)
    quantize_(llama, config, filter_fn=None)
    assert_as_asked(llama, allocation)
    assert torch.isfinite(llama(TOKENS).logits).all()
    assert config_from_dict(config_to_dict(config)) == config
    found(layers=len(allocation), schemes=" ".join(SCHEMES))


def test_the_code_builds_the_same_config(llama, tmp_path):
    """The Python file is executed; its `CONFIG` equals what the JSON gives."""
    shown, _ = point(llama)
    names: dict = {}
    exec(compile(render("torchao-code", shown), "quantize_with_torchao.py", "exec"), names)
    assert names["CONFIG"] == config_from_dict(json.loads(render("torchao", shown)))


@pytest.mark.parametrize("name", ["torchao", "torchao-code"])
def test_the_command_that_is_shown_runs(llama_folder, tmp_path, name):
    """The command shown beside the file, typed into a shell, leaves a quantized model."""
    model = tiny.llama(blocks=3)
    shown, _ = point(model)
    export = EXPORTS[name]
    (tmp_path / export.filename).write_text(render(name, shown))
    (tmp_path / "a-model").symlink_to(llama_folder)
    command = shlex.split(export.command(search=1, point=3, model="a-model", source="a-model"))
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, timeout=600)
    if name == "torchao":
        config = json.loads((tmp_path / "a-model-torchao" / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "torchao"
    else:
        state = torch.load(tmp_path / "a-model-torchao.pt", weights_only=True)
        assert isinstance(state["model.layers.0.mlp.down_proj.weight"], IntxUnpackedToInt8Tensor)
