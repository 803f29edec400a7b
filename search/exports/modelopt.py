"""NVIDIA ModelOpt: a recipe whose `quant_cfg` list `mtq.quantize` takes, and `hf_quant_config.json` of what
TensorRT-LLM runs.

Checked against ModelOpt 0.47. Later entries of the list override earlier ones; their names are globs over the full name
of a quantizer, so that a layer's own name is enough. `block_sizes` needs whole numbers as keys, which JSON has not.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from search.exports import Exported, export
from search.exports.refusing import all_schemes, check_fused, check_quantized, check_schemes
from search.inventory import Layer
from search.scheme import FULL_PRECISION, Scheme
from search.targets import find_target

TENSORRT_GROUPS = (64, 128)
"""Group sizes of TensorRT-LLM's 4-bit kernels."""


@export(
    "modelopt",
    filename="modelopt_recipe.yaml",
    description="A recipe for ModelOpt: the `quant_cfg` list that `mtq.quantize` takes",
    carries="Symmetric weights of 2 to 8 bits of linear layers and embeddings, linear layers also with 4-, 6- or 8-bit "
    "activations, and convolutions per channel. ModelOpt simulates widths that no runtime of it has; it rounds without "
    "searching for clips.",
    use='python -c "import transformers, modelopt.torch.quantization as mtq; from modelopt.recipe import load_recipe; '
    "name = transformers.AutoConfig.from_pretrained('{source}').architectures[0]; "
    "model = getattr(transformers, name).from_pretrained('{source}'); "
    "mtq.quantize(model, load_recipe('{file}').quantize); "
    'mtq.print_quant_summary(model)"',
    media_type="application/yaml",
)
def write_modelopt(exported: Exported) -> str:
    """The candidate as a PTQ recipe: everything disabled, then an entry for every quantizer that is not.

    Raises ExportRefused where ModelOpt would quantize otherwise.
    """
    check_schemes(exported, _problem)
    check_quantized(exported, "ModelOpt")
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name, scheme in _quantized(exported):
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": _weight(scheme)})
        if scheme.quantizes_activations:
            entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": _tokens(scheme)})
    recipe = {
        "metadata": {"recipe_type": "ptq", "description": f"{exported.model}: {exported.candidate.label}"},
        "quantize": {"algorithm": "max", "quant_cfg": entries},
    }
    return yaml.safe_dump(recipe, sort_keys=False, width=1000)


@export(
    "modelopt-hf",
    filename="hf_quant_config.json",
    description="What TensorRT-LLM reads beside the weights that ModelOpt exports",
    carries="What TensorRT-LLM runs of integer formats: symmetric w4a16 in groups of 64 or 128 and w8a16 per channel, "
    "linear layers only, one scheme for what it fuses.",
    use="cp {file} {model}-modelopt/ && trtllm-serve {model}-modelopt",
)
def write_modelopt_hf(exported: Exported) -> str:
    """The candidate as `hf_quant_config.json`, as ModelOpt's export writes it for a model quantized by the recipe.

    Raises ExportRefused where TensorRT-LLM has no such format.
    """
    check_schemes(exported, _hf_problem)
    check_quantized(exported, "ModelOpt")
    check_fused(exported, find_target("vllm"), "TensorRT-LLM", _hf_problem)
    layers = {name: _algorithm(scheme) for name, scheme in _quantized(exported)}
    first = next(iter(layers.values()))
    if all(algorithm == first for algorithm in layers.values()):
        names = {name for layer in exported.inventory.layers for name in (layer.name, *layer.aliases)}
        chosen = {**first, "kv_cache_quant_algo": None, "exclude_modules": sorted(names - layers.keys())}
    else:
        chosen = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": layers}
    document = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": chosen}
    return json.dumps(document, indent=2) + "\n"


def _quantized(exported: Exported) -> list[tuple[str, Scheme]]:
    schemes = all_schemes(exported)
    return [
        (name, schemes[layer.name])
        for layer in exported.inventory.layers
        if schemes[layer.name] != FULL_PRECISION
        for name in (layer.name, *layer.aliases)
    ]


def _problem(layer: Layer, scheme: Scheme) -> str | None:
    if layer.kind == "experts":
        return "ModelOpt quantizes the experts of some architectures only"
    if not scheme.symmetric:
        return "ModelOpt's integer quantizers are symmetric"
    if layer.kind == "conv" and scheme.group_size is not None:
        return "ModelOpt groups a convolution's weights along one side of its kernel"
    if layer.kind != "linear" and scheme.quantizes_activations:
        return "ModelOpt has one scale for each token of linear layers only"
    if not scheme.fits(layer.columns):
        return f"the group size does not divide its {layer.columns} columns"
    return None


def _hf_problem(layer: Layer, scheme: Scheme) -> str | None:
    if layer.kind != "linear":
        return "TensorRT-LLM quantizes linear layers only"
    if scheme.quantizes_activations:
        return "ModelOpt's INT8 format has one scale for all tokens, and this point was measured with one for each"
    if scheme.weight_bits not in (4, 8):
        return f"TensorRT-LLM has no {scheme.weight_bits}-bit integer format"
    if scheme.weight_bits == 8 and scheme.group_size is not None:
        return "TensorRT-LLM has 8-bit weights per channel only"
    if scheme.weight_bits == 4 and scheme.group_size not in TENSORRT_GROUPS:
        return f"TensorRT-LLM has 4-bit weights in groups of {' and '.join(map(str, TENSORRT_GROUPS))} only"
    return _problem(layer, scheme)


def _weight(scheme: Scheme) -> dict[str, Any]:
    if scheme.group_size is None:
        return {"num_bits": scheme.weight_bits, "axis": 0}
    return {"num_bits": scheme.weight_bits, "block_sizes": {-1: scheme.group_size}}


def _tokens(scheme: Scheme) -> dict[str, Any]:
    # A block without a size is the whole dimension: one scale for each token.
    return {"num_bits": scheme.activation_bits, "type": "dynamic", "block_sizes": {-1: None}}


def _algorithm(scheme: Scheme) -> dict[str, Any]:
    if scheme.weight_bits == 8:
        return {"quant_algo": "W8A16"}
    # ModelOpt calls every 4-bit integer format by AWQ's name; its export writes the scales that AWQ would have.
    return {
        "quant_algo": "W4A16_AWQ",
        "group_size": scheme.group_size,
        "has_zero_point": False,
        "pre_quant_scale": True,
    }
