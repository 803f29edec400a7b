import dataclasses
import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match, match_named_modules
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from search.candidate import Candidate
from search.errors import ExportRefused, InvalidRequest
from search.exports import EXPORTS, Exported, render
from search.exports.native import read_native
from search.inventory import Inventory, Layer
from search.scheme import Scheme
from search.space import tie
from search.targets import find_target

VLLM = find_target("vllm")
SCHEMES = ("w4a16g64", "w6a16g32asym", "w8a8", "w3a8", "w16a16", "w8a16")

# What vLLM 0.33 declares for each model: the fused layer's name under vLLM and the names of its shards.
LLAMA_FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def bert():
    config = BertConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    return BertModel(config)


def inventory_of(model, task="causal-lm"):
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            layers.append(Layer(name, "linear", module.out_features, module.in_features))
        elif isinstance(module, torch.nn.Embedding):
            layers.append(Layer(name, "embedding", module.num_embeddings, module.embedding_dim))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Inventory("0" * 64, type(model).__name__, task, parameters, tuple(layers))


def candidate_of(allocation):
    return Candidate(
        3,
        "ilp",
        "kl at 5.25 bits",
        allocation,
        predicted={"kl": 0.5},
        costs={"avg_bits": 5.25, "size_bytes": 1000.0},
        metrics={"loss": 0.25, "loss_stderr": 0.01},
    )


def varied(inventory, schemes=SCHEMES):
    """Schemes dealt out to the units that vLLM can quantize, in turn."""
    units = tie([layer for layer in inventory.layers if VLLM.refuses(layer) is None], VLLM)
    return {layer.name: schemes[i % len(schemes)] for i, unit in enumerate(units) for layer in unit.layers}


def exported(inventory, allocation):
    return Exported("a-model", inventory, "vllm", "mse", candidate_of(allocation))


def matches(model, config):
    """Module name → the groups of the config that target it, by compressed-tensors' own matching."""
    found = {}
    for group in config.config_groups.values():
        for name, _ in match_named_modules(model, group.targets, config.ignore):
            found.setdefault(name, []).append(group)
    return found


def assert_chosen(group, scheme):
    weights, activations = group.weights, group.input_activations
    assert weights.type == "int"
    assert weights.num_bits == scheme.weight_bits
    assert weights.symmetric == scheme.symmetric
    assert weights.group_size == scheme.group_size
    assert weights.strategy == ("channel" if scheme.group_size is None else "group")
    assert (activations is not None) == scheme.quantizes_activations
    if activations is not None:
        assert activations.num_bits == scheme.activation_bits
        assert (activations.dynamic, activations.symmetric, activations.strategy) == (True, True, "token")


@pytest.mark.parametrize(("which", "task"), [("llama", "causal-lm"), ("bert", "embedding")])
def test_vllm_gives_every_layer_the_scheme_chosen(which, task, request):
    model = request.getfixturevalue(which)
    inventory = inventory_of(model, task)
    allocation = varied(inventory)
    config = QuantizationConfig.model_validate_json(render("vllm", exported(inventory, allocation)))

    found = matches(model, config)
    for name, module in model.named_modules():
        scheme = Scheme.parse(allocation.get(name, "w16a16"))
        if scheme.quantizes_weights:
            (group,) = found[name]
            assert_chosen(group, scheme)
        else:
            assert name not in found
            if isinstance(module, torch.nn.Linear):
                assert is_match(name, module, config.ignore)


def test_vllm_finds_fused_layers_by_their_shards(llama):
    inventory = inventory_of(llama)
    allocation = varied(inventory)
    config = QuantizationConfig.model_validate_json(render("vllm", exported(inventory, allocation)))
    # vLLM's model has one module where the checkpoint has q, k and v: it must find one group, by every shard.
    for number in range(12):
        for fused, shards in LLAMA_FUSED.items():
            parent = f"model.layers.{number}.{'self_attn' if fused == 'qkv_proj' else 'mlp'}"
            module = torch.nn.Linear(1, 1)
            groups = [
                group
                for group in config.config_groups.values()
                if is_match(f"{parent}.{fused}", module, group.targets, fused=LLAMA_FUSED)
            ]
            wanted = Scheme.parse(allocation[f"{parent}.{shards[0]}"])
            assert len(groups) == wanted.quantizes_weights
            assert is_match(f"{parent}.{fused}", module, config.ignore, fused=LLAMA_FUSED) != wanted.quantizes_weights
            for group in groups:
                assert_chosen(group, wanted)


def test_vllm_names_berts_attention_as_vllm_builds_it(bert):
    inventory = inventory_of(bert, "embedding")
    config = json.loads(render("vllm", exported(inventory, varied(inventory, ("w4a16g64",)))))
    (group,) = config["config_groups"].values()
    shards = [f"encoder.layer.0.attention.output.{name}" for name in ("query", "key", "value")]
    assert set(shards) <= set(group["targets"])
    assert "pooler.dense" in config["ignore"]


def test_vllm_names_roberta_as_bert():
    layer = Layer("roberta.encoder.layer.0.attention.self.query", "linear", 64, 64)
    rest = [dataclasses.replace(layer, name=layer.name.replace("query", name)) for name in ("key", "value")]
    inventory = Inventory("0", "RobertaForSequenceClassification", "sequence-classification", 12288, (layer, *rest))
    config = json.loads(render("vllm", exported(inventory, varied(inventory, ("w8a16",)))))
    assert "bert.encoder.layer.0.attention.output.query" in config["config_groups"]["w8a16"]["targets"]


def test_vllm_says_the_format_of_every_group(llama):
    inventory = inventory_of(llama)
    mixed = json.loads(render("vllm", exported(inventory, varied(inventory))))
    assert mixed["format"] == "mixed-precision"
    assert {name: group["format"] for name, group in mixed["config_groups"].items()} == {
        "w3a8": "pack-quantized",
        "w4a16g64": "pack-quantized",
        "w6a16g32asym": "pack-quantized",
        "w8a16": "pack-quantized",
        "w8a8": "int-quantized",
    }
    alike = json.loads(render("vllm", exported(inventory, varied(inventory, ("w4a16g64", "w6a16g64")))))
    assert alike["format"] == "pack-quantized"


def moe_inventory():
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=4,
    )
    model = MixtralForCausalLM(config)
    experts = [
        Layer(name, "experts", parameter.shape[0] * parameter.shape[1], parameter.shape[2])
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3
    ]
    inventory = inventory_of(model)
    return dataclasses.replace(inventory, layers=(*inventory.layers, *experts))


def test_vllm_finds_the_experts_under_its_own_names():
    inventory = moe_inventory()
    config = QuantizationConfig.model_validate_json(
        render("vllm", exported(inventory, varied(inventory, ("w4a16g32", "w6a16g32", "w5a16g32"))))
    )
    module = torch.nn.Linear(1, 1)
    for projection in ("w1", "w2", "w3"):
        name = f"model.layers.0.block_sparse_moe.experts.0.{projection}"
        groups = [key for key, group in config.config_groups.items() if is_match(name, module, group.targets)]
        assert groups == ["w5a16g32"]
    assert not any(
        is_match("model.layers.10.block_sparse_moe.experts.0.w1", module, group.targets)
        for group in config.config_groups.values()
    )


def refusal(inventory, allocation):
    with pytest.raises(ExportRefused) as caught:
        render("vllm", exported(inventory, allocation))
    return caught.value


def test_vllm_refuses_mixed_schemes_in_a_fused_set(llama):
    inventory = inventory_of(llama)
    allocation = varied(inventory, ("w4a16g64",))
    error = refusal(inventory, allocation | {"model.layers.1.self_attn.k_proj": "w6a16g64"})
    assert "q_proj" in error.detail
    assert error.field == "model.layers.1.self_attn.q_proj+k_proj+v_proj"
    assert error.accepted == "w6a16g64"
    without = {name: scheme for name, scheme in allocation.items() if name != "model.layers.0.mlp.up_proj"}
    assert "gate_proj" in refusal(inventory, without).detail


@pytest.mark.parametrize(
    ("scheme", "nearest"),
    [
        ("w4a8", "w4a16"),
        ("w6a6", "w6a8"),
        ("w4a4", "w4a16"),
        ("w8a8g64", "w8a8"),
        ("w8a8asym", "w8a8"),
        ("w4a16g256", "w4a16g64"),
    ],
)
def test_vllm_refuses_what_it_would_not_run_as_measured(llama, scheme, nearest):
    inventory = inventory_of(llama)
    error = refusal(inventory, varied(inventory, ("w4a16g64",)) | {"model.layers.0.self_attn.o_proj": scheme})
    assert error.field == "model.layers.0.self_attn.o_proj"
    assert error.accepted == nearest
    assert error.status == 422


@pytest.mark.parametrize(
    "layer",
    [
        Layer("embeddings.word_embeddings", "embedding", 96, 64),
        Layer("stem.convolution", "conv", 64, 64),
        Layer("lm_head", "linear", 96, 64),
        Layer("pooler.dense", "linear", 64, 64),
        Layer("classifier.out_proj", "linear", 64, 64),
        Layer("model.layers.0.mlp.shared_expert_gate", "linear", 1, 64),
        Layer("linear", "linear", 64, 64),
    ],
    ids=lambda layer: layer.name,
)
def test_vllm_refuses_layers_it_keeps_at_full_precision(layer):
    inventory = Inventory("0", "SomeModel", "causal-lm", layer.weights, (layer,))
    error = refusal(inventory, {layer.name: "w8a16"})
    assert error.field == layer.name
    assert error.accepted == "w16a16"


def test_vllm_refuses_sizes_that_do_not_pack():
    layer = Layer("model.layers.0.mlp.down_proj", "linear", 63, 48)
    inventory = Inventory("0", "SomeModel", "causal-lm", layer.weights, (layer,))
    assert refusal(inventory, {layer.name: "w5a16g16"}).accepted == "w6a16g16"
    assert refusal(inventory, {layer.name: "w4a16g16asym"}).accepted == "w4a16g16"


def test_vllm_refuses_experts_per_channel_and_unknown_experts():
    inventory = moe_inventory()
    allocation = varied(inventory, ("w4a16",))
    assert refusal(inventory, allocation).accepted == "w4a16g64"
    unknown = dataclasses.replace(inventory, architecture="NovelForCausalLM")
    assert "MixtralForCausalLM" in refusal(unknown, varied(inventory, ("w4a16g32",))).accepted


@pytest.mark.parametrize(
    ("architecture", "task"),
    [("ViTForImageClassification", "image-classification"), ("GPT2LMHeadModel", "causal-lm")],
)
def test_vllm_refuses_models_it_cannot_serve(architecture, task):
    layer = Layer("blocks.0.dense", "linear", 64, 64)
    assert refusal(Inventory("0", architecture, task, 4096, (layer,)), {layer.name: "w8a16"}).value == architecture


def test_vllm_refuses_a_point_that_quantizes_nothing(llama):
    inventory = inventory_of(llama)
    assert "nothing" in refusal(inventory, varied(inventory, ("w16a16",))).detail


def test_native_round_trip(llama):
    inventory = inventory_of(llama)
    allocation = varied(inventory)
    text = render("json", exported(inventory, allocation))
    read = read_native(text)
    assert {name: str(scheme) for name, scheme in read.schemes.items()} == allocation
    assert [layer.name for layer in read.layers] == [
        layer.name for layer in inventory.layers if layer.name in allocation
    ]
    assert set(read.full_precision) == {"model.embed_tokens", "lm_head"}
    assert (read.model.digest, read.target, read.quantizer) == (inventory.digest, "vllm", "mse")
    assert read.costs == {"avg_bits": 5.25, "size_bytes": 1000.0}
    assert read.metrics["loss"] == 0.25
    assert read.model_dump_json(by_alias=True, indent=2) + "\n" == text


def test_native_names_the_parts_of_a_layer(llama):
    name = "model.layers.3.mlp.down_proj"
    allocation = {f"{name}[0:48]": "w4a16g64", f"{name}[48:64]": "w8a16"}
    read = read_native(render("json", exported(inventory_of(llama), allocation)))
    assert {name: str(scheme) for name, scheme in read.schemes.items()} == allocation
    assert [(layer.name, layer.rows, layer.columns) for layer in read.layers] == [
        (f"{name}[0:48]", 48, 128),
        (f"{name}[48:64]", 16, 128),
    ]
    assert name not in read.full_precision
    assert "model.layers.3.mlp.up_proj" in read.full_precision


def test_layers_whose_parts_agree_are_whole_in_every_format(llama):
    inventory = inventory_of(llama)
    allocation = varied(inventory, ("w4a16g32", "w8a16"))
    halves = {
        layer.part(range(start, start + layer.rows // 2)).name: allocation[layer.name]
        for layer in inventory.layers
        if layer.name in allocation
        for start in (0, layer.rows // 2)
    }
    for name in ("json", "vllm"):
        assert render(name, exported(inventory, halves)) == render(name, exported(inventory, allocation))


@pytest.mark.parametrize("name", sorted(set(EXPORTS) - {"json"}))
def test_no_other_format_takes_parts_of_layers(llama, name):
    part = "model.layers.3.mlp.down_proj[0:48]"
    with pytest.raises(ExportRefused, match="several schemes") as caught:
        render(name, exported(inventory_of(llama), {part: "w4a16g64"}))
    assert (caught.value.field, caught.value.value, caught.value.accepted) == (part, "w4a16g64", "the formats json")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": 2}, "version"),
        ({"schema": "other"}, "schema"),
        ({"costs": {"avg_bits": "many"}}, "costs.avg_bits"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_native_refuses_other_documents(llama, change, field):
    inventory = inventory_of(llama)
    document = json.loads(render("json", exported(inventory, varied(inventory)))) | change
    with pytest.raises(InvalidRequest) as caught:
        read_native(json.dumps(document))
    assert caught.value.field == field


def test_native_refuses_a_layer_that_contradicts_its_scheme(llama):
    inventory = inventory_of(llama)
    document = json.loads(render("json", exported(inventory, varied(inventory))))
    document["layers"][0]["weight_bits"] = 7
    with pytest.raises(InvalidRequest, match="contradict"):
        read_native(json.dumps(document))


def test_unknown_format_lists_the_known():
    with pytest.raises(InvalidRequest) as caught:
        render("onnx", exported(Inventory("0", "Any", "causal-lm", 0, ()), {}))
    assert caught.value.accepted == sorted(EXPORTS)
