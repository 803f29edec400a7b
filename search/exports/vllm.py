"""vLLM: the `quantization_config` of config.json, in compressed-tensors' terms, or the reason why it would not load.

Checked against the sources of vLLM 0.33: a layer is looked up by its exact name under vLLM's own module tree; of a
fused layer every shard's name must match, and the first one's scheme serves the whole.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from search.errors import ExportRefused
from search.exports import Exported, export
from search.inventory import Inventory, Layer
from search.scheme import ACTIVATION_BITS, FULL_PRECISION, GROUP_SIZES, WEIGHT_BITS, Scheme
from search.space import tie
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

# Fused experts are looked up as `<block>.experts.<number>.<projection>`, under these names.
_W = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
_PROJ = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
EXPERTS = {
    "MixtralForCausalLM": ("block_sparse_moe", _W),
    "MiniMaxM2ForCausalLM": ("mlp", _W),
    "Qwen2MoeForCausalLM": ("mlp", _PROJ),
    "Qwen3MoeForCausalLM": ("mlp", _PROJ),
    "OlmoeForCausalLM": ("mlp", _PROJ),
}


@export(
    "vllm",
    filename="quantization_config.json",
    description="The `quantization_config` of config.json that vLLM reads for a compressed-tensors checkpoint",
)
def write_vllm(exported: Exported) -> str:
    """The candidate as a compressed-tensors quantization config: one group per scheme, layers by their full names.

    Raises ExportRefused where vLLM could not load it or would silently load something else.
    """
    inventory, taken = exported.inventory, exported.schemes
    schemes = {layer.name: taken.get(layer.name, FULL_PRECISION) for layer in inventory.layers}
    _refuse_model(inventory)
    for layer in inventory.layers:
        _refuse_layer(layer, schemes[layer.name])
    _refuse_mixed(inventory, schemes)

    groups: dict[Scheme, list[str]] = {}
    ignored: list[str] = []
    for layer in inventory.layers:
        if schemes[layer.name] != FULL_PRECISION:
            groups.setdefault(schemes[layer.name], []).extend(_names(layer, inventory))
        elif layer.kind in ("linear", "experts"):
            ignored.extend(_names(layer, inventory))
        else:
            ignored.extend(layer.aliases)
    if not groups:
        raise ExportRefused(
            "every layer of this point keeps full precision: there is nothing for vLLM to dequantize",
            accepted="a point that quantizes at least one layer, or the model as it is",
        )
    formats = {_format(scheme) for scheme in groups}
    document = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": {str(scheme): _group(scheme, groups[scheme]) for scheme in sorted(groups)},
    }
    return json.dumps(document, indent=2) + "\n"


def _refuse_model(inventory: Inventory) -> None:
    reason = None
    if inventory.task == "image-classification":
        reason = "vLLM does not serve image classification models"
    elif inventory.architecture.startswith("GPT2"):
        reason = "GPT-2 keeps its weights in transposed Conv1D modules, which compressed-tensors does not quantize"
    if reason:
        raise ExportRefused(reason, value=inventory.architecture, accepted="the export format 'json'")


def _refuse_layer(layer: Layer, scheme: Scheme) -> None:
    if scheme == FULL_PRECISION:
        return
    reason = TARGET.refuses(layer)
    if reason:
        raise ExportRefused(
            f"{layer.name} takes {scheme}, but {reason}", field=layer.name, value=str(scheme), accepted="w16a16"
        )
    reason = _problem(layer, scheme)
    if reason:
        nearest = _nearest(layer, scheme)
        raise ExportRefused(
            f"{layer.name} takes {scheme}, but {reason}; the nearest that loads is {nearest}",
            field=layer.name,
            value=str(scheme),
            accepted=str(nearest),
        )


def _problem(layer: Layer, scheme: Scheme) -> str | None:
    """Why vLLM cannot load `layer` at `scheme`."""
    if scheme == FULL_PRECISION:
        return None
    if not scheme.fits(layer.columns):
        return f"the group size does not divide its {layer.columns} columns"
    if layer.columns * scheme.weight_bits % WORD_BITS:
        return f"vLLM's kernels read rows of whole {WORD_BITS}-bit words"
    if not scheme.symmetric and layer.rows * scheme.weight_bits % WORD_BITS:
        return f"zero points are packed along the {layer.rows} rows into whole {WORD_BITS}-bit words"
    if layer.kind == "experts" and (scheme.quantizes_activations or scheme.group_size is None):
        return "vLLM's mixed-precision kernels for experts take grouped weights and 16-bit activations"
    return TARGET.refuses_scheme(scheme)


def _nearest(layer: Layer, wanted: Scheme) -> Scheme:
    """The loadable scheme closest to `wanted`: in weight bits first, then activation bits, grouping and symmetry."""

    per_channel = 2 * max(GROUP_SIZES)

    def distance(scheme: Scheme) -> tuple[int, ...]:
        return (
            abs(scheme.weight_bits - wanted.weight_bits),
            abs(scheme.activation_bits - wanted.activation_bits),
            abs((scheme.group_size or per_channel) - (wanted.group_size or per_channel)),
            scheme.symmetric != wanted.symmetric,
            -scheme.weight_bits,
        )

    grid = itertools.product(WEIGHT_BITS, ACTIVATION_BITS, (*GROUP_SIZES, None), (True, False))
    choices = [Scheme(*choice) for choice in grid if choice[0] < FULL_PRECISION.weight_bits]
    loadable = [scheme for scheme in choices if _problem(layer, scheme) is None]
    return min(loadable, key=distance, default=FULL_PRECISION)


def _refuse_mixed(inventory: Inventory, schemes: dict[str, Scheme]) -> None:
    for unit in tie(list(inventory.layers), TARGET):
        taken = {layer.name: str(schemes[layer.name]) for layer in unit.layers}
        if len(set(taken.values())) > 1:
            widest = max((schemes[name] for name in taken), key=lambda scheme: (scheme.weight_bits, str(scheme)))
            raise ExportRefused(
                f"vLLM fuses {', '.join(taken)} into one layer, which takes one scheme, but this point gives "
                f"{', '.join(sorted(set(taken.values())))}; search with target 'vllm' to tie them",
                field=unit.name,
                value=taken,
                accepted=str(widest),
            )


def _names(layer: Layer, inventory: Inventory) -> list[str]:
    """What vLLM and compressed-tensors look `layer` up by: full names, or a pattern over the experts of a layer."""
    if layer.kind == "experts":
        return [_expert_pattern(layer, inventory)]
    names = [layer.name, *layer.aliases]
    for pattern, replacement in RENAMED:
        names += [match.expand(replacement) for name in names if (match := pattern.fullmatch(name))]
    return list(dict.fromkeys(names))


def _expert_pattern(layer: Layer, inventory: Inventory) -> str:
    path, _, fused = layer.name.rpartition(".experts.")
    block, projections = EXPERTS.get(inventory.architecture, ("", {}))
    if fused not in projections:
        raise ExportRefused(
            f"the names under which vLLM looks up the experts {layer.name} of {inventory.architecture} are not known",
            field=layer.name,
            value=inventory.architecture,
            accepted=sorted(EXPERTS),
        )
    parent = re.escape(f"{path.rpartition('.')[0]}.{block}.experts")
    return rf"re:{parent}\.\d+\.({'|'.join(projections[fused])})$"


def _format(scheme: Scheme) -> str:
    # vLLM's INT8 × INT8 path reads plain int8 weights; everything else is packed into 32-bit words.
    return "int-quantized" if scheme == Scheme(8, 8) else "pack-quantized"


def _group(scheme: Scheme, names: list[str]) -> dict[str, Any]:
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
        "format": _format(scheme),
    }
