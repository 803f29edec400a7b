"""What a checkpoint on disk holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from search.exports import Exported
from search.exports.refusing import all_schemes
from search.scheme import FULL_PRECISION, Scheme


def quantization_config(folder: Path) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint's config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return config


def shapes(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensor name → its type, as safetensors writes it, and its shape."""
    from safetensors import safe_open

    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            # The file is no mapping.
            for name in tensors.keys():  # noqa: SIM118
                view = tensors.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
    return found


def compressed_schemes(config: dict[str, Any], exported: Exported) -> dict[str, Scheme]:
    """What compressed-tensors' own matching makes of a checkpoint's configuration: linear layer → its scheme."""
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match

    parsed = QuantizationConfig.model_validate(config)
    module = torch.nn.Linear(1, 1)
    found = {}
    for layer in exported.inventory.layers:
        if layer.kind != "linear":
            continue
        groups = [
            group
            for group in parsed.config_groups.values()
            if is_match(layer.name, module, group.targets, parsed.ignore)
        ]
        assert len(groups) <= 1, f"{layer.name} is in {len(groups)} groups"
        found[layer.name] = scheme_of(groups[0]) if groups else FULL_PRECISION
    return found


def scheme_of(group: Any) -> Scheme:
    """The scheme that a `QuantizationScheme` of compressed-tensors stands for."""
    if group is None or group.weights is None:
        return FULL_PRECISION
    weights, inputs = group.weights, group.input_activations
    assert (weights.type, weights.strategy) == ("int", "group" if weights.group_size else "channel")
    if inputs is not None:
        assert (inputs.type, inputs.dynamic, inputs.symmetric, inputs.strategy) == ("int", True, True, "token")
    return Scheme(weights.num_bits, inputs.num_bits if inputs else 16, weights.group_size or None, weights.symmetric)


def assert_packed(folder: Path, exported: Exported) -> None:
    """The tensors have the types and shapes of compressed-tensors ≥ 0.18: codes densely packed along the columns, zero
    points along the rows, plain int8 for w8a8, and nothing of a layer that keeps full precision."""
    found = shapes(folder)
    schemes = all_schemes(exported)
    for layer in exported.inventory.layers:
        scheme = schemes[layer.name]
        tensors = {
            name.removeprefix(f"{layer.name}."): view
            for name, view in found.items()
            if name.startswith(f"{layer.name}.")
        }
        if layer.kind != "linear" or scheme == FULL_PRECISION:
            assert tensors.keys() == {"weight"}, layer.name
            continue
        groups = layer.columns // (scheme.group_size or layer.columns)
        assert tensors["weight_scale"][1] == (layer.rows, groups), layer.name
        if scheme == Scheme(8, 8):
            assert tensors["weight"] == ("I8", (layer.rows, layer.columns)), layer.name
            continue
        packed = layer.columns * scheme.weight_bits // 32
        assert tensors["weight_packed"] == ("I32", (layer.rows, packed)), layer.name
        assert ("weight_zero_point" in tensors) != scheme.symmetric, layer.name
        if not scheme.symmetric:
            assert tensors["weight_zero_point"] == ("I32", (layer.rows * scheme.weight_bits // 32, groups)), layer.name


def assert_stored(folder: Path, exported: Exported) -> dict[str, Any]:
    """Every linear layer of a compressed-tensors checkpoint has its scheme, by its configuration and its tensors; what
    the log says of it."""
    config, schemes = quantization_config(folder), all_schemes(exported)
    applied = compressed_schemes(config, exported)
    assert applied == {name: schemes[name] for name in applied}
    assert_packed(folder, exported)
    return {"layers": len(applied), "schemes": len(set(applied.values())), "format": config["format"]}


def relative_error(folder: Path, original: Path) -> float:
    """How far the logits of a checkpoint, as Transformers loads it, are from those of the model it was made from."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)(tokens).logits
        small = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    return float((small - whole).norm() / whole.norm())
