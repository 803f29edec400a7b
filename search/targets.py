"""Targets: the runtime that will load the result decides which layers must agree and which schemes it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from search.errors import InvalidRequest
from search.inventory import Layer
from search.scheme import Scheme


@dataclass(frozen=True, slots=True)
class Target:
    """What a runtime fuses, skips and accepts.

    `fused` lists sets of sibling names under one parent that the runtime merges into one matrix; `ties_experts` says
    whether all experts of a layer must agree, `splits_layers` whether output channels of one layer may differ.
    `refuses(layer)` and `refuses_scheme(scheme)` give the reason, or None.
    """

    name: str
    description: str
    fused: tuple[tuple[str, ...], ...]
    ties_experts: bool
    refuses: Callable[[Layer], str | None]
    refuses_scheme: Callable[[Scheme], str | None]
    splits_layers: bool = False


# The names under which model families keep what runtimes merge: Llama-like, BERT-like and DistilBERT's attention,
# DeepSeek's latent attention, gated MLPs.
FUSED_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)

# vLLM builds most of these without a quantization config, whatever the checkpoint says.
_VLLM_HEADS = {"lm_head", "embed_out", "classifier", "pre_classifier", "score", "pooler", "cls", "mlm_head"}
_VLLM_ROUTERS = {"gate", "router", "shared_expert_gate"}


def _vllm_refuses(layer: Layer) -> str | None:
    parts = layer.name.split(".")
    if layer.kind == "conv":
        return "vLLM does not quantize convolutions"
    if layer.kind == "embedding":
        return "vLLM loads a quantized embedding in some models only"
    if _VLLM_HEADS.intersection(parts):
        return "vLLM loads quantized heads and poolers in some models only"
    if parts[-1] in _VLLM_ROUTERS:
        return "vLLM keeps routers at full precision"
    if len(parts) == 1:
        return "vLLM takes a name without a dot for a kind of layer"
    return None


def _vllm_refuses_scheme(scheme: Scheme) -> str | None:
    # Weight-only: 2 to 8 bits, symmetric or not, per channel or grouped, all have a kernel.
    if not scheme.quantizes_activations:
        return None
    if scheme.activation_bits != 8:
        return (
            f"vLLM has no kernel for {scheme.activation_bits}-bit activations that it would not replace by a wider one"
        )
    if scheme.group_size is not None:
        return "vLLM multiplies grouped weights with 16-bit activations, whatever the checkpoint says"
    if scheme.weight_bits == 4:
        return "vLLM multiplies 4-bit weights with 16-bit activations on most devices"
    if scheme.weight_bits == 8 and not scheme.symmetric:
        return "vLLM's INT8 kernels take symmetric weights only"
    return None


TARGETS = {
    target.name: target
    for target in (
        Target(
            "generic",
            "No particular runtime: every layer is its own unit and every scheme is allowed",
            fused=(),
            ties_experts=False,
            refuses=lambda layer: None,
            refuses_scheme=lambda scheme: None,
            splits_layers=True,
        ),
        Target(
            "vllm",
            "vLLM through compressed-tensors: q/k/v, gate/up and the experts of a layer share a scheme",
            fused=FUSED_SIBLINGS,
            ties_experts=True,
            refuses=_vllm_refuses,
            refuses_scheme=_vllm_refuses_scheme,
        ),
    )
}


def find_target(name: str) -> Target:
    """The target called `name`. Raises InvalidRequest, which lists the known ones."""
    if name not in TARGETS:
        raise InvalidRequest(f"'{name}' is not a target", field="target", value=name, accepted=sorted(TARGETS))
    return TARGETS[name]
