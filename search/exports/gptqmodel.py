"""GPTQModel: a `QuantizeConfig` whose `dynamic` rules give every layer its scheme.

Checked against GPTQModel 7.7. The first rule that matches the beginning of a name wins, and rules that exclude are
moved to the front, so every pattern is the whole of one name (or of the experts of one layer). A layer inside a block
that no rule names would take the configuration's own scheme: all are named.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from search.exports import Exported, export
from search.exports.refusing import all_schemes, check_generates, check_quantized, check_schemes
from search.exports.vllm import UNFUSED, expert_path
from search.inventory import Layer
from search.scheme import FULL_PRECISION, Scheme
from search.space import tie
from search.targets import find_target

VLLM = find_target("vllm")
HEAD = "lm_head"
PLANAR_BITS = (5, 6, 7)
"""Widths that exist in the layout GPTQ_P only; one such layer makes the whole checkpoint GPTQ_P."""
BLOCK = 32
"""Both dimensions of a planar weight are multiples of this."""

# What vLLM calls a fused set. Up to 0.33 it looks rules up by this name alone, later by those of the shards too.
FUSED_NAMES = {
    "q_proj": "qkv_proj",
    "query": "qkv_proj",
    "q_lin": "qkv_proj",
    "q_a_proj": "fused_qkv_a_proj",
    "gate_proj": "gate_up_proj",
    "w1": "gate_up_proj",
}


@export(
    "gptqmodel",
    filename="quantize_config.json",
    description="GPTQModel's `QuantizeConfig`, with a `dynamic` rule for every layer",
    carries="Weights of 2 to 8 bits with 16-bit activations of the linear layers and experts inside a language model's "
    "blocks, and of its head; 5, 6 or 7 bits make the whole checkpoint GPTQ_P, and vLLM loads 4 and 8 only.",
    use='python -c "import json; from gptqmodel import GPTQModel, QuantizeConfig; '
    "config = QuantizeConfig.from_quant_config(json.load(open('{file}'))); model = GPTQModel.load('{source}', config); "
    "model.quantize(open('calibration.txt').read().splitlines()); model.save('{model}-gptq')\"",
)
def write_gptqmodel(exported: Exported) -> str:
    """The candidate as the `quantize_config.json` that `QuantizeConfig` reads.

    Raises ExportRefused where GPTQModel would not give every layer its scheme.
    """
    schemes = all_schemes(exported)
    check_generates(exported, "GPTQModel")
    planar = any(scheme.weight_bits in PLANAR_BITS for scheme in schemes.values())
    check_schemes(exported, lambda layer, scheme: _problem(layer, scheme, planar=planar))
    check_quantized(exported, "GPTQModel")

    taken = Counter(scheme for scheme in schemes.values() if scheme != FULL_PRECISION)
    rules = dict(_rule(pattern, scheme) for pattern, scheme in [*_own_patterns(exported), *_fused_patterns(exported)])
    excluding = {rule: settings for rule, settings in rules.items() if rule.startswith("-")}
    document = {
        **_settings(max(taken, key=lambda scheme: (taken[scheme], scheme))),
        "desc_act": False,
        "lm_head": schemes.get(HEAD, FULL_PRECISION) != FULL_PRECISION,
        "quant_method": "gptq",
        "checkpoint_format": "gptq_p" if planar else "gptq",
        "dynamic": excluding | rules,
    }
    return json.dumps(document, indent=2) + "\n"


def _problem(layer: Layer, scheme: Scheme, *, planar: bool) -> str | None:
    head = layer.name == HEAD
    if layer.kind not in ("linear", "experts") or layer.aliases:
        return "GPTQModel quantizes neither embeddings nor convolutions nor weights that are shared with them"
    if layer.block is None and not head:
        return "GPTQModel quantizes the layers inside repeated blocks, and lm_head"
    if not head and (reason := VLLM.refuses(layer)):
        return reason
    if scheme.quantizes_activations:
        return "a GPTQ checkpoint does not quantize activations"
    if not scheme.fits(layer.columns):
        return f"the group size does not divide its {layer.columns} columns"
    split = scheme.weight_bits in PLANAR_BITS or (planar and scheme.weight_bits == 3)
    if split and (layer.rows % BLOCK or layer.columns % BLOCK):
        return f"GPTQ_P stores {scheme.weight_bits} bits in blocks of {BLOCK} rows and {BLOCK} columns"
    if layer.columns * scheme.weight_bits % 32 or layer.rows * scheme.weight_bits % 32:
        return "GPTQ packs rows and columns into whole 32-bit words"
    return None


def _rule(pattern: str, scheme: Scheme) -> tuple[str, dict[str, Any]]:
    return (f"-:{pattern}", {}) if scheme == FULL_PRECISION else (f"+:{pattern}", _settings(scheme))


def _settings(scheme: Scheme) -> dict[str, Any]:
    settings = {"bits": scheme.weight_bits, "group_size": scheme.group_size or -1, "sym": scheme.symmetric}
    # GPTQModel sorts columns by groups of them unless it is told not to, and stops where there are none.
    return settings if scheme.group_size else settings | {"act_group_aware": False}


def _own_patterns(exported: Exported) -> Iterator[tuple[str, Scheme]]:
    """What GPTQModel looks up, with its scheme."""
    schemes = all_schemes(exported)
    for layer in exported.inventory.layers:
        if layer.kind == "experts":
            path, _, projection = layer.name.rpartition(".")
            yield rf"^{re.escape(path)}\.\d+\.(?:{'|'.join(UNFUSED[projection])})$", schemes[layer.name]
        elif layer.kind == "linear":
            yield _exactly(layer.name), schemes[layer.name]


def _fused_patterns(exported: Exported) -> Iterator[tuple[str, Scheme]]:
    """What vLLM looks up. A set that differs is excluded: vLLM then stops at quantized weights of a layer that is not
    quantized, where the configuration's own scheme would have been wrong without a word."""
    schemes = all_schemes(exported)
    for unit in tie([layer for layer in exported.inventory.layers if layer.kind in ("linear", "experts")], VLLM):
        found = {schemes[layer.name] for layer in unit.layers}
        scheme = found.pop() if len(found) == 1 else FULL_PRECISION
        parent, _, siblings = unit.name.rpartition(".")
        if unit.layers[0].kind == "experts":
            names = [unit.name, expert_path(unit.layers[0], exported.inventory)]
        elif len(unit.layers) > 1:
            names = [f"{parent}.{FUSED_NAMES[siblings.partition('+')[0]]}"]
        else:
            names = []
        for name in names:
            yield _exactly(name), scheme


def _exactly(name: str) -> str:
    # Both tools recognize a pattern of this form as a plain name and look it up without matching.
    return f"^{re.escape(name)}$"
