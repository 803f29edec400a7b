"""AutoRound: a `layer_config` that gives every layer its scheme.

Checked against AutoRound 0.15 and 0.16. A key that is the full name of a layer stands for it alone; any other is
searched for in all names, so only names of linear layers are written. A layer inside a block that is not named would
take AutoRound's default scheme: all are named.
"""

from __future__ import annotations

import json
from typing import Any

from search.errors import ExportRefused
from search.exports import Exported, export
from search.exports.refusing import all_schemes, check_fused, check_generates, check_quantized, check_schemes
from search.inventory import Layer
from search.scheme import FULL_PRECISION, Scheme
from search.targets import find_target

DIVISOR = 32
"""AutoRound silently keeps weights whose rows or columns are no multiple of this at full precision."""


@export(
    "autoround",
    filename="layer_config.json",
    description="AutoRound's `layer_config`: the scheme of every linear layer by its name",
    carries="Weights of 2 to 8 bits with 16-bit activations of the linear layers inside a language model's blocks. "
    "All widths are stored with `format='llm_compressor'`, which vLLM loads; one scheme for what vLLM fuses.",
    use='python -c "import json; from auto_round import AutoRound; '
    "AutoRound('{source}', layer_config=json.load(open('{file}')))"
    ".quantize_and_save('{model}-quantized', format='llm_compressor')\"",
)
def write_autoround(exported: Exported) -> str:
    """The candidate as the mapping that `AutoRound(…, layer_config=…)` takes.

    Raises ExportRefused where AutoRound would not give every layer its scheme.
    """
    inventory, schemes = exported.inventory, all_schemes(exported)
    check_generates(exported, "AutoRound")
    experts = [layer.name for layer in inventory.layers if layer.kind == "experts"]
    if experts:
        raise ExportRefused(
            "AutoRound reads layer_config before it takes fused experts apart, and would give them its default scheme",
            field=experts[0],
            value=inventory.architecture,
            accepted="a model without fused experts, or the export formats 'llm-compressor' and 'gptqmodel'",
        )
    check_schemes(exported, _problem)
    # AutoRound fuses nothing, but vLLM would take the first shard's scheme for all, without a word.
    check_fused(exported, find_target("vllm"), "vLLM, which loads what AutoRound writes,", _problem)
    check_quantized(exported, "AutoRound")
    config = {
        layer.name: _settings(schemes[layer.name])
        for layer in inventory.layers
        if layer.kind == "linear" and layer.block is not None
    }
    return json.dumps(config, indent=2) + "\n"


def _problem(layer: Layer, scheme: Scheme) -> str | None:
    if layer.kind != "linear":
        return "AutoRound quantizes linear layers only"
    if layer.block is None:
        return "AutoRound quantizes the layers inside repeated blocks, and leaves others at full precision in silence"
    if scheme.quantizes_activations:
        return "AutoRound stores quantized activations for a whole checkpoint, not for a layer"
    if not scheme.fits(layer.columns):
        return f"the group size does not divide its {layer.columns} columns"
    if layer.rows % DIVISOR or layer.columns % DIVISOR:
        return f"AutoRound quantizes no weight of {layer.rows} × {layer.columns}: {DIVISOR} must divide both"
    return None


def _settings(scheme: Scheme) -> dict[str, Any]:
    if scheme == FULL_PRECISION:
        return {"bits": 16, "data_type": "float", "act_bits": 16}
    return {
        "bits": scheme.weight_bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.symmetric,
        "data_type": "int",
        "act_bits": 16,
    }
