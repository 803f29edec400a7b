"""torchao: an `FqnToConfig`, as the JSON that `config_to_dict` makes and as the Python that builds it.

Checked against torchao 0.18. Linear layers and embeddings are named in full; a name that is not in the configuration is
left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from search.exports import Exported, export
from search.exports.refusing import all_schemes, check_quantized, check_schemes
from search.inventory import Layer
from search.scheme import FULL_PRECISION, Scheme

CARRIES = (
    "Linear layers of 2 to 8 bits with 16- or 8-bit activations and embeddings of 2 to 8 bits, one scheme a layer. "
    "8-bit activations get a zero point, except those of w8a8, which are as measured."
)
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "embedding": "AutoModel",
    "image-classification": "AutoModelForImageClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
}


@export(
    "torchao",
    filename="torchao_config.json",
    description="torchao's `FqnToConfig`, as `config_from_dict` reads it and `TorchAoConfig` of Transformers takes it",
    carries=CARRIES,
    use='python -c "import json, transformers; from torchao.core.config import config_from_dict; '
    "config = transformers.TorchAoConfig(config_from_dict(json.load(open('{file}')))); "
    "name = transformers.AutoConfig.from_pretrained('{source}').architectures[0]; "
    "model = getattr(transformers, name).from_pretrained('{source}', quantization_config=config); "
    "model.save_pretrained('{model}-torchao')\"",
)
def write_torchao(exported: Exported) -> str:
    """The candidate as `config_to_dict` would write it. Raises ExportRefused where torchao would quantize otherwise."""
    layers = {name: _config(scheme) for name, scheme in _named(exported)}
    return json.dumps(_object("FqnToConfig", 1, fqn_to_config=layers), indent=2) + "\n"


@export(
    "torchao-code",
    filename="quantize_with_torchao.py",
    description="A Python file that builds torchao's `FqnToConfig` and calls `quantize_`",
    carries=CARRIES,
    use="python {file} {source} {model}-torchao.pt",
    media_type="text/x-python",
)
def write_torchao_code(exported: Exported) -> str:
    """The candidate as a program and a module: `CONFIG`, and a command that writes the quantized state dict."""
    layers = "".join(f"    {json.dumps(name)}: {_expression(scheme)},\n" for name, scheme in _named(exported))
    return _CODE.format(layers=layers, auto=AUTO[exported.inventory.task])


_CODE = '''\
"""Quantize a model with torchao (0.18 or later) as a point of a Bitfrontier search says: MODEL STATE_DICT_FILE."""

import sys
from collections import OrderedDict

import torch
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.quant_primitives import MappingType


def weights(bits, group=None, mapping=MappingType.SYMMETRIC):
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{{bits}}"),
        granularity=PerGroup(group) if group else PerAxis(0),
        mapping_type=mapping,
    )


def weights_and_inputs(bits, group=None, mapping=MappingType.SYMMETRIC):
    if (bits, group, mapping) == (8, None, MappingType.SYMMETRIC):
        return Int8DynamicActivationInt8WeightConfig()
    return Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{{bits}}"),
        weight_granularity=PerGroup(group) if group else PerAxis(0),
        weight_mapping_type=mapping,
    )


LAYERS = {{
{layers}}}
CONFIG = FqnToConfig(OrderedDict(LAYERS))

if __name__ == "__main__":
    from transformers import {auto}

    model = {auto}.from_pretrained(sys.argv[1])
    quantize_(model, CONFIG, filter_fn=None)
    torch.save(model.state_dict(), sys.argv[2])
'''


def _named(exported: Exported) -> Iterator[tuple[str, Scheme]]:
    """Every linear layer, and every other that is quantized, by each of its names."""
    check_schemes(exported, _problem)
    check_quantized(exported, "torchao")
    schemes = all_schemes(exported)
    for layer in exported.inventory.layers:
        if layer.kind == "linear" or schemes[layer.name] != FULL_PRECISION:
            for name in (layer.name, *layer.aliases):
                yield name, schemes[layer.name]


def _problem(layer: Layer, scheme: Scheme) -> str | None:
    if scheme == FULL_PRECISION:
        return None
    if layer.kind in ("conv", "experts"):
        return f"torchao has no such groups for {'convolutions' if layer.kind == 'conv' else 'fused experts'}"
    if layer.kind == "embedding" and scheme.quantizes_activations:
        return "an embedding has no activations to quantize"
    if not scheme.quantizes_weights:
        return "torchao quantizes no activations without weights"
    if scheme.activation_bits not in (8, 16):
        return f"torchao has no configuration for {scheme.activation_bits}-bit activations"
    if not scheme.fits(layer.columns):
        return f"the group size does not divide its {layer.columns} columns"
    return None


def _expression(scheme: Scheme) -> str:
    if scheme == FULL_PRECISION:
        return "None"
    function = "weights_and_inputs" if scheme.quantizes_activations else "weights"
    group = f", {scheme.group_size}" if scheme.group_size else ""
    mapping = "" if scheme.symmetric else ", mapping=MappingType.ASYMMETRIC"
    return f"{function}({scheme.weight_bits}{group}{mapping})"


def _config(scheme: Scheme) -> dict[str, Any] | None:
    if scheme == FULL_PRECISION:
        return None
    if scheme == Scheme(8, 8):
        return _object("Int8DynamicActivationInt8WeightConfig", 2)
    dtype = {"_type": "torch.dtype", "_data": f"int{scheme.weight_bits}"}
    granularity = (
        _object("PerGroup", 1, group_size=scheme.group_size) if scheme.group_size else _object("PerAxis", 1, axis=0)
    )
    mapping = {"_type": "MappingType", "_data": "SYMMETRIC" if scheme.symmetric else "ASYMMETRIC"}
    if scheme.quantizes_activations:
        return _object(
            "Int8DynamicActivationIntxWeightConfig",
            2,
            weight_dtype=dtype,
            weight_granularity=granularity,
            weight_mapping_type=mapping,
        )
    return _object("IntxWeightOnlyConfig", 2, weight_dtype=dtype, granularity=granularity, mapping_type=mapping)


def _object(kind: str, version: int, **fields: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": fields}
