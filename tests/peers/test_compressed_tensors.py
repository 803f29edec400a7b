import json

import pytest
import torch

from search.exports import render
from search.exports.refusing import all_schemes
from search.scheme import FULL_PRECISION
from tests.peers import tiny
from tests.peers.checkpoints import compressed_schemes, scheme_of
from tests.search.exports.examples import dealt, exported

compressed_tensors = pytest.importorskip("compressed_tensors")

from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config  # noqa: E402
from compressed_tensors.utils.match import is_match  # noqa: E402

SCHEMES = ("w4a16g64", "w6a16g32asym", "w8a8", "w3a8", "w16a16", "w8a16", "w2a16g16", "w5a16", "w7a16g32")

# What vLLM 0.33 declares for Llama: a fused layer's name under vLLM and the names of its shards.
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def point():
    inventory = tiny.inventory_of(tiny.llama())
    return exported(inventory, dealt(inventory, SCHEMES))


@pytest.fixture(scope="module")
def config(point):
    return QuantizationConfig.model_validate(json.loads(render("vllm", point)))


def test_every_layer_of_a_real_model_gets_its_scheme(llama, point, config, found):
    """`apply_quantization_config` on a 12-block Llama attaches to every linear layer exactly the bits, group size and
    symmetry asked for, and nothing to the ignored ones."""
    apply_quantization_config(llama, config)
    schemes = all_schemes(point)
    applied = {
        name: scheme_of(getattr(module, "quantization_scheme", None))
        for name, module in llama.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert applied == {layer.name: schemes[layer.name] for layer in point.inventory.layers if layer.kind == "linear"}
    assert not hasattr(llama.model.embed_tokens, "quantization_scheme")
    found(layers=len(applied), schemes=len(set(applied.values())))


def test_names_match_exactly_one_group(point, config):
    """compressed-tensors' `is_match` finds one group for every quantized layer, none for the others: block 1's targets
    do not reach block 11."""
    schemes = all_schemes(point)
    matched = compressed_schemes(json.loads(render("vllm", point)), point)
    assert matched == {name: schemes[name] for name in matched}
    ignored = [name for name, scheme in matched.items() if scheme == FULL_PRECISION]
    module = torch.nn.Linear(1, 1)
    assert ignored == [name for name in matched if is_match(name, module, config.ignore)]


def test_fused_layers_are_found_by_their_shards(point, config):
    """Looked up as vLLM does, by the fused name and its shards, every qkv_proj and gate_up_proj has the one scheme of
    its shards, or is ignored whole."""
    schemes, module = all_schemes(point), torch.nn.Linear(1, 1)
    for number in range(12):
        for fused, shards in FUSED.items():
            parent = f"model.layers.{number}.{'self_attn' if fused == 'qkv_proj' else 'mlp'}"
            groups = [
                group
                for group in config.config_groups.values()
                if is_match(f"{parent}.{fused}", module, group.targets, fused=FUSED)
            ]
            wanted = schemes[f"{parent}.{shards[0]}"]
            assert [scheme_of(group) for group in groups] == [wanted] * wanted.quantizes_weights
            assert is_match(f"{parent}.{fused}", module, config.ignore, fused=FUSED) != wanted.quantizes_weights


def test_berts_layers_get_their_schemes():
    """A BERT, whose attention vLLM names differently: every layer gets its scheme under the checkpoint's own name."""
    model = tiny.bert()
    inventory = tiny.inventory_of(model, "embedding")
    point = exported(inventory, dealt(inventory, ("w4a16g64", "w6a16g32", "w16a16")))
    apply_quantization_config(model, QuantizationConfig.model_validate(json.loads(render("vllm", point))))
    applied = {
        name: scheme_of(getattr(module, "quantization_scheme", None))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    schemes = all_schemes(point)
    assert applied == {name: schemes[name] for name in applied}


def test_the_version_packs_densely():
    """compressed-tensors ≥ 0.18 packs 128 columns of 6 bits into 24 words, as vLLM allocates them; 0.17 took 26."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.zeros(2, 128, dtype=torch.int8)
    assert {bits: pack_to_int32(codes, bits).shape[1] for bits in range(2, 9)} == {
        bits: 4 * bits for bits in range(2, 9)
    }
