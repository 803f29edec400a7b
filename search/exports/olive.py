"""Olive: a workflow whose round-to-nearest pass has an override for every layer, for ONNX Runtime's MatMulNBits.

Checked against Olive 0.13 and ONNX Runtime 1.31. The pass takes any width in an override without looking at it, and
gives q, k and v of a block the widest scheme among them without a word: both are refused here.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from search.errors import ExportRefused
from search.exports import Exported, export
from search.exports.refusing import all_schemes, check_fused, check_generates, check_quantized, check_schemes, nearest
from search.inventory import Layer
from search.scheme import FULL_PRECISION, Scheme
from search.space import tie
from search.targets import find_target

TARGET = find_target("onnxruntime")
HEAD, EMBEDDING = "lm_head", "model.embed_tokens"
"""Every other linear layer is quantized, whether it is named or not."""


@export(
    "olive",
    filename="olive.json",
    description="A workflow for Olive, whose `Rtn` pass quantizes a language model for ONNX Runtime",
    carries="Grouped weights of 2, 4 and 8 bits with 16-bit activations, of every linear layer of a language model, "
    "and of its embedding and head or not; one scheme for q, k and v.",
    use="olive run --config {file} --model_name_or_path {source} --output_path {model}-olive",
)
def write_olive(exported: Exported) -> str:
    """The candidate as a run configuration: the commonest scheme for all, `overrides` for the other layers.

    Raises ExportRefused where Olive would quantize otherwise.
    """
    inventory, schemes = exported.inventory, all_schemes(exported)
    check_generates(exported, "Olive's pass")
    check_schemes(exported, _problem)
    check_quantized(exported, "Olive")
    named = {name: schemes[layer.name] for layer in inventory.layers for name in (layer.name, *layer.aliases)}
    taken = {name: scheme for name, scheme in named.items() if scheme != FULL_PRECISION}
    units = {layer.name: unit.layers for unit in tie(list(inventory.layers), TARGET) for layer in unit.layers}
    for layer in inventory.layers:
        if layer.kind == "linear" and layer.name not in taken and layer.name != HEAD:
            fused = units[layer.name]
            others = [taken[one.name] for one in fused if one.name in taken]
            widest = max(others, key=lambda scheme: (scheme.weight_bits, str(scheme)), default=Scheme(8))
            closest = nearest(fused, widest, _problem)
            raise ExportRefused(
                f"{layer.name} keeps full precision, but Olive's pass quantizes every linear layer beside the head",
                field=layer.name,
                value=str(FULL_PRECISION),
                accepted="the export format 'json'" if closest == FULL_PRECISION else str(closest),
            )
    check_fused(exported, TARGET, "Olive", _problem)
    common = Counter(taken.values()).most_common(1)[0][0]
    settings = _settings(common)
    quantize = {
        "type": "Rtn",
        "bits": settings["bits"],
        "group_size": settings["group_size"],
        "sym": settings["symmetric"],
        "lm_head": HEAD in taken,
        "embeds": EMBEDDING in taken,
        "overrides": {name: _settings(scheme) for name, scheme in taken.items() if scheme != common},
    }
    document = {
        "input_model": {"type": "HfModel", "model_path": exported.model},
        "passes": {"quantize": quantize},
    }
    return json.dumps(document, indent=2) + "\n"


def _problem(layer: Layer, scheme: Scheme) -> str | None:
    if not scheme.fits(layer.columns):
        return f"the group size does not divide its {layer.columns} columns"
    return TARGET.refuses(layer) or TARGET.refuses_scheme(scheme) or TARGET.refuses_at(layer, scheme)


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {"bits": scheme.weight_bits, "group_size": scheme.group_size, "symmetric": scheme.symmetric}
