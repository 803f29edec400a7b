import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from search.exports import EXPORTS, render
from search.exports.refusing import all_schemes
from search.scheme import FULL_PRECISION
from tests.peers import tiny
from tests.peers.checkpoints import assert_stored, relative_error, shapes
from tests.search.exports.examples import dealt, exported

pytest.importorskip("llmcompressor", reason="make test-exports runs this in an environment of its own")


SCHEMES = ("w4a16g64", "w6a16g32asym", "w8a8", "w3a16", "w16a16", "w8a16g16", "w2a16g16", "w5a16", "w7a16g32")


def quantized(folder, point, tmp_path):
    """The checkpoint that the command writes which the page shows beside our recipe."""
    export = EXPORTS["llm-compressor"]
    (tmp_path / export.filename).write_text(render("llm-compressor", point))
    (tmp_path / "model").symlink_to(folder)
    command = export.command(search=1, point=point.candidate.number, model="model", source="model")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True, timeout=600)
    return tmp_path / "model-quantized"


def test_oneshot_writes_the_checkpoint_asked_for(llama_folder, tmp_path, found):
    """`oneshot` with our recipe, called as the page says, on a Llama of 3 blocks saves every layer with the bits, group
    size and symmetry asked for, widths of 3, 5, 6 and 7 bits packed densely, and the ignored layers as they were."""
    inventory = tiny.inventory_of(tiny.llama(blocks=3))
    point = exported(inventory, dealt(inventory, SCHEMES))
    folder = quantized(llama_folder, point, tmp_path)
    found(**assert_stored(folder, point))


def test_the_checkpoint_loads_and_runs(llama_folder, tmp_path, found):
    """Transformers loads the checkpoint of a point with 4, 6 and 8 bits, and its logits are near those of the model."""
    inventory = tiny.inventory_of(tiny.llama(blocks=3))
    point = exported(inventory, dealt(inventory, ("w8a16g32", "w6a16g32", "w8a8", "w16a16")))
    folder = quantized(llama_folder, point, tmp_path)
    error = relative_error(folder, llama_folder)
    assert 0 < error < 0.05
    found(relative_error=f"{error:.4f}")


def test_a_fused_moe_is_taken_apart_and_quantized(tmp_path, found):
    """`oneshot` on a Mixtral with fused experts takes them apart; every expert has the bits asked for."""
    model = tiny.mixtral()
    inventory = tiny.inventory_of(model)
    folder = tiny.save(model, tmp_path / "mixtral")
    point = exported(inventory, dealt(inventory, ("w4a16g32", "w8a16g32", "w6a16g32")))
    written = shapes(quantized(folder, point, tmp_path))
    schemes = all_schemes(point)
    packed = {name: shape for name, (_, shape) in written.items() if name.endswith("weight_packed")}
    experts = {name: shape for name, shape in packed.items() if ".experts." in name}
    assert len(experts) == 4 * 3
    for name, shape in experts.items():
        columns = 128 if "down_proj" in name or ".w2." in name else 64
        scheme = schemes[f"model.layers.0.mlp.experts.{'down_proj' if columns == 128 else 'gate_up_proj'}"]
        assert shape[1] == math.ceil(columns * scheme.weight_bits / 32)
    others = [
        layer.name for layer in inventory.layers if layer.kind == "linear" and schemes[layer.name] != FULL_PRECISION
    ]
    assert {f"{name}.weight_packed" for name in others} == packed.keys() - experts.keys()
    found(experts=len(experts), bits=scheme.weight_bits)
