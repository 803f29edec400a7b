"""llm-compressor: a recipe that quantizes a model into the checkpoint that the `vllm` format describes."""

from __future__ import annotations

from typing import Any

import yaml

from search.exports import Exported, export
from search.exports.vllm import group, grouped

OBSERVERS = {"rtn": "memoryless_minmax", "mse": "memoryless_mse"}
"""Quantizer → what llm-compressor calls its way to choose a weight's scales."""


@export(
    "llm-compressor",
    filename="recipe.yaml",
    description="A recipe for llm-compressor's `oneshot`, which writes a compressed-tensors checkpoint for vLLM",
    carries="What the format 'vllm' carries: integer weights of 2 to 8 bits with 16-bit activations, and those that "
    "vLLM multiplies with 8-bit ones; one scheme for what vLLM fuses.",
    use="python -c \"from llmcompressor import oneshot; oneshot(model='{source}', recipe='{file}', "
    "output_dir='{model}-quantized')\"",
    media_type="application/yaml",
)
def write_llm_compressor(exported: Exported) -> str:
    """The candidate as a recipe with one `QuantizationModifier`, which needs no data.

    Raises ExportRefused where vLLM could not load the checkpoint.
    """
    groups, ignored = grouped(exported)
    modifier = {
        "ignore": ignored,
        "config_groups": {
            str(scheme): _observed(group(scheme, names), exported.quantizer) for scheme, names in groups.items()
        },
    }
    recipe = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": modifier}}}
    return yaml.safe_dump(recipe, sort_keys=False, width=1000)


def _observed(config: dict[str, Any], quantizer: str) -> dict[str, Any]:
    return config | {"weights": config["weights"] | {"observer": OBSERVERS[quantizer]}}
