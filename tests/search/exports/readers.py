"""What a tool makes of our file, by the lookup rules of the tool: format → reader of (document, layer).

A reader gives the scheme of a layer, None for one that the tool leaves alone, and fails where two rules contend. The
real tools confirm the same of single files in tests/peers/.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import yaml

from search.exports.native import read_native
from search.inventory import Layer
from search.scheme import Scheme

Reader = Callable[[str, Layer], Scheme | None]

EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def modules(layer: Layer) -> list[str]:
    """The names of the modules that a layer is, where a tool takes fused experts apart: some of many experts."""
    path, _, projection = layer.name.rpartition(".")
    if layer.kind != "experts":
        return [layer.name]
    return [f"{path}.{number}.{name}" for number in (0, 1, 11) for name in EXPERTS[projection]]


def compressed_tensors(config: dict[str, Any], layer: Layer) -> Scheme | None:
    """A target is a full name, or the beginning of one as a regular expression; what is ignored takes nothing."""
    found = set()
    for name in modules(layer):

        def matches(target: str, name: str = name) -> bool:
            return bool(re.match(target[3:], name)) if target.startswith("re:") else target == name

        groups = [group for group in config["config_groups"].values() if any(map(matches, group["targets"]))]
        ignored = any(map(matches, config["ignore"]))
        assert len(groups) + ignored <= 1, f"{name} is ignored, or in several groups"
        found.add(_compressed_scheme(groups[0]) if groups else None)
    (scheme,) = found
    return scheme


def _compressed_scheme(group: dict[str, Any]) -> Scheme:
    weights, inputs = group["weights"], group["input_activations"]
    return Scheme(
        weights["num_bits"], inputs["num_bits"] if inputs else 16, weights["group_size"], weights["symmetric"]
    )


def _vllm(text: str, layer: Layer) -> Scheme | None:
    return compressed_tensors(json.loads(text), layer)


def _llm_compressor(text: str, layer: Layer) -> Scheme | None:
    (modifier,) = yaml.safe_load(text)["quant_stage"]["quant_modifiers"].values()
    return compressed_tensors(modifier, layer)


def _gptqmodel(text: str, layer: Layer) -> Scheme | None:
    """Rules that exclude go first; the first whose pattern matches the beginning of a name wins; else the config's."""
    config = json.loads(text)
    rules = sorted(config["dynamic"].items(), key=lambda rule: not rule[0].startswith("-:"))
    found = set()
    for name in modules(layer):
        sign, rule = next(((p[0], s) for p, s in rules if re.match(p[2:], name)), ("+", {}))
        found.add(None if sign == "-" else _gptq_scheme(config | rule))
    (scheme,) = found
    return scheme


def _autoround(text: str, layer: Layer) -> Scheme | None:
    """A key that is a name stands for it, any other is searched for in all names; else W4A16 in groups of 128."""
    config = json.loads(text)
    if layer.block is None:
        assert not any(re.search(key, layer.name) for key in config)
        return None
    settings = config.get(layer.name, {"bits": 4, "group_size": 128, "sym": True})
    return None if settings["bits"] == 16 else _gptq_scheme(settings)


def _gptq_scheme(settings: dict[str, Any]) -> Scheme:
    size = settings["group_size"]
    return Scheme(settings["bits"], 16, None if size == -1 else size, settings["sym"])


def _torchao(text: str, layer: Layer) -> Scheme | None:
    """A full name stands for its layer; one that is missing, or has null, is left alone."""
    config = json.loads(text)["_data"]["fqn_to_config"].get(layer.name)
    if config is None:
        return None
    kind, data = config["_type"], config["_data"]
    if kind == "Int8DynamicActivationInt8WeightConfig":
        return Scheme(8, 8)
    weight = "" if kind == "IntxWeightOnlyConfig" else "weight_"
    granularity = data[f"{weight}granularity"]
    return Scheme(
        int(data["weight_dtype"]["_data"].removeprefix("int")),
        8 if weight else 16,
        granularity["_data"].get("group_size"),
        data[f"{weight}mapping_type"]["_data"] == "SYMMETRIC",
    )


def _modelopt(text: str, layer: Layer) -> Scheme | None:
    """Every rule whose wildcard matches a quantizer applies to it, the later over the earlier."""
    found: dict[str, dict[str, Any]] = {}
    for rule in yaml.safe_load(text)["quantize"]["quant_cfg"]:
        for which in ("weight", "input"):
            if fnmatchcase(f"{layer.name}.{which}_quantizer", rule["quantizer_name"]):
                found[which] = rule.get("cfg", {}) if rule.get("enable", True) else {}
    if not found["weight"]:
        return None
    bits = found["input"].get("num_bits", 16)
    return Scheme(found["weight"]["num_bits"], bits, found["weight"].get("block_sizes", {}).get(-1))


def _csv(text: str, layer: Layer) -> Scheme | None:
    (row,) = [row for row in csv.DictReader(io.StringIO(text, newline="")) if row["name"] == layer.name]
    return Scheme.parse(row["scheme"])


def _json(text: str, layer: Layer) -> Scheme | None:
    return read_native(text).schemes.get(layer.name)


READERS: dict[str, Reader] = {
    "json": _json,
    "csv": _csv,
    "vllm": _vllm,
    "llm-compressor": _llm_compressor,
    "gptqmodel": _gptqmodel,
    "autoround": _autoround,
    "torchao": _torchao,
    "modelopt": _modelopt,
}
