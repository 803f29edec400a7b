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
    whether all experts of a layer must agree. `refuses(layer)` and `refuses_scheme(scheme)` give the reason, or None.
    """

    name: str
    description: str
    fused: tuple[tuple[str, ...], ...]
    ties_experts: bool
    refuses: Callable[[Layer], str | None]
    refuses_scheme: Callable[[Scheme], str | None]


# The names under which model families keep what runtimes merge: Llama-like and BERT-like attention, ViT, gated MLPs.
FUSED_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def _vllm_refuses(layer: Layer) -> str | None:
    if layer.kind in ("embedding", "conv"):
        return f"vLLM keeps {layer.kind} layers at full precision"
    if layer.name.split(".")[-1] in ("lm_head", "classifier", "score", "pooler") or "pooler" in layer.name:
        return "vLLM keeps output heads and poolers at full precision"
    return None


def _vllm_refuses_scheme(scheme: Scheme) -> str | None:
    if not scheme.quantizes_weights:
        return None
    if not scheme.quantizes_activations:
        if not scheme.symmetric and scheme.weight_bits not in (4, 8):
            return "vLLM loads asymmetric weights at 4 and 8 bits only"
        return None
    if scheme == Scheme(8, 8):
        return None
    return "vLLM multiplies quantized activations only as w8a8 with one scale per output channel"


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
