"""Points to apply, and what compressed-tensors itself makes of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import match_name
from safetensors.torch import load_file
from torch import Tensor

from search.candidate import Candidate
from search.exports import Exported
from search.inventory import Inventory
from search.measurement import metrics
from search.request import Calibration
from search.scheme import Scheme
from search.space import tie
from search.targets import find_target
from workers.apply import Asked
from workers.evaluator import Evaluator, EvaluatorSpec
from workers.settings import Dtype

SMALL = Calibration(samples=4, sequence_length=24)
VLLM = find_target("vllm")


def dealt(inventory: Inventory, schemes: Sequence[str]) -> dict[str, str]:
    """Schemes dealt out to the units that vLLM can quantize, in turn."""
    units = tie([layer for layer in inventory.layers if VLLM.refuses(layer) is None], VLLM)
    return {layer.name: schemes[i % len(schemes)] for i, unit in enumerate(units) for layer in unit.layers}


def size_bytes(inventory: Inventory, allocation: dict[str, str]) -> float:
    """As the search counts it."""
    schemes = {text: Scheme.parse(text) for text in allocation.values()}
    quantized = [layer for layer in inventory.layers if layer.name in allocation]
    stored = sum(schemes[allocation[layer.name]].storage_bits(layer.rows, layer.columns) for layer in quantized)
    return stored / 8 + 2 * (inventory.parameters - sum(layer.weights for layer in quantized))


def measured_point(
    source: Path | str, schemes: Sequence[str], quantizer: str = "mse", dtype: Dtype = "float32"
) -> tuple[Asked, Evaluator]:
    """A point of a model that takes `schemes` in turn, as a search would have measured it; and what measured it."""
    spec = EvaluatorSpec(str(source), SMALL, quantizer, dtype=dtype)
    evaluator = Evaluator.build(spec)
    inventory = evaluator.inventory
    allocation = dealt(inventory, schemes)
    parsed = {name: Scheme.parse(text) for name, text in allocation.items()}
    told = evaluator.measure(parsed)
    point = Candidate(3, "ilp", "3 bits", allocation, {}, {"size_bytes": size_bytes(inventory, allocation)}, told)
    evaluator.apply({})
    found = Exported("a-model", inventory, "vllm", quantizer, point)
    return Asked(found, spec.source, measured_with=(spec, evaluator.data.digest)), evaluator


def loss(evaluator: Evaluator, model: torch.nn.Module) -> float:
    """Of another model, against the evaluator's full precision."""
    found = []
    with torch.no_grad():
        for index, batch in enumerate(evaluator.batches("held_out")):
            reference = evaluator.reference("held_out", index)
            original, evaluator.loaded.model = evaluator.loaded.model, model
            output = evaluator.loaded(batch)
            evaluator.loaded.model = original
            found.append(evaluator.losses(batch, output, reference))
    return metrics({"loss": torch.cat(found).double().tolist()})["loss"]


def decompressed(folder: Path) -> dict[str, Tensor]:
    """Module → its weight, of all that a checkpoint has quantized, as compressed-tensors reads it in float32."""
    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    found = {}
    for name in tensors:
        module, _, part = name.rpartition(".")
        if part != "weight_scale":
            continue
        (scheme,) = (
            group for group in config.config_groups.values() if any(match_name(module, one) for one in group.targets)
        )
        state = {key.removeprefix(f"{module}."): one for key, one in tensors.items() if key.startswith(f"{module}.w")}
        # A code times a float16 scale is exact in float32.
        state["weight_scale"] = state["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        found[module] = compressor.decompress(state, scheme)["weight"]
    return found
