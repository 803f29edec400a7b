import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("olive")
import onnx
import onnxruntime
import torch
from olive.common.quant.hf_utils import OliveHfQuantizationConfig
from olive.common.quant.nn import QuantModule
from olive.model import HfModelHandler

from search.exports import EXPORTS, render
from search.exports.refusing import all_schemes
from search.scheme import Scheme
from tests.peers import tiny
from tests.search.exports.examples import dealt, exported

SCHEMES = ("w4a16g32", "w8a16g64", "w2a16g16", "w4a16g64asym", "w8a16g32asym")
INPUTS = {
    "input_ids": torch.arange(12)[None],
    "attention_mask": torch.ones(1, 12, dtype=torch.long),
    "position_ids": torch.arange(12)[None],
}


class Logits(torch.nn.Module):
    """The model without its cache, which the exporter cannot follow."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits


@pytest.fixture(scope="module")
def point():
    inventory = tiny.inventory_of(tiny.llama(blocks=3))
    allocation = dealt(inventory, SCHEMES, "onnxruntime") | {"model.embed_tokens": "w4a16g32", "lm_head": "w8a16g64"}
    return exported(inventory, allocation, "onnxruntime")


@pytest.fixture(scope="module")
def quantized(point, llama_folder, tmp_path_factory):
    """What the command that is shown leaves, typed into a shell."""
    folder = tmp_path_factory.mktemp("olive")
    export = EXPORTS["olive"]
    (folder / export.filename).write_text(render("olive", point))
    (folder / "a-model").symlink_to(llama_folder)
    tool, *arguments = shlex.split(export.command(search=1, point=3, model="a-model", source="a-model"))
    program = Path(sys.executable).with_name(tool)
    quiet = os.environ | {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([program, *arguments], cwd=folder, check=True, timeout=600, env=quiet)
    return HfModelHandler(folder / "a-model-olive" / "model").load_model().eval()


def test_every_layer_is_quantized_as_asked(point, quantized, found):
    """`olive run` reads the workflow and quantizes a Llama; reloaded, every linear layer and the embedding has the
    bits, groups and symmetry asked for."""
    modules = {
        name: Scheme(one.quantizer.bits, 16, one.quantizer.group_size, one.quantizer.symmetric)
        for name, one in quantized.named_modules()
        if isinstance(one, QuantModule)
    }
    assert modules == all_schemes(point)
    found(layers=len(modules), schemes=" ".join(SCHEMES))


def test_onnx_runtime_runs_nodes_of_these_bits(point, quantized, tmp_path, found):
    """Exported to ONNX, every MatMulNBits node has the bits and block size asked for, and ONNX Runtime runs the model
    on a CPU; its logits are near those of the quantized model in torch."""
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        Logits(quantized), tuple(INPUTS.values()), path, dynamo=False, opset_version=18, input_names=list(INPUTS)
    )
    schemes = all_schemes(point)
    nodes = {}
    for node in onnx.load(path).graph.node:
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized"):
            settings = {one.name: one.i for one in node.attribute}
            name = node.name.removeprefix("/model/").rpartition("/")[0].replace("/", ".")
            nodes[name] = (settings["bits"], settings["block_size"])
    assert nodes == {name: (scheme.weight_bits, scheme.group_size) for name, scheme in schemes.items()}
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {name: value.numpy() for name, value in INPUTS.items()})
    with torch.no_grad():
        expected = Logits(quantized)(**INPUTS)
    apart = float((torch.from_numpy(logits) - expected).norm() / expected.norm())
    assert apart < 0.05
    found(nodes=len(nodes), logits_apart=f"{apart:.4f}")


def test_olive_takes_six_bits_unvalidated():
    """Olive's configuration refuses 6 bits as the common width and takes them in an override without a word: the width
    that our file must never have."""
    with pytest.raises(ValueError, match="Only 2-bit, 4-bit and 8-bit"):
        OliveHfQuantizationConfig(bits=6, symmetric=True, group_size=32)
    config = OliveHfQuantizationConfig(bits=4, symmetric=True, group_size=32, overrides={"lm_head": {"bits": 6}})
    assert config.get_qlinear_init_args("lm_head")["bits"] == 6
