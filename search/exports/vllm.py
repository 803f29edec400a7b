"""vLLM: the `quantization_config` of config.json, in compressed-tensors' terms, or the reason why it would not load.

Checked against the sources of vLLM 0.33: a layer is looked up by its exact name under vLLM's own module tree; of a
fused layer every shard's name must match, and the first one's scheme serves the whole.
"""

from __future__ import annotations

import json
import re
from typing import Any

from search.errors import ExportRefused
from search.exports import Exported, export
from search.exports.refusing import all_schemes, check_fused, check_quantized, check_schemes
from search.inventory import Inventory, Layer
from search.scheme import FULL_PRECISION, Scheme
from search.targets import find_target

TARGET = find_target("vllm")
WORD_BITS = 32

# Where vLLM's module tree differs from the checkpoint's and its name mapping does not bridge it. A pattern that holds
# adds a name and keeps the other, which compressed-tensors itself matches.
RENAMED = (
    # BERT's fused attention is built under the prefix of its sibling `output`.
    (re.compile(r"(.*)\.attention\.self\.(query|key|value)"), r"\1.attention.output.\2"),
    (re.compile(r"roberta\.(.*)"), r"bert.\1"),
    # Backbones saved without a head are put under `model`.
    (re.compile(r"(layers\..*)"), r"model.\1"),
)

# What the tools that write a checkpoint make of fused experts: `<experts>.<number>.<projection>`.
UNFUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

# vLLM looks them up as `<block>.experts.<number>.<projection>`, under these names.
_W = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
EXPERTS = {
    "MixtralForCausalLM": ("block_sparse_moe", _W),
    "MiniMaxM2ForCausalLM": ("mlp", _W),
    "Qwen2MoeForCausalLM": ("mlp", UNFUSED),
    "Qwen3MoeForCausalLM": ("mlp", UNFUSED),
    "OlmoeForCausalLM": ("mlp", UNFUSED),
}


@export(
    "vllm",
    filename="quantization_config.json",
    description="The `quantization_config` of config.json that vLLM reads for a compressed-tensors checkpoint",
    carries="Integer weights of 2 to 8 bits with 16-bit activations, and those that vLLM multiplies with 8-bit ones; "
    "linear layers of language and embedding models, one scheme for what vLLM fuses.",
    use="bitfrontier apply {search} --point {point} --output {model}-quantized && vllm serve {model}-quantized",
)
def write_vllm(exported: Exported) -> str:
    """The candidate as a compressed-tensors quantization config: one group per scheme, layers by their full names.

    Raises ExportRefused where vLLM could not load it or would silently load something else.
    """
    groups, ignored = grouped(exported)
    formats = {_format(scheme) for scheme in groups}
    document = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {
            str(scheme): {**group(scheme, names), "format": _format(scheme)} for scheme, names in groups.items()
        },
    }
    return json.dumps(document, indent=2) + "\n"


def grouped(exported: Exported) -> tuple[dict[Scheme, list[str]], list[str]]:
    """Scheme → the names of the layers that take it, coarsest first, and the names of those to leave alone.

    Raises what `write_vllm` raises.
    """
    inventory, schemes = exported.inventory, all_schemes(exported)
    if inventory.task == "image-classification":
        raise ExportRefused(
            "vLLM does not serve image classification models",
            value=inventory.architecture,
            accepted="the export format 'json'",
        )
    check_schemes(exported, _problem)
    check_fused(exported, TARGET, "vLLM", _problem)
    check_quantized(exported, "vLLM")

    groups: dict[Scheme, list[str]] = {}
    ignored: list[str] = []
    for layer in inventory.layers:
        if schemes[layer.name] != FULL_PRECISION:
            groups.setdefault(schemes[layer.name], []).extend(_names(layer, inventory))
        elif layer.kind in ("linear", "experts"):
            ignored.extend(_names(layer, inventory))
        else:
            ignored.extend(layer.aliases)
    return {scheme: groups[scheme] for scheme in sorted(groups)}, ignored


def _problem(layer: Layer, scheme: Scheme) -> str | None:
    refused = TARGET.refuses(layer)
    if refused:
        return refused
    if not scheme.fits(layer.columns):
        return f"the group size does not divide its {layer.columns} columns"
    if layer.columns * scheme.weight_bits % WORD_BITS:
        return f"vLLM's kernels read rows of whole {WORD_BITS}-bit words"
    if not scheme.symmetric and layer.rows * scheme.weight_bits % WORD_BITS:
        return f"zero points are packed along the {layer.rows} rows into whole {WORD_BITS}-bit words"
    if layer.kind == "experts" and (scheme.quantizes_activations or scheme.group_size is None):
        return "vLLM's mixed-precision kernels for experts take grouped weights and 16-bit activations"
    return TARGET.refuses_scheme(scheme)


def _names(layer: Layer, inventory: Inventory) -> list[str]:
    """What vLLM and compressed-tensors look `layer` up by: full names, or patterns over the experts of a layer."""
    if layer.kind == "experts":
        return list(dict.fromkeys(_expert_patterns(layer, inventory)))
    names = [layer.name, *layer.aliases]
    for pattern, replacement in RENAMED:
        names += [match.expand(replacement) for name in names if (match := pattern.fullmatch(name))]
    return list(dict.fromkeys(names))


def expert_path(layer: Layer, inventory: Inventory) -> str:
    """Under which name vLLM keeps the experts that `layer` is one projection of.

    Raises ExportRefused for models where that is not known.
    """
    path, _, fused = layer.name.rpartition(".experts.")
    block, projections = EXPERTS.get(inventory.architecture, ("", {}))
    if fused not in projections:
        raise ExportRefused(
            f"the names under which vLLM looks up the experts {layer.name} of {inventory.architecture} are not known",
            field=layer.name,
            value=inventory.architecture,
            accepted=sorted(EXPERTS),
        )
    return f"{path.rpartition('.')[0]}.{block}.experts"


def _expert_patterns(layer: Layer, inventory: Inventory) -> list[str]:
    path, projection = expert_path(layer, inventory), layer.name.rpartition(".")[2]
    served, unfused = EXPERTS[inventory.architecture][1][projection], UNFUSED[projection]
    return [_numbered(path, served), _numbered(layer.name.rpartition(".")[0], unfused)]


def _numbered(path: str, projections: tuple[str, ...]) -> str:
    return rf"re:{re.escape(path)}\.\d+\.({'|'.join(projections)})$"


def _format(scheme: Scheme) -> str:
    # vLLM's INT8 × INT8 path reads plain int8 weights; everything else is packed into 32-bit words.
    return "int-quantized" if scheme == Scheme(8, 8) else "pack-quantized"


def group(scheme: Scheme, names: list[str]) -> dict[str, Any]:
    """One of compressed-tensors' `config_groups`."""
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    activations = {
        "num_bits": scheme.activation_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return {
        "targets": names,
        "weights": weights,
        "input_activations": activations if scheme.quantizes_activations else None,
    }
