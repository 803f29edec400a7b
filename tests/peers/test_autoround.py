import json

import pytest
import torch

from search.exports import render
from search.exports.refusing import all_schemes
from tests.peers import tiny
from tests.peers.checkpoints import assert_stored, quantization_config, relative_error
from tests.search.exports.examples import dealt, exported

pytest.importorskip("auto_round", reason="make test-exports runs this in an environment of its own")

from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEMES = ("w4a16g64", "w6a16g32asym", "w8a16g64asym", "w3a16", "w16a16", "w2a16g16", "w5a16", "w7a16g32")


def quantized(folder, point, tmp_path, form):
    """The checkpoint that AutoRound writes with our `layer_config`, by rounding to nearest (no iterations)."""
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
        layer_config=json.loads(render("autoround", point)),
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
    )
    rounder.quantize_and_save(str(tmp_path / "quantized"), format=form)
    (config,) = (tmp_path / "quantized").rglob("config.json")
    return config.parent


def test_every_layer_is_stored_as_asked(llama_folder, tmp_path, found):
    """`AutoRound(layer_config=ours)` on a Llama of 3 blocks, saved as llm_compressor: every layer has the bits, group
    size and symmetry asked for, densely packed, and what keeps full precision is as it was."""
    inventory = tiny.inventory_of(tiny.llama(blocks=3))
    point = exported(inventory, dealt(inventory, SCHEMES))
    folder = quantized(llama_folder, point, tmp_path, "llm_compressor")
    found(**assert_stored(folder, point))


def test_the_checkpoint_loads_and_runs(llama_folder, tmp_path, found):
    """Transformers loads the mixed checkpoint, and its logits are near those of the model."""
    inventory = tiny.inventory_of(tiny.llama(blocks=3))
    point = exported(inventory, dealt(inventory, ("w8a16g32", "w6a16g32", "w8a16", "w16a16")))
    folder = quantized(llama_folder, point, tmp_path, "llm_compressor")
    error = relative_error(folder, llama_folder)
    assert 0 < error < 0.05
    found(relative_error=f"{error:.4f}")


def test_its_own_format_keeps_the_schemes_too(llama_folder, tmp_path, found):
    """Saved as auto_round, AutoRound's own format, with 2, 3, 4 and 8 bits: every layer that differs from the default
    is listed with the bits, group size and symmetry asked for."""
    inventory = tiny.inventory_of(tiny.llama(blocks=3))
    point = exported(inventory, dealt(inventory, ("w4a16g32", "w8a16", "w3a16g32", "w2a16g16", "w16a16")))
    config = quantization_config(quantized(llama_folder, point, tmp_path, "auto_round"))
    for name, scheme in all_schemes(point).items():
        if ".layers." in name:
            kept = config | config["extra_config"].get(name, {})
            assert kept["bits"] == scheme.weight_bits, name
            if scheme.quantizes_weights:
                assert (kept["group_size"], kept["sym"]) == (scheme.group_size or -1, scheme.symmetric), name
    found(listed=len(config["extra_config"]), packing=config["packing_format"])
