import re

import gguf
import pytest

from search import gguf_tensors
from search.exports import EXPORTS, render
from search.inventory import Layer
from search.request import SpaceRequest
from search.scheme import Scheme
from search.space import build_space
from search.targets import find_target
from tests.search.exports.examples import dealt, exported, inventory, llama, refused

SCHEMES = ("w4a16g32", "w5a16g32asym", "w8a16", "w16a16", "w4a16g64asym")
WIDE = Layer("model.layers.0.mlp.down_proj", "linear", 256, 512)


def rules(text):
    """As llama-quantize reads the file: words, cut at the first '=', the name in lower case."""
    return [(name.lower(), kind) for name, _, kind in (word.partition("=") for word in text.split())]


def chosen(name, ordered):
    """The type of the first rule found anywhere in a tensor's name."""
    return next((kind for pattern, kind in ordered if re.search(pattern, name)), None)


@pytest.mark.parametrize("architecture", sorted(gguf_tensors.ARCHITECTURES))
def test_names_are_those_of_the_official_maps(architecture):
    official = gguf.get_tensor_name_map(
        next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == gguf_tensors.ARCHITECTURES[architecture]), 12
    )
    found = []
    for module in official.mapping:
        name = gguf_tensors.tensor_name(module)
        # A map lists the names of many families; ours are those of Transformers.
        if name is not None:
            assert name == f"{official.get_name(module)}.weight"
            found.append(module)
    assert len(found) >= 4 * 12


def test_types_by_width():
    kinds = {bits: gguf_tensors.tensor_type(Scheme(bits, group_size=64), 512) for bits in (2, 3, 4, 5, 6, 8)}
    assert kinds == {2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k", 8: "q8_0"}
    assert {name.lower() for name in gguf.GGMLQuantizationType.__members__} >= {*kinds.values(), "f16"}


@pytest.mark.parametrize(
    ("scheme", "columns", "kind"),
    [
        ("w4a16g32", 512, "q4_0"),
        ("w4a16g32asym", 512, "q4_1"),
        ("w5a16g32", 512, "q5_0"),
        ("w5a16g32asym", 512, "q5_1"),
        ("w4a16g128asym", 512, "q4_k"),
        ("w4a16", 384, "q4_0"),
        ("w5a16g64asym", 384, "q5_1"),
        ("w8a16", 384, "q8_0"),
        ("w16a16", 20, "f16"),
        ("w6a16g64", 384, None),
        ("w3a16g64", 384, None),
        ("w8a16", 48, None),
        ("w7a16g64", 512, None),
    ],
)
def test_types_by_group_and_columns(scheme, columns, kind):
    assert gguf_tensors.tensor_type(Scheme.parse(scheme), columns) == kind


def test_a_type_has_the_bits_and_block_that_are_said():
    for bits in (2, 3, 4, 5, 6, 8):
        for symmetric in (True, False):
            for group in (32, 64):
                for columns in (32, 256):
                    name = gguf_tensors.tensor_type(Scheme(bits, group_size=group, symmetric=symmetric), columns)
                    if name is not None:
                        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
                        assert columns % block == 0
                        assert bits <= 8 * size / block <= bits + 1


@pytest.mark.parametrize("reverse", [False, True], ids=["first wins", "last wins"])
def test_every_tensor_has_its_type_whichever_rule_wins(reverse):
    model = llama()
    allocation = dealt(model, SCHEMES, "llama.cpp")
    ordered = rules(render("llama.cpp", exported(model, allocation, "llama.cpp")))
    official = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    for layer in model.layers:
        scheme = Scheme.parse(allocation[layer.name])
        kind = chosen(f"{official.get_name(layer.name)}.weight", ordered[::-1] if reverse else ordered)
        assert kind == gguf_tensors.tensor_type(scheme, layer.columns)
    assert chosen("blk.1.attn_norm.weight", ordered) is None
    assert len(ordered) == len(model.layers)


def test_layers_that_were_not_searched_keep_sixteen_bits():
    model = llama(blocks=1)
    text = render("llama.cpp", exported(model, {"model.layers.0.mlp.down_proj": "w8a16"}))
    assert "^blk\\.0\\.ffn_down\\.weight$=q8_0\n" in text
    assert "^token_embd\\.weight$=f16\n" in text
    assert "^output\\.weight$=f16\n" in text


def test_a_shared_embedding_is_one_tensor():
    layers = (Layer("model.embed_tokens", "embedding", 96, 64, aliases=("lm_head",)),)
    text = render("llama.cpp", exported(inventory(layers, "Qwen3ForCausalLM"), {"model.embed_tokens": "w8a16"}))
    assert text == "^token_embd\\.weight$=q8_0\n"


@pytest.mark.parametrize(
    ("layer", "scheme", "nearest", "why"),
    [
        (WIDE, "w7a16g64", "w8a16g64", "no type of 7 bits"),
        (WIDE, "w8a8", "w8a16", "activations"),
        (Layer(WIDE.name, "linear", 64, 384), "w6a16g64", "w5a16g64", "blocks of 256"),
        (Layer(WIDE.name, "linear", 64, 384), "w2a16g64", "w4a16g64", "blocks of 256"),
        (Layer("embeddings.position_embeddings", "embedding", 96, 64), "w8a16", "w16a16", "keeps it"),
        (Layer("model.layers.0.mlp.experts.down_proj", "experts", 96, 64), "w8a16", "w16a16", "experts"),
    ],
)
def test_refuses_what_it_would_store_otherwise(layer, scheme, nearest, why):
    error = refused("llama.cpp", inventory([layer], "LlamaForCausalLM"), {layer.name: scheme})
    assert why in error.detail
    assert (error.field, error.accepted) == (layer.name, nearest)


def test_refuses_models_whose_names_are_not_known():
    error = refused("llama.cpp", inventory([WIDE], "NovelForCausalLM"), {WIDE.name: "w8a16"})
    assert "LlamaForCausalLM" in error.accepted


@pytest.mark.parametrize(
    "schemes", [("w4a16g64", "w5a16g64", "w6a16g64", "w8a16g64"), ("w2a16g16", "w3a16", "w8a16asym")]
)
def test_whatever_a_search_for_the_target_chooses_is_carried(schemes):
    shapes = {"q_proj": (256, 256), "k_proj": (64, 256), "v_proj": (64, 256), "o_proj": (256, 256)}
    layers = [Layer(f"model.layers.0.self_attn.{name}", "linear", *shape) for name, shape in shapes.items()]
    model = inventory([Layer("model.embed_tokens", "embedding", 96, 256), *layers], "LlamaForCausalLM")
    space = build_space(model, SpaceRequest(schemes=schemes), find_target("llama.cpp"))
    assert [unit.name for unit in space.units] == [layer.name for layer in model.layers]
    for scheme in space.schemes:
        render("llama.cpp", exported(model, dict.fromkeys((layer.name for layer in space.layers), scheme), "llama.cpp"))


def test_the_command_asks_for_a_quantized_file_type():
    # For a file of 16 bits, llama-quantize ignores the rules.
    assert EXPORTS["llama.cpp"].command(search=1, point=2, model="m", source="m").endswith("m.gguf Q8_0")
